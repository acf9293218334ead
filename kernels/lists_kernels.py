"""Triton kernels of the counting sort that makes routing lists; `lists.py` describes the passes.

A *share* is some rows of one q head's selection, handled by one program per pass; it is processed one *batch* at a time. Rows
with very many slots are cut into chunks of WIDTH slots, so that at least one row fits a batch.
"""

import triton
import triton.language as tl

_VARYING = ["tokens", "n_blocks", "group", "shares_per_head", "share_rows", "selected_head", "selected_token"]


@triton.jit
def _token_and_slot(row, index, WIDTH: tl.constexpr, CHUNKS: tl.constexpr):
    """Token and slot at `index` of a batch that begins at row `row`: rows are WIDTH slots, CHUNKS rows per token."""
    row = row + index // WIDTH
    return row // CHUNKS, row % CHUNKS * WIDTH + index % WIDTH


@triton.jit
def _batch(
    head_selected, row, end, tokens, selected_token, selected_slot,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Blocks of a batch of one q head's selection, -1 for none: the rows from `row` and before `end` that fit."""
    index = tl.arange(0, ENTRIES)
    token, slot = _token_and_slot(row, index, WIDTH, CHUNKS)
    inside = (index < ENTRIES // WIDTH * WIDTH) & (row + index // WIDTH < end) & (token < tokens) & (slot < SLOTS)
    block = tl.load(
        head_selected + token.to(tl.int64) * selected_token + slot.to(tl.int64) * selected_slot, mask=inside, other=-1
    )
    return block.to(tl.int32)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["selected"])
def count_kernel(
    selected, count, tokens, n_blocks, group, shares_per_head, share_rows, selected_head, selected_token, selected_slot,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program: how often each block occurs in one share of a kv head's selection.

    Reads the share once, 2 or 4 bytes per slot; writes 4 bytes per block, to `count[1 + (kv head, block, share)]`.
    `count[0]` is 0. With BINS = 0 there are too many blocks for registers: each entry is added to its count by an atomic,
    starting from zeros. Integer sums are the same in any order.
    """
    share = tl.program_id(0)
    kv_head = tl.program_id(1)
    if BINS > 0 and share + kv_head == 0:
        tl.store(count, 0)
    count += 1
    first = kv_head.to(tl.int64) * n_blocks
    total = tl.zeros([BINS if BINS > 0 else 1], tl.int32)
    head_selected = selected + (kv_head * group + share // shares_per_head).to(tl.int64) * selected_head
    begin = share % shares_per_head * share_rows
    for row in range(begin, begin + share_rows, ENTRIES // WIDTH):
        block = _batch(
            head_selected, row, begin + share_rows, tokens, selected_token, selected_slot, SLOTS, WIDTH, CHUNKS, ENTRIES
        )
        if BINS > 0:
            total += tl.histogram(tl.where(block >= 0, block, 0), BINS, mask=block >= 0)
        else:
            index = (first + block) * tl.num_programs(0) + share
            tl.atomic_add(count + index, 1, mask=block >= 0, sem="relaxed")
    if BINS > 0:
        bin_ = tl.arange(0, BINS)
        tl.store(count + (first + bin_) * tl.num_programs(0) + share, total, mask=bin_ < n_blocks)


@triton.jit
def _greater(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["selected"])
def scatter_kernel(
    selected, begin_of, entry, tokens, n_blocks, group, shares_per_head, share_rows, selected_head, selected_token,
    selected_slot, head_bits, slot_bits,
    SLOTS: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr, ENTRIES: tl.constexpr, INDEX_BITS: tl.constexpr,
):  # fmt: skip
    """One program: the entries of one share, each to its position in the lists.

    Reads the share once, 2 or 4 bytes per slot; writes 4 or 8 bytes per entry, runs of equal blocks together.

    `begin_of[kv head, block, share]` is the position of the share's next entry of a block; it advances with every batch. A
    batch is sorted by (block, index in the batch). These keys are unique, so any sort of them is stable.
    """
    share = tl.program_id(0)
    kv_head = tl.program_id(1)
    index = tl.arange(0, ENTRIES)
    NONE: tl.constexpr = (1 << (31 - INDEX_BITS)) - 1
    in_group = share // shares_per_head
    head_selected = selected + (kv_head * group + in_group).to(tl.int64) * selected_head
    begin = share % shares_per_head * share_rows
    end = begin + share_rows
    for row in range(begin, end, ENTRIES // WIDTH):
        block = _batch(head_selected, row, end, tokens, selected_token, selected_slot, SLOTS, WIDTH, CHUNKS, ENTRIES)
        in_order = tl.sort((tl.where(block >= 0, block, NONE) << INDEX_BITS) | index)
        block = in_order >> INDEX_BITS
        listed = block != NONE
        before = tl.gather(block, tl.maximum(index - 1, 0), 0)
        after = tl.gather(block, tl.minimum(index + 1, ENTRIES - 1), 0)
        opens = (index == 0) | (before != block)
        closes = (index == ENTRIES - 1) | (after != block)
        rank = index - tl.associative_scan(tl.where(opens, index, 0), 0, _greater)
        cursor = begin_of + (kv_head.to(tl.int64) * n_blocks + block) * tl.num_programs(0) + share
        target = tl.load(cursor, mask=listed, other=0) + rank
        origin = in_order & (ENTRIES - 1)
        token, slot = _token_and_slot(row, origin, WIDTH, CHUNKS)
        token = token.to(entry.dtype.element_ty)
        code = (token << (head_bits + slot_bits)) | (in_group << slot_bits) | slot
        tl.store(entry + target, code, mask=listed)
        if row + ENTRIES // WIDTH < end:
            # Every thread reads the cursors before they advance, and they have advanced before the next batch reads them.
            tl.debug_barrier()
            tl.store(cursor, target + 1, mask=listed & closes)
            tl.debug_barrier()


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["selected"])
def scatter_few_kernel(
    selected, begin_of, entry, tokens, n_blocks, group, shares_per_head, share_rows, selected_head, selected_token,
    selected_slot, head_bits, slot_bits,
    SLOTS: tl.constexpr, BINS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `scatter_kernel`, for few blocks: reads and writes the same.

    A table [block, token] says in which slot, if any, the token selects the block; a sum along the tokens ranks them. The
    position of each block's next entry stays in registers.
    """
    share = tl.program_id(0)
    kv_head = tl.program_id(1)
    in_group = share // shares_per_head
    head_selected = selected + (kv_head * group + in_group).to(tl.int64) * selected_head
    bin_ = tl.arange(0, BINS)
    begin = begin_of + (kv_head.to(tl.int64) * n_blocks + bin_) * tl.num_programs(0) + share
    cursor = tl.load(begin, mask=bin_ < n_blocks, other=0)
    first = share % shares_per_head * share_rows
    end = tl.minimum(first + share_rows, tokens)
    for at in range(first, end, TOKENS):
        token = at + tl.arange(0, TOKENS)
        row_selected = head_selected + token.to(tl.int64) * selected_token
        named = tl.zeros([BINS, TOKENS], tl.int32)  # slot + 1
        for slot in tl.static_range(SLOTS):
            block = tl.load(row_selected + slot * selected_slot, mask=token < end, other=-1).to(tl.int32)
            named = tl.where(bin_[:, None] == block[None, :], slot + 1, named)
        listed = (named > 0).to(tl.int32)
        target = cursor[:, None] + tl.cumsum(listed, 1) - 1
        code = (token.to(entry.dtype.element_ty) << (head_bits + slot_bits)) | (in_group << slot_bits)
        # Flat, so that the threads of a warp hold consecutive tokens of a block, whose entries are adjacent.
        target = tl.reshape(target, [BINS * TOKENS])
        code = tl.reshape(code[None, :] | (named - 1), [BINS * TOKENS])
        tl.store(entry + target, code, mask=tl.reshape(named, [BINS * TOKENS]) > 0)
        cursor += tl.sum(listed, 1)


@triton.jit(do_not_specialize=["n_bins", "shares", "items", "per_item"])
def item_kernel(
    begin_of, pointer, item_bin, item_start, item_end, n_bins, shares, items, per_item,
    BINS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """One program: `pointer` of BINS bins, and their work items, from `begin_of` `[n_bins * shares + 1]`.

    Reads 8 bytes per bin; writes 4 per bin and 12 per item.

    The items of bin b begin at item `pointer[b] // per_item + b`. No item is lost: all earlier bins have at most that many
    items, since each has at most one that is not full. At most one item stays unused between two bins; the items after the
    last bin are marked unused by all programs together.
    """
    bin_ = tl.program_id(0) * BINS + tl.arange(0, BINS)
    begin_at = begin_of + bin_.to(tl.int64) * shares
    begin = tl.load(begin_at, mask=bin_ <= n_bins, other=0)
    end = tl.load(begin_at + shares, mask=bin_ < n_bins, other=0)
    tl.store(pointer + bin_, begin, mask=bin_ <= n_bins)
    first = begin // per_item + bin_
    behind = tl.where(bin_ < n_bins, end // per_item + bin_ + 1, first)
    of_bin = (end - begin) // per_item + ((end - begin) % per_item > 0).to(tl.int32)
    for at in range(0, tl.max(behind - first, 0), ITEMS):
        number = at + tl.arange(0, ITEMS)
        item = first[:, None] + number[None, :]
        used = number[None, :] < of_bin[:, None]
        tl.store(item_bin + item, tl.where(used, bin_[:, None], -1), mask=item < behind[:, None])
        start = begin[:, None] + number[None, :] * per_item
        tl.store(item_start + item, start, mask=used)
        tl.store(item_end + item, start + tl.minimum(end[:, None] - start, per_item), mask=used)
    behind_all = tl.load(begin_of + n_bins.to(tl.int64) * shares) // per_item + n_bins
    index = tl.arange(0, BINS * ITEMS)
    for at in range(behind_all + tl.program_id(0) * BINS * ITEMS, items, tl.num_programs(0) * BINS * ITEMS):
        tl.store(item_bin + at + index, tl.full([BINS * ITEMS], -1, tl.int32), mask=at + index < items)
