"""The gate: scores and top-k fused, exact, and never a `tokens x blocks` tensor.

Order of scores: no candidate < -inf < ... < -0 = +0 < ... < +inf < NaN; of equal scores the later block is greater.

Rows whose candidates are all selected are not scored. For the others `gate_kernel` keeps a few best scores per lane and proves
for nearly every row that they contain the selection. Rows without a proof are listed on the device and computed again by
`gate_exact.py`. Both compute the same products in the same order, so a row's result does not depend on which of them made it.
The host reads nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .gate_exact import gate_exact_kernel, load_tile, select_sorted, store_selection
from .gpu import gpu_of
from .launch import launch_kernel
from .sizes import cdiv, next_power_of_2, padded
from .types import QueryRows, selection_dtype

FAST_TOPK = 16
"""Largest topk of `gate_kernel`, whose rounds are unrolled."""
LIST_TOPK = 64
"""Largest topk of `gate_exact_kernel`, which keeps a list in registers. Beyond it scores are sorted in bounded portions."""
EXACT_PROGRAMS_PER_MULTIPROCESSOR = 4

_EMPTY = tl.constexpr(-3.4028234663852886e38)
"""Key of an empty list entry: the lowest finite number. Keys of scores are greater, see `gate_kernel`."""


@triton.jit
def _label_score(score, score_mask, label, ASM: tl.constexpr):
    """The score with `label` in the bits outside of `score_mask`."""
    if ASM:
        # (score & mask) | label in one instruction; the compiler would use two. The interpreter has no assembler.
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=f,f,r,r", [score, score_mask, label], tl.float32, is_pure=True, pack=1
        )
    else:
        return ((score.to(tl.int32, bitcast=True) & score_mask) | label).to(tl.float32, bitcast=True)


@triton.jit
def _swizzle(tile, BLOCKS: tl.constexpr):
    """A hash of the tile's number: block i of a tile goes to lane i ^ swizzle.

    Blocks at any fixed distance should share a lane as rarely as random blocks. Multiples of the tile's number fail at some
    distances (the golden ratio's at 31 and 33), multiples of its square at hardly any. This factor is one of the best of 4500
    that were tried.
    """
    return (tl.mul(tile * tile, 0x063DB153, sanitize_overflow=False) >> 26) & (BLOCKS - 1)


@triton.jit
def _load_centroids(base, first, lane_block, stride, D: tl.constexpr, D_PADDED: tl.constexpr):
    """As `load_tile`: rows `first + lane_block`, all of which exist. Without a mask where D is a power of two.

    `lane_block * stride` fits in 32 bits, see `select_blocks`.
    """
    column = tl.arange(0, D_PADDED)
    pointer = base + first.to(tl.int64) * stride + (lane_block[:, None] * stride + column[None, :])
    if D_PADDED == D:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=(column < D)[None, :], other=0.0)


@triton.jit
def _insert(m1, m2, m3, m4, key, DEPTH: tl.constexpr):
    """Insert `key` into each lane's descending list of DEPTH keys. A NaN stays in every list that it meets."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    if DEPTH >= 4:
        # From the bottom up, so that only one temporary is live.
        m4 = tl.maximum(m4, tl.minimum(m3, key, propagate_nan=NAN), propagate_nan=NAN)
    if DEPTH >= 3:
        m3 = tl.maximum(m3, tl.minimum(m2, key, propagate_nan=NAN), propagate_nan=NAN)
    if DEPTH >= 2:
        m2 = tl.maximum(m2, tl.minimum(m1, key, propagate_nan=NAN), propagate_nan=NAN)
    m1 = tl.maximum(m1, key, propagate_nan=NAN)
    return m1, m2, m3, m4


@triton.jit(
    do_not_specialize=["tokens", "q_heads", "group"], do_not_specialize_on_alignment=["own_block", "first_block"]
)
def gate_kernel(
    q, centroids, own_block, first_block, selected, again_count, again_row,
    tokens, q_heads, group, q_token, q_head, c_block, c_head,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, DEPTH: tl.constexpr, PACKED: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the selection of ROWS rows of one q head.

    Reads 2 * D + 8 bytes per row once, and 2 * D bytes per centroid from the rows' first to their last candidate (from L2:
    all programs share them), BLOCKS at a time; writes TOPK block numbers per row, and the numbers of rows without a proof.

    A block's lane is its index in its tile of BLOCKS, swizzled per tile: otherwise preferred blocks at regular distances
    would share few lanes. Each (row, lane) keeps its DEPTH best keys in order; an insertion is minima and maxima of full
    tiles. A key is the score with its low bits replaced by the tile's number, counted from 1 (with PACKED followed by the
    lane), in no more bits than this program needs. At the end the best key of a row is taken TOPK - 1 times. That is the
    selection unless
    - a lane gave away all of its keys and may have dropped others, which takes candidates in more than DEPTH tiles,
    - the last key taken and the best key left differ in the low bits only, or
    - a score is infinite or NaN: with low bits that are never 0 it becomes a NaN key, which stays.
    The key of a finite score is greater than _EMPTY, because its low bits are never all ones.
    """
    program = tl.program_id(0)
    head = program % q_heads
    # Later rows usually have more candidates: the longest programs start first. Heads share rows of q in DRAM.
    tile = tl.num_programs(0) // q_heads - 1 - program // q_heads
    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < tokens
    own = tl.load(own_block + row, mask=valid, other=0)
    first = tl.load(first_block + row, mask=valid, other=0)
    slot = tl.arange(0, SLOTS)
    scored = own - first >= TOPK
    whole = own[:, None] + (slot - (SLOTS - 1))[None, :]
    whole = tl.where(whole >= first[:, None], whole, -1)
    if tl.max(scored.to(tl.int32), 0) == 0:
        store_selection(selected, whole, row, head, tokens, valid, TOPK, SLOTS)
        return

    BIG: tl.constexpr = 1 << 30
    low = tl.min(tl.where(scored, first, BIG), 0)
    high = tl.max(tl.where(scored, own, 0), 0)
    tiles = tl.cdiv(high - low, BLOCKS)
    # Tiles of which every block is a candidate of every scored row.
    full = (tl.min(tl.where(scored, own, BIG), 0) - low) // BLOCKS
    full = tl.where(tl.max(tl.where(scored, first, 0), 0) == low, full, 0)
    # The bit length of tiles + 2, from a float's exponent: enough for 1 .. tiles, and never all ones.
    label_bits = ((tiles + 2).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    UNIT: tl.constexpr = BLOCKS if PACKED else 1
    label_mask = ((1 << label_bits) * UNIT) - 1
    score_mask = -1 - label_mask
    lane = tl.arange(0, BLOCKS)
    label = lane if PACKED else lane * 0
    origin = low - BLOCKS  # tiles are counted from 1

    q_tile = load_tile(q + head.to(tl.int64) * q_head, row, q_token, valid, D, D_PADDED)
    c_base = centroids + (head // group).to(tl.int64) * c_head
    m1 = tl.full([ROWS, BLOCKS], _EMPTY, tl.float32)
    m2 = tl.full([ROWS, BLOCKS], _EMPTY, tl.float32)
    m3 = tl.full([ROWS, BLOCKS], _EMPTY, tl.float32)
    m4 = tl.full([ROWS, BLOCKS], _EMPTY, tl.float32)
    for j in tl.range(1, full + 1, num_stages=STAGES):
        c_tile = _load_centroids(c_base, origin + j * BLOCKS, lane ^ _swizzle(j, BLOCKS), c_block, D, D_PADDED)
        score = tl.dot(q_tile, tl.trans(c_tile))
        key = _label_score(score, score_mask, (j * UNIT + label)[None, :], ASM)
        m1, m2, m3, m4 = _insert(m1, m2, m3, m4, key, DEPTH)
    for j in tl.range(full + 1, tiles + 1, num_stages=1):
        number = origin + j * BLOCKS + (lane ^ _swizzle(j, BLOCKS))
        c_tile = load_tile(c_base, number, c_block, number < high, D, D_PADDED)
        score = tl.dot(q_tile, tl.trans(c_tile))
        key = _label_score(score, score_mask, (j * UNIT + label)[None, :], ASM)
        candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
        key = tl.where(candidate, key, _EMPTY)
        m1, m2, m3, m4 = _insert(m1, m2, m3, m4, key, DEPTH)

    unordered = tl.max((m1 != m1).to(tl.int32), 1) > 0
    GONE: tl.constexpr = float("-inf")
    chosen = tl.zeros([ROWS, SLOTS], tl.int32)
    last = tl.max(m1, 1)
    COUNTED: tl.constexpr = 1 << 16
    doubled = scored & False
    for taken in tl.static_range(TOPK - 1):
        best = tl.max(m1, 1)
        found = best.to(tl.int32, bitcast=True) & label_mask
        hit = m1 == best[:, None]
        if not PACKED:
            # Two lanes may have the same best key: then the sum counts two.
            found_lane = tl.sum(tl.where(hit, lane[None, :] + COUNTED, 0), 1)
            doubled |= found_lane >= 2 * COUNTED
            found = found * BLOCKS + (found_lane & (COUNTED - 1))
        chosen = tl.where((slot == SLOTS - 2 - taken)[None, :], found[:, None], chosen)
        last = best
        # A lane's next keys move up, as far as the remaining rounds can look.
        m1 = tl.where(hit, m2 if DEPTH > 1 else GONE, m1)
        if DEPTH > 1 and TOPK - 1 - taken > 1:
            m2 = tl.where(hit, m3 if DEPTH > 2 else GONE, m2)
        if DEPTH > 2 and TOPK - 1 - taken > 2:
            m3 = tl.where(hit, m4 if DEPTH > 3 else GONE, m3)
        if DEPTH > 3 and TOPK - 1 - taken > 3:
            m4 = tl.where(hit, GONE, m4)

    left = tl.max(m1, 1).to(tl.int32, bitcast=True) & score_mask
    tied = left.to(tl.float32, bitcast=True) == (last.to(tl.int32, bitcast=True) & score_mask).to(
        tl.float32, bitcast=True
    )
    # Tiles, not the number of candidates: tiles are swizzled, so DEPTH * BLOCKS candidates that begin inside a tile may put
    # DEPTH + 1 into one lane.
    deep = (own - 1 - low) // BLOCKS - (first - low) // BLOCKS >= DEPTH
    exhausted = (tl.min(m1, 1) == GONE) & deep
    again = scored & (unordered | tied | doubled | exhausted)
    chosen = origin + (chosen ^ _swizzle(chosen // BLOCKS, BLOCKS))  # tile and lane to block number
    chosen = tl.where((slot >= SLOTS - TOPK)[None, :], chosen, -1)
    chosen = tl.where((slot == SLOTS - 1)[None, :], own[:, None], chosen)
    selection = tl.where(scored[:, None], tl.sort(chosen), whole)
    store_selection(selected, selection, row, head, tokens, valid, TOPK, SLOTS)
    # The order of the listed rows varies from run to run; their results do not depend on it.
    again_int = again.to(tl.int32)
    rows_again = tl.sum(again_int, 0)
    if rows_again > 0:
        begin = tl.atomic_add(again_count + head, rows_again)
        index = begin + tl.cumsum(again_int, 0) - again_int
        tl.store(again_row + head.to(tl.int64) * tokens + index, row, mask=again)


def _select_whole(rows: QueryRows, q_heads: int, topk: int, dtype: torch.dtype) -> Tensor:
    """The selection where every row's candidates are all selected."""
    number = rows.block[:, None] + torch.arange(1 - topk, 1, dtype=torch.int32, device=rows.block.device)
    number = torch.where(number >= rows.first_block[:, None], number, -1).to(dtype)
    return number.expand(q_heads, -1, -1).contiguous()


def select_blocks(q: Tensor, *, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
    """See `backend.Backend.select_blocks`. Scores are fp32; rows may come in any order."""
    tokens, q_heads, dim = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    if tokens * q_heads == 0 or topk == 1 or topk >= n_blocks:
        return _select_whole(rows, q_heads, topk, selection_dtype(n_blocks))
    out = torch.empty(q_heads, tokens, topk, dtype=selection_dtype(n_blocks), device=q.device)
    gpu = gpu_of(q.device)
    config = configs.gate(dim, n_blocks, topk, gpu)
    if centroids.stride(0) * config.blocks >= 1 << 31:
        centroids = centroids.contiguous()  # offsets inside a tile have 32 bits
    if topk > LIST_TOPK:
        select_sorted(q, centroids, rows, topk, config, out)
        return out
    fast = topk <= FAST_TOPK
    again_count = torch.zeros(q_heads if fast else 0, dtype=torch.int32, device=q.device)
    again_row = torch.empty(q_heads, tokens if fast else 0, dtype=torch.int32, device=q.device)
    arguments = (
        q, centroids, rows.block, rows.first_block, out, again_count, again_row, tokens, q_heads, q_heads // kv_heads,
        q.stride(0), q.stride(1), centroids.stride(0), centroids.stride(1),
    )  # fmt: skip
    constants = {
        "TOPK": topk, "SLOTS": next_power_of_2(topk), "D": dim, "D_PADDED": padded(dim), "ROWS": config.rows,
        "BLOCKS": config.blocks,
    }  # fmt: skip
    row_tiles = cdiv(tokens, config.rows)
    if fast:
        limit = {} if config.max_registers is None else {"maxnreg": config.max_registers}
        launch_kernel(gate_kernel, (row_tiles * q_heads,),
            *arguments, **constants, DEPTH=config.depth, PACKED=config.packed, ASM=q.is_cuda, STAGES=config.num_stages,
            num_warps=config.num_warps, **limit,
        )  # fmt: skip
    programs = min(row_tiles, cdiv(EXACT_PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors, q_heads))
    launch_kernel(
        gate_exact_kernel, (programs * q_heads,), *arguments, **constants, LISTED=fast, num_warps=config.num_warps
    )
    return out
