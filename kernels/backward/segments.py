"""Segments of long bins: many programs share the sums into the dK and dV of one block.

Bins of more than two segments are cut at the multiples of `segment_rows` in the entry array, or up to `CUT_ROWS` entries before
them: between two work items of the bin. Each segment's sums go to a buffer, and `sum_segments_kernel` adds them in order, so the
result has the same bits every time. The host bounds the buffer: one slot per multiple, which is at most 1/8 of the bytes of the
bf16 dq partials.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch_kernel
from ..sizes import ITEM_ROWS, cdiv
from ..types import ListShape
from .call import Call, key_strides

SEGMENT_BLOCKS = 32
"""Entries per segment, in block sizes. The buffer takes 4 / SEGMENT_BLOCKS of the bytes of the bf16 dq partials."""
CUT_ROWS = tl.constexpr(ITEM_ROWS)
"""Entries of a bin before a cut are a multiple of this, so that no work item of a large block is cut."""
_SEARCHES = 128
"""Segments that one program of `find_segments_kernel` looks up."""


@triton.jit(do_not_specialize=["n_bins", "n_segments", "rounds"])
def find_segments_kernel(pointer, segment_bin, n_bins, n_segments, rounds, SEGMENT: tl.constexpr, SIZE: tl.constexpr):
    """One program: SIZE segments c; the bin that is cut at entry c * SEGMENT, or -1 where no long bin is.

    One binary search over the bins' offsets serves all of them. Reads 4 * log2(n_bins) bytes per segment, writes 4.
    """
    c = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    cut = c * SEGMENT
    low = tl.zeros([SIZE], tl.int32)
    high = low + n_bins + 1  # low: the first index whose offset is at or past the cut
    for _ in range(rounds):
        middle = (low + high) // 2
        before = (tl.load(pointer + tl.minimum(middle, n_bins)) < cut) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    bin_ = low - 1
    inside = (bin_ >= 0) & (bin_ < n_bins)
    first = tl.load(pointer + bin_, mask=inside, other=0)
    last = tl.load(pointer + bin_ + 1, mask=inside, other=0)
    long = inside & (cut < last) & (last - first > 2 * SEGMENT)
    tl.store(segment_bin + c, tl.where(long, bin_, -1), mask=c < n_segments)


@triton.jit
def work_unit(index, n_units, n_bins):
    """The bin (below `n_bins`) or segment (from `n_bins` on) that comes at `index` in the order of programs.

    Segments take longest, so they come first: none of them is left to run alone at the end.
    """
    n_segments = n_units - n_bins
    return tl.where(index < n_segments, index + n_bins, index - n_segments)


@triton.jit
def segment_bounds(first, last, c, SEGMENT: tl.constexpr):
    """Entries of segment c of a long bin `[first, last)`. Its first segment also takes what precedes the first cut."""
    cut = first + (c * SEGMENT - first) // CUT_ROWS * CUT_ROWS
    next_cut = first + ((c + 1) * SEGMENT - first) // CUT_ROWS * CUT_ROWS
    return tl.where(first // SEGMENT + 1 == c, first, cut), tl.where((c + 1) * SEGMENT < last, next_cut, last)


@triton.jit
def _sum_rows(
    sums, target, target_row, c, last_segment, key, mask, d, first_column,
    KEY_ROWS: tl.constexpr, WIDTH: tl.constexpr, KEYS: tl.constexpr, D_PADDED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Add the segments' rows of dK or of dV, from segment c on, and store the totals."""
    total = tl.zeros([KEYS, D_PADDED], tl.float32)
    at = sums + (c.to(tl.int64) * KEY_ROWS + key)[:, None] * WIDTH + first_column + d[None, :]
    for _ in range(c, last_segment + 1):
        total += tl.load(at, mask=mask, other=0.0)
        at += KEY_ROWS * WIDTH
    at = target + target_row + d[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_blocks", "start_head"])
def sum_segments_kernel(
    sums, segment_bin, pointer, start, length, dk, dv, dk_row, dk_head, dv_row, dv_head, start_head, n_blocks,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, KEYS: tl.constexpr,
    TILES: tl.constexpr, SEGMENT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of KEYS keys of one long bin, the ordered sums over its segments.

    The program of a bin's first segment does the work, the others return. Reads 4 * KEYS * (D + DV) bytes per segment and
    writes KEYS * (D + DV) numbers.
    """
    c = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    bin_ = tl.load(segment_bin + c)
    if bin_ < 0:
        return
    first = tl.load(pointer + bin_)
    last_segment = (tl.load(pointer + bin_ + 1) - 1) // SEGMENT
    kv_head = (bin_ // n_blocks).to(tl.int64)
    first_key = tl.load(start + kv_head * start_head + bin_ % n_blocks)
    held = tl.load(length + bin_ % n_blocks)
    if (first // SEGMENT + 1 != c) | (first_key < 0) | (tile * KEYS >= held):
        return
    d = tl.arange(0, D_PADDED)
    e = tl.arange(0, DV_PADDED)
    key = tile * KEYS + tl.arange(0, KEYS)
    row = (first_key + key).to(tl.int64)[:, None]
    inside = (key < held)[:, None]
    _sum_rows(
        sums, dk, row * dk_row + kv_head * dk_head, c, last_segment, key, inside & (d < D)[None, :], d, 0,
        TILES * KEYS, D + DV, KEYS, D_PADDED, ACCUMULATE,
    )  # fmt: skip
    _sum_rows(
        sums, dv, row * dv_row + kv_head * dv_head, c, last_segment, key, inside & (e < DV)[None, :], e, D,
        TILES * KEYS, D + DV, KEYS, DV_PADDED, ACCUMULATE,
    )  # fmt: skip


def segment_rows(block_size: int) -> int:
    """Entries between two cuts of a long bin."""
    return SEGMENT_BLOCKS * block_size


def segment_count(tokens: int, shape: ListShape) -> int:
    """Slots of the buffer for `tokens` rows; 0 where no bin can be long enough to be cut."""
    step = segment_rows(shape.block_size)
    if tokens * shape.group_size <= 2 * step:
        return 0
    return tokens * shape.kv_heads * shape.group_size * shape.topk // step + 1


def find_segments(pointer: Tensor, n_segments: int, block_size: int) -> Tensor:
    """int32 `[n_segments]`: the long bin cut at entry `c * segment_rows`, or -1 where no long bin is."""
    segment_bin = torch.empty(n_segments, dtype=torch.int32, device=pointer.device)
    n_bins = pointer.numel() - 1
    launch_kernel(find_segments_kernel, (cdiv(n_segments, _SEARCHES),),
        pointer, segment_bin, n_bins, n_segments, (n_bins + 1).bit_length(), SEGMENT=segment_rows(block_size),
        SIZE=_SEARCHES, num_warps=4,
    )  # fmt: skip
    return segment_bin


def sum_segments(call: Call, sums: Tensor, keys: int, tiles: int) -> None:
    """dK and dV of long bins from the sums of their segments; `tiles` tiles of `keys` keys per block."""
    if not call.n_segments:
        return
    part, lists = call.part, call.lists
    launch_kernel(sum_segments_kernel, (call.n_segments * tiles,),
        sums, call.segment_bin, lists.pointer, part.start, part.length, call.dk, call.dv,
        *key_strides(call.dk, call.dv), part.start.stride(0), lists.shape.n_blocks, **call.dims(), KEYS=keys,
        TILES=tiles, SEGMENT=segment_rows(lists.shape.block_size), ACCUMULATE=call.accumulate, num_warps=8,
    )  # fmt: skip
