"""Gluon kernel for dK, dV and the partial dq on Hopper where one tile of keys holds a block; `hopper_backward.py` launches it.

The rules of ordering are those of `hopper_backward_kernels`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .backward_kernels import UNALIGNED, VARYING
from .hopper_backward_kernels import (
    LOG2E,
    _bounds,
    _copy_rows,
    _decode,
    _load_scalars,
    _offset,
    _reload,
    _unit,
    _write,
    barrier,
)


@gluon.jit
def _store_dq(
    dq_done, dq, code_s, valid, cols, dq_h, dq_t, dq_s, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store a tile's partial dq in the slots of its rows."""
    code = code_s.load(gl.SliceLayout(1, LAYOUT))
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    row = _offset(token, head, dq_t, dq_h, HEAD_BITS) + (code & ((1 << SLOT_BITS) - 1))
    at = dq + (row * dq_s)[:, None] + cols[None, :]
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
    CODES: gl.constexpr = AHEAD + 2  # a tile's are read last when its dq is stored
    unit = _unit(n_bins, 1)
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
    k_s = gl.allocate_shared_memory(T, [BK, D], TILE)
    v_s = gl.allocate_shared_memory(T, [BK, D], TILE)
    # Waited for with the first tile of rows.
    async_copy.async_copy_global_to_shared(k_s, k_at, mask=inside)
    async_copy.async_copy_global_to_shared(v_s, v_at, mask=inside)
    async_copy.commit_group()
    q_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    do_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    ds_s = gl.allocate_shared_memory(T, [2, BK, R], DS)
    lse_s = gl.allocate_shared_memory(gl.float32, [2, R], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, R], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [2, R], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [CODES, R], FLAT)

    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, R, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, NW // 4], instr_shape=[16, D * 4 // NW, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    score_key = gl.arange(0, BK, layout=gl.SliceLayout(1, SCORE))
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    WARP: gl.constexpr = gl.BlockedLayout([R // 32], [32], [NW], [0])  # every warp holds all rows of a tile
    zero = gl.zeros([BK, R], gl.float32, SCORE)
    zero_dq = gl.zeros([R, D], gl.float32, DQ)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    line = gl.arange(0, R, layout=LINE)
    entry += begin
    q += head0 * q_h
    dout += head0 * dout_h
    lse += head0 * lse_h
    delta += head0 * delta_h
    dq += head0 * dq_h * dq_s
    last = gl.maximum(count - 1, 0)  # rows past the end repeat the last one, and count for nothing
    factor = scale * LOG2E
    n = (count + R - 1) // R
    if n > 0:
        for j in gl.static_range(AHEAD):
            at = gl.minimum(j * R + r, last)
            _copy_rows(
                q, dout, gl.load(entry + at), q_s.index(j), do_s.index(j), cols, q_t, q_h, dout_t, dout_h, HEAD_BITS,
                SLOT_BITS,
            )  # fmt: skip
            code_s.index(j).store(gl.load(entry + gl.minimum(j * R + line, last)))
    line_code = gl.load(entry + gl.minimum(line, last), mask=line < n * R, other=0)
    row_lse, row_delta, limit = _load_scalars(
        lse, delta, position, line_code, line < count, length, lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS,
        TOPK,
    )  # fmt: skip
    line_code = gl.load(entry + gl.minimum(AHEAD * R + line, last), mask=line < n * R, other=0)
    dk_sum = gl.zeros([BK, D], gl.float32, SUM)
    dv_sum = gl.zeros([BK, D], gl.float32, SUM)
    for i in range(n):
        stage = i % STAGES
        ahead = (i + AHEAD) % STAGES
        async_copy.wait_group(AHEAD - 1)
        lse_s.index(i % 2).store(row_lse)
        delta_s.index(i % 2).store(row_delta)
        limit_s.index(i % 2).store(limit)
        code_s.index((i + AHEAD) % CODES).store(line_code)
        fence_async_shared()
        barrier()
        q_i = q_s.index(stage)
        do_i = do_s.index(stage)
        s_run = warpgroup_mma(k_s, q_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp_run = warpgroup_mma(v_s, do_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        masked = gl.min(limit_s.index(i % 2).load(WARP), 0) < BK - 1
        s = warpgroup_mma_wait(1, deps=(s_run,))
        p = gl.exp2(s * factor - lse_s.index(i % 2).load(BY_ROW)[None, :])
        if masked:
            p = gl.where(score_key[:, None] <= limit_s.index(i % 2).load(BY_ROW)[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(T), LEFT)
        dv_run = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        ds = (p * (dp - delta_s.index(i % 2).load(BY_ROW)[None, :])).to(T)
        ds_i = ds_s.index(i % 2)  # two: were there one, its addresses would be kept over the loop, and spill
        ds_i.store(ds)
        ds_left = gl.convert_layout(ds, LEFT)
        fence_async_shared()
        barrier()
        dq_run = warpgroup_mma(ds_i.permute((1, 0)), k_s, zero_dq, use_acc=False, is_async=True)
        dk_run = warpgroup_mma(ds_left, q_i, dk_sum, is_async=True)
        row_lse, row_delta, limit = _load_scalars(
            lse, delta, position, code_s.index((i + 1) % CODES).load(LINE), (i + 1) * R + line < count, length,
            lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        line_code = gl.load(entry + gl.minimum((i + 1 + AHEAD) * R + line, last))
        # The stage of tile i - 1: all warps waited for its products before the barrier above.
        _copy_rows(
            q, dout, code_s.index((i + AHEAD) % CODES).load(gl.SliceLayout(1, GATHER)), q_s.index(ahead),
            do_s.index(ahead), cols, q_t, q_h, dout_t, dout_h, HEAD_BITS, SLOT_BITS,
        )  # fmt: skip
        dv_sum, p_left, dq_tile, dk_sum, ds_left = warpgroup_mma_wait(0, deps=(dv_run, p_left, dq_run, dk_run, ds_left))
        _store_dq(
            (dq_tile * scale).to(T), dq, code_s.index(i % CODES), i * R + r < count, cols, dq_h, dq_t, dq_s,
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
