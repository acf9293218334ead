"""Arithmetic on sizes and strides on the host, where kernels are launched.

`triton.cdiv` and `triton.next_power_of_2` also serve kernels: they unwrap and wrap their arguments, which costs some
microseconds per call on the host, and one forward and backward pass makes about twenty calls. These are for the host only.
"""

from __future__ import annotations

from torch import Tensor

LOG2E = 1.4426950408889634
ITEMS_PER_PROGRAM = 16
"""Work items per program, about, of kernels that request an item's rows while they compute another."""

MOST_ITEMS_PER_PROGRAM = 2 * ITEMS_PER_PROGRAM
"""Most per program: one read of `dq_kernel` covers all of its items, a lane each."""

ROWS_AT_ONCE, GROUPS_AT_ONCE = 32 << 20, 64 << 20
"""Most bytes of q and dout rows that the kv heads taking turns gather: counted with one q head for each kv head, and with all of
them. L2 has 50 MB on Hopper. Beyond the first number, heads without groups were slower; up to the second, groups of four were
faster."""


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; 0 for 0, as in Triton."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def programs_for(n_items: int, resident: int) -> int:
    """Programs that share `n_items` work items, where `resident` programs run at the same time.

    A program requests its next item's rows while it computes, so it should have several items. But multiprocessors that other
    kernels hold for a while must find less to do: hence about `ITEMS_PER_PROGRAM` items each, at most `MOST_ITEMS_PER_PROGRAM`,
    in full waves of programs.
    """
    waves = max(1, n_items // (resident * ITEMS_PER_PROGRAM))
    return min(n_items, waves * resident)


def heads_at_once(kv_heads: int, group_size: int, q_bytes: int) -> int:
    """Kv heads whose programs take turns: a power of two, at most `kv_heads`; 1 where each head's programs follow the last's.

    A head's first blocks have the most rows, so its programs begin with the longest. Head by head, the longest programs of the
    last head start when few others are left. In turns, the longest of several heads come first and only short ones last. But rows
    are read once per selected block, so those of all heads that take turns must stay in L2: with long sequences there is one.
    A power of two, because each number is compiled apart. Forward and backward take the same number.

    Args:
        kv_heads: kv heads being processed.
        group_size: q heads per kv head.
        q_bytes: bytes of one q head's rows of q; those of dout are as many.
    """
    most = min(kv_heads, ROWS_AT_ONCE // max(2 * q_bytes, 1), GROUPS_AT_ONCE // max(2 * q_bytes * group_size, 1))
    return 1 << (most.bit_length() - 1) if most else 1


MOST_UNITS, ROWS_OF_UNITS = 4, 3 << 15
"""Work units of large blocks that take turns where dq is summed: how many at most, and of how many rows together. A row takes
1 KiB of L2: of q, of dout and of its sums."""


def units_at_once(entries: int, n_bins: int) -> int:
    """Work units whose tiles of keys take turns where dq is summed (docs/kernels.md, "Fewer units in turns for long bins").

    The programs of a unit's tiles of keys walk the same rows, one behind the other. The more units take turns, the further apart
    these programs start, and the less they wait for each other. But what lies between the first and the last must stay in L2.

    Args:
        entries, n_bins: of the routing lists: entries at most, and (kv head, block) pairs.
    """
    return max(1, min(MOST_UNITS, ROWS_OF_UNITS * n_bins // max(entries, 1)))


MOST_DIM = 256
"""Largest head size of the kernels."""
LEAST_BLOCK = 16
"""Smallest block of the kernels."""
ITEM_ROWS = 128
"""Most entries per work item of a block of more than 128 keys."""
KEPT_DIM = 128
"""Head size with which keeping gradients of scores pays: with 64 they are as large, and the products that they save are half."""
KEPT_BLOCK = 512
"""Largest block whose gradients of scores are kept. With larger ones sums of dq take less memory."""
SUM_ROWS = 64
"""Rows per tile of sums of dq."""
SUM_TILE_BYTES = SUM_ROWS * KEPT_DIM * 4
"""Of a tile of sums. Up to one more than its rows fill is taken for each (kv head, block)."""
MOST_SUMMED_BLOCKS = 1 << 12
"""Most blocks with which dq is summed: their tiles take 128 MiB per kv head at most. It may not depend on the ranks or on the
workspace, since the bits of dq may not."""
MOST_SUMMED_KEYS = 1 << 17
"""Largest such block: the sums of one program's rows are counted in 32 bits."""


LARGEST_CHOICE = 2 * MOST_SUMMED_KEYS
"""From this block size on, no choice of a kernel or of its tiles depends on it, but for what divides it, and where bins of more
than 2^24 entries are cut."""


def block_size_of_kernels(block_size: int, longest: int) -> int:
    """A block size for which kernels compute the same in the same way, where no block has more than `longest` keys: few programs
    then find no keys of their own. `block_size` itself up to `LARGEST_CHOICE`, and where blocks are that long.
    """
    least = max(longest, LARGEST_CHOICE)
    return min(block_size, least + (block_size - least) % 128)


def can_keep_ds(block_size: int) -> bool:
    """Whether the Hopper kernels can keep the gradients of scores: blocks of several tiles of 128 keys."""
    return 128 < block_size <= KEPT_BLOCK and block_size % 128 == 0


def sums_dq(block_size: int, dim: int, n_blocks: int) -> bool:
    """Whether the Hopper kernels compute dq with dK and dV, as fp32 sums over a block's tiles of 128 keys.

    Args:
        n_blocks: of all documents, so that every rank decides the same.
    """
    return (
        KEPT_BLOCK < block_size <= MOST_SUMMED_KEYS
        and block_size % 128 == 0
        and dim == KEPT_DIM
        and n_blocks <= MOST_SUMMED_BLOCKS
    )


def tiles_of_sums(entries: int, n_bins: int) -> int:
    """Tiles of sums of dq that lists of at most so many entries take: those of each bin are its own."""
    return entries // SUM_ROWS + n_bins


def kept_ds_bytes(*, entries: int, n_blocks: int, block_size: int, dim: int) -> int:
    """Bytes of the gradients of scores of a kv head in 16 bits, and of where its partial dq are; 0 where it does not pay.

    Args:
        entries: of the kv head: (row, slot) pairs.
    """
    if not can_keep_ds(block_size) or dim != KEPT_DIM:
        return 0
    return (cdiv(entries, ITEM_ROWS) + n_blocks) * ITEM_ROWS * block_size * 2 + 4 * entries


def padded(size: int) -> int:
    """The size of a tile dimension of `size` elements: a power of two, at least 16, which tensor cores need."""
    return max(16, next_power_of_2(size))


MOST_REACH = 1 << 36
"""The Hopper kernels count rows of q, dout and partial dq in 32 bits, in units of 16 elements. Inputs with rows so many elements
apart, k and v among them, take the portable kernels."""


def reach(x: Tensor) -> int:
    """Elements from the first row of `[T, H, ...]` to the last."""
    return max(x.shape[0] - 1, 0) * x.stride(0) + max(x.shape[1] - 1, 0) * x.stride(1)


def aligned(x: Tensor) -> bool:
    """Whether `x` starts at a multiple of 16 bytes, and its rows are multiples of 16 elements and less than `MOST_REACH` apart.

    Asynchronous copies move 16 bytes, and the compiler proves their alignment from multiples of 16 elements only.
    """
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0 and reach(x) < MOST_REACH


def head_stride(x: Tensor) -> int:
    """Elements between two heads of `[N, H, D]`; 0 where all kv heads read one head (H = 1, see `KVPart`)."""
    return x.stride(1) if x.shape[1] > 1 else 0
