"""Kernels of decoding; `decode.py` launches them and says how they share the work.

Block numbers inside a kernel are the sample's own. `slots` maps the positions of a sample's content to slots of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gate_exact import _order_key, load_tile


@triton.jit
def _tile_of_program(
    count, before, lengths, before_step, lengths_step, heads, tiles, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """The sample, kv head and first block of a program's tile of TILE blocks, and where its missing centroids begin and end.

    Block numbers are the sample's. Programs are in order of (sample, kv head, tile), as `count` is.
    """
    program = tl.program_id(0)
    first = program % tiles * TILE
    head = (program // tiles) % heads
    sample = (program // tiles // heads).to(tl.int64)
    known = tl.minimum(tl.load(count + program), tl.maximum(tl.load(before + sample * before_step) // BLOCK - first, 0))
    complete = tl.maximum(tl.minimum(tl.load(lengths + sample * lengths_step) // BLOCK - first, TILE), 0)
    return sample, head, first, first + known, first + complete


@triton.jit
def _own_block(position, sample, position_step, BLOCK: tl.constexpr):
    """The block of the sample's query, in the sample's numbering; 0 where it has none."""
    return tl.maximum(tl.load(position + sample * position_step), 0) // BLOCK


@triton.jit
def _selection_of(selected, head, sample, samples, TOPK: tl.constexpr):
    """Where the TOPK block numbers of a (q head, sample) begin."""
    return selected + (head.to(tl.int64) * samples + sample) * TOPK


@triton.jit
def _write_centroid(
    k, table, out, k_token, block, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr
):
    """One centroid; sums in the order of `centroids_kernel`, so that it has the same bits."""
    first_slot = tl.load(table + block * BLOCK)
    if tl.load(table + block * BLOCK + BLOCK - 1) - first_slot == BLOCK - 1:  # as in `attend_selected_kernel`
        total = _sum_keys(k, table, first_slot, k_token, block, BLOCK, D, D_PADDED, KEYS, False)
    else:
        total = _sum_keys(k, table, first_slot, k_token, block, BLOCK, D, D_PADDED, KEYS, True)
    column = tl.arange(0, D_PADDED)
    mean = tl.math.div_rn(tl.sum(total, 0), tl.full([D_PADDED], BLOCK, tl.float32))
    tl.store(out + column, mean.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _sum_keys(
    k, table, first_slot, k_token, block,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """KEYS sums `[KEYS, D_PADDED]` over the keys of a block, in slots from `first_slot` on or SCATTERED as the table says."""
    row = tl.arange(0, KEYS)
    column = tl.arange(0, D_PADDED)
    total = tl.zeros([KEYS, D_PADDED], tl.float32)
    for first in tl.range(0, BLOCK, KEYS, num_stages=5):
        inside = first + row < BLOCK
        if SCATTERED:
            slot = tl.load(table + block * BLOCK + first + row, mask=inside, other=0)
        else:
            slot = first_slot + first + row
        pointer = k + slot.to(tl.int64)[:, None] * k_token + column[None, :]
        total += tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=["most", "tiles"], do_not_specialize_on_alignment=["slots", "before", "lengths", "count"])
def update_centroids_kernel(
    k, slots, before, lengths, count, centroids, k_sample, k_token, k_head, slots_sample, before_step, lengths_step,
    heads, most, tiles,
    LANES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One program: missing centroids of one (sample, kv head, tile of TILE blocks), every LANES-th of them.

    Reads 2 * BLOCK * D bytes and 4 * BLOCK of the table per centroid, writes 2 * D.
    """
    sample, head, _, known, complete = _tile_of_program(
        count, before, lengths, before_step, lengths_step, heads, tiles, BLOCK, TILE
    )
    base = k + sample * k_sample + head.to(tl.int64) * k_head
    for block in tl.range(known + tl.program_id(1), complete, LANES):
        out = centroids + ((sample * most + block) * heads + head) * D
        _write_centroid(base, slots + sample * slots_sample, out, k_token, block, BLOCK, D, D_PADDED, KEYS)


@triton.jit(
    do_not_specialize=["most", "tiles"],
    do_not_specialize_on_alignment=["slots", "before", "lengths", "count", "position", "arrived"],
)
def select_kernel(
    q, k, slots, before, lengths, position, count, arrived, centroids, keys, selected, q_sample, q_head, k_sample,
    k_token, k_head, slots_sample, before_step, lengths_step, position_step, samples, heads, group, most, tiles,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: scores of one (sample, kv head, tile of TILE blocks); the last program of a kv head selects for its q heads.

    Reads 2 * D bytes per candidate and kv head, writes and reads an order key of 4 bytes per candidate and q head, writes TOPK
    block numbers per q head. Missing centroids of the tile come first. The program alone reads and writes the tile's count.
    Scores have the bits of the gate's: the same products of tiles of at least 64 rows.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()  # all programs run by now: attention may take free multiprocessors, and wait
    sample, head, first_block, known, complete = _tile_of_program(
        count, before, lengths, before_step, lengths_step, heads, tiles, BLOCK, TILE
    )
    base = k + sample * k_sample + head.to(tl.int64) * k_head
    c_base = centroids + (sample * most * heads + head) * D
    for missing in tl.range(known, complete):
        out = c_base + missing * heads * D
        _write_centroid(base, slots + sample * slots_sample, out, k_token, missing, BLOCK, D, D_PADDED, KEYS)
    tl.debug_barrier()  # every thread has read the count, and sees the centroids
    tl.store(count + tl.program_id(0), complete - first_block)
    own = _own_block(position, sample, position_step, BLOCK)
    if (first_block >= own) & (first_block > 0):
        return
    number = first_block + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    c_tile = load_tile(c_base, number, heads * D, number < own, D, D_PADDED)
    first_head = head * group
    keys_row = sample * heads * group + first_head
    for first in tl.range(0, group, ROWS):
        valid = first + row < group
        q_tile = load_tile(q + sample * q_sample, first_head + first + row, q_head, valid, D, D_PADDED)
        score = tl.dot(q_tile, tl.trans(c_tile))
        to = keys + (keys_row + first + row)[:, None] * most + number[None, :]
        tl.store(to, _order_key(score), mask=valid[:, None] & (number < own)[None, :])
    if not _is_last(arrived + sample * heads + head, 1, tl.maximum(tl.cdiv(own, TILE), 1)):
        return

    block = tl.arange(0, BLOCKS)
    slot = tl.arange(0, SLOTS)
    column = slot - (SLOTS - TOPK)
    NONE: tl.constexpr = -(1 << 63)
    for begin in tl.range(0, group, HEADS):
        member = begin + tl.arange(0, HEADS)
        candidate = (member < group)[:, None] & (block < own)[None, :]
        # An order key and a block number make one key of 64 bits: the best is unique, and of equal scores the later block's.
        key = tl.load(keys + (keys_row + member)[:, None] * most + block[None, :], mask=candidate, other=0).to(tl.int64)
        key = tl.where(candidate, key * (1 << 32) + block[None, :], NONE)
        chosen = tl.where(slot == SLOTS - 1, own, -1)[None, :] + tl.zeros([HEADS, SLOTS], tl.int32)
        for taken in tl.range(0, tl.minimum(TOPK - 1, own)):
            found = (tl.max(key, 1) & 0xFFFFFFFF).to(tl.int32)
            chosen = tl.where((slot == SLOTS - 2 - taken)[None, :], found[:, None], chosen)
            key = tl.where(block[None, :] == found[:, None], NONE, key)
        chosen = tl.sort(chosen)
        pointer = _selection_of(selected, first_head + member, sample, samples, TOPK)[:, None] + column[None, :]
        stored = (member < group)[:, None] & (column >= 0)[None, :]
        tl.store(pointer, tl.where(chosen >= 0, chosen + sample * most, -1), mask=stored)


@triton.jit
def _is_last(arrived, work, all_work):
    """Whether a program is the last of those that share a counter. What the others stored is visible to it then.

    The counter is 0 again when the last one has arrived.
    """
    tl.debug_barrier()  # the stores of all threads precede the atomic
    last = tl.atomic_add(arrived, work) + work == all_work
    if last:
        tl.store(arrived, 0)
    return last


@triton.jit
def _parts_seen(number, first_block, last, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """Parts of a selected block with keys up to position `last`: all but those of later keys in the own block; 0 for -1."""
    keys = tl.minimum(last + 1 - (number.to(tl.int64) - first_block) * BLOCK, BLOCK)
    return tl.where(number >= 0, tl.minimum(tl.cdiv(tl.maximum(keys, 0), SPLIT), SPLITS), 0).to(tl.int32)


@triton.jit
def _attend_keys(
    q_tile, k_base, v_base, table, first_slot, begin, end, k_token, v_token, scale_log2,
    SPLIT: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    KEYS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum of weights and weighted sum of the values at positions from `begin` up to `end`, KEYS at a time.

    Their slots are consecutive from `first_slot` on, or SCATTERED as the table says. The bits are the same.
    """
    d = tl.arange(0, D_PADDED)
    dv = tl.arange(0, DV_PADDED)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    for offset in tl.range(0, SPLIT, KEYS, num_stages=STAGES):
        at = begin + offset + tl.arange(0, KEYS)
        visible = at < end
        if SCATTERED:
            of_key = tl.load(table + at, mask=visible, other=0).to(tl.int64)
        else:
            of_key = first_slot.to(tl.int64) + offset + tl.arange(0, KEYS)
        k_tile = tl.load(
            k_base + of_key[:, None] * k_token + d[None, :], mask=visible[:, None] & (d < D)[None, :], other=0.0
        )
        v_tile = tl.load(
            v_base + of_key[:, None] * v_token + dv[None, :], mask=visible[:, None] & (dv < DV)[None, :], other=0.0
        )
        score = tl.where(visible[None, :], tl.dot(q_tile, tl.trans(k_tile)) * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(score, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # all scores may be -inf so far
        weight = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(m - shift)
        acc = acc * rescale[:, None] + tl.dot(weight.to(v_tile.dtype), v_tile)
        norm = norm * rescale + tl.sum(weight, 1)
        m = m_new
    return m, norm, acc


@triton.jit(
    do_not_specialize=["blocks", "samples"], do_not_specialize_on_alignment=["slots", "position", "selected", "arrived"]
)
def attend_selected_kernel(
    q, k, v, slots, position, selected, arrived, partial, out, scale_log2, q_sample, q_head, k_sample,
    k_token, k_head, v_sample, v_token, v_head, slots_sample, position_step, samples, blocks, group,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program: at most SPLIT keys of one block that a q head selected, for all q heads of its group that selected it.

    The first of them does the work, the others' programs end. Reads 2 * (D + DV) bytes per visible key once per group, writes one
    normalised fp32 partial and its log-sum-exp in base 2 per q head; `partial` holds first all of the former, then the latter.
    The last program of a (kv head, sample) merges the partials of its q heads in order of blocks: reads 4 * DV + 4 bytes per
    partial, writes 2 * DV per q head. A row without a query (position -1) gets zeros.
    """
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(0) // group
    split = part % SPLITS
    row = tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    dv = tl.arange(0, DV_PADDED)
    head_row = (kv_head * group + row).to(tl.int64)
    last = tl.load(position + sample * position_step)
    q_tile = load_tile(q + sample * q_sample, head_row, q_head, row < group, D, D_PADDED)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # for the selection
    number = tl.load(_selection_of(selected, tl.program_id(0), sample, samples, TOPK) + part // SPLITS).to(tl.int64)
    of_group = tl.load(
        _selection_of(selected, head_row, sample, samples, TOPK)[:, None] + slot[None, :],
        mask=(row < group)[:, None] & (slot < TOPK)[None, :],
        other=-1,
    )
    hit = of_group == number
    slot_of_row = tl.max(tl.where(hit, slot[None, :], -1), 1)
    member = slot_of_row >= 0
    first_member = tl.min(tl.where(member, row, ROWS), 0)
    begin = (number - sample * blocks) * BLOCK + split * SPLIT
    end = tl.minimum(begin + tl.minimum(SPLIT, BLOCK - split * SPLIT), last + 1)
    out_row = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + out_row * DV + dv, 0.0, mask=(dv < DV) & (last < 0) & (part == 0))
    if (number < 0) | (first_member != tl.program_id(0) % group) | (end <= begin):
        return

    k_base = k + sample * k_sample + kv_head.to(tl.int64) * k_head
    v_base = v + sample * v_sample + kv_head.to(tl.int64) * v_head
    table = slots + sample * slots_sample
    # Slots ascend, so the first and the last tell whether all keys are consecutive: then no address waits for the table.
    first_slot = tl.load(table + begin)
    if tl.load(table + end - 1) - first_slot == end - 1 - begin:
        m, norm, acc = _attend_keys(
            q_tile, k_base, v_base, table, first_slot, begin, end, k_token, v_token, scale_log2,
            SPLIT, D, D_PADDED, DV, DV_PADDED, KEYS, ROWS, STAGES, False,
        )  # fmt: skip
    else:
        m, norm, acc = _attend_keys(
            q_tile, k_base, v_base, table, first_slot, begin, end, k_token, v_token, scale_log2,
            SPLIT, D, D_PADDED, DV, DV_PADDED, KEYS, ROWS, STAGES, True,
        )  # fmt: skip
    partial_lse = partial + tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * TOPK * SPLITS * DV
    weightless = norm == 0.0
    acc = acc / tl.where(weightless, 1.0, norm)[:, None]
    part_row = ((sample * tl.num_programs(0) + head_row) * TOPK + slot_of_row) * SPLITS + split
    tl.store(partial + part_row[:, None] * DV + dv[None, :], acc, mask=member[:, None] & (dv < DV)[None, :])
    tl.store(partial_lse + part_row, tl.where(weightless, float("-inf"), m + tl.log2(norm)), mask=member)

    all_parts = tl.sum(tl.sum(_parts_seen(of_group, sample * blocks, last, SPLITS, SPLIT, BLOCK), 1), 0)
    kv_heads = tl.num_programs(0) // group
    if not _is_last(arrived + sample * kv_heads + kv_head, tl.sum(member.to(tl.int32), 0), all_parts):
        return
    for first in tl.range(0, group, HEADS):
        _merge_parts(
            partial, partial_lse, selected, out, kv_head * group, first + tl.arange(0, HEADS), group, sample, samples,
            sample * blocks, last, TOPK, SPLITS, SPLIT, BLOCK, DV, DV_PADDED, HEADS, AT_ONCE,
        )  # fmt: skip


@triton.jit
def _merge_parts(
    partial, partial_lse, selected, out, first_head, row, group, sample, samples, first_block, last,
    TOPK: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr,
    DV_PADDED: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Outputs of HEADS q heads of one (kv head, sample), AT_ONCE parts at a time in order of blocks."""
    dv = tl.arange(0, DV_PADDED)
    PARTS: tl.constexpr = TOPK * SPLITS
    head_row = (first_head + row).to(tl.int64)
    out_row = sample * tl.num_programs(0) + head_row
    chosen = _selection_of(selected, head_row, sample, samples, TOPK)
    m = tl.full([HEADS], float("-inf"), tl.float32)
    norm = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, DV_PADDED], tl.float32)
    for first in tl.range(0, PARTS, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        inside = (row < group)[:, None] & (part < PARTS)[None, :]
        number = tl.load(chosen[:, None] + (part // SPLITS)[None, :], mask=inside, other=-1)
        written = (part % SPLITS)[None, :] < _parts_seen(number, first_block, last, SPLITS, SPLIT, BLOCK)
        index = out_row[:, None] * PARTS + part[None, :]
        lse = tl.load(partial_lse + index, mask=written, other=float("-inf"))
        o = tl.load(
            partial + index[:, :, None] * DV + dv[None, None, :],
            mask=written[:, :, None] & (dv < DV)[None, None, :],
            other=0.0,
        )
        m_new = tl.maximum(m, tl.max(lse, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(lse - shift[:, None])
        rescale = tl.exp2(m - shift)
        acc = acc * rescale[:, None] + tl.sum(weight[:, :, None] * o, 1)
        norm = norm * rescale + tl.sum(weight, 1)
        m = m_new
    result = (acc / norm[:, None]).to(out.dtype.element_ty)
    tl.store(out + out_row[:, None] * DV + dv[None, :], result, mask=(row < group)[:, None] & (dv < DV)[None, :])
