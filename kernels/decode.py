"""Decoding: one query per sample and q head against the keys of a cache, selected blocks only.

1. `update_centroids_kernel` adds the centroids of blocks that have become complete since the last step: usually none.
2. The gate (`gate.py`) selects blocks, as in every forward pass.
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
from .sizes import LOG2E, cdiv, next_power_of_2, padded


@triton.jit(do_not_specialize=["most"], do_not_specialize_on_alignment=["slots", "before", "lengths", "count"])
def update_centroids_kernel(
    k, slots, before, lengths, count, centroids, k_sample, k_token, k_head, slots_sample, before_step, lengths_step,
    heads, most,
    LANES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: missing centroids of one (sample, kv head), every LANES-th of them.

    Reads 2 * BLOCK * D bytes and 4 * BLOCK of the table per centroid, writes 2 * D. Sums in the order of `centroids_kernel`, so
    that a centroid has the same bits. With one lane the program also updates the count of its (sample, kv head).
    """
    program = tl.program_id(0)
    sample = (program // heads).to(tl.int64)
    head = program % heads
    known = tl.minimum(tl.load(count + program), tl.load(before + sample * before_step) // BLOCK)
    complete = tl.minimum(tl.load(lengths + sample * lengths_step) // BLOCK, most)
    row = tl.arange(0, KEYS)
    column = tl.arange(0, D_PADDED)
    base = k + sample * k_sample + head.to(tl.int64) * k_head
    table = slots + sample * slots_sample
    for block in tl.range(known + tl.program_id(1), complete, LANES):
        total = tl.zeros([KEYS, D_PADDED], tl.float32)
        for first in tl.range(0, BLOCK, KEYS, num_stages=3):
            inside = first + row < BLOCK
            slot = tl.load(table + block * BLOCK + first + row, mask=inside, other=0)
            pointer = base + slot.to(tl.int64)[:, None] * k_token + column[None, :]
            total += tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0).to(tl.float32)
        mean = tl.math.div_rn(tl.sum(total, 0), tl.full([D_PADDED], BLOCK, tl.float32))
        out_at = centroids + ((sample * most + block) * heads + head) * D + column
        tl.store(out_at, mean.to(centroids.dtype.element_ty), mask=column < D)
    if LANES == 1:
        tl.store(count + program, complete)


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["slots", "position", "selected"])
def attend_selected_kernel(
    q, k, v, slots, position, selected, partial, partial_lse, scale_log2, q_sample, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, slots_sample, position_step, samples, blocks, group,
    TOPK: tl.constexpr, SPLITS: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: one row (sample, q head) times at most SPLIT keys of one selected block.

    Reads 2 * (D + DV) + 4 bytes per visible key, writes one normalised fp32 partial and its log-sum-exp in base 2, or only -inf
    where the slot is empty or none of the keys is visible. Programs of neighbouring q heads read the own block together.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    row = sample * tl.num_programs(0) + head
    out_row = row * (TOPK * SPLITS) + part
    number = tl.load(selected + (head.to(tl.int64) * samples + sample) * TOPK + part // SPLITS).to(tl.int64)
    begin = (number - sample * blocks) * BLOCK + (part % SPLITS) * SPLIT
    inside = tl.minimum(SPLIT, BLOCK - (part % SPLITS) * SPLIT)
    end = tl.minimum(begin + inside, tl.load(position + sample * position_step).to(tl.int64) + 1)
    if (number < 0) | (end <= begin):
        tl.store(partial_lse + out_row, float("-inf"))
        return

    kv_head = (head // group).to(tl.int64)
    d = tl.arange(0, D_PADDED)
    dv = tl.arange(0, DV_PADDED)
    query = tl.load(q + sample * q_sample + head.to(tl.int64) * q_head + d, mask=d < D, other=0.0).to(tl.float32)
    k_base = k + sample * k_sample + kv_head * k_head
    v_base = v + sample * v_sample + kv_head * v_head
    table = slots + sample * slots_sample
    m = tl.full([], float("-inf"), tl.float32)
    norm = tl.zeros([], tl.float32)
    acc = tl.zeros([DV_PADDED], tl.float32)
    for first in tl.range(begin, end, KEYS):
        at = first + tl.arange(0, KEYS)
        visible = at < end
        slot = tl.load(table + at, mask=visible, other=0).to(tl.int64)
        k_tile = tl.load(
            k_base + slot[:, None] * k_token + d[None, :], mask=visible[:, None] & (d < D)[None, :], other=0.0
        )
        v_tile = tl.load(
            v_base + slot[:, None] * v_token + dv[None, :], mask=visible[:, None] & (dv < DV)[None, :], other=0.0
        )
        score = tl.sum(k_tile.to(tl.float32) * query[None, :], 1) * scale_log2
        score = tl.where(visible, score, float("-inf"))
        m_new = tl.maximum(m, tl.max(score, 0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # all scores may be -inf so far
        weight = tl.exp2(score - shift)
        rescale = tl.exp2(m - shift)
        acc = acc * rescale + tl.sum(weight[:, None] * v_tile.to(tl.float32), 0)
        norm = norm * rescale + tl.sum(weight, 0)
        m = m_new
    weightless = m == float("-inf")
    acc = acc / tl.where(weightless, 1.0, norm)
    tl.store(partial + out_row * DV + dv, acc, mask=dv < DV)
    tl.store(partial_lse + out_row, tl.where(weightless & (norm == 0.0), m, m + tl.log2(norm)))


@triton.jit(do_not_specialize_on_alignment=["position"])
def merge_splits_kernel(
    partial, partial_lse, position, out, position_step, q_heads,
    PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One program: the output of one row, from its PARTS partials.

    Reads PARTS * (4 * DV + 8) bytes, writes 2 * DV. A row without a query (position -1) gets zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    empty = tl.load(position + (row // q_heads) * position_step) < 0
    all_parts = tl.arange(0, PARTS_PADDED)
    lse = tl.load(partial_lse + row * PARTS + all_parts, mask=all_parts < PARTS, other=float("-inf"))
    m = tl.max(lse, 0)
    m = tl.where(m == float("-inf"), 0.0, m)
    dv = tl.arange(0, DV_PADDED)
    acc = tl.zeros([DV_PADDED], tl.float32)
    norm = tl.zeros([], tl.float32)
    for first in tl.range(0, PARTS, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        part_lse = tl.load(partial_lse + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
        written = part_lse != float("-inf")
        weight = tl.exp2(part_lse - m)
        pointer = partial + (row * PARTS + part)[:, None] * DV + dv[None, :]
        o = tl.load(pointer, mask=written[:, None] & (dv < DV)[None, :], other=0.0)
        acc += tl.sum(weight[:, None] * o, 0)
        norm += tl.sum(weight, 0)
    result = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, norm))
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)


def update_centroids(
    k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, count: Tensor, centroids: Tensor, block_size: int,
    at_most: int,
) -> None:  # fmt: skip
    """See `backend.Backend.update_centroids`."""
    samples, most, heads, dim = centroids.shape
    if centroids.numel() == 0:
        return
    config = configs.centroids(dim, block_size, k.element_size())
    lanes = min(next_power_of_2(max(at_most, 1)), most)
    lanes = lanes if lanes > 2 else 1  # one program catches up with two blocks, and updates the count as well
    update_centroids_kernel[(samples * heads, lanes)](
        k, slots, before, lengths, count, centroids, k.stride(0), k.stride(1), k.stride(2), slots.stride(0),
        before.stride(0), lengths.stride(0), heads, most, LANES=lanes, BLOCK=block_size, D=dim,
        D_PADDED=next_power_of_2(dim), KEYS=config.keys, num_warps=config.num_warps,
    )  # fmt: skip
    if lanes > 1:  # every program has read the count by now
        count.copy_((lengths // block_size).clamp(max=most)[:, None].expand_as(count))


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, position: Tensor, selected: Tensor, blocks: int, block_size: int,
    scale: float,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.attend_selected`; partials and sums in fp32."""
    samples, q_heads, dim = q.shape
    dim_v, topk = v.shape[3], selected.shape[2]
    out = torch.empty(samples, q_heads, dim_v, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    config = configs.DECODE
    split = min(config.split, block_size)
    splits = cdiv(block_size, split)
    parts = topk * splits
    partial = torch.empty(samples * q_heads, parts, dim_v, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(samples * q_heads, parts, dtype=torch.float32, device=q.device)
    attend_selected_kernel[(q_heads, parts, samples)](
        q, k, v, slots, position, selected, partial, partial_lse, scale * LOG2E, q.stride(0), q.stride(1), k.stride(0),
        k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), slots.stride(0), position.stride(0), samples,
        blocks, q_heads // k.shape[2], TOPK=topk, SPLITS=splits, SPLIT=split, BLOCK=block_size, D=dim,
        D_PADDED=padded(dim), DV=dim_v, DV_PADDED=padded(dim_v), KEYS=config.keys, num_warps=config.num_warps,
    )  # fmt: skip
    merge_splits_kernel[(samples * q_heads,)](
        partial, partial_lse, position, out, position.stride(0), q_heads, PARTS=parts,
        PARTS_PADDED=next_power_of_2(parts), DV=dim_v, DV_PADDED=padded(dim_v), AT_ONCE=16, num_warps=4,
    )  # fmt: skip
    return out
