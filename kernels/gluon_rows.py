"""What the Gluon kernels for Hopper share: gathered rows, layouts, and the rules of ordering.

Gluon leaves ordering to the kernel:

- A tile copied by `cp.async` is read after `wait_group`, `fence_async_shared` and a barrier. The fence is needed because the
  tensor cores read shared memory through another proxy than the one that copies and ordinary stores write it through.
- A stage is overwritten only when every warp has waited for the products that read it, and a barrier has passed since.
- Registers with the left operand of a product in flight stay untouched until the product has been waited for: they are
  passed through the `deps` of the wait.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from .softmax import MOST_INVERSE

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7


@gluon.constexpr_function
def gather_layout(dim: int, warps: int) -> gl.BlockedLayout:
    """Of gathered rows `[rows, dim]`: 16 bytes per thread, neighbouring lanes on one row."""
    return gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(columns: int, warps: int) -> gl.NVMMADistributedLayout:
    """Of a warpgroup's product with `columns` columns; warps split the rows."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def line_layout(warps: int) -> gl.BlockedLayout:
    """Of one number per row of a tile, rows split over warps."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def warp_layout(rows: int, warps: int) -> gl.BlockedLayout:
    """Of one number per row of a tile, all rows in every warp: a reduction needs no other warp."""
    return gl.BlockedLayout([rows // 32], [32], [warps], [0])


@gluon.constexpr_function
def store_layout(rows: int, dim: int, warps: int) -> gl.DistributedLinearLayout:
    """For stores of the product `[rows, dim]` of one or two warpgroups: its layout, with eight adjacent columns per thread.

    The conversion exchanges columns inside a quad of lanes, without a barrier or other warps, and stores are 16 bytes wide.
    """
    columns = [[0, 1 << bit] for bit in range(dim.bit_length() - 1)]
    more_rows = [[16 * warps << bit, 0] for bit in range((rows // (16 * warps)).bit_length() - 1)]
    registers = [*columns[:3], [8, 0], *columns[5:], *more_rows]
    lanes = [*columns[3:5], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16 << bit, 0] for bit in range(warps.bit_length() - 1)], [], [rows, dim]
    )


@gluon.jit
def in_turns(index, units, per_head, HEADS: gl.constexpr):
    """Kv head and unit that come at `index` in the order of programs: units of HEADS heads in turns, then of the next HEADS.

    There are `units` in all, `per_head` of each head. Every (head, unit) comes at one index below `units`.
    """
    first_head = index // (HEADS * per_head) * HEADS
    first = first_head * per_head
    # The last heads may be fewer. Not `units // per_head - first_head`: a loop would keep that quotient in a register.
    heads = gl.minimum(units - first, HEADS * per_head) // per_head
    return first_head + (index - first) % heads, (index - first) // heads


@gluon.jit
def decode(code, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr):
    """Token and head in the group of entries, 32 bits each."""
    return code >> (HEAD_BITS + SLOT_BITS), (code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)


@gluon.jit
def offset_of(token, head, token_stride, head_stride, HEAD_BITS: gl.constexpr):
    """Offset of a row from the first head of its group, in 32 bits without a sign.

    Entries are int32, so all (token, head, slot) of a group are below 2^31. Of units that are not one of these, callers know that
    there are fewer than 2^32. With 64-bit strides an address would take seven instructions, not three: the compiler extends
    strides before a loop, and then no longer sees that 32 bits would do.
    """
    offset = token.to(gl.uint32) * token_stride
    if HEAD_BITS > 0:
        offset += head.to(gl.uint32) * head_stride
    return offset


@gluon.jit
def aligned_offset_of(token, head, token_stride, head_stride, HEAD_BITS: gl.constexpr):
    """The same in 64 bits, for strides that are multiples of 16 and rows less than `sizes.MOST_REACH` elements apart."""
    return offset_of(token, head, token_stride >> 4, head_stride >> 4, HEAD_BITS).to(gl.int64) * 16


@gluon.jit
def normalised(total, norm, SUM: gl.constexpr):
    """Outputs `total`, in the layout SUM, divided by their rows' sums of weights, as `softmax.inverse` divides."""
    return total * gl.convert_layout(gl.minimum(1.0 / norm, MOST_INVERSE), gl.SliceLayout(1, SUM))[:, None]


@gluon.jit
def gather(
    x, code, x_s, cols, x_token, x_head, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, NARROW: gl.constexpr = True
):
    """Start the copy of the rows of the entries `code`; the caller commits it. Without NARROW, strides have 64 bits."""
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    if NARROW:
        at = aligned_offset_of(token, head, x_token, x_head, HEAD_BITS)
    else:
        at = token.to(gl.int64) * x_token
        if HEAD_BITS > 0:
            at += head.to(gl.int64) * x_head
    async_copy.async_copy_global_to_shared(x_s, x + at[:, None] + cols[None, :])
