"""What the Gluon kernels of the backward share: gathered rows with their scalars, work units, and stores of dK and dV."""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from ..gluon_rows import decode, gather, gather_layout, in_turns, line_layout, offset_of
from .segments import CUT_ROWS

_READ_AGAIN = gl.constexpr(not triton.__version__.startswith(("3.6.", "3.7.")))
"""Triton 3.8 keeps more registers across a kernel's loop, and `dkdv_kernel` would spill what follows from the program's index."""
NARROW_DKDV = gl.constexpr(triton.__version__.startswith(("3.6.", "3.7.")))
"""Whether `dkdv_kernel` counts offsets of the rows that it copies in 32 bits. With Triton 3.8 it would spill."""


@gluon.constexpr_function
def ds_layout(keys: int, rows: int, warps: int) -> gl.DistributedLinearLayout:
    """For stores of dS^T `[keys, 64 rows]` of `in_ds_order`: the products' registers, eight neighbours of a thread in a row."""
    assert (rows, keys) == (64, 16 * warps)
    registers, lanes = [[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    more = [[16 << bit, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, more, [], [keys, rows])


@gluon.jit
def in_ds_order(ds, KEYS: gl.constexpr, ROWS: gl.constexpr):
    """dS^T with its rows in the order in which they are kept: `row_in_ds_order`.

    A thread's scores of one key are then adjacent, sixteen bytes at a time, and no value moves to another thread.
    """
    return ds.reshape([KEYS, 2, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([KEYS, ROWS])


@gluon.jit
def row_in_ds_order(place):
    """Row of an item that is kept at `place`: bits 1 and 2 change places with bits 3 and 4."""
    return (place & ~30) | (place >> 2 & 6) | ((place & 6) << 2)


@gluon.jit
def next_kept(kept, half, ROWS: gl.constexpr, BLOCK: gl.constexpr):
    """Where the next ROWS rows of a bin are kept, and whether they are the second half of a work item, of 2 * ROWS rows."""
    return kept + gl.where(half == 1, BLOCK * 2 * ROWS - ROWS, ROWS), 1 - half


@gluon.jit
def copy_rows(
    q, dout, code, q_s, do_s, cols, q_token, q_head, dout_token, dout_head,
    HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, NARROW: gl.constexpr = True,
):  # fmt: skip
    """Start the copies of one tile of gathered rows of q and dout: those of the entries `code`."""
    gather(q, code, q_s, cols, q_token, q_head, HEAD_BITS, SLOT_BITS, NARROW)
    gather(dout, code, do_s, cols, dout_token, dout_head, HEAD_BITS, SLOT_BITS, NARROW)
    async_copy.commit_group()


@gluon.jit
def copy_block(k, v, k_s, v_s, kv_head, first_key, key, held, cols, k_row, k_head, v_row, v_head):
    """Start the copies of the keys and values `key` of a block; zeros past its end."""
    row = (first_key + key).to(gl.int64)
    inside = (key < held)[:, None] & (cols >= 0)[None, :]
    async_copy.async_copy_global_to_shared(
        k_s, k + (row * k_row + kv_head * k_head)[:, None] + cols[None, :], mask=inside
    )
    async_copy.async_copy_global_to_shared(
        v_s, v + (row * v_row + kv_head * v_head)[:, None] + cols[None, :], mask=inside
    )
    async_copy.commit_group()


@gluon.jit
def load_scalars(
    lse, delta, position, code, valid, held, lse_head, lse_token, delta_head, delta_token,
    HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Log-sum-exp, delta and last visible key of a tile's rows. Infinity, with weight 0, where `valid` is false.

    All loads are masked: without any rows the tensors are empty. Nothing is computed from the loaded values here, since an
    instruction that waits for memory would delay the next product.
    """
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    own = valid & ((code & ((1 << SLOT_BITS) - 1)) == TOPK - 1)
    row_lse = gl.load(lse + offset_of(token, head, lse_token, lse_head, HEAD_BITS), mask=valid, other=float("inf"))
    row_delta = gl.load(delta + offset_of(token, head, delta_token, delta_head, HEAD_BITS), mask=valid, other=0.0)
    return row_lse, row_delta, gl.load(position + token, mask=own, other=held - 1)


@gluon.jit
def start_rows(
    q, dout, lse, delta, position, entry, count, n, held, q_s, do_s, code_s, cols,
    q_token, q_head, dout_token, dout_head, lse_head, lse_token, delta_head, delta_token,
    ROWS: gl.constexpr, D: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr,
    HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Start the copies of the first AHEAD of `n` tiles of rows, of `count` entries, and store the codes of all but the first.

    Returns the first tile's scalars, as `load_scalars`, and each line's code of the tile behind the copied ones. Rows past the
    end repeat the last one with weight 0.
    """
    LINE: gl.constexpr = line_layout(WARPS)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, gather_layout(D, WARPS)))
    line = gl.arange(0, ROWS, layout=LINE)
    last = gl.maximum(count - 1, 0)
    if n > 0:
        for j in gl.static_range(AHEAD):
            at = gl.minimum(j * ROWS + r, last)
            copy_rows(
                q, dout, gl.load(entry + at), q_s.index(j), do_s.index(j), cols, q_token, q_head, dout_token, dout_head,
                HEAD_BITS, SLOT_BITS,
            )  # fmt: skip
    line_code = gl.load(entry + gl.minimum(line, last), mask=line < n * ROWS, other=0)
    row_lse, row_delta, limit = load_scalars(
        lse, delta, position, line_code, line < count, held, lse_head, lse_token, delta_head, delta_token,
        HEAD_BITS, SLOT_BITS, TOPK,
    )  # fmt: skip
    for j in gl.static_range(1, AHEAD):
        code_s.index(j).store(gl.load(entry + gl.minimum(j * ROWS + line, last), mask=line < n * ROWS, other=0))
    line_code = gl.load(entry + gl.minimum(AHEAD * ROWS + line, last), mask=line < n * ROWS, other=0)
    return row_lse, row_delta, limit, line_code


@gluon.jit
def block_of(start, length, bin_, n_blocks, start_head):
    """Kv head, first key and number of keys of a bin's block. No keys where there is nothing to do."""
    safe = gl.maximum(bin_, 0)
    kv_head = (safe // n_blocks).to(gl.int64)
    first_key = gl.load(start + kv_head * start_head + safe % n_blocks)
    held = gl.load(length + safe % n_blocks)
    return kv_head, gl.maximum(first_key, 0), gl.where((bin_ < 0) | (first_key < 0), 0, held)


@gluon.jit
def work_unit(program, n_bins, n_blocks, TILES: gl.constexpr, HEADS: gl.constexpr):
    """Bin or segment of a program, by its index `program`.

    Segments take longest and come first. Then come bins, of HEADS kv heads in turns: with one head, as `segments.work_unit`.
    """
    index = program // TILES
    n_segments = gl.num_programs(0) // TILES - n_bins
    bin_ = index - n_segments
    if HEADS > 1:
        kv_head, block = in_turns(gl.maximum(bin_, 0), n_bins, n_blocks, HEADS)
        bin_ = kv_head * n_blocks + block
    return gl.where(index < n_segments, index + n_bins, bin_)


@gluon.jit
def unit_bounds(unit, pointer, segment_bin, start, length, n_bins, n_blocks, start_head, SEGMENT: gl.constexpr):
    """`(bin, entries of the bin before the unit, first entry, entries, first key, keys)` of a work unit.

    The first key is -1 where there is nothing to do. Bounds of segments are those of `segments.segment_bounds`.
    """
    is_segment = unit >= n_bins
    c = gl.maximum(unit - n_bins, 0)
    bin_ = gl.where(is_segment, gl.load(segment_bin + c, mask=is_segment, other=-1), unit)
    here = bin_ >= 0
    safe = gl.maximum(bin_, 0)
    first = gl.load(pointer + safe)
    last = gl.load(pointer + safe + 1)
    first_key = gl.load(start + (safe // n_blocks).to(gl.int64) * start_head + safe % n_blocks)
    held = gl.load(length + safe % n_blocks)
    first_key = gl.where(here & ((last - first > 2 * SEGMENT) == is_segment), first_key, -1)
    before = gl.where(is_segment & (first // SEGMENT + 1 != c), (c * SEGMENT - first) // CUT_ROWS * CUT_ROWS, 0)
    next_cut = first + ((c + 1) * SEGMENT - first) // CUT_ROWS * CUT_ROWS
    end = gl.where(is_segment & ((c + 1) * SEGMENT < last), next_cut, last)
    return safe, before, first + before, end - first - before, first_key, held


@gluon.jit
def unseen_rows(
    entry, position, count, first_key, ROWS: gl.constexpr, WARPS: gl.constexpr, HEAD_BITS: gl.constexpr,
    SLOT_BITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Entries at the start of a bin's list, in whole tiles, that see no key from `first_key` on.

    Entries ascend by (head, token), so the own rows of the group's first head come first. At most `first_key` of them see
    no such key.
    """
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    index = gl.arange(0, 64 * WARPS, layout=SCAN)
    seeing = gl.full([64 * WARPS], 2147483647, gl.int32, SCAN)
    bound = gl.minimum(first_key, count)
    for j in range(0, bound, 64 * WARPS):
        here = j + index < bound
        code = gl.load(entry + j + index, mask=here, other=0)
        own = here & ((code & ((1 << SLOT_BITS) - 1)) == TOPK - 1)
        row_position = gl.load(position + (code >> (HEAD_BITS + SLOT_BITS)), mask=own, other=2147483647)
        seeing = gl.where(row_position < first_key, seeing, gl.minimum(seeing, j + index))
    return gl.minimum(gl.min(seeing, 0), bound) // ROWS * ROWS


@gluon.jit
def program_again():
    """The program's index; with _READ_AGAIN read by an instruction that the compiler does not merge with an earlier one."""
    if _READ_AGAIN:
        program = gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    else:
        program = gl.program_id(0)
    return program


@gluon.jit
def _unit_again(
    program, segment_bin, start, length, n_bins, n_blocks, start_head, TILES: gl.constexpr, HEADS: gl.constexpr
):
    """`(unit, segment, kv head, first key, keys)` of a program that has something to do."""
    unit = work_unit(program, n_bins, n_blocks, TILES, HEADS)
    c = gl.maximum(unit - n_bins, 0)
    bin_ = gl.where(unit >= n_bins, gl.load(segment_bin + c, mask=unit >= n_bins, other=0), unit)
    first_key = gl.load(start + (bin_ // n_blocks).to(gl.int64) * start_head + bin_ % n_blocks)
    return unit, c, (bin_ // n_blocks).to(gl.int64), first_key, gl.load(length + bin_ % n_blocks)


@gluon.jit
def _store_sums(
    total, target, sums, is_segment, c, first_key, kv_head, tile, held, target_row, target_head,
    D: gl.constexpr, KEYS: gl.constexpr, TILES: gl.constexpr, ACCUMULATE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store or add a tile of dK or dV; a segment's goes to the buffer `sums`."""
    key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    mask = (key < held)[:, None] & (cols < D)[None, :]
    total = gl.convert_layout(total, LAYOUT)
    if is_segment:
        sums_at = sums + (c.to(gl.int64) * TILES * KEYS + key)[:, None] * (2 * D) + cols[None, :]
        gl.store(sums_at, total, mask=mask)
    else:
        at = target + ((first_key + key).to(gl.int64) * target_row + kv_head * target_head)[:, None] + cols[None, :]
        if ACCUMULATE:
            total += gl.load(at, mask=mask, other=0.0).to(gl.float32)
        gl.store(at, total.to(target.dtype.element_ty), mask=mask)


@gluon.jit
def store_dkdv(
    program, dk_sum, dv_sum, scale, dk, dv, sums, segment_bin, start, length, dk_row, dk_head, dv_row, dv_head,
    n_bins, n_blocks, start_head,
    D: gl.constexpr, KEYS: gl.constexpr, TILES: gl.constexpr, ACCUMULATE: gl.constexpr, WARPS: gl.constexpr,
    HEADS: gl.constexpr,
):  # fmt: skip
    """Store the sums of `program`. The work unit is looked up again: values kept from the start would spill."""
    tile = program % TILES
    unit, c, kv_head, first_key, held = _unit_again(
        program, segment_bin, start, length, n_bins, n_blocks, start_head, TILES, HEADS
    )
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [max(128 // D, 1), min(D // 4, 32)], [WARPS, 1], [1, 0])
    _store_sums(
        dk_sum * scale, dk, sums, unit >= n_bins, c, first_key, kv_head, tile, held, dk_row, dk_head,
        D, KEYS, TILES, ACCUMULATE, STORE,
    )  # fmt: skip
    _store_sums(
        dv_sum, dv, sums + D, unit >= n_bins, c, first_key, kv_head, tile, held, dv_row, dv_head,
        D, KEYS, TILES, ACCUMULATE, STORE,
    )  # fmt: skip
