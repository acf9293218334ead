"""Triton kernels of the backward of block attention, for sm_80 and newer.

Sizes and strides that change from chunk to chunk are not specialised, and small integer views may start at any address: one
compiled kernel serves every step.
"""

import triton
import triton.language as tl

from ..sizes import LOG2E as _LOG2E
from .segments import segment_bounds, work_unit

LOG2E = tl.constexpr(_LOG2E)
VARYING = ["lse_head", "delta_head", "dq_head", "n_bins", "n_blocks", "start_head", "scale"]
UNALIGNED = [
    "lse", "delta", "position", "pointer", "entry", "start", "length", "segment_bin", "item_bin", "item_start",
    "item_end",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dkdv_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, start, length, segment_bin, dk, dv, dq, sums,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, dk_row, dk_head, dv_row, dv_head,
    lse_head, lse_token, delta_head, delta_token, dq_head, dq_token, dq_slot, start_head, n_bins, n_blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, HEAD_BITS: tl.constexpr,
    SLOT_BITS: tl.constexpr, TOPK: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, SEGMENT: tl.constexpr, FUSED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of KEYS keys of one block, over the rows of its bin or of one segment of it.

    With FUSED, where one tile of keys holds the block, also the rows' partial dq. A work unit (`work_unit`) is a bin of
    ordinary length or a segment of a long one, whose sums go to `sums`; TILES programs share a unit.

    Reads 2 * KEYS * (D + DV) bytes of K and V once and 2 * (D + DV) + 16 bytes per row (bf16); writes KEYS * (D + DV)
    sums, and with FUSED 2 * D bytes per row.
    """
    unit = work_unit(tl.program_id(0) // TILES, tl.num_programs(0) // TILES, n_bins)
    tile = tl.program_id(0) % TILES
    is_segment = unit >= n_bins
    c = tl.maximum(unit - n_bins, 0)
    bin_ = tl.where(is_segment, tl.load(segment_bin + c, mask=is_segment, other=-1), unit)
    if bin_ < 0:
        return
    first = tl.load(pointer + bin_)
    last = tl.load(pointer + bin_ + 1)
    if (last - first > 2 * SEGMENT) != is_segment:
        return
    kv_head = bin_ // n_blocks
    block = bin_ % n_blocks
    first_key = tl.load(start + kv_head.to(tl.int64) * start_head + block)
    held = tl.load(length + block)
    if (first_key < 0) | (tile * KEYS >= held) | ((first == last) & ACCUMULATE):
        return
    segment_begin, segment_end = segment_bounds(first, last, c, SEGMENT)
    begin = tl.where(is_segment, segment_begin, first)
    end = tl.where(is_segment, segment_end, last)

    d = tl.arange(0, D_PADDED)
    e = tl.arange(0, DV_PADDED)
    r = tl.arange(0, ROWS)
    key = tile * KEYS + tl.arange(0, KEYS)
    key_row = (first_key + key).to(tl.int64)[:, None]
    k_mask = (key < held)[:, None] & (d < D)[None, :]
    v_mask = (key < held)[:, None] & (e < DV)[None, :]
    head64 = kv_head.to(tl.int64)
    k_tile = tl.load(k + key_row * k_row + head64 * k_head + d[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + key_row * v_row + head64 * v_head + e[None, :], mask=v_mask, other=0.0)
    dk_sum = tl.zeros([KEYS, D_PADDED], tl.float32)
    dv_sum = tl.zeros([KEYS, DV_PADDED], tl.float32)
    for i in tl.range(begin, end, ROWS, num_stages=STAGES):
        ok = i + r < end
        code = tl.load(entry + i + r, mask=ok, other=0)
        slot = (code & ((1 << SLOT_BITS) - 1)).to(tl.int32)
        head = ((code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(tl.int64) + head64 * group
        token = (code >> (HEAD_BITS + SLOT_BITS)).to(tl.int64)
        q_rows = tl.load(
            q + (token * q_token + head * q_head)[:, None] + d[None, :],
            mask=ok[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        # The last slot is the own block. Every key of an earlier block is visible.
        limit = tl.load(position + token, mask=ok & (slot == TOPK - 1), other=0)
        limit = tl.where(slot == TOPK - 1, limit, held - 1)
        row_lse = tl.load(lse + head * lse_head + token * lse_token, mask=ok, other=float("inf"))
        row_delta = tl.load(delta + head * delta_head + token * delta_token, mask=ok, other=0.0)
        do_rows = tl.load(
            dout + (token * dout_token + head * dout_head)[:, None] + e[None, :],
            mask=ok[:, None] & (e < DV)[None, :], other=0.0,
        )  # fmt: skip
        # S^T directly from K Q^T: on Hopper the transposed result of a product must not be an operand of the next.
        s = tl.dot(k_tile, tl.trans(q_rows), input_precision="ieee")
        visible = key[:, None] <= limit[None, :]
        p = tl.where(visible, tl.exp2(s * (scale * LOG2E) - row_lse[None, :]), 0.0)
        dv_sum = tl.dot(p.to(do_rows.dtype), do_rows, dv_sum, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_rows), input_precision="ieee")
        ds = tl.where(visible, p * (dp - row_delta[None, :]), 0.0).to(q_rows.dtype)
        dk_sum = tl.dot(ds, q_rows, dk_sum, input_precision="ieee")
        if FUSED:
            dq_rows = tl.dot(tl.trans(k_tile), ds, input_precision="ieee") * scale
            dq_at = dq + (head * dq_head + token * dq_token + slot) * dq_slot
            tl.store(dq_at[None, :] + d[:, None], dq_rows.to(dq.dtype.element_ty), mask=ok[None, :] & (d < D)[:, None])
    dk_sum *= scale
    if is_segment:
        at = sums + (c.to(tl.int64) * TILES * KEYS + key)[:, None] * (D + DV)
        tl.store(at + d[None, :], dk_sum, mask=k_mask)
        tl.store(at + D + e[None, :], dv_sum, mask=v_mask)
    else:
        dk_at = dk + key_row * dk_row + head64 * dk_head + d[None, :]
        dv_at = dv + key_row * dv_row + head64 * dv_head + e[None, :]
        if ACCUMULATE:
            dk_sum += tl.load(dk_at, mask=k_mask, other=0.0).to(tl.float32)
            dv_sum += tl.load(dv_at, mask=v_mask, other=0.0).to(tl.float32)
        tl.store(dk_at, dk_sum.to(dk.dtype.element_ty), mask=k_mask)
        tl.store(dv_at, dv_sum.to(dv.dtype.element_ty), mask=v_mask)


@triton.jit(do_not_specialize=["lse_head", "delta_head", "dq_head", "n_blocks", "start_head"])
def dq_kernel(
    q, dout, k, v, lse, delta, position, entry, item_bin, item_start, item_end, start, length, dq,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, lse_head, lse_token, delta_head, delta_token,
    dq_head, dq_token, dq_slot, start_head, n_blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, HEAD_BITS: tl.constexpr,
    SLOT_BITS: tl.constexpr, TOPK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: partial dq of one work item's rows for its block. ROWS gathered rows stay, the block's keys stream.

    Reads 2 * (D + DV) + 16 bytes and writes 2 * D bytes per row, and reads 2 * (D + DV) bytes per key for every ROWS
    rows (bf16; keys mostly from L2).
    """
    bin_ = tl.load(item_bin + tl.program_id(0))
    if bin_ < 0:
        return
    kv_head = (bin_ // n_blocks).to(tl.int64)
    block = bin_ % n_blocks
    first_key = tl.load(start + kv_head * start_head + block)
    held = tl.load(length + block)
    if first_key < 0:
        return
    first = tl.load(item_start + tl.program_id(0))
    end = tl.load(item_end + tl.program_id(0))
    d = tl.arange(0, D_PADDED)
    e = tl.arange(0, DV_PADDED)
    r = tl.arange(0, ROWS)
    n = tl.arange(0, KEYS)
    k_base = k + kv_head * k_head
    v_base = v + kv_head * v_head
    for i in range(first, end, ROWS):
        ok = i + r < end
        code = tl.load(entry + i + r, mask=ok, other=0)
        slot = (code & ((1 << SLOT_BITS) - 1)).to(tl.int32)
        head = ((code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(tl.int64) + kv_head * group
        token = (code >> (HEAD_BITS + SLOT_BITS)).to(tl.int64)
        q_rows = tl.load(
            q + (token * q_token + head * q_head)[:, None] + d[None, :],
            mask=ok[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        do_rows = tl.load(
            dout + (token * dout_token + head * dout_head)[:, None] + e[None, :],
            mask=ok[:, None] & (e < DV)[None, :], other=0.0,
        )  # fmt: skip
        own = ok & (slot == TOPK - 1)
        limit = tl.where(own, tl.load(position + token, mask=own, other=0), held - 1)
        limit = tl.where(ok, limit, -1)
        row_lse = tl.load(lse + head * lse_head + token * lse_token, mask=ok, other=float("inf"))
        row_delta = tl.load(delta + head * delta_head + token * delta_token, mask=ok, other=0.0)
        total = tl.zeros([ROWS, D_PADDED], tl.float32)
        # Keys that no row of the tile sees would add exact zeros: skipping them changes no bit.
        for j in tl.range(0, tl.max(limit, 0) + 1, KEYS, num_stages=STAGES):
            key = j + n
            key_row = (first_key + key).to(tl.int64)[:, None]
            inside = (key < held)[:, None]
            k_tile = tl.load(k_base + key_row * k_row + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
            v_tile = tl.load(v_base + key_row * v_row + e[None, :], mask=inside & (e < DV)[None, :], other=0.0)
            s = tl.dot(q_rows, tl.trans(k_tile), input_precision="ieee")
            dp = tl.dot(do_rows, tl.trans(v_tile), input_precision="ieee")
            p = tl.exp2(s * (scale * LOG2E) - row_lse[:, None])
            ds = tl.where(key[None, :] <= limit[:, None], p * (dp - row_delta[:, None]), 0.0)
            total = tl.dot(ds.to(k_tile.dtype), k_tile, total, input_precision="ieee")
        dq_at = dq + (head * dq_head + token * dq_token + slot) * dq_slot
        tl.store(
            dq_at[:, None] + d[None, :], (total * scale).to(dq.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :]
        )
