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
def _decode(code, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr):
    """Token and head in the group of entries; 32 bits each, so that a product with a stride is one wide multiplication."""
    return code >> (HEAD_BITS + SLOT_BITS), (code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)


@gluon.jit
def _offset(token, head, stride_t, stride_h, HEAD_BITS: gl.constexpr):
    """64-bit offset of a row, the group's first head counted apart."""
    offset = token.to(gl.int64) * stride_t
    if HEAD_BITS > 0:
        offset += head.to(gl.int64) * stride_h
    return offset


@gluon.jit
def _gather(x, code, x_s, cols, x_t, x_h, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr):
    """Start the copy of the rows of the entries `code`; left to the next commit."""
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    async_copy.async_copy_global_to_shared(x_s, x + _offset(token, head, x_t, x_h, HEAD_BITS)[:, None] + cols[None, :])


@gluon.jit
def _copy_rows(
    q, dout, code, q_s, do_s, cols, q_t, q_h, dout_t, dout_h, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr
):
    """Start the copies of one tile of gathered rows, those of the entries `code`."""
    _gather(q, code, q_s, cols, q_t, q_h, HEAD_BITS, SLOT_BITS)
    _gather(dout, code, do_s, cols, dout_t, dout_h, HEAD_BITS, SLOT_BITS)
    async_copy.commit_group()


@gluon.jit
def _load_scalars(
    lse, delta, position, code, valid, length, lse_h, lse_t, delta_h, delta_t,
    HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """Log-sum-exp, delta and last visible key of a tile's rows: infinity, whose weights are 0, where there is no row.

    Where there is none at all the tensors are empty, and nothing may be read.

    Nothing is done to what is loaded: an instruction that waits for memory here would keep the next product waiting.
    """
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    own = valid & ((code & ((1 << SLOT_BITS) - 1)) == TOPK - 1)
    row_lse = gl.load(lse + _offset(token, head, lse_t, lse_h, HEAD_BITS), mask=valid, other=float("inf"))
    row_delta = gl.load(delta + _offset(token, head, delta_t, delta_h, HEAD_BITS), mask=valid, other=0.0)
    return row_lse, row_delta, gl.load(position + token, mask=own, other=length - 1)


@gluon.jit
def _copy_ahead(
    q, dout, lse, delta, position, entry, i, count, length, line, cols, q_s, do_s, code_s, q_t, q_h, dout_t, dout_h, lse_h,
    lse_t, delta_h, delta_t, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, R: gl.constexpr,
    AHEAD: gl.constexpr, GATHER: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """In tile i: start the copies of the rows of tile i + AHEAD, and load the scalars of tile i + 1 and the entries of tile
    i + AHEAD + 1. The stage was read by tile i - 2, whose products all warps must have waited for before a barrier."""
    STAGES: gl.constexpr = AHEAD + 2
    stage = (i + AHEAD) % STAGES
    _copy_rows(
        q, dout, code_s.index(stage).load(gl.SliceLayout(1, GATHER)), q_s.index(stage), do_s.index(stage), cols, q_t, q_h,
        dout_t, dout_h, HEAD_BITS, SLOT_BITS,
    )  # fmt: skip
    row_lse, row_delta, limit = _load_scalars(
        lse, delta, position, code_s.index((i + 1) % STAGES).load(LINE), (i + 1) * R + line < count, length, lse_h, lse_t,
        delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK,
    )  # fmt: skip
    line_code = gl.load(entry + gl.minimum((i + 1 + AHEAD) * R + line, gl.maximum(count - 1, 0)))
    return row_lse, row_delta, limit, line_code


@gluon.jit
def _unseen_rows(
    entry, position, count, first_key, R: gl.constexpr, NW: gl.constexpr, HEAD_BITS: gl.constexpr,
    SLOT_BITS: gl.constexpr, TOPK: gl.constexpr,
):  # fmt: skip
    """How many entries, in whole tiles, a bin's list begins with that see no key from `first_key` on.

    Entries ascend by (head, token): the block's own rows of the group's first head come first. More than `first_key` of
    them there cannot be.
    """
    SCAN: gl.constexpr = gl.BlockedLayout([2], [32], [NW], [0])
    index = gl.arange(0, 64 * NW, layout=SCAN)
    seeing = gl.full([64 * NW], 2147483647, gl.int32, SCAN)
    bound = gl.minimum(first_key, count)
    for j in range(0, bound, 64 * NW):
        here = j + index < bound
        code = gl.load(entry + j + index, mask=here, other=0)
        own = here & ((code & ((1 << SLOT_BITS) - 1)) == TOPK - 1)
        place = gl.load(position + (code >> (HEAD_BITS + SLOT_BITS)), mask=own, other=2147483647)
        seeing = gl.where(place < first_key, seeing, gl.minimum(seeing, j + index))
    return gl.minimum(gl.min(seeing, 0), bound) // R * R


@gluon.jit
def _unit(n_bins, NT: gl.constexpr):
    """Bin or piece of a program, as in the portable kernel: pieces, the longest, come first."""
    place = gl.program_id(0) // NT
    pieces = gl.num_programs(0) // NT - n_bins
    return gl.where(place < pieces, place + n_bins, place - pieces)


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
    unit = _unit(n_bins, NT)
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
    ACCUMULATE: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """dK and dV of BK keys of one block over the rows of its bin, or of one piece of it; programs as in the portable one.

    Reads 2 BK D elements once and 2 D elements + 16 bytes a row; writes 2 BK D sums. The products of a tile's dV and dK
    run on beside the next tile's S^T, so a stage is free two tiles later: AHEAD + 2 stages.
    """
    STAGES: gl.constexpr = AHEAD + 2
    unit = _unit(n_bins, NT)
    tile = gl.program_id(0) % NT
    bin_, begin, count, start, length = _bounds(
        unit, pointer, piece_bin, part_start, part_length, n_bins, n_blocks, start_h, PIECE
    )
    if (start < 0) | (tile * BK >= length) | ((count == 0) & ACCUMULATE):
        return
    kv_head = (bin_ // n_blocks).to(gl.int64)
    head0 = kv_head * group
    entry += begin

    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, GATHER))
    row = (start + key).to(gl.int64)
    inside = (key < length)[:, None] & (cols >= 0)[None, :]
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], T)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(T, [BK, D], TILE)
    v_s = gl.allocate_shared_memory(T, [BK, D], TILE)
    # Waited for with the first tile of rows.
    async_copy.async_copy_global_to_shared(k_s, k + (row * k_n + kv_head * k_h)[:, None] + cols[None, :], mask=inside)
    async_copy.async_copy_global_to_shared(v_s, v + (row * v_n + kv_head * v_h)[:, None] + cols[None, :], mask=inside)
    async_copy.commit_group()
    q_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    do_s = gl.allocate_shared_memory(T, [STAGES, R, D], ROWS)
    # Two are enough: one is written again two tiles and so two barriers later.
    lse_s = gl.allocate_shared_memory(gl.float32, [2, R], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, R], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [2, R], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [STAGES, R], FLAT)

    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, R, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    WARP: gl.constexpr = gl.BlockedLayout([R // 32], [32], [NW], [0])  # every warp holds all rows of a tile
    score_key = tile * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, SCORE))
    zero = gl.zeros([BK, R], gl.float32, SCORE)
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    line = gl.arange(0, R, layout=LINE)
    unseen = _unseen_rows(entry, position, count, tile * BK, R, NW, HEAD_BITS, SLOT_BITS, TOPK)
    entry += unseen
    count -= unseen
    q += head0 * q_h
    dout += head0 * dout_h
    lse += head0 * lse_h
    delta += head0 * delta_h
    last = gl.maximum(count - 1, 0)  # rows past the end repeat the last one, and count for nothing
    last_key = tile * BK + BK - 1
    factor = scale * LOG2E
    n = (count + R - 1) // R
    if n > 0:
        for j in gl.static_range(AHEAD):
            at = gl.minimum(j * R + r, last)
            _copy_rows(
                q, dout, gl.load(entry + at), q_s.index(j), do_s.index(j), cols, q_t, q_h, dout_t, dout_h, HEAD_BITS,
                SLOT_BITS,
            )  # fmt: skip
    line_code = gl.load(entry + gl.minimum(line, last), mask=line < n * R, other=0)
    row_lse, row_delta, limit = _load_scalars(
        lse, delta, position, line_code, line < count, length, lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS,
        TOPK,
    )  # fmt: skip
    for j in gl.static_range(1, AHEAD):
        code_s.index(j).store(gl.load(entry + gl.minimum(j * R + line, last), mask=line < n * R, other=0))
    line_code = gl.load(entry + gl.minimum(AHEAD * R + line, last), mask=line < n * R, other=0)
    dk_sum = warpgroup_mma_init(gl.zeros([BK, D], gl.float32, SUM))
    dv_sum = warpgroup_mma_init(gl.zeros([BK, D], gl.float32, SUM))
    p_left = gl.zeros([BK, R], T, LEFT)
    ds_left = gl.zeros([BK, R], T, LEFT)
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
        if not LATE:
            row_lse, row_delta, limit, line_code = _copy_ahead(
                q, dout, lse, delta, position, entry, i, count, length, line, cols, q_s, do_s, code_s, q_t, q_h, dout_t,
                dout_h, lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK, R, AHEAD, GATHER, LINE,
            )  # fmt: skip
        q_i = q_s.index(stage)
        do_i = do_s.index(stage)
        s_run = warpgroup_mma(k_s, q_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        # The last tile's dV and dK are done before dP^T starts: all at once they need more registers than there are.
        p_left, ds_left = warpgroup_mma_wait(1, deps=(p_left, ds_left))
        dp_run = warpgroup_mma(v_s, do_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        if LATE:
            row_lse, row_delta, limit, line_code = _copy_ahead(
                q, dout, lse, delta, position, entry, i, count, length, line, cols, q_s, do_s, code_s, q_t, q_h, dout_t,
                dout_h, lse_h, lse_t, delta_h, delta_t, HEAD_BITS, SLOT_BITS, TOPK, R, AHEAD, GATHER, LINE,
            )  # fmt: skip
        masked = gl.min(limit_s.index(i % 2).load(WARP), 0) < last_key
        s = warpgroup_mma_wait(1, deps=(s_run,))
        p = gl.exp2(s * factor - lse_s.index(i % 2).load(BY_ROW)[None, :])
        if masked:  # few tiles hold rows of the block itself
            p = gl.where(score_key[:, None] <= limit_s.index(i % 2).load(BY_ROW)[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(T), LEFT)
        dv_sum = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        # Zero where p is; not masked again.
        ds = p * (dp - delta_s.index(i % 2).load(BY_ROW)[None, :])
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
