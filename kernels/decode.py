"""Decoding: one query per sample and q head against the keys of a cache, selected blocks only.

1. `score_kernel` adds the centroids of blocks that became complete since the last step (usually none), and scores all blocks.
2. `select_kernel` takes the best. Where it does not serve, `update_centroids_kernel` and the gate of a forward pass do.
3. `attend_selected_kernel` splits the selected blocks over programs, and `merge_splits_kernel` merges their results.

Content is counted from each sample's first token. A table maps it to slots of the cache, so padding on either side, or between a
prompt and what was generated, is never read. The host reads nothing, so the steps can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .gate import select_blocks
from .gate_exact import _order_key, load_tile
from .launch import launch_kernel
from .sizes import LOG2E, cdiv, next_power_of_2, padded
from .types import COUNT_TILE, QueryRows, selection_dtype

MOST_BLOCKS = 4096
"""Most blocks per sample whose keys `select_kernel` keeps in registers."""
MOST_TOPK = 64
"""Largest topk of `select_kernel`, which takes the best one after the other."""


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
):  # fmt: skip
    """One centroid; sums in the order of `centroids_kernel`, so that it has the same bits."""
    row = tl.arange(0, KEYS)
    column = tl.arange(0, D_PADDED)
    total = tl.zeros([KEYS, D_PADDED], tl.float32)
    for first in tl.range(0, BLOCK, KEYS, num_stages=3):
        inside = first + row < BLOCK
        slot = tl.load(table + block * BLOCK + first + row, mask=inside, other=0)
        pointer = k + slot.to(tl.int64)[:, None] * k_token + column[None, :]
        total += tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
    mean = tl.math.div_rn(tl.sum(total, 0), tl.full([D_PADDED], BLOCK, tl.float32))
    tl.store(out + column, mean.to(out.dtype.element_ty), mask=column < D)


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
    do_not_specialize_on_alignment=["slots", "before", "lengths", "count", "position"],
)
def score_kernel(
    q, k, slots, before, lengths, position, count, centroids, keys, q_sample, q_head, k_sample, k_token, k_head,
    slots_sample, before_step, lengths_step, position_step, heads, group, most, tiles,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: missing centroids, then int32 order keys of one (sample, kv head, tile of TILE blocks), for each q head.

    Reads 2 * D bytes per candidate and q head, writes 4 per candidate and q head. Scores have the bits of the gate's: the same
    products of tiles of at least 64 rows. It alone reads and writes the tile's count.
    """
    sample, head, first_block, known, complete = _tile_of_program(
        count, before, lengths, before_step, lengths_step, heads, tiles, BLOCK, TILE
    )
    base = k + sample * k_sample + head.to(tl.int64) * k_head
    c_base = centroids + (sample * most * heads + head) * D
    for block in tl.range(known, complete):
        out = c_base + block * heads * D
        _write_centroid(base, slots + sample * slots_sample, out, k_token, block, BLOCK, D, D_PADDED, KEYS)
    tl.debug_barrier()  # every thread has read the count, and sees the centroids
    tl.store(count + tl.program_id(0), complete - first_block)
    own = _own_block(position, sample, position_step, BLOCK)
    if first_block >= own:
        return
    number = first_block + tl.arange(0, TILE)
    row = tl.arange(0, ROWS)
    c_tile = load_tile(c_base, number, heads * D, number < own, D, D_PADDED)
    q_head_number = head * group + row
    for first in tl.range(0, group, ROWS):
        valid = first + row < group
        q_tile = load_tile(q + sample * q_sample, q_head_number + first, q_head, valid, D, D_PADDED)
        score = tl.dot(q_tile, tl.trans(c_tile))
        pointer = keys + (sample * heads * group + q_head_number + first)[:, None] * most + number[None, :]
        tl.store(pointer, _order_key(score), mask=valid[:, None] & (number < own)[None, :])


@triton.jit(do_not_specialize=["most"], do_not_specialize_on_alignment=["position"])
def select_kernel(
    keys, position, selected, position_step, samples, most,
    BLOCK: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: the selection of one (q head, sample).

    Reads 4 bytes per candidate, writes TOPK block numbers. An order key and a block number make one key of 64 bits, so the best
    is unique and of equal scores the later block's.
    """
    head = tl.program_id(0)
    sample = tl.program_id(1)
    own = _own_block(position, sample, position_step, BLOCK)
    number = tl.arange(0, BLOCKS)
    base = keys + (sample.to(tl.int64) * tl.num_programs(0) + head) * most
    NONE: tl.constexpr = -(1 << 63)
    key = tl.load(base + number, mask=number < own, other=0).to(tl.int64) * (1 << 32) + number
    key = tl.where(number < own, key, NONE)
    slot = tl.arange(0, SLOTS)
    chosen = tl.where(slot == SLOTS - 1, own, -1)
    for taken in tl.range(0, tl.minimum(TOPK - 1, own)):
        best = tl.max(key, 0)
        found = (best & 0xFFFFFFFF).to(tl.int32)
        chosen = tl.where(slot == SLOTS - 2 - taken, found, chosen)
        key = tl.where(number == found, NONE, key)
    chosen = tl.sort(chosen)
    column = slot - (SLOTS - TOPK)
    out = _selection_of(selected, head, sample, samples, TOPK) + column
    tl.store(out, tl.where(chosen >= 0, chosen + sample * most, -1), mask=column >= 0)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["slots", "position", "selected"])
def attend_selected_kernel(
    q, k, v, slots, position, selected, partial, partial_lse, scale_log2, q_sample, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, slots_sample, position_step, samples, blocks, group,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program: at most SPLIT keys of one block that a q head selected, for all q heads of its group that selected it.

    The first of them does the work, the others' programs end. Reads 2 * (D + DV) + 4 bytes per visible key once per group, writes
    one normalised fp32 partial and its log-sum-exp in base 2 per q head.
    """
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(0) // group
    split = part % SPLITS
    row = tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    head_row = (kv_head * group + row).to(tl.int64)
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
    end = tl.minimum(begin + tl.minimum(SPLIT, BLOCK - split * SPLIT), tl.load(position + sample * position_step) + 1)
    if (number < 0) | (first_member != tl.program_id(0) % group) | (end <= begin):
        return

    d = tl.arange(0, D_PADDED)
    dv = tl.arange(0, DV_PADDED)
    q_tile = load_tile(q + sample * q_sample, head_row, q_head, member, D, D_PADDED)
    k_base = k + sample * k_sample + kv_head.to(tl.int64) * k_head
    v_base = v + sample * v_sample + kv_head.to(tl.int64) * v_head
    table = slots + sample * slots_sample
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    for offset in tl.range(0, SPLIT, KEYS, num_stages=3):
        at = begin + offset + tl.arange(0, KEYS)
        visible = at < end
        of_key = tl.load(table + at, mask=visible, other=0).to(tl.int64)
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
    weightless = norm == 0.0
    acc = acc / tl.where(weightless, 1.0, norm)[:, None]
    out_row = ((sample * tl.num_programs(0) + head_row) * TOPK + slot_of_row) * SPLITS + split
    tl.store(partial + out_row[:, None] * DV + dv[None, :], acc, mask=member[:, None] & (dv < DV)[None, :])
    tl.store(partial_lse + out_row, tl.where(weightless, float("-inf"), m + tl.log2(norm)), mask=member)


@triton.jit
def _part_lse(
    partial_lse, chosen, part, first_block, last,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of some parts of a row, and which were written; -inf for the others: an empty slot, or later keys."""
    number = tl.load(chosen + part // SPLITS, mask=part < PARTS, other=-1).to(tl.int64)
    written = (number >= 0) & ((number - first_block) * BLOCK + (part % SPLITS) * SPLIT <= last)
    return tl.load(partial_lse + part, mask=written, other=float("-inf")), written


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["position", "selected"])
def merge_splits_kernel(
    partial, partial_lse, selected, position, out, position_step, samples, blocks,
    TOPK: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PARTS_PADDED: tl.constexpr,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program: the output of one (q head, sample), from its partials in order of blocks.

    Reads 4 * DV + 8 bytes per partial, writes 2 * DV. A row without a query (position -1) gets zeros.
    """
    head = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    row = sample * tl.num_programs(0) + head
    last = tl.load(position + sample * position_step)
    chosen = _selection_of(selected, head, sample, samples, TOPK)
    PARTS: tl.constexpr = TOPK * SPLITS
    row_lse = partial_lse + row * PARTS
    lse, _ = _part_lse(row_lse, chosen, tl.arange(0, PARTS_PADDED), sample * blocks, last, PARTS, SPLITS, SPLIT, BLOCK)
    m = tl.max(lse, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    dv = tl.arange(0, DV_PADDED)
    acc = tl.zeros([DV_PADDED], tl.float32)
    norm = tl.zeros([], tl.float32)
    for first in tl.range(0, PARTS, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        part_lse, written = _part_lse(row_lse, chosen, part, sample * blocks, last, PARTS, SPLITS, SPLIT, BLOCK)
        weight = tl.exp2(part_lse - m)
        pointer = partial + (row * PARTS + part)[:, None] * DV + dv[None, :]
        o = tl.load(pointer, mask=written[:, None] & (dv < DV)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * o, 0)
        norm += tl.sum(weight, 0)
    result = tl.where(last < 0, 0.0, acc / tl.where(last < 0, 1.0, norm))
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)


def update_centroids(
    k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, count: Tensor, centroids: Tensor, block_size: int,
    at_most: int,
) -> None:  # fmt: skip
    """See `backend.Backend.update_centroids`."""
    samples, most, heads, dim = centroids.shape
    tiles = count.shape[2]
    if centroids.numel() == 0:
        return
    config = configs.centroids(dim, block_size, k.element_size())
    lanes = min(next_power_of_2(max(at_most, 1)), COUNT_TILE)
    launch_kernel(update_centroids_kernel, (samples * heads * tiles, lanes),
        k, slots, before, lengths, count, centroids, k.stride(0), k.stride(1), k.stride(2), slots.stride(0),
        before.stride(0), lengths.stride(0), heads, most, tiles, LANES=lanes, BLOCK=block_size, D=dim,
        D_PADDED=next_power_of_2(dim), KEYS=config.keys, TILE=COUNT_TILE, num_warps=config.num_warps,
    )  # fmt: skip
    # Every program has read the count by now.
    first = torch.arange(tiles, device=count.device, dtype=torch.int32) * COUNT_TILE
    count.copy_((lengths[:, None, None] // block_size - first).clamp(0, COUNT_TILE).expand_as(count))


def select_for_decoding(
    q: Tensor, k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor, rows: QueryRows,
    count: Tensor, centroids: Tensor, block_size: int, topk: int,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.select_for_decoding`."""
    samples, most, heads, dim = centroids.shape
    q_heads, tiles = q.shape[1], count.shape[2]
    if topk == 1 or topk > MOST_TOPK or most > MOST_BLOCKS or q.numel() == 0:
        update_centroids(
            k, slots=slots, before=before, lengths=lengths, count=count, centroids=centroids, block_size=block_size,
            at_most=1,
        )  # fmt: skip
        return select_blocks(q, centroids=centroids.flatten(0, 1), rows=rows, topk=topk)
    keys = torch.empty(samples * q_heads, most, dtype=torch.int32, device=q.device)
    selected = torch.empty(q_heads, samples, topk, dtype=selection_dtype(samples * most), device=q.device)
    config = configs.centroids(dim, block_size, k.element_size())
    launch_kernel(score_kernel, (samples * heads * tiles,),
        q, k, slots, before, lengths, position, count, centroids, keys, q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), k.stride(2), slots.stride(0), before.stride(0), lengths.stride(0), position.stride(0), heads,
        q_heads // heads, most, tiles, BLOCK=block_size, D=dim, D_PADDED=padded(dim), KEYS=config.keys,
        TILE=COUNT_TILE, ROWS=configs.GATE_ROWS, num_warps=4,
    )  # fmt: skip
    launch_kernel(select_kernel, (q_heads, samples),
        keys, position, selected, position.stride(0), samples, most, BLOCK=block_size, TOPK=topk,
        SLOTS=next_power_of_2(topk), BLOCKS=most, num_warps=4 if most <= 1024 else 8,
    )  # fmt: skip
    return selected


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, position: Tensor, selected: Tensor, blocks: int, block_size: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.attend_selected`; partials and sums in fp32."""
    samples, q_heads, dim = q.shape
    dim_v, topk, group = v.shape[3], selected.shape[2], q_heads // k.shape[2]
    out = torch.empty(samples, q_heads, dim_v, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    config = configs.DECODE
    split = min(config.split, padded(block_size))
    splits = cdiv(block_size, split)
    parts = topk * splits
    partial = torch.empty(samples * q_heads, parts, dim_v, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(samples * q_heads, parts, dtype=torch.float32, device=q.device)
    launch_kernel(attend_selected_kernel, (q_heads, parts, samples),
        q, k, v, slots, position, selected, partial, partial_lse, scale * LOG2E, q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), slots.stride(0), position.stride(0), samples,
        blocks, group, TOPK=topk, SLOTS=next_power_of_2(topk), SPLITS=splits, SPLIT=split, BLOCK=block_size, D=dim,
        D_PADDED=padded(dim), DV=dim_v, DV_PADDED=padded(dim_v), KEYS=min(config.keys, split), ROWS=padded(group),
        num_warps=config.num_warps,
    )  # fmt: skip
    launch_kernel(merge_splits_kernel, (q_heads, samples),
        partial, partial_lse, selected, position, out, position.stride(0), samples, blocks, TOPK=topk, SPLITS=splits,
        SPLIT=split, BLOCK=block_size, PARTS_PADDED=next_power_of_2(parts), DV=dim_v, DV_PADDED=padded(dim_v),
        AT_ONCE=16, num_warps=4,
    )  # fmt: skip
    return out
