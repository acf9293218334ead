"""Gluon kernel for dK and dV on Hopper, for blocks of more than one tile of keys where dq is not summed.

`gluon_rows.py` has the rules of ordering.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_rows import barrier, gather_layout, line_layout, product_layout, warp_layout
from .portable_kernels import LOG2E, UNALIGNED, VARYING
from .rows_sm90 import (
    NARROW_DKDV,
    copy_block,
    copy_rows,
    ds_layout,
    in_ds_order,
    load_scalars,
    next_kept,
    program_again,
    start_rows,
    store_dkdv,
    unit_bounds,
    unseen_rows,
    work_unit,
)


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dkdv_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, start, length, segment_bin, dk, dv, dq, sums,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, dk_row, dk_head, dv_row, dv_head,
    lse_head, lse_token, delta_head, delta_token, dq_head, dq_token, dq_slot, start_head, n_bins, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, KEYS: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
    SEGMENT: gl.constexpr, ACCUMULATE: gl.constexpr, LAST: gl.constexpr, HEADS: gl.constexpr, KEEPS: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of KEYS keys of one block, over the rows of its bin or of one segment of it.

    Reads 4 * KEYS * D bytes of K and V once and 4 * D + 16 bytes per row; writes 2 * KEYS * D sums. Work units are those of
    `portable_kernels.dkdv_kernel`, bins of HEADS kv heads in turns. The products of a tile's dV and dK overlap with the next
    tile's S^T, so a stage is free two tiles later: AHEAD + 2 stages.

    With KEEPS, `dq` is `DqPartials.dq` by items, and each row's gradients of its KEYS scores, 2 * KEYS bytes, go there.
    """
    STAGES: gl.constexpr = AHEAD + 2
    unit = work_unit(gl.program_id(0), n_bins, n_blocks, TILES, HEADS)
    tile = gl.program_id(0) % TILES
    bin_, before, begin, count, first_key, held = unit_bounds(
        unit, pointer, segment_bin, start, length, n_bins, n_blocks, start_head, SEGMENT
    )
    if (first_key < 0) | (tile * KEYS >= held) | ((count == 0) & ACCUMULATE):
        return
    kv_head = (bin_ // n_blocks).to(gl.int64)
    first_head = kv_head * group
    entry += begin

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER))
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    # The wait for the first tile of rows covers these copies.
    copy_block(k, v, k_s, v_s, kv_head, first_key, key, held, cols, k_row, k_head, v_row, v_head)
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], ROWS_LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], ROWS_LAYOUT)
    # Two stages suffice: each is overwritten two tiles, and so two barriers, later.
    lse_s = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [2, ROWS], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT)

    SCORE: gl.constexpr = product_layout(ROWS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    LINE: gl.constexpr = line_layout(WARPS)
    WARP: gl.constexpr = warp_layout(ROWS, WARPS)
    score_key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORE))
    zero = gl.zeros([KEYS, ROWS], gl.float32, SCORE)
    line = gl.arange(0, ROWS, layout=LINE)
    unseen = unseen_rows(entry, position, count, tile * KEYS, ROWS, WARPS, HEAD_BITS, SLOT_BITS, TOPK)
    if KEEPS:
        KEPT: gl.constexpr = ds_layout(KEYS, ROWS, WARPS)
        kept_key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, KEPT))
        kept_at = kept_key[:, None] * (2 * ROWS) + gl.arange(0, ROWS, layout=gl.SliceLayout(0, KEPT))[None, :]
        item = gl.load(pointer + bin_) // (2 * ROWS) + bin_ + before // (2 * ROWS)
        kept = dq + item.to(gl.int64) * (TILES * KEYS * 2 * ROWS)
        half = begin * 0  # of an item: its first or its second ROWS rows
        for _ in range(unseen // ROWS):
            gl.store(kept + kept_at, gl.zeros([KEYS, ROWS], DTYPE, KEPT))
            kept, half = next_kept(kept, half, ROWS, TILES * KEYS)
    entry += unseen
    count -= unseen
    q += first_head * q_head
    dout += first_head * dout_head
    lse += first_head * lse_head
    delta += first_head * delta_head
    last_key = tile * KEYS + KEYS - 1
    factor = scale * LOG2E
    n = (count + ROWS - 1) // ROWS
    row_lse, row_delta, limit, line_code = start_rows(
        q, dout, lse, delta, position, entry, count, n, held, q_s, do_s, code_s, cols,
        q_token, q_head, dout_token, dout_head, lse_head, lse_token, delta_head, delta_token,
        ROWS, D, AHEAD, WARPS, HEAD_BITS, SLOT_BITS, TOPK,
    )  # fmt: skip
    dk_sum = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, SUM))
    dv_sum = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, SUM))
    p_left = gl.zeros([KEYS, ROWS], DTYPE, LEFT)
    ds_left = gl.zeros([KEYS, ROWS], DTYPE, LEFT)
    for i in range(n):
        stage = i % STAGES
        nxt = (i + AHEAD) % STAGES
        async_copy.wait_group(AHEAD - 1)
        lse_s.index(i % 2).store(row_lse)
        delta_s.index(i % 2).store(row_delta)
        limit_s.index(i % 2).store(limit)
        code_s.index(nxt).store(line_code)
        fence_async_shared()
        barrier()
        if not LAST:  # read early: products delay shared memory
            copied = code_s.index(nxt).load(gl.SliceLayout(1, GATHER))
        q_i = q_s.index(stage)
        do_i = do_s.index(stage)
        s_run = warpgroup_mma(k_s, q_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        # Wait for the previous tile's dV and dK before issuing dP^T: all at once they would need too many registers.
        p_left, ds_left = warpgroup_mma_wait(1, deps=(p_left, ds_left))
        dp_run = warpgroup_mma(v_s, do_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        # Rows of tile i + AHEAD, in the stage of tile i - 2: all warps have waited for that tile's products, and passed a barrier
        # since. The compiler puts a barrier between these copies and the next product that reads rows.
        if not LAST:
            copy_rows(
                q, dout, copied, q_s.index(nxt), do_s.index(nxt), cols,
                q_token, q_head, dout_token, dout_head, HEAD_BITS, SLOT_BITS, NARROW_DKDV,
            )  # fmt: skip
        row_lse, row_delta, limit = load_scalars(
            lse, delta, position, code_s.index((i + 1) % STAGES).load(LINE), (i + 1) * ROWS + line < count, held,
            lse_head, lse_token, delta_head, delta_token, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        line_code = gl.load(entry + gl.minimum((i + 1 + AHEAD) * ROWS + line, gl.maximum(count - 1, 0)))
        masked = gl.min(limit_s.index(i % 2).load(WARP), 0) < last_key
        s = warpgroup_mma_wait(1, deps=(s_run,))
        p = gl.exp2(s * factor - lse_s.index(i % 2).load(BY_ROW)[None, :])
        if masked:  # few tiles contain own rows
            p = gl.where(score_key[:, None] <= limit_s.index(i % 2).load(BY_ROW)[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(DTYPE), LEFT)
        dv_sum = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        # Zero where p is zero, so not masked again.
        ds = (p * (dp - delta_s.index(i % 2).load(BY_ROW)[None, :])).to(DTYPE)
        ds_left = gl.convert_layout(ds, LEFT)
        dk_sum = warpgroup_mma(ds_left, q_i, dk_sum, is_async=True)
        if KEEPS:
            gl.store(kept + kept_at, gl.convert_layout(in_ds_order(ds, KEYS, ROWS), KEPT), cache_modifier=".cs")
            kept, half = next_kept(kept, half, ROWS, TILES * KEYS)
        if LAST:
            copy_rows(
                q, dout, code_s.index(nxt).load(gl.SliceLayout(1, GATHER)), q_s.index(nxt), do_s.index(nxt), cols,
                q_token, q_head, dout_token, dout_head, HEAD_BITS, SLOT_BITS, NARROW_DKDV,
            )  # fmt: skip
    dv_sum, p_left, dk_sum, ds_left = warpgroup_mma_wait(0, deps=(dv_sum, p_left, dk_sum, ds_left))
    async_copy.wait_group(0)
    store_dkdv(
        program_again(), dk_sum, dv_sum, scale, dk, dv, sums, segment_bin, start, length, dk_row, dk_head, dv_row, dv_head,
        n_bins, n_blocks, start_head, D, KEYS, TILES, ACCUMULATE, WARPS, HEADS,
    )  # fmt: skip
