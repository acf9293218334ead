"""Routing lists: a deterministic counting sort of (q head, token, slot) by (kv head, block), and work items over it.

Three passes, all on the device: each program of `_count_kernel` counts its own piece of the selection by block; one
cumulative sum over [kv head, block, piece] turns the counts into the place where each piece's entries of each block begin;
each program of `_scatter_kernel` puts its entries there, in order. The order inside a bin is that of the selection, (head,
token), whatever the sizes of the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .types import QueryRows

FORWARD_ROWS_SMALL = 2048
"""Most entries of a work item of forward where a program keeps a small block's keys and streams rows past them."""
FORWARD_ROWS_LARGE = 128
"""Most entries of a work item of forward where a program keeps its rows and streams a large block's keys past them."""
BACKWARD_ROWS = 8192
"""Most entries of a work item of backward."""
SMALL_BLOCK = 128
"""Up to this block size forward treats own blocks as ordinary entries."""

COUNTED_BLOCKS = 8192
"""Most blocks whose counts one program holds; beyond, and beyond `COUNTED_TOPK`, torch sorts."""
COUNTED_TOPK = 1024
LEAST_ENTRIES = 1024
"""Fewest entries that a program sorts at once."""
ENTRY_BITS = 31
"""Entries of more bits are int64."""
PROGRAMS = 1024
"""About as many programs of a pass, so that the counts of the pieces stay few."""


@dataclass(frozen=True)
class RoutingLists:
    """CSR by (kv head, block) of the query rows that visit the block, and work items over it.

    Attributes:
        pointer: int32 `[kv_heads * n_blocks + 1]`, bins in (kv head, block) order.
        entry: int32, or int64 where `ENTRY_BITS` are too few, `[q_heads * T * listed slots]`, valid up to `pointer[-1]`:
            `token << (head_bits + slot_bits) | head in the kv head's group << slot_bits | slot`; inside a bin ascending by
            (head, token).
        head_bits, slot_bits: widths of these fields.
        n_blocks, kv_heads, group_size: blocks a head, kv heads at work, q heads a kv head.
        with_own: whether own blocks are listed.
        item_bin, item_start: int32 `[items]`: item i covers the entries
            `[item_start, min(item_start + rows_per_item, pointer[item_bin + 1]))`. Unused items come last, with bin -1.
        rows_per_item: most entries of an item.
        block_size: keys a block, as given to `route`.
    """

    pointer: Tensor
    entry: Tensor
    head_bits: int
    slot_bits: int
    n_blocks: int
    kv_heads: int
    group_size: int
    with_own: bool
    item_bin: Tensor
    item_start: Tensor
    rows_per_item: int
    block_size: int


@triton.jit
def _piece(
    selected_ptr, piece, part, pieces_per_head, parts, kv_head, group, tokens, stride_h, stride_t, stride_s,
    SLOTS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Blocks of part `part` of a piece of a kv head's selection (-1: none), and their (token, head in group, slot).

    A part is as many whole rows of one q head as have at most ENTRIES slots.
    """
    ROWS: tl.constexpr = ENTRIES // SLOTS
    place = tl.arange(0, ENTRIES)
    in_group = piece // pieces_per_head
    row = (piece % pieces_per_head * parts + part) * ROWS
    token = row + place // SLOTS
    slot = place % SLOTS
    base = selected_ptr + (kv_head * group + in_group).to(tl.int64) * stride_h
    inside = (place < ROWS * SLOTS) & (token < tokens)
    block = tl.load(base + token.to(tl.int64) * stride_t + slot * stride_s, mask=inside, other=-1)
    return block, in_group, row


@triton.jit(do_not_specialize=["tokens", "n_blocks", "group", "pieces_per_head", "parts", "stride_h", "stride_t"])
def _count_kernel(
    selected_ptr,
    count_ptr,
    tokens,
    n_blocks,
    group,
    pieces_per_head,
    parts,
    stride_h,
    stride_t,
    stride_s,
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: how often each block occurs in one piece (`parts` parts) of one kv head's selection.

    Reads the piece once; writes one int32 for each block into `count[kv head, block, piece]`.
    """
    piece = tl.program_id(0)
    kv_head = tl.program_id(1)
    total = tl.zeros([BINS], tl.int32)
    for part in range(parts):
        block, _, _ = _piece(
            selected_ptr, piece, part, pieces_per_head, parts, kv_head, group, tokens, stride_h, stride_t, stride_s,
            SLOTS, ENTRIES,
        )  # fmt: skip
        total += tl.histogram(tl.where(block >= 0, block, 0), BINS, mask=block >= 0)
    bin_ = tl.arange(0, BINS)
    place = (kv_head * n_blocks + bin_).to(tl.int64) * tl.num_programs(0) + piece
    tl.store(count_ptr + place, total, mask=bin_ < n_blocks)


@triton.jit(do_not_specialize=["tokens", "n_blocks", "group", "pieces_per_head", "parts", "stride_h", "stride_t"])
def _scatter_kernel(
    selected_ptr,
    end_ptr,
    entry_ptr,
    tokens,
    n_blocks,
    group,
    pieces_per_head,
    parts,
    stride_h,
    stride_t,
    stride_s,
    head_bits,
    slot_bits,
    SLOTS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLACE_BITS: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: the entries of one piece to their places.

    `end` is the cumulative sum of the counts: the number before it is where the piece's entries of a block begin. Reads the
    piece and one number a block; writes each entry once, runs of equal blocks together. A part is sorted by (block, place in
    the part), which is unique, so that every sort is a stable one.
    """
    piece = tl.program_id(0)
    kv_head = tl.program_id(1)
    bin_ = tl.arange(0, BINS)
    before = (kv_head * n_blocks + bin_).to(tl.int64) * tl.num_programs(0) + piece - 1
    begin = tl.load(end_ptr + before, mask=(bin_ < n_blocks) & (before >= 0), other=0)
    place = tl.arange(0, ENTRIES)
    for part in range(parts):
        block, in_group, row = _piece(
            selected_ptr, piece, part, pieces_per_head, parts, kv_head, group, tokens, stride_h, stride_t, stride_s,
            SLOTS, ENTRIES,
        )  # fmt: skip
        count = tl.histogram(tl.where(block >= 0, block, 0), BINS, mask=block >= 0)
        in_order = tl.sort((tl.where(block >= 0, block, BINS) << PLACE_BITS) | place)
        block = in_order >> PLACE_BITS
        listed = block < BINS
        origin = in_order & (ENTRIES - 1)
        # A block's first entry stands after all entries of lesser blocks in the part, and goes to `begin`.
        shift = tl.gather(begin - (tl.cumsum(count, 0) - count), tl.where(listed, block, 0), 0)
        token = (row + origin // SLOTS).to(entry_ptr.dtype.element_ty)
        entry = (token << (head_bits + slot_bits)) | (in_group << slot_bits) | (origin % SLOTS)
        tl.store(entry_ptr + shift + place, entry, mask=listed)
        begin += count


@triton.jit(do_not_specialize=["bins", "pieces", "per_item"])
def _pointer_kernel(end_ptr, pointer_ptr, items_ptr, bins, pieces, per_item, TILE: tl.constexpr):
    """One program: where TILE bins begin, and how many items each has. `end[bin, piece]` as in `_scatter_kernel`."""
    bin_ = tl.program_id(0) * TILE + tl.arange(0, TILE)
    last = bin_.to(tl.int64) * pieces - 1
    begin = tl.load(end_ptr + last, mask=(bin_ <= bins) & (bin_ > 0), other=0)
    end = tl.load(end_ptr + last + pieces, mask=bin_ < bins, other=0)
    tl.store(pointer_ptr + bin_, begin, mask=bin_ <= bins)
    tl.store(items_ptr + bin_, (end - begin + per_item - 1) // per_item, mask=bin_ < bins)


@triton.jit(do_not_specialize=["bins", "items", "per_item"])
def _item_kernel(pointer_ptr, items_end_ptr, item_bin_ptr, item_start_ptr, bins, items, per_item, TILE: tl.constexpr):
    """One program: bin and first entry of TILE items, by binary search in the cumulative number of items of the bins."""
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    low = tl.zeros([TILE], tl.int32)
    high = tl.zeros([TILE], tl.int32) + bins
    width = bins
    while width > 0:
        middle = (low + high) // 2
        passed = (low < high) & (tl.load(items_end_ptr + middle, mask=low < high, other=0) <= item)
        high = tl.where(passed, high, middle)
        low = tl.where(passed, middle + 1, low)
        width = width // 2
    used = low < bins
    before = tl.load(items_end_ptr + low - 1, mask=used & (low > 0), other=0)
    start = tl.load(pointer_ptr + low, mask=used, other=0) + (item - before) * per_item
    tl.store(item_bin_ptr + item, tl.where(used, low, -1), mask=item < items)
    tl.store(item_start_ptr + item, tl.where(used, start, 0), mask=item < items)


def counting_shape(n_blocks: int, slots: int) -> dict[str, int]:
    """Constants of the counting passes: bins a program holds, and entries it sorts at once."""
    bins = max(triton.next_power_of_2(n_blocks), 32)
    # As many entries as bins, so that the sums over the bins stay cheap beside the sort.
    entries = min(max(bins, LEAST_ENTRIES, triton.next_power_of_2(slots)), 4096)
    return {"SLOTS": slots, "ENTRIES": entries, "BINS": bins, "num_warps": 4 if entries <= 1024 else 8}


def _counting_sort(selected: Tensor, n_blocks: int, kv_heads: int, bits: tuple[int, int], entry: Tensor) -> Tensor:
    """Fill `entry`; ends of the bins' pieces, int32 `[kv_heads * n_blocks, pieces]`."""
    q_heads, tokens, slots = selected.shape
    group = q_heads // kv_heads
    shape = counting_shape(n_blocks, slots)
    parts_per_head = triton.cdiv(tokens, shape["ENTRIES"] // slots)
    parts = max(1, min(parts_per_head, parts_per_head * q_heads // PROGRAMS))
    pieces_per_head = triton.cdiv(parts_per_head, parts)
    grid = (pieces_per_head * group, kv_heads)
    sizes = (tokens, n_blocks, group, pieces_per_head, parts, *selected.stride())
    count = torch.empty(kv_heads * n_blocks, grid[0], dtype=torch.int32, device=selected.device)
    _count_kernel[grid](selected, count, *sizes, **shape)
    end = torch.cumsum(count.view(-1), 0, dtype=torch.int32).view_as(count)
    place_bits = shape["ENTRIES"].bit_length() - 1
    _scatter_kernel[grid](selected, end, entry, *sizes, *bits, PLACE_BITS=place_bits, **shape)
    return end


def _torch_sort(selected: Tensor, n_blocks: int, kv_heads: int, bits: tuple[int, int], entry: Tensor) -> Tensor:
    """As `_counting_sort`, one piece a bin, for any number of blocks: one stable sort a kv head."""
    q_heads, tokens, slots = selected.shape
    group = q_heads // kv_heads
    head_bits, slot_bits = bits
    ends = []
    begin = torch.zeros((), dtype=torch.int64, device=selected.device)
    numbers = torch.arange(n_blocks, dtype=torch.int32, device=selected.device)
    capacity = group * tokens * slots
    for kv_head in range(kv_heads):
        block = selected[kv_head * group : (kv_head + 1) * group].reshape(-1)
        block, order = torch.sort(torch.where(block >= 0, block, n_blocks), stable=True)
        end = torch.searchsorted(block, numbers, right=True, out_int32=True)
        token = order // slots % tokens
        value = (token << (head_bits + slot_bits)) | (order // (slots * tokens) << slot_bits) | order % slots
        # All of the kv head's values, unused ones last: the next kv head's overwrite those.
        place = begin + torch.arange(capacity, device=selected.device)
        entry.scatter_(0, place, value.to(entry.dtype))
        ends.append(begin.to(torch.int32) + end)
        begin = begin + end[-1]
    return torch.cat(ends)[:, None]


def _items(end: Tensor, capacity: int, rows_per_item: int) -> tuple[Tensor, Tensor, Tensor]:
    """`pointer`, `item_bin` and `item_start` from the ends of the bins' pieces."""
    bins, pieces = end.shape
    device = end.device
    pointer = torch.empty(bins + 1, dtype=torch.int32, device=device)
    items_of_bin = torch.empty(bins, dtype=torch.int32, device=device)
    tile = 256
    _pointer_kernel[(triton.cdiv(bins + 1, tile),)](end, pointer, items_of_bin, bins, pieces, rows_per_item, TILE=tile)
    items_end = torch.cumsum(items_of_bin, 0, dtype=torch.int32)
    items = capacity // rows_per_item + min(bins, capacity)
    item_bin = torch.empty(items, dtype=torch.int32, device=device)
    item_start = torch.empty(items, dtype=torch.int32, device=device)
    arguments = (pointer, items_end, item_bin, item_start, bins, items, rows_per_item)
    _item_kernel[(triton.cdiv(items, tile),)](*arguments, TILE=tile)
    return pointer, item_bin, item_start


def route(
    selected: Tensor, n_blocks: int, kv_heads: int, rows: QueryRows, block_size: int, *, backward: bool = False
) -> RoutingLists:
    """Routing lists of `selected` for forward or backward block attention.

    Args:
        selected: int32 `[Hq, T, topk]` of `select_blocks`, any strides; the q heads of `kv_heads` kv heads.
        n_blocks: blocks in all.
        kv_heads: kv heads at work.
        rows: where the `T` rows stand. Not needed: own blocks are in the last slot.
        block_size: keys a block.
        backward: own blocks are always listed; else only up to `SMALL_BLOCK`.
    """
    with_own = backward or block_size <= SMALL_BLOCK
    small = FORWARD_ROWS_SMALL if block_size <= SMALL_BLOCK else FORWARD_ROWS_LARGE
    rows_per_item = BACKWARD_ROWS if backward else small
    if not with_own:
        selected = selected[:, :, :-1]
    q_heads, tokens, slots = selected.shape
    group = q_heads // kv_heads
    capacity = selected.numel()
    if capacity >= 1 << 31:
        raise ValueError(f"routing lists hold fewer than 2**31 entries, got {tuple(selected.shape)}; split the heads")
    head_bits, slot_bits = (group - 1).bit_length(), max(slots - 1, 0).bit_length()
    narrow = max(tokens - 1, 0).bit_length() + head_bits + slot_bits <= ENTRY_BITS
    device = selected.device
    entry = torch.empty(capacity, dtype=torch.int32 if narrow else torch.int64, device=device)
    if capacity == 0:
        pointer = torch.zeros(kv_heads * n_blocks + 1, dtype=torch.int32, device=device)
        item_bin, item_start = torch.empty(2, 0, dtype=torch.int32, device=device)
    else:
        sort = _counting_sort if n_blocks <= COUNTED_BLOCKS and slots <= COUNTED_TOPK else _torch_sort
        end = sort(selected, n_blocks, kv_heads, (head_bits, slot_bits), entry)
        pointer, item_bin, item_start = _items(end, capacity, rows_per_item)
    return RoutingLists(
        pointer, entry, head_bits, slot_bits, n_blocks, kv_heads, group, with_own, item_bin, item_start, rows_per_item,
        block_size,
    )  # fmt: skip
