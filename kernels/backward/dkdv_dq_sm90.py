"""Gluon kernel for dK, dV and the partial dq on Hopper where one tile of keys holds a block.

`gluon_rows.py` has the rules of ordering.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..gluon_rows import barrier, decode, gather_layout, line_layout, offset_of, product_layout, warp_layout
from .portable_kernels import LOG2E, UNALIGNED, VARYING
from .rows_sm90 import copy_rows, load_scalars, program_again, store_dkdv, unit_bounds, work_unit


@gluon.jit
def _store_dq(
    dq_done, dq, code_s, valid, cols, dq_head, dq_token, dq_slot, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store a tile's partial dq in the slots of its rows, which are multiples of 16 elements apart."""
    code = code_s.load(gl.SliceLayout(1, LAYOUT))
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    row = offset_of(token, head, dq_token, dq_head, HEAD_BITS) + (code & ((1 << SLOT_BITS) - 1))
    at = dq + ((row * (dq_slot >> 4)).to(gl.int64) * 16)[:, None] + cols[None, :]
    gl.store(at, gl.convert_layout(dq_done, LAYOUT), mask=valid[:, None] & (cols >= 0)[None, :])


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dkdv_dq_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, start, length, segment_bin, dk, dv, dq, sums,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, dk_row, dk_head, dv_row, dv_head,
    lse_head, lse_token, delta_head, delta_token, dq_head, dq_token, dq_slot, start_head, n_bins, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, KEYS: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
    SEGMENT: gl.constexpr, ACCUMULATE: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of one block of KEYS keys over the rows of its bin or of one segment of it, and their partial dq.

    Reads 4 * KEYS * D bytes of K and V once and 4 * D + 16 bytes per row; writes 2 * KEYS * D sums and 2 * D bytes per row.
    Work units are those of `portable_kernels.dkdv_kernel`, bins of HEADS kv heads in turns. dS goes through shared memory to be
    an operand of dS^T K. The store of a tile's dq overlaps with the next tile's S^T.
    """
    STAGES: gl.constexpr = AHEAD + 1
    CODES: gl.constexpr = AHEAD + 2  # stages of the entries, which are last read when the tile's dq is stored
    unit = work_unit(gl.program_id(0), n_bins, n_blocks, 1, HEADS)
    bin_, _, begin, count, first_key, held = unit_bounds(
        unit, pointer, segment_bin, start, length, n_bins, n_blocks, start_head, SEGMENT
    )
    if (first_key < 0) | ((count == 0) & ACCUMULATE):
        return
    kv_head = (bin_ // n_blocks).to(gl.int64)
    first_head = kv_head * group

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER))
    row = (first_key + key).to(gl.int64)
    inside = (key < held)[:, None] & (cols < D)[None, :]
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], DTYPE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_at = k + (row * k_row + kv_head * k_head)[:, None] + cols[None, :]
    v_at = v + (row * v_row + kv_head * v_head)[:, None] + cols[None, :]
    k_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    # The wait for the first tile of rows covers these copies.
    async_copy.async_copy_global_to_shared(k_s, k_at, mask=inside)
    async_copy.async_copy_global_to_shared(v_s, v_at, mask=inside)
    async_copy.commit_group()
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], ROWS_LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], ROWS_LAYOUT)
    ds_s = gl.allocate_shared_memory(DTYPE, [2, KEYS, ROWS], DS)
    lse_s = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [2, ROWS], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [CODES, ROWS], FLAT)

    SCORE: gl.constexpr = product_layout(ROWS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    DQ: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, WARPS // 4], instr_shape=[16, D * 4 // WARPS, 16]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    score_key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORE))
    LINE: gl.constexpr = line_layout(WARPS)
    WARP: gl.constexpr = warp_layout(ROWS, WARPS)
    zero = gl.zeros([KEYS, ROWS], gl.float32, SCORE)
    zero_dq = gl.zeros([ROWS, D], gl.float32, DQ)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHER))
    line = gl.arange(0, ROWS, layout=LINE)
    entry += begin
    q += first_head * q_head
    dout += first_head * dout_head
    lse += first_head * lse_head
    delta += first_head * delta_head
    dq += first_head * dq_head * dq_slot
    last = gl.maximum(count - 1, 0)  # rows past the end repeat the last one with weight 0
    factor = scale * LOG2E
    n = (count + ROWS - 1) // ROWS
    if n > 0:
        for j in gl.static_range(AHEAD):
            at = gl.minimum(j * ROWS + r, last)
            copy_rows(
                q, dout, gl.load(entry + at), q_s.index(j), do_s.index(j), cols, q_token, q_head, dout_token, dout_head,
                HEAD_BITS, SLOT_BITS,
            )  # fmt: skip
            code_s.index(j).store(gl.load(entry + gl.minimum(j * ROWS + line, last)))
    line_code = gl.load(entry + gl.minimum(line, last), mask=line < n * ROWS, other=0)
    row_lse, row_delta, limit = load_scalars(
        lse, delta, position, line_code, line < count, held, lse_head, lse_token, delta_head, delta_token,
        HEAD_BITS, SLOT_BITS, TOPK,
    )  # fmt: skip
    line_code = gl.load(entry + gl.minimum(AHEAD * ROWS + line, last), mask=line < n * ROWS, other=0)
    dk_sum = gl.zeros([KEYS, D], gl.float32, SUM)
    dv_sum = gl.zeros([KEYS, D], gl.float32, SUM)
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
        masked = gl.min(limit_s.index(i % 2).load(WARP), 0) < KEYS - 1
        lse_by_row = lse_s.index(i % 2).load(BY_ROW)
        s = warpgroup_mma_wait(1, deps=(s_run,))
        p = gl.exp2(s * factor - lse_by_row[None, :])
        if masked:
            p = gl.where(score_key[:, None] <= limit_s.index(i % 2).load(BY_ROW)[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(DTYPE), LEFT)
        dv_run = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        ds = (p * (dp - delta_s.index(i % 2).load(BY_ROW)[None, :])).to(DTYPE)
        ds_i = ds_s.index(i % 2)  # two stages: the addresses of a single one would be kept across the loop and spill
        ds_i.store(ds)
        ds_left = gl.convert_layout(ds, LEFT)
        fence_async_shared()
        barrier()
        dq_run = warpgroup_mma(ds_i.permute((1, 0)), k_s, zero_dq, use_acc=False, is_async=True)
        dk_run = warpgroup_mma(ds_left, q_i, dk_sum, is_async=True)
        row_lse, row_delta, limit = load_scalars(
            lse, delta, position, code_s.index((i + 1) % CODES).load(LINE), (i + 1) * ROWS + line < count, held,
            lse_head, lse_token, delta_head, delta_token, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        line_code = gl.load(entry + gl.minimum((i + 1 + AHEAD) * ROWS + line, last))
        # Overwrites the stage of tile i - 1. All warps waited for its products before the barrier above.
        copy_rows(
            q, dout, code_s.index((i + AHEAD) % CODES).load(gl.SliceLayout(1, GATHER)), q_s.index(ahead),
            do_s.index(ahead), cols, q_token, q_head, dout_token, dout_head, HEAD_BITS, SLOT_BITS,
        )  # fmt: skip
        dv_sum, p_left, dq_tile, dk_sum, ds_left = warpgroup_mma_wait(0, deps=(dv_run, p_left, dq_run, dk_run, ds_left))
        _store_dq(
            (dq_tile * scale).to(DTYPE), dq, code_s.index(i % CODES), i * ROWS + r < count, cols, dq_head, dq_token, dq_slot,
            HEAD_BITS, SLOT_BITS, GATHER,
        )  # fmt: skip
    async_copy.wait_group(0)
    store_dkdv(
        program_again(), dk_sum, dv_sum, scale, dk, dv, sums, segment_bin, start, length, dk_row, dk_head, dv_row, dv_head,
        n_bins, n_blocks, start_head, D, KEYS, TILES, ACCUMULATE, WARPS, HEADS,
    )  # fmt: skip
