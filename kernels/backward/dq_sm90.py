"""Gluon kernel for the partial dq on Hopper, for blocks of more than one tile of keys.

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

from ..gluon_rows import barrier, decode, gather_layout, offset_of, product_layout
from .portable_kernels import LOG2E, UNALIGNED, VARYING
from .rows_sm90 import copy_rows, load_scalars


@gluon.jit
def _copy_keys(k_at, v_at, key, held, k_row, v_row, k_s, v_s, cols):
    """Start the copies of one tile of keys and values; zeros past the block's end."""
    inside = (key < held)[:, None] & (cols >= 0)[None, :]
    row = key.to(gl.int64)
    async_copy.async_copy_global_to_shared(k_s, k_at + (row * k_row)[:, None] + cols[None, :], mask=inside)
    async_copy.async_copy_global_to_shared(v_s, v_at + (row * v_row)[:, None] + cols[None, :], mask=inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dq_kernel(
    q, dout, k, v, lse, delta, position, entry, item_bin, item_start, item_end, start, length, dq,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, lse_head, lse_token, delta_head, delta_token,
    dq_head, dq_token, dq_slot, start_head, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One program: partial dq of one work item's rows (at most ROWS) for its block. Gathered rows stay, keys stream.

    Reads 4 * D + 16 bytes and writes 2 * D bytes per row, and reads 4 * D bytes per key (from L2). A tile's product into dq
    overlaps with the next tile's scores, so a stage is free two tiles later: AHEAD + 2 stages.
    """
    STAGES: gl.constexpr = AHEAD + 2
    bin_ = gl.load(item_bin + gl.program_id(0))
    first = gl.load(item_start + gl.program_id(0))
    safe = gl.maximum(bin_, 0)
    kv_head = (safe // n_blocks).to(gl.int64)
    end = gl.load(item_end + gl.program_id(0))
    first_key = gl.load(start + kv_head * start_head + safe % n_blocks)
    held = gl.load(length + safe % n_blocks)
    if (first_key < 0) | (bin_ < 0):
        return
    first_head = kv_head * group

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    SCORE: gl.constexpr = product_layout(KEYS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], KEYS_LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], KEYS_LAYOUT)
    q_s = gl.allocate_shared_memory(DTYPE, [ROWS, D], ROWS_LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [ROWS, D], ROWS_LAYOUT)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    n = gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER))
    k_at = k + first_key.to(gl.int64) * k_row + kv_head * k_head
    v_at = v + first_key.to(gl.int64) * v_row + kv_head * v_head

    q += first_head * q_head
    dout += first_head * dout_head
    lse += first_head * lse_head
    delta += first_head * delta_head
    dq += first_head * dq_head * dq_slot
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHER))
    code = gl.load(entry + gl.minimum(first + r, end - 1))
    row = first + gl.arange(0, ROWS, layout=BY_ROW)
    row_code = gl.load(entry + gl.minimum(row, end - 1))
    # The gathered rows are in the first tile's commit group. Rows past the end repeat the last one and are not stored.
    for j in gl.static_range(AHEAD):
        _copy_keys(k_at, v_at, j * KEYS + n, held, k_row, v_row, k_s.index(j), v_s.index(j), cols)
        if j == 0:
            copy_rows(q, dout, code, q_s, do_s, cols, q_token, q_head, dout_token, dout_head, HEAD_BITS, SLOT_BITS)
    row_lse, row_delta, limit = load_scalars(
        lse,
        delta,
        position,
        row_code,
        row >= 0,
        held,
        lse_head,
        lse_token,
        delta_head,
        delta_token,
        HEAD_BITS,
        SLOT_BITS,
        TOPK,
    )
    score_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORE))
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORE)
    factor = scale * LOG2E
    total = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, SUM))
    ds_left = gl.zeros([ROWS, KEYS], DTYPE, LEFT)
    # Keys that no row of the item sees would add exact zeros: skipping them changes no bit.
    tiles = (gl.max(limit, 0) + KEYS) // KEYS
    unmasked = (gl.min(limit, 0) + 1) // KEYS  # tiles of which every row sees every key
    for i in range(tiles):
        stage = i % STAGES
        async_copy.wait_group(AHEAD - 1)
        fence_async_shared()
        barrier()
        # The stage that is overwritten was read by tile i - 2. All warps waited for its products before the barrier.
        ahead = (i + AHEAD) % STAGES
        _copy_keys(k_at, v_at, (i + AHEAD) * KEYS + n, held, k_row, v_row, k_s.index(ahead), v_s.index(ahead), cols)
        k_i = k_s.index(stage)
        s_run = warpgroup_mma(q_s, k_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp_run = warpgroup_mma(do_s, v_s.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s, ds_left = warpgroup_mma_wait(1, deps=(s_run, ds_left))  # and the last tile's sum
        p = gl.exp2(s * factor - row_lse[:, None])
        dp = warpgroup_mma_wait(0, deps=(dp_run,))
        ds = p * (dp - row_delta[:, None])
        if i >= unmasked:
            ds = gl.where(i * KEYS + score_key[None, :] <= limit[:, None], ds, 0.0)
        ds_left = gl.convert_layout(ds.to(DTYPE), LEFT)
        total = warpgroup_mma(ds_left, k_i, total, is_async=True)
    # Loaded again, and early: the last product hides the latency.
    code = gl.load(entry + gl.minimum(first + r, end - 1))
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    out = offset_of(token, head, dq_token, dq_head, HEAD_BITS) + (code & ((1 << SLOT_BITS) - 1))
    at = dq + (out * dq_slot)[:, None] + cols[None, :]
    total, ds_left = warpgroup_mma_wait(0, deps=(total, ds_left))
    async_copy.wait_group(0)
    total = gl.convert_layout((total * scale).to(DTYPE), GATHER)
    gl.store(at, total, mask=(first + r < end)[:, None] & (cols >= 0)[None, :])
