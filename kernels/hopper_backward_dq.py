"""Gluon kernel for the partial dq on Hopper, for blocks of more than one tile of keys; `hopper_backward.py` launches it.

The rules of ordering are those of `hopper_backward_kernels`.
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

from .backward_kernels import UNALIGNED, VARYING
from .hopper_backward_kernels import LOG2E, _copy_rows, _decode, _load_scalars, _offset, barrier


@gluon.jit
def _copy_keys(k_at, v_at, key, length, k_n, v_n, k_s, v_s, cols):
    """Start the copies of one tile of keys and values; zeros past the block's end."""
    inside = (key < length)[:, None] & (cols >= 0)[None, :]
    row = key.to(gl.int64)
    async_copy.async_copy_global_to_shared(k_s, k_at + (row * k_n)[:, None] + cols[None, :], mask=inside)
    async_copy.async_copy_global_to_shared(v_s, v_at + (row * v_n)[:, None] + cols[None, :], mask=inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dq_kernel(
    q, dout, k, v, lse, delta, position, entry, item_bin, item_start, item_end, part_start, part_length, dq,
    q_t, q_h, dout_t, dout_h, k_n, k_h, v_n, v_h, lse_h, lse_t, delta_h, delta_t, dq_h, dq_t, dq_s,
    start_h, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, R: gl.constexpr,
    BN: gl.constexpr, AHEAD: gl.constexpr, NW: gl.constexpr, T: gl.constexpr,
):  # fmt: skip
    """Partial dq of one work item's rows (at most R) for its block: the gathered rows stay, keys stream by BN.

    Reads 2 D elements and writes D for each row, and reads 2 D elements a key. A tile's sum into dq runs on beside the
    next tile's scores, so a stage is free two tiles later: AHEAD + 2 stages.
    """
    STAGES: gl.constexpr = AHEAD + 2
    bin_ = gl.load(item_bin + gl.program_id(0))
    first = gl.load(item_start + gl.program_id(0))
    safe = gl.maximum(bin_, 0)
    kv_head = (safe // n_blocks).to(gl.int64)
    end = gl.load(item_end + gl.program_id(0))
    start = gl.load(part_start + kv_head * start_h + safe % n_blocks)
    length = gl.load(part_length + safe % n_blocks)
    if (start < 0) | (bin_ < 0):
        return
    head0 = kv_head * group

    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BN, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], T)
    k_s = gl.allocate_shared_memory(T, [STAGES, BN, D], KEYS)
    v_s = gl.allocate_shared_memory(T, [STAGES, BN, D], KEYS)
    q_s = gl.allocate_shared_memory(T, [R, D], ROWS)
    do_s = gl.allocate_shared_memory(T, [R, D], ROWS)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    n = gl.arange(0, BN, layout=gl.SliceLayout(1, GATHER))
    k_at = k + start.to(gl.int64) * k_n + kv_head * k_h
    v_at = v + start.to(gl.int64) * v_n + kv_head * v_h

    q += head0 * q_h
    dout += head0 * dout_h
    lse += head0 * lse_h
    delta += head0 * delta_h
    dq += head0 * dq_h * dq_s
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    code = gl.load(entry + gl.minimum(first + r, end - 1))
    row = first + gl.arange(0, R, layout=BY_ROW)
    row_code = gl.load(entry + gl.minimum(row, end - 1))
    # The gathered rows travel with the first tile of keys. Rows past the end repeat the last one; they are not stored.
    for j in gl.static_range(AHEAD):
        _copy_keys(k_at, v_at, j * BN + n, length, k_n, v_n, k_s.index(j), v_s.index(j), cols)
        if j == 0:
            _copy_rows(q, dout, code, q_s, do_s, cols, q_t, q_h, dout_t, dout_h, HEAD_BITS, SLOT_BITS)
    row_lse, row_delta, limit = _load_scalars(
        lse, delta, position, row_code, row >= 0, length, lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK
    )
    score_key = gl.arange(0, BN, layout=gl.SliceLayout(0, SCORE))
    zero = gl.zeros([R, BN], gl.float32, SCORE)
    factor = scale * LOG2E
    total = warpgroup_mma_init(gl.zeros([R, D], gl.float32, SUM))
    ds_left = gl.zeros([R, BN], T, LEFT)
    # Keys that no row of the item sees add exact zeros: leaving them out changes no bit.
    tiles = (gl.max(limit, 0) + BN) // BN
    unmasked = (gl.min(limit, 0) + 1) // BN  # tiles whose every key every row sees
    for i in range(tiles):
        stage = i % STAGES
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        barrier()
        # This stage was read by tile i - 2, whose products all warps waited for before the barrier above.
        ahead = (i + AHEAD) % STAGES
        _copy_keys(k_at, v_at, (i + AHEAD) * BN + n, length, k_n, v_n, k_s.index(ahead), v_s.index(ahead), cols)
        k_i = k_s.index(stage)
        s_run = warpgroup_mma(q_s, k_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp_run = warpgroup_mma(do_s, v_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s, ds_left = warpgroup_mma_wait(1, deps=(s_run, ds_left))  # and the last tile's sum
        p = gl.exp2(s * factor - row_lse[:, None])
        dp = warpgroup_mma_wait(0, deps=(dp_run,))
        ds = p * (dp - row_delta[:, None])
        if i >= unmasked:
            ds = gl.where(i * BN + score_key[None, :] <= limit[:, None], ds, 0.0)
        ds_left = gl.convert_layout(ds.to(T), LEFT)
        total = warpgroup_mma(ds_left, k_i, total, is_async=True)
    # Looked up again, and early: the last product hides it.
    code = gl.load(entry + gl.minimum(first + r, end - 1))
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    out = _offset(token, head, dq_t, dq_h, HEAD_BITS) + (code & ((1 << SLOT_BITS) - 1))
    at = dq + (out * dq_s)[:, None] + cols[None, :]
    total, ds_left = warpgroup_mma_wait(0, deps=(total, ds_left))
    async_copy.wait_group(0)
    total = gl.convert_layout((total * scale).to(T), GATHER)
    gl.store(at, total, mask=(first + r < end)[:, None] & (cols >= 0)[None, :])
