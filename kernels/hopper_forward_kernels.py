"""Gluon kernels for block attention on Hopper; `hopper_forward.py` says when they serve and launches them.

The rules of ordering are those of `hopper_backward_kernels`. Tiles that TMA brings are waited for by their barrier alone: it
writes shared memory through the path by which products read it.
"""

from functools import lru_cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_backward_kernels import _decode, _gather, _offset, barrier, element


@lru_cache(maxsize=64)
def tile_layout(keys: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Shared memory of a tile `[1, keys, dim]` that TMA writes and products read."""
    return gl.NVMMASharedLayout.get_default_for([1, keys, dim], element(dtype))


@gluon.constexpr_function
def _store_layout(rows: int, dim: int) -> gl.DistributedLinearLayout:
    """For stores of a warpgroup's product `[rows, dim]`, 64 or 128 rows: its layout, but each thread's columns come in eights.

    A quad of lanes trades columns, no barrier and no other warp comes in, and stores are of 16 bytes.
    """
    columns = [[0, 1 << bit] for bit in range(dim.bit_length() - 1)]
    registers = [*columns[:3], [8, 0], *columns[5:], *([[64, 0]] if rows == 128 else [])]
    lanes = [*columns[3:5], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, dim])


@gluon.jit
def _limits(position, code, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, BK: gl.constexpr):
    """Last visible key of the rows of the entries `code`."""
    own = (code & ((1 << SLOT_BITS) - 1)) == TOPK - 1
    return gl.load(position + (code >> (HEAD_BITS + SLOT_BITS)), mask=own, other=BK - 1)


@gluon.jit(
    do_not_specialize=["tokens", "n_blocks", "start_head"],
    do_not_specialize_on_alignment=["start", "length", "position", "entry", "item_bin", "item_start", "item_end"],
)
def stream_rows_kernel(
    q, k, v, start, length, position, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, group, scale, start_head, q_t, q_h, k_n, k_h, v_n, v_h,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, BK: gl.constexpr,
    R: gl.constexpr, NW: gl.constexpr, T: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """As `forward_kernels.stream_rows_kernel`: one work item, its rows past the block's K and V. Reads and writes the same.

    Per tile: S = q K^T was started a tile ahead; its rows make room for those of the tile after next; weights; O = P V, and
    beside it the next tile's S; O is stored while that runs.
    """
    CODES: gl.constexpr = 4  # tile i's entries are written two tiles ahead, and read last when it is stored
    item = gl.program_id(0)
    bin_ = gl.load(item_bin + item)
    begin = gl.load(item_start + item)
    count = gl.load(item_end + item) - begin
    safe = gl.maximum(bin_, 0)
    kv_head = (safe // n_blocks).to(gl.int64)
    first_key = gl.load(start + kv_head * start_head + safe % n_blocks)
    held = gl.load(length + safe % n_blocks)
    if (bin_ < 0) | (first_key < 0):
        return

    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BK, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    STORE: gl.constexpr = _store_layout(R, D)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [NW], [0])
    WARP: gl.constexpr = gl.BlockedLayout([R // 32], [32], [NW], [0])  # every warp holds all rows of a tile
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BK, D], T)
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(T, [BK, D], KEYS)
    v_s = gl.allocate_shared_memory(T, [BK, D], KEYS)
    q_s = gl.allocate_shared_memory(T, [2, R, D], TILE)
    code_s = gl.allocate_shared_memory(gl.int32, [CODES, R], FLAT)

    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    # Keys past the end of a short block: the last one again, whose weight is 0 for every row that may not see it.
    key = gl.minimum(gl.arange(0, BK, layout=gl.SliceLayout(1, GATHER)), held - 1)
    row = (first_key + key).to(gl.int64)
    async_copy.async_copy_global_to_shared(k_s, k + (row * k_n + kv_head * k_h)[:, None] + cols[None, :])
    async_copy.async_copy_global_to_shared(v_s, v + (row * v_n + kv_head * v_h)[:, None] + cols[None, :])
    entry += begin
    q += kv_head * group * q_h
    first_row = kv_head * group * tokens
    last = count - 1  # rows past the end repeat the last one, and are not stored
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    line = gl.arange(0, R, layout=LINE)
    by_row = gl.arange(0, R, layout=BY_ROW)
    stored = gl.arange(0, R, layout=gl.SliceLayout(1, STORE))
    out_cols = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    score_key = gl.arange(0, BK, layout=gl.SliceLayout(0, SCORE))
    zero = gl.zeros([R, BK], gl.float32, SCORE)
    zero_out = gl.zeros([R, D], gl.float32, SUM)
    for j in gl.static_range(2):
        code = gl.load(entry + gl.minimum(j * R + r, last))
        _gather(q, code, q_s.index(j), cols, q_t, q_h, HEAD_BITS, SLOT_BITS)
        async_copy.commit_group()
        code_s.index(j).store(gl.load(entry + gl.minimum(j * R + line, last)))
    limit = _limits(position, gl.load(entry + gl.minimum(by_row, last)), HEAD_BITS, SLOT_BITS, TOPK, BK)
    line_code = gl.load(entry + gl.minimum(2 * R + line, last))
    async_copy.wait_group(1)
    fence_async_shared()
    barrier()
    s_run = warpgroup_mma(q_s.index(0), k_s.permute((1, 0)), zero, use_acc=False, is_async=True)
    for i in range((count + R - 1) // R):
        code_s.index((i + 2) % CODES).store(line_code)
        s = warpgroup_mma_wait(0, deps=(s_run,))
        barrier()
        code = code_s.index((i + 2) % CODES).load(gl.SliceLayout(1, GATHER))
        _gather(q, code, q_s.index(i % 2), cols, q_t, q_h, HEAD_BITS, SLOT_BITS)
        async_copy.commit_group()
        line_code = gl.load(entry + gl.minimum((i + 3) * R + line, last))
        if NEGATIVE:
            s = -s
        slots = code_s.index(i % CODES).load(WARP) & ((1 << SLOT_BITS) - 1)
        if gl.max(slots, 0) == TOPK - 1:  # few tiles hold rows of the block itself
            s = gl.where(score_key[None, :] <= limit[:, None], s, float("-inf"))
        m = gl.max(s, 1) * scale
        p = gl.exp2(s * scale - m[:, None])
        norm = gl.sum(p, 1)
        p_left = gl.convert_layout(p.to(T), LEFT)
        o_run = warpgroup_mma(p_left, v_s, zero_out, use_acc=False, is_async=True)
        async_copy.wait_group(1)
        fence_async_shared()
        barrier()
        s_run = warpgroup_mma(q_s.index((i + 1) % 2), k_s.permute((1, 0)), zero, use_acc=False, is_async=True)
        limit = _limits(position, code_s.index((i + 1) % CODES).load(BY_ROW), HEAD_BITS, SLOT_BITS, TOPK, BK)
        row_code = code_s.index(i % CODES).load(BY_ROW)
        token, head = _decode(row_code, HEAD_BITS, SLOT_BITS)
        at = (first_row + _offset(token, head, 1, tokens, HEAD_BITS)) * TOPK + (row_code & ((1 << SLOT_BITS) - 1))
        gl.store(lse + at, m + gl.log2(norm), mask=i * R + by_row < count)
        o, p_left = warpgroup_mma_wait(1, deps=(o_run, p_left))
        o = o * gl.convert_layout(1.0 / norm, gl.SliceLayout(1, SUM))[:, None]
        at = gl.convert_layout(at, gl.SliceLayout(1, STORE))
        gl.store(
            out + (at * D)[:, None] + out_cols[None, :], gl.convert_layout(o.to(T), STORE),
            mask=(i * R + stored < count)[:, None], cache_modifier=".cs",
        )  # fmt: skip
    warpgroup_mma_wait(0, deps=(s_run,))
    async_copy.wait_group(0)


@gluon.jit
def _fetch(tiles, head, row, full, tile_s, there, D: gl.constexpr, BN: gl.constexpr):
    """Start the copy of one tile of keys or values, if it is `there`."""
    mbarrier.expect(full, BN * D * 2, pred=there)
    tma.async_copy_global_to_shared(tiles, [head, row, 0], full, tile_s, pred=there)


@gluon.jit(
    do_not_specialize=["tokens", "n_blocks", "start_head"],
    do_not_specialize_on_alignment=["start", "entry", "item_bin", "item_start", "item_end"],
)
def hold_rows_kernel(
    q, k_tiles, v_tiles, start, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, group, scale, start_head, q_t, q_h, k_head, v_head,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, TILES: gl.constexpr,
    R: gl.constexpr, BN: gl.constexpr, NW: gl.constexpr, T: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """As `forward_kernels.hold_rows_kernel` without own rows: one work item, R rows; reads and writes the same.

    The block is at least two whole tiles of BN keys. A tile of keys is asked for two tiles ahead, as soon as the scores of
    the tile whose place it takes are done; values one tile ahead.
    """
    item = gl.program_id(0)
    bin_ = gl.load(item_bin + item)
    begin = gl.load(item_start + item)
    end = gl.load(item_end + item)
    if bin_ < 0:
        return
    kv_head = bin_ // n_blocks
    WARP: gl.constexpr = gl.BlockedLayout([R // 32], [32], [NW], [0])  # every warp holds all rows
    slots = gl.load(entry + gl.minimum(begin + gl.arange(0, R, layout=WARP), end - 1)) & ((1 << SLOT_BITS) - 1)
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    code = gl.load(entry + gl.minimum(begin + gl.arange(0, R, layout=gl.SliceLayout(1, GATHER)), end - 1))
    first_key = gl.load(start + kv_head.to(gl.int64) * start_head + bin_ % n_blocks)
    if (first_key < 0) | (gl.min(slots, 0) == TOPK - 1):
        return

    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BN, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    STORE: gl.constexpr = _store_layout(R, D)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    k_s = gl.allocate_shared_memory(T, [2, 1, BN, D], k_tiles.layout)
    v_s = gl.allocate_shared_memory(T, [2, 1, BN, D], v_tiles.layout)
    q_s = gl.allocate_shared_memory(T, [R, D], ROWS)
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(v_full.index(j), count=1)
    fence_async_shared()
    barrier()
    k_at = kv_head * k_head
    v_at = kv_head * v_head
    _fetch(k_tiles, k_at, first_key, k_full.index(0), k_s.index(0), True, D, BN)
    _fetch(v_tiles, v_at, first_key, v_full.index(0), v_s.index(0), True, D, BN)
    _fetch(k_tiles, k_at, first_key + BN, k_full.index(1), k_s.index(1), True, D, BN)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    q += kv_head.to(gl.int64) * group * q_h
    async_copy.async_copy_global_to_shared(q_s, q + _offset(token, head, q_t, q_h, HEAD_BITS)[:, None] + cols[None, :])
    async_copy.commit_group()

    m = gl.full([R], float("-inf"), gl.float32, BY_ROW)
    norm = gl.zeros([R], gl.float32, BY_ROW)
    zero = gl.zeros([R, BN], gl.float32, SCORE)
    acc = warpgroup_mma_init(gl.zeros([R, D], gl.float32, SUM))
    p_left = gl.zeros([R, BN], T, LEFT)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    for i in range(TILES):
        stage = i % 2
        phase = i // 2 % 2
        mbarrier.wait(k_full.index(stage), phase)
        s_run = warpgroup_mma(
            q_s, k_s.index(stage).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True
        )  # fmt: skip
        s, total, p_left = warpgroup_mma_wait(0, deps=(s_run, acc, p_left))
        barrier()
        key = first_key + i * BN
        _fetch(v_tiles, v_at, key + BN, v_full.index(1 - stage), v_s.index(1 - stage), i + 1 < TILES, D, BN)
        _fetch(k_tiles, k_at, key + 2 * BN, k_full.index(stage), k_s.index(stage), i + 2 < TILES, D, BN)
        if NEGATIVE:
            s = -s
        m_new = gl.maximum(m, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - m_new[:, None])
        rescale = gl.exp2(m - m_new)
        norm = norm * rescale + gl.sum(p, 1)
        m = m_new
        total = total * gl.convert_layout(rescale, gl.SliceLayout(1, SUM))[:, None]
        p_left = gl.convert_layout(p.to(T), LEFT)
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p_left, v_s.index(stage).reshape([BN, D]), total, is_async=True)
    row = begin + gl.arange(0, R, layout=BY_ROW)
    code = gl.load(entry + gl.minimum(row, end - 1), cache_modifier=".cg")  # read again: the loop needs every register
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    slot = code & ((1 << SLOT_BITS) - 1)
    at = ((kv_head * group).to(gl.int64) * tokens + _offset(token, head, 1, tokens, HEAD_BITS)) * TOPK + slot
    stored = (row < end) & (slot != TOPK - 1)
    gl.store(lse + at, m + gl.log2(norm), mask=stored)
    total, p_left = warpgroup_mma_wait(0, deps=(acc, p_left))
    o = total * gl.convert_layout(1.0 / norm, gl.SliceLayout(1, SUM))[:, None]
    at = gl.convert_layout(at, gl.SliceLayout(1, STORE))
    stored = gl.convert_layout(stored, gl.SliceLayout(1, STORE))
    out_cols = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    gl.store(out + (at * D)[:, None] + out_cols[None, :], gl.convert_layout(o.to(T), STORE), mask=stored[:, None])
    for j in gl.static_range(2):
        mbarrier.invalidate(k_full.index(j))
        mbarrier.invalidate(v_full.index(j))
