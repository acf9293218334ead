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

from . import configs
from .sizes import cdiv, next_power_of_2

ITEM_ROWS_SMALL = 2048
"""Most entries of a work item where a program keeps a small block's keys and streams rows past them."""
ITEM_ROWS_LARGE = 128
"""Most entries of a work item where a program keeps its rows and streams a large block's keys past them."""
REGISTER_BINS = 512
"""Most blocks whose counts one program keeps in registers."""
ENTRIES, WARPS = 512, 1
"""Entries that a program sorts at once, and its warps: within a warp nothing waits for a barrier."""
COUNT_ENTRIES, COUNT_WARPS = 2048, 4
"""Entries that a program counts at once, and its warps."""
FEW_BLOCKS, FEW_TOKENS, FEW_WARPS = 64, 32, 4
"""Up to so many blocks a program keeps a place for each in registers and sorts nothing; its tokens at once, and its warps."""
FEW_SLOTS = 32
"""Most slots a row for that."""
ITEM_KERNEL_BINS, ITEM_KERNEL_ITEMS = 32, 32
"""Bins a program makes the items of, and items of each that it writes at once."""
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
        item_bin, item_start, item_end: int32 `[items]`: item i covers the entries `[item_start, item_end)` of the bin, in
            order of bins; -1 is the bin of an unused item.
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
    item_bin: Tensor
    item_start: Tensor
    item_end: Tensor
    rows_per_item: int
    block_size: int


@triton.jit
def _token_and_slot(row, place, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """What stands at `place` of a part that begins at row `row`: rows are WIDTH slots, CHUNKS of them a token."""
    row = row + place // WIDTH
    return row // CHUNKS, row % CHUNKS * WIDTH + place % WIDTH


@triton.jit
def _part(
    head_ptr, row, end, tokens, stride_t, stride_s,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Blocks (-1: none) of a part of one q head's selection: of the rows from `row`, but before `end`, that have room."""
    place = tl.arange(0, ENTRIES)
    token, slot = _token_and_slot(row, place, WIDTH, CHUNKS)
    inside = (place < ENTRIES // WIDTH * WIDTH) & (row + place // WIDTH < end) & (token < tokens) & (slot < SLOTS)
    block = tl.load(head_ptr + token.to(tl.int64) * stride_t + slot * stride_s, mask=inside, other=-1)
    return block.to(tl.int32)


@triton.jit(
    do_not_specialize=["tokens", "n_blocks", "group", "pieces_per_head", "piece_rows", "stride_h", "stride_t"],
    do_not_specialize_on_alignment=["selected_ptr"],
)
def _count_kernel(
    selected_ptr,
    count_ptr,
    tokens,
    n_blocks,
    group,
    pieces_per_head,
    piece_rows,
    stride_h,
    stride_t,
    stride_s,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program: how often each block occurs in one piece (`piece_rows` rows of one q head) of a kv head's selection.

    Reads the piece once; writes one int32 for each block into `count[1 + (kv head, block, piece)]`; `count[0]` is 0. With
    BINS = 0 the blocks are too many for registers, and each entry is added where it belongs, to zeros; sums of integers have
    no order.
    """
    piece = tl.program_id(0)
    kv_head = tl.program_id(1)
    if BINS > 0 and piece + kv_head == 0:
        tl.store(count_ptr, 0)
    count_ptr += 1
    first = kv_head.to(tl.int64) * n_blocks
    total = tl.zeros([BINS if BINS > 0 else 1], tl.int32)
    head_ptr = selected_ptr + (kv_head * group + piece // pieces_per_head).to(tl.int64) * stride_h
    begin = piece % pieces_per_head * piece_rows
    for row in range(begin, begin + piece_rows, ENTRIES // WIDTH):
        block = _part(
            head_ptr, row, begin + piece_rows, tokens, stride_t, stride_s, SLOTS, WIDTH, CHUNKS, ENTRIES
        )  # fmt: skip
        if BINS > 0:
            total += tl.histogram(tl.where(block >= 0, block, 0), BINS, mask=block >= 0)
        else:
            place = (first + block) * tl.num_programs(0) + piece
            tl.atomic_add(count_ptr + place, 1, mask=block >= 0, sem="relaxed")
    if BINS > 0:
        bin_ = tl.arange(0, BINS)
        tl.store(count_ptr + (first + bin_) * tl.num_programs(0) + piece, total, mask=bin_ < n_blocks)


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit(
    do_not_specialize=["tokens", "n_blocks", "group", "pieces_per_head", "piece_rows", "stride_h", "stride_t"],
    do_not_specialize_on_alignment=["selected_ptr"],
)
def _scatter_kernel(
    selected_ptr,
    begin_ptr,
    entry_ptr,
    tokens,
    n_blocks,
    group,
    pieces_per_head,
    piece_rows,
    stride_h,
    stride_t,
    stride_s,
    head_bits,
    slot_bits,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLACE_BITS: tl.constexpr,
):
    """One program: the entries of one piece to their places.

    `begin[kv head, block, piece]` is where the piece's next entry of a block goes; it moves on with every part. Reads the
    piece once; writes each entry once, runs of equal blocks together. A part is sorted by (block, place in the part), which
    is unique, so that every sort is a stable one.
    """
    piece = tl.program_id(0)
    kv_head = tl.program_id(1)
    place = tl.arange(0, ENTRIES)
    NONE: tl.constexpr = (1 << (31 - PLACE_BITS)) - 1
    in_group = piece // pieces_per_head
    head_ptr = selected_ptr + (kv_head * group + in_group).to(tl.int64) * stride_h
    begin = piece % pieces_per_head * piece_rows
    end = begin + piece_rows
    for row in range(begin, end, ENTRIES // WIDTH):
        block = _part(head_ptr, row, end, tokens, stride_t, stride_s, SLOTS, WIDTH, CHUNKS, ENTRIES)
        in_order = tl.sort((tl.where(block >= 0, block, NONE) << PLACE_BITS) | place)
        block = in_order >> PLACE_BITS
        listed = block != NONE
        before = tl.gather(block, tl.maximum(place - 1, 0), 0)
        after = tl.gather(block, tl.minimum(place + 1, ENTRIES - 1), 0)
        opens = (place == 0) | (before != block)
        closes = (place == ENTRIES - 1) | (after != block)
        rank = place - tl.associative_scan(tl.where(opens, place, 0), 0, _greater)
        cursor = begin_ptr + (kv_head.to(tl.int64) * n_blocks + block) * tl.num_programs(0) + piece
        target = tl.load(cursor, mask=listed, other=0) + rank
        origin = in_order & (ENTRIES - 1)
        token, slot = _token_and_slot(row, origin, WIDTH, CHUNKS)
        token = token.to(entry_ptr.dtype.element_ty)
        entry = (token << (head_bits + slot_bits)) | (in_group << slot_bits) | slot
        tl.store(entry_ptr + target, entry, mask=listed)
        if row + ENTRIES // WIDTH < end:
            # All of the part has read the cursors before they move, and they have moved before the next part reads them.
            tl.debug_barrier()
            tl.store(cursor, target + 1, mask=listed & closes)
            tl.debug_barrier()


@triton.jit(
    do_not_specialize=["tokens", "n_blocks", "group", "pieces_per_head", "piece_rows", "stride_h", "stride_t"],
    do_not_specialize_on_alignment=["selected_ptr"],
)
def _scatter_few_kernel(
    selected_ptr,
    begin_ptr,
    entry_ptr,
    tokens,
    n_blocks,
    group,
    pieces_per_head,
    piece_rows,
    stride_h,
    stride_t,
    stride_s,
    head_bits,
    slot_bits,
    SLOTS: tl.constexpr,
    BINS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """As `_scatter_kernel` where blocks are few: a table of [block, token] that says in which slot, if any, the token names
    the block; a sum along the tokens ranks them. Where each block's next entry goes stays in registers.
    """
    piece = tl.program_id(0)
    kv_head = tl.program_id(1)
    in_group = piece // pieces_per_head
    head_ptr = selected_ptr + (kv_head * group + in_group).to(tl.int64) * stride_h
    bin_ = tl.arange(0, BINS)
    begin = begin_ptr + (kv_head.to(tl.int64) * n_blocks + bin_) * tl.num_programs(0) + piece
    cursor = tl.load(begin, mask=bin_ < n_blocks, other=0)
    first = piece % pieces_per_head * piece_rows
    end = tl.minimum(first + piece_rows, tokens)
    for at in range(first, end, TOKENS):
        token = at + tl.arange(0, TOKENS)
        row_ptr = head_ptr + token.to(tl.int64) * stride_t
        named = tl.zeros([BINS, TOKENS], tl.int32)  # slot + 1
        for slot in tl.static_range(SLOTS):
            block = tl.load(row_ptr + slot * stride_s, mask=token < end, other=-1).to(tl.int32)
            named = tl.where(bin_[:, None] == block[None, :], slot + 1, named)
        listed = (named > 0).to(tl.int32)
        target = cursor[:, None] + tl.cumsum(listed, 1) - 1
        entry = (token.to(entry_ptr.dtype.element_ty) << (head_bits + slot_bits)) | (in_group << slot_bits)
        # Flat, so that the threads of a warp stay on consecutive tokens of a block, whose entries lie together.
        target = tl.reshape(target, [BINS * TOKENS])
        entry = tl.reshape(entry[None, :] | (named - 1), [BINS * TOKENS])
        tl.store(entry_ptr + target, entry, mask=tl.reshape(named, [BINS * TOKENS]) > 0)
        cursor += tl.sum(listed, 1)


@triton.jit(do_not_specialize=["bins", "pieces", "items", "per_item"])
def _item_kernel(
    begin_ptr,
    pointer_ptr,
    item_bin_ptr,
    item_start_ptr,
    item_end_ptr,
    bins,
    pieces,
    items,
    per_item,
    BINS: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """One program: where BINS bins begin, and their items. `begin[bins, pieces]` and one number more.

    The items of bin b begin at item `pointer[b] // per_item + b`. That is no more than the items before it in number, since
    a bin has at most one item that is not full, and leaves at most one item unused between two bins; what is left after
    the last bin is shared by all programs.
    """
    bin_ = tl.program_id(0) * BINS + tl.arange(0, BINS)
    begin_of = begin_ptr + bin_.to(tl.int64) * pieces
    begin = tl.load(begin_of, mask=bin_ <= bins, other=0)
    end = tl.load(begin_of + pieces, mask=bin_ < bins, other=0)
    tl.store(pointer_ptr + bin_, begin, mask=bin_ <= bins)
    first = begin // per_item + bin_
    behind = tl.where(bin_ < bins, end // per_item + bin_ + 1, first)
    of_bin = (end - begin) // per_item + ((end - begin) % per_item > 0).to(tl.int32)
    for at in range(0, tl.max(behind - first, 0), ITEMS):
        number = at + tl.arange(0, ITEMS)
        item = first[:, None] + number[None, :]
        used = number[None, :] < of_bin[:, None]
        tl.store(item_bin_ptr + item, tl.where(used, bin_[:, None], -1), mask=item < behind[:, None])
        start = begin[:, None] + number[None, :] * per_item
        tl.store(item_start_ptr + item, start, mask=used)
        tl.store(item_end_ptr + item, start + tl.minimum(end[:, None] - start, per_item), mask=used)
    behind_all = tl.load(begin_ptr + bins.to(tl.int64) * pieces) // per_item + bins
    place = tl.arange(0, BINS * ITEMS)
    for at in range(behind_all + tl.program_id(0) * BINS * ITEMS, items, tl.num_programs(0) * BINS * ITEMS):
        tl.store(item_bin_ptr + at + place, tl.full([BINS * ITEMS], -1, tl.int32), mask=at + place < items)


def counting_shape(n_blocks: int, slots: int) -> dict[str, int]:
    """Constants of the counting passes: entries in a part, and the counts a program keeps in registers, if it does."""
    bins = max(next_power_of_2(n_blocks), 32)
    chunks = cdiv(slots, ENTRIES)
    width = cdiv(slots, chunks)
    rows = {"SLOTS": slots, "WIDTH": width, "CHUNKS": chunks, "ENTRIES": ENTRIES}
    return {**rows, "BINS": bins if bins <= REGISTER_BINS else 0}


def _counting_sort(
    selected: Tensor, n_blocks: int, kv_heads: int, bits: tuple[int, int], entry: Tensor, rows_per_item: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill `entry`; `pointer`, `item_bin`, `item_start`, `item_end`."""
    q_heads, tokens, slots = selected.shape
    group = q_heads // kv_heads
    shape = counting_shape(n_blocks, slots)
    part_rows = shape["ENTRIES"] // shape["WIDTH"]
    parts_per_head = cdiv(tokens * shape["CHUNKS"], part_rows)
    parts = max(1, min(parts_per_head, parts_per_head * q_heads // PROGRAMS))
    pieces_per_head = cdiv(parts_per_head, parts)
    grid = (pieces_per_head * group, kv_heads)
    sizes = (tokens, n_blocks, group, pieces_per_head, parts * part_rows, *selected.stride())
    bins = shape.pop("BINS")
    # A zero before the counts makes their inclusive sum the exclusive one, with the total at its end.
    room = torch.empty if bins else torch.zeros
    count = room(1 + kv_heads * n_blocks * grid[0], dtype=torch.int32, device=selected.device)
    counted = shape | {"ENTRIES": COUNT_ENTRIES, "BINS": bins}
    _count_kernel[grid](selected, count, *sizes, **counted, num_warps=COUNT_WARPS)
    begin = torch.cumsum(count, 0, dtype=torch.int32)
    result = _items(begin, kv_heads * n_blocks, grid[0], entry.numel(), rows_per_item)
    if n_blocks <= FEW_BLOCKS and slots <= FEW_SLOTS and shape["CHUNKS"] == 1:
        few = {"SLOTS": slots, "BINS": max(next_power_of_2(n_blocks), 16), "TOKENS": FEW_TOKENS}
        _scatter_few_kernel[grid](selected, begin, entry, *sizes, *bits, **few, num_warps=FEW_WARPS)
    else:
        shape["PLACE_BITS"] = shape["ENTRIES"].bit_length() - 1
        _scatter_kernel[grid](selected, begin, entry, *sizes, *bits, **shape, num_warps=WARPS)
    return result


def _items(
    begin: Tensor, bins: int, pieces: int, capacity: int, rows_per_item: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pointer` and the items from where the bins' pieces begin, `[bins * pieces + 1]`."""
    items = capacity // rows_per_item + bins
    pointer, item_bin, item_start, item_end = (
        torch.empty(size, dtype=torch.int32, device=begin.device) for size in (bins + 1, items, items, items)
    )
    tables = (begin, pointer, item_bin, item_start, item_end)
    shape = {"BINS": ITEM_KERNEL_BINS, "ITEMS": ITEM_KERNEL_ITEMS}
    _item_kernel[(cdiv(bins + 1, ITEM_KERNEL_BINS),)](*tables, bins, pieces, items, rows_per_item, **shape)
    return pointer, item_bin, item_start, item_end


def route(selected: Tensor, n_blocks: int, kv_heads: int, block_size: int) -> RoutingLists:
    """Routing lists of `selected` for block attention and its backward; own blocks are entries like any other.

    Args:
        selected: `[Hq, T, topk]` of `select_blocks`, any strides; the q heads of `kv_heads` kv heads.
        n_blocks: blocks in all.
        kv_heads: kv heads at work.
        block_size: keys a block.
    """
    rows_per_item = ITEM_ROWS_SMALL if block_size <= configs.SMALL_BLOCK else ITEM_ROWS_LARGE
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
        item_bin, item_start, item_end = torch.empty(3, 0, dtype=torch.int32, device=device)
    else:
        pointer, item_bin, item_start, item_end = _counting_sort(
            selected, n_blocks, kv_heads, (head_bits, slot_bits), entry, rows_per_item
        )
    return RoutingLists(
        pointer, entry, head_bits, slot_bits, n_blocks, kv_heads, group, item_bin, item_start, item_end, rows_per_item,
        block_size,
    )  # fmt: skip
