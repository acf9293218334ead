"""Gluon kernels for dK and dV on Hopper; `hopper_backward.py` says when they serve and launches them.

Ordering, which Gluon leaves to the kernel:
- A tile copied by `cp.async` is read after `wait_group`, `fence_async_shared` (the tensor cores read shared memory through
  another path than ordinary stores and copies write it) and a barrier.
- A stage is written again only when every warp has waited for the products that read it, and a barrier has passed since.
- Registers that hold the left operand of a running product stay untouched until it has been waited for: they go through
  the `deps` of the wait.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .backward_kernels import UNALIGNED, VARYING

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
LOG2E = gl.constexpr(1.4426950408889634)


def element(dtype: torch.dtype) -> gl.dtype:
    """Gluon's name for bf16 or fp16."""
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]


@gluon.jit
def _copy_rows(
    q, dout, lse, delta, position, code, q_s, do_s, lse_s, delta_s, limit_s, code_s, head0, cols,
    q_t, q_h, dout_t, dout_h, lse_h, lse_t, delta_h, delta_t,
    HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Start the copies of one tile of gathered rows, those of the entries `code`."""
    token = (code >> (HEAD_BITS + SLOT_BITS)).to(gl.int64)
    head = ((code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(gl.int64) + head0
    own = (code & ((1 << SLOT_BITS) - 1)) == TOPK - 1
    async_copy.async_copy_global_to_shared(q_s, q + (token * q_t + head * q_h)[:, None] + cols[None, :])
    async_copy.async_copy_global_to_shared(do_s, dout + (token * dout_t + head * dout_h)[:, None] + cols[None, :])
    async_copy.async_copy_global_to_shared(lse_s, lse + head * lse_h + token * lse_t)
    async_copy.async_copy_global_to_shared(delta_s, delta + head * delta_h + token * delta_t)
    async_copy.async_copy_global_to_shared(limit_s, position + token, mask=own)
    async_copy.commit_group()
    code_s.store(code)


@gluon.jit
def _limits(limit_s, code_s, valid, length, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, LAYOUT: gl.constexpr):
    """Last visible key of each row: its position in the own block, the block's end in an earlier one, -1 for no row."""
    own = (code_s.load(LAYOUT) & ((1 << SLOT_BITS) - 1)) == TOPK - 1
    return gl.where(valid, gl.where(own, limit_s.load(LAYOUT), length - 1), -1)


@gluon.jit
def _bounds(unit, pointer, piece_bin, part_start, part_length, n_bins, n_blocks, start_h, PIECE: gl.constexpr):
    """What a program works on, as in the portable kernel: `(bin, first entry, entries, first row, length)`.

    The first row is -1 where there is nothing to do.
    """
    is_piece = unit >= n_bins
    c = gl.maximum(unit - n_bins, 0)
    bin_ = gl.where(is_piece, gl.load(piece_bin + c, mask=is_piece, other=-1), unit)
    here = bin_ >= 0
    safe = gl.maximum(bin_, 0)
    first = gl.load(pointer + safe)
    last = gl.load(pointer + safe + 1)
    start = gl.load(part_start + (safe // n_blocks).to(gl.int64) * start_h + safe % n_blocks)
    length = gl.load(part_length + safe % n_blocks)
    start = gl.where(here & ((last - first > 2 * PIECE) == is_piece), start, -1)
    begin = gl.where(is_piece & (first // PIECE + 1 != c), c * PIECE, first)
    end = gl.where(is_piece, gl.minimum(last, (c + 1) * PIECE), last)
    return safe, begin, end - begin, start, length


@gluon.jit
def _reload(piece_bin, part_start, part_length, n_bins, n_blocks, start_h, NT: gl.constexpr):
    """`(unit, piece, kv head, first row, length)` of a program that has something to do."""
    unit = gl.program_id(0) // NT
    c = gl.maximum(unit - n_bins, 0)
    bin_ = gl.where(unit >= n_bins, gl.load(piece_bin + c, mask=unit >= n_bins, other=0), unit)
    start = gl.load(part_start + (bin_ // n_blocks).to(gl.int64) * start_h + bin_ % n_blocks)
    return unit, c, (bin_ // n_blocks).to(gl.int64), start, gl.load(part_length + bin_ % n_blocks)


@gluon.jit
def _write(
    total, target, pieces, is_piece, c, start, head, tile, length, stride_n, stride_h, D: gl.constexpr,
    BK: gl.constexpr, NT: gl.constexpr, ACCUMULATE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store a tile of dK or dV, add it, or leave it in the buffer for pieces."""
    key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    mask = (key < length)[:, None] & (cols < D)[None, :]
    total = gl.convert_layout(total, LAYOUT)
    if is_piece:
        piece_at = pieces + (c.to(gl.int64) * NT * BK + key)[:, None] * (2 * D) + cols[None, :]
        gl.store(piece_at, total, mask=mask)
    else:
        at = target + ((start + key).to(gl.int64) * stride_n + head * stride_h)[:, None] + cols[None, :]
        if ACCUMULATE:
            total += gl.load(at, mask=mask, other=0.0).to(gl.float32)
        gl.store(at, total.to(target.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dkdv_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, part_start, part_length, piece_bin, dk, dv, dq, pieces,
    q_t, q_h, dout_t, dout_h, k_n, k_h, v_n, v_h, dk_n, dk_h, dv_n, dv_h, lse_h, lse_t, delta_h, delta_t,
    dq_h, dq_t, dq_s, start_h, n_bins, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, BK: gl.constexpr,
    R: gl.constexpr, NT: gl.constexpr, AHEAD: gl.constexpr, NW: gl.constexpr, T: gl.constexpr, PIECE: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """dK and dV of BK keys of one block over the rows of its bin, or of one piece of it; programs as in the portable one.

    Reads 2 BK D elements once and 2 D elements + 16 bytes a row; writes 2 BK D sums. The products of a tile's dV and dK
    run on beside the next tile's S^T, so a stage is free two tiles later: AHEAD + 2 stages.
    """
    STAGES: gl.constexpr = AHEAD + 2
    unit = gl.program_id(0) // NT
    tile = gl.program_id(0) % NT
    bin_, begin, count, start, length = _bounds(
        unit, pointer, piece_bin, part_start, part_length, n_bins, n_blocks, start_h, PIECE
    )
    if (start < 0) | (tile * BK >= length) | ((count == 0) & ACCUMULATE):
        return
    kv_head = (bin_ // n_blocks).to(gl.int64)
    head0 = kv_head * group

    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, GATHER))
    row = (start + key).to(gl.int64)
    inside = (key < length)[:, None] & (cols < D)[None, :]
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], T)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_at = k + (row * k_n + kv_head * k_h)[:, None] + cols[None, :]
    v_at = v + (row * v_n + kv_head * v_h)[:, None] + cols[None, :]
    k_s = gl.allocate_shared_memory(T, [BK, D], TILE, gl.load(k_at, mask=inside, other=0.0))
    v_s = gl.allocate_shared_memory(T, [BK, D], TILE, gl.load(v_at, mask=inside, other=0.0))
    q_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    do_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, R], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, R], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [STAGES, R], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [STAGES, R], FLAT)

    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, R, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    score_key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, SCORE))
    score_row = gl.arange(0, R, layout=BY_ROW)
    zero = gl.zeros([BK, R], gl.float32, SCORE)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    entry += begin
    last = gl.maximum(count - 1, 0)  # rows past the end repeat the last one, and count for nothing
    factor = scale * LOG2E
    n = (count + R - 1) // R
    if n > 0:
        for j in gl.static_range(AHEAD):
            at = gl.minimum(j * R + r, last)
            _copy_rows(
                q, dout, lse, delta, position, gl.load(entry + at), q_s.index(j), do_s.index(j),
                lse_s.index(j), delta_s.index(j), limit_s.index(j), code_s.index(j), head0, cols, q_t, q_h, dout_t,
                dout_h, lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK,
            )  # fmt: skip
    code = gl.load(entry + gl.minimum(AHEAD * R + r, last), mask=r < n * R, other=0)
    dk_sum = warpgroup_mma_init(gl.zeros([BK, D], gl.float32, SUM))
    dv_sum = warpgroup_mma_init(gl.zeros([BK, D], gl.float32, SUM))
    p_left = gl.zeros([BK, R], T, LEFT)
    ds_left = gl.zeros([BK, R], T, LEFT)
    for i in range(n):
        stage = i % STAGES
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        barrier()
        # This stage was read by tile i - 2, whose products all warps waited for before the barrier above.
        nxt = (i + AHEAD) % STAGES
        _copy_rows(
            q, dout, lse, delta, position, code, q_s.index(nxt), do_s.index(nxt), lse_s.index(nxt),
            delta_s.index(nxt), limit_s.index(nxt), code_s.index(nxt), head0, cols, q_t, q_h, dout_t, dout_h, lse_h,
            lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        code = gl.load(entry + gl.minimum((i + 1 + AHEAD) * R + r, last))
        q_i = q_s.index(stage)
        do_i = do_s.index(stage)
        s_run = warpgroup_mma(k_s, q_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp_run = warpgroup_mma(v_s, do_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, p_left, ds_left = warpgroup_mma_wait(1, deps=(s_run, p_left, ds_left))  # and the last tile's dV and dK
        valid = i * R + score_row < count
        limit = _limits(limit_s.index(stage), code_s.index(stage), valid, length, SLOT_BITS, TOPK, BY_ROW)
        p = gl.exp2(s * factor - lse_s.index(stage).load(BY_ROW)[None, :])
        p = gl.where(score_key[:, None] <= limit[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(T), LEFT)
        dv_sum = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        # Zero where p is; not masked again.
        ds = p * (dp - delta_s.index(stage).load(BY_ROW)[None, :])
        ds_left = gl.convert_layout(ds.to(T), LEFT)
        dk_sum = warpgroup_mma(ds_left, q_i, dk_sum, is_async=True)
    dv_sum, p_left, dk_sum, ds_left = warpgroup_mma_wait(0, deps=(dv_sum, p_left, dk_sum, ds_left))
    async_copy.wait_group(0)
    tile = gl.program_id(0) % NT
    # Looked up again: kept from the start, what they lead to would spill.
    unit, c, kv_head, start, length = _reload(piece_bin, part_start, part_length, n_bins, n_blocks, start_h, NT)
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [max(128 // D, 1), min(D // 4, 32)], [NW, 1], [1, 0])
    _write(
        dk_sum * scale, dk, pieces, unit >= n_bins, c, start, kv_head, tile, length, dk_n, dk_h, D, BK, NT, ACCUMULATE,
        STORE,
    )  # fmt: skip
    _write(
        dv_sum, dv, pieces + D, unit >= n_bins, c, start, kv_head, tile, length, dv_n, dv_h, D, BK, NT, ACCUMULATE,
        STORE,
    )  # fmt: skip


@gluon.jit
def _store_dq(
    dq_done, dq, code_s, valid, cols, head0, dq_h, dq_t, dq_s, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store a tile's partial dq in the slots of its rows."""
    code = code_s.load(gl.SliceLayout(1, LAYOUT))
    token = (code >> (HEAD_BITS + SLOT_BITS)).to(gl.int64)
    head = ((code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(gl.int64) + head0
    at = dq + ((head * dq_h + token * dq_t + (code & ((1 << SLOT_BITS) - 1))) * dq_s)[:, None] + cols[None, :]
    gl.store(at, gl.convert_layout(dq_done, LAYOUT), mask=valid[:, None] & (cols >= 0)[None, :])


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dkdv_dq_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, part_start, part_length, piece_bin, dk, dv, dq, pieces,
    q_t, q_h, dout_t, dout_h, k_n, k_h, v_n, v_h, dk_n, dk_h, dv_n, dv_h, lse_h, lse_t, delta_h, delta_t,
    dq_h, dq_t, dq_s, start_h, n_bins, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, BK: gl.constexpr,
    R: gl.constexpr, NT: gl.constexpr, AHEAD: gl.constexpr, NW: gl.constexpr, T: gl.constexpr, PIECE: gl.constexpr,
    ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """As `dkdv_kernel` for blocks of BK keys, and the rows' partial dq: dS goes through shared memory for dS^T K.

    Reads 2 BK D elements once and 2 D elements + 16 bytes a row; writes 2 BK D sums and D elements a row. A tile's dq
    is stored beside the next tile's S^T.
    """
    STAGES: gl.constexpr = AHEAD + 1
    unit = gl.program_id(0)
    bin_, begin, count, start, length = _bounds(
        unit, pointer, piece_bin, part_start, part_length, n_bins, n_blocks, start_h, PIECE
    )
    if (start < 0) | ((count == 0) & ACCUMULATE):
        return
    kv_head = (bin_ // n_blocks).to(gl.int64)
    head0 = kv_head * group

    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    key = gl.arange(0, BK, layout=gl.SliceLayout(1, GATHER))
    row = (start + key).to(gl.int64)
    inside = (key < length)[:, None] & (cols < D)[None, :]
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], T)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, R], T)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_at = k + (row * k_n + kv_head * k_h)[:, None] + cols[None, :]
    v_at = v + (row * v_n + kv_head * v_h)[:, None] + cols[None, :]
    k_s = gl.allocate_shared_memory(T, [BK, D], TILE, gl.load(k_at, mask=inside, other=0.0))
    v_s = gl.allocate_shared_memory(T, [BK, D], TILE, gl.load(v_at, mask=inside, other=0.0))
    q_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    do_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    ds_s = gl.allocate_shared_memory(T, [2, BK, R], DS)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, R], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, R], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [STAGES, R], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [STAGES, R], FLAT)

    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, R, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, NW // 4], instr_shape=[16, D * 4 // NW, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    score_key = gl.arange(0, BK, layout=gl.SliceLayout(1, SCORE))
    score_row = gl.arange(0, R, layout=BY_ROW)
    zero = gl.zeros([BK, R], gl.float32, SCORE)
    zero_dq = gl.zeros([R, D], gl.float32, DQ)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    entry += begin
    last = gl.maximum(count - 1, 0)  # rows past the end repeat the last one, and count for nothing
    factor = scale * LOG2E
    n = (count + R - 1) // R
    if n > 0:
        for j in gl.static_range(AHEAD):
            at = gl.minimum(j * R + r, last)
            _copy_rows(
                q, dout, lse, delta, position, gl.load(entry + at), q_s.index(j), do_s.index(j), lse_s.index(j),
                delta_s.index(j), limit_s.index(j), code_s.index(j), head0, cols, q_t, q_h, dout_t, dout_h, lse_h,
                lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK,
            )  # fmt: skip
    dk_sum = gl.zeros([BK, D], gl.float32, SUM)
    dv_sum = gl.zeros([BK, D], gl.float32, SUM)
    for i in range(n):
        stage = i % STAGES
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        barrier()
        q_i = q_s.index(stage)
        do_i = do_s.index(stage)
        s_run = warpgroup_mma(k_s, q_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp_run = warpgroup_mma(v_s, do_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        code = gl.load(entry + gl.minimum((i + AHEAD) * R + r, last))
        s = warpgroup_mma_wait(1, deps=(s_run,))
        valid = i * R + score_row < count
        limit = _limits(limit_s.index(stage), code_s.index(stage), valid, length, SLOT_BITS, TOPK, BY_ROW)
        p = gl.exp2(s * factor - lse_s.index(stage).load(BY_ROW)[None, :])
        p = gl.where(score_key[:, None] <= limit[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(T), LEFT)
        dv_run = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        ds = (p * (dp - delta_s.index(stage).load(BY_ROW)[None, :])).to(T)
        ds_i = ds_s.index(i % 2)  # two: were there one, its addresses would be kept over the loop, and spill
        ds_i.store(ds)
        ds_left = gl.convert_layout(ds, LEFT)
        fence_async_shared()
        barrier()
        dq_run = warpgroup_mma(ds_i.permute((1, 0)), k_s, zero_dq, use_acc=False, is_async=True)
        dk_run = warpgroup_mma(ds_left, q_i, dk_sum, is_async=True)
        # The stage of tile i - 1: all warps waited for its products before the barrier above.
        ahead = (i + AHEAD) % STAGES
        _copy_rows(
            q, dout, lse, delta, position, code, q_s.index(ahead), do_s.index(ahead), lse_s.index(ahead),
            delta_s.index(ahead), limit_s.index(ahead), code_s.index(ahead), head0, cols, q_t, q_h, dout_t, dout_h,
            lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        dv_sum, p_left, dq_tile, dk_sum, ds_left = warpgroup_mma_wait(0, deps=(dv_run, p_left, dq_run, dk_run, ds_left))
        _store_dq(
            (dq_tile * scale).to(T), dq, code_s.index(stage), i * R + r < count, cols, head0, dq_h, dq_t, dq_s,
            HEAD_BITS, SLOT_BITS, GATHER,
        )  # fmt: skip
    async_copy.wait_group(0)
    # Looked up again: kept from the start, what they lead to would spill.
    unit, c, kv_head, start, length = _reload(piece_bin, part_start, part_length, n_bins, n_blocks, start_h, NT)
    STORE: gl.constexpr = gl.BlockedLayout([1, 4], [max(128 // D, 1), min(D // 4, 32)], [NW, 1], [1, 0])
    _write(
        dk_sum * scale, dk, pieces, unit >= n_bins, c, start, kv_head, 0, length, dk_n, dk_h, D, BK, NT, ACCUMULATE,
        STORE,
    )  # fmt: skip
    _write(
        dv_sum, dv, pieces + D, unit >= n_bins, c, start, kv_head, 0, length, dv_n, dv_h, D, BK, NT, ACCUMULATE,
        STORE,
    )  # fmt: skip
