"""Gluon kernel for block attention on Hopper where one tile of keys holds a block; `hopper_forward.py` launches it.

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

from .hopper_backward_kernels import _decode, _gather, _offset, barrier


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
