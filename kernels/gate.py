"""The gate: scores and top-k fused, exact, and never a `tokens x blocks` tensor.

Scores are ordered as: no candidate < -inf < ... < -0 = +0 < ... < +inf < NaN, and of equals the later block is greater.
Rows whose candidates are all selected are not scored. For the others `_gate_kernel` keeps a few best scores in each lane
and proves for nearly every row that they contain the selection; rows without proof are listed on the device and done again
by the kernel of `kernels/gate_exact.py`. Both take the same products in the same order, so
a row's result does not depend on which of them made it. Nothing is read on the host.
"""

from __future__ import annotations

from math import comb

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .gate_exact import _gate_exact_kernel, _load_tile, _store_selection, select_sorted
from .sizes import cdiv, next_power_of_2
from .types import QueryRows, selection_dtype

ROW_TILE = 64
"""Query rows a program: the smallest tile of Hopper's matrix instruction."""
FAST_TOPK = 16
"""Largest topk of the kernel with lists in lanes; its rounds are unrolled."""
LIST_TOPK = 64
"""Largest topk of the kernel that streams past a list in registers; beyond it scores are sorted in bounded pieces."""
PACKED_BLOCKS = 1024
"""Up to so many blocks a key holds the whole block number; beyond, only the tile, which leaves more bits to the score."""
WIDE_BLOCKS = 4096
"""Beyond so many blocks tiles of 64 of them pay, where the list of the best is short."""
REDONE_ROWS = 0.035
"""Share of the rows that the depth of the lists may leave to be done again."""
EXACT_PROGRAMS_PER_SM = 4

_EMPTY = tl.constexpr(-3.4028234663852886e38)
"""Fast key of an empty place: the lowest finite number. Keys of scores are greater, see `_gate_kernel`."""


@triton.jit
def _label_score(score, score_mask, label, ASM: tl.constexpr):
    """The score with `label` in the bits outside `score_mask`."""
    if ASM:
        # (score & mask) | label in one instruction; the compiler makes two of it. The interpreter has no assembler.
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=f,f,r,r", [score, score_mask, label], tl.float32, is_pure=True, pack=1
        )
    else:
        return ((score.to(tl.int32, bitcast=True) & score_mask) | label).to(tl.float32, bitcast=True)


@triton.jit
def _turn(tile, BN: tl.constexpr):
    """The block at place p of a tile is in lane p ^ turn, a hash of the tile's number.

    Blocks at any one distance should meet in a lane as rarely as random ones. Multiples of the tile's number fail at some
    distances (the golden ratio's at 31 and 33), multiples of its square at hardly any. This factor did well among 4500.
    """
    return (tl.mul(tile * tile, 0x063DB153, sanitize_overflow=False) >> 26) & (BN - 1)


@triton.jit
def _load_centroids(base, number, place, stride, D: tl.constexpr, PADDED_D: tl.constexpr):
    """As `_load_tile`, rows `number + place`, every row inside: without a mask where D is a power of two.

    `place * stride` stays in 32 bits, see `select_blocks`.
    """
    column = tl.arange(0, PADDED_D)
    pointer = base + number.to(tl.int64) * stride + (place[:, None] * stride + column[None, :])
    if PADDED_D == D:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=(column < D)[None, :], other=0.0)


@triton.jit
def _insert(m1, m2, m3, m4, key, DEPTH: tl.constexpr):
    """`key` into each lane's descending list of DEPTH. A NaN stays in every list that it meets."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    if DEPTH >= 4:
        # From the bottom up, so that no more than one temporary is alive.
        m4 = tl.maximum(m4, tl.minimum(m3, key, propagate_nan=NAN), propagate_nan=NAN)
    if DEPTH >= 3:
        m3 = tl.maximum(m3, tl.minimum(m2, key, propagate_nan=NAN), propagate_nan=NAN)
    if DEPTH >= 2:
        m2 = tl.maximum(m2, tl.minimum(m1, key, propagate_nan=NAN), propagate_nan=NAN)
    m1 = tl.maximum(m1, key, propagate_nan=NAN)
    return m1, m2, m3, m4


@triton.jit(do_not_specialize=["tokens", "q_heads", "group"], do_not_specialize_on_alignment=["own_ptr", "first_ptr"])
def _gate_kernel(
    q_ptr,
    c_ptr,
    own_ptr,
    first_ptr,
    out_ptr,
    again_count_ptr,
    again_ptr,
    tokens,
    q_heads,
    group,
    stride_qt,
    stride_qh,
    stride_cn,
    stride_ch,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DEPTH: tl.constexpr,
    PACKED: tl.constexpr,
    ASM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: the selection of BM rows of one q head.

    Reads BM x D of q once and the kv head's centroids from the rows' first to their last candidate (from L2: all programs
    share them), BN at a time; writes BM x TOPK block numbers, and the numbers of the rows to be done again.

    A block's lane is its place in its tile of BN, turned from tile to tile: else blocks at regular distances, where a query
    likes those best, would share few lanes. Each (row, lane) keeps its DEPTH best keys in order; an insertion is minima and
    maxima of whole tiles. A key is the score with its low bits replaced by the tile's number from 1 (with PACKED, followed by
    the lane's), no more bits than this program needs. At the end the best key of a row is taken TOPK - 1 times. That is the
    selection unless
    - a lane gave all its keys away and may have dropped others: it may where the candidates lie in more than DEPTH tiles,
    - the last key taken and the best key left differ only in the low bits, or
    - a score is infinite or NaN: with low bits that are never 0 it is a NaN key, which stays.
    The key of a finite score is greater than _EMPTY: its low bits are never all ones.
    """
    program = tl.program_id(0)
    head = program % q_heads
    # Later rows have more candidates as a rule: the longest programs start first. Heads share rows of q in DRAM.
    tile = tl.num_programs(0) // q_heads - 1 - program // q_heads
    row = tile * BM + tl.arange(0, BM)
    valid = row < tokens
    own = tl.load(own_ptr + row, mask=valid, other=0)
    first = tl.load(first_ptr + row, mask=valid, other=0)
    slot = tl.arange(0, SLOTS)
    scored = own - first >= TOPK
    whole = own[:, None] + (slot - (SLOTS - 1))[None, :]
    whole = tl.where(whole >= first[:, None], whole, -1)
    if tl.max(scored.to(tl.int32), 0) == 0:
        _store_selection(out_ptr, whole, row, head, tokens, valid, TOPK, SLOTS)
        return

    BIG: tl.constexpr = 1 << 30
    low = tl.min(tl.where(scored, first, BIG), 0)
    high = tl.max(tl.where(scored, own, 0), 0)
    tiles = tl.cdiv(high - low, BN)
    # Tiles of which every block is a candidate of every scored row.
    full = (tl.min(tl.where(scored, own, BIG), 0) - low) // BN
    full = tl.where(tl.max(tl.where(scored, first, 0), 0) == low, full, 0)
    # Bits of the number tiles + 2, from a float's exponent: room for 1 .. tiles, and never all ones.
    label_bits = ((tiles + 2).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    UNIT: tl.constexpr = BN if PACKED else 1
    label_mask = ((1 << label_bits) * UNIT) - 1
    score_mask = -1 - label_mask
    lane = tl.arange(0, BN)
    label = lane if PACKED else lane * 0
    origin = low - BN  # tiles count from 1

    q = _load_tile(q_ptr + head.to(tl.int64) * stride_qh, row, stride_qt, valid, D, PADDED_D)
    c_base = c_ptr + (head // group).to(tl.int64) * stride_ch
    m1 = tl.full([BM, BN], _EMPTY, tl.float32)
    m2 = tl.full([BM, BN], _EMPTY, tl.float32)
    m3 = tl.full([BM, BN], _EMPTY, tl.float32)
    m4 = tl.full([BM, BN], _EMPTY, tl.float32)
    for j in tl.range(1, full + 1, num_stages=STAGES):
        c = _load_centroids(c_base, origin + j * BN, lane ^ _turn(j, BN), stride_cn, D, PADDED_D)
        score = tl.dot(q, tl.trans(c))
        key = _label_score(score, score_mask, (j * UNIT + label)[None, :], ASM)
        m1, m2, m3, m4 = _insert(m1, m2, m3, m4, key, DEPTH)
    for j in tl.range(full + 1, tiles + 1, num_stages=1):
        number = origin + j * BN + (lane ^ _turn(j, BN))
        c = _load_tile(c_base, number, stride_cn, number < high, D, PADDED_D)
        score = tl.dot(q, tl.trans(c))
        key = _label_score(score, score_mask, (j * UNIT + label)[None, :], ASM)
        candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
        key = tl.where(candidate, key, _EMPTY)
        m1, m2, m3, m4 = _insert(m1, m2, m3, m4, key, DEPTH)

    unordered = tl.max((m1 != m1).to(tl.int32), 1) > 0
    GONE: tl.constexpr = float("-inf")
    chosen = tl.zeros([BM, SLOTS], tl.int32)
    last = tl.max(m1, 1)
    COUNTED: tl.constexpr = 1 << 16
    doubled = scored & False
    for taken in tl.static_range(TOPK - 1):
        best = tl.max(m1, 1)
        found = best.to(tl.int32, bitcast=True) & label_mask
        hit = m1 == best[:, None]
        if not PACKED:
            # Two lanes may have the same best key: then they stand in the sum twice.
            found_lane = tl.sum(tl.where(hit, lane[None, :] + COUNTED, 0), 1)
            doubled |= found_lane >= 2 * COUNTED
            found = found * BN + (found_lane & (COUNTED - 1))
        chosen = tl.where((slot == SLOTS - 2 - taken)[None, :], found[:, None], chosen)
        last = best
        # A lane's next keys move up, no further than the rounds to come can see.
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
    # Not their number: as tiles turn, DEPTH * BN candidates that begin inside a tile may have DEPTH + 1 in a lane.
    deep = (own - 1 - low) // BN - (first - low) // BN >= DEPTH
    exhausted = (tl.min(m1, 1) == GONE) & deep
    again = scored & (unordered | tied | doubled | exhausted)
    chosen = origin + (chosen ^ _turn(chosen // BN, BN))  # from tile and lane to the block's number
    chosen = tl.where((slot >= SLOTS - TOPK)[None, :], chosen, -1)
    chosen = tl.where((slot == SLOTS - 1)[None, :], own[:, None], chosen)
    selection = tl.where(scored[:, None], tl.sort(chosen), whole)
    _store_selection(out_ptr, selection, row, head, tokens, valid, TOPK, SLOTS)
    # The order of the listed rows varies from run to run; their results do not depend on it.
    again_int = again.to(tl.int32)
    rows_again = tl.sum(again_int, 0)
    if rows_again > 0:
        begin = tl.atomic_add(again_count_ptr + head, rows_again)
        place = begin + tl.cumsum(again_int, 0) - again_int
        tl.store(again_ptr + head.to(tl.int64) * tokens + place, row, mask=again)


def shapes(dim: int, n_blocks: int, topk: int, hopper: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Constants of the kernels: tiles, sizes of the selection, and those and the options of `_gate_kernel` alone.

    They depend on the device, D, topk and the number of blocks in all, which no layout changes; never on the rows at hand.
    """
    padded = configs.padded(dim)
    narrow = n_blocks <= WIDE_BLOCKS or topk > 8 or padded > 128 or not hopper
    tile = {"D": dim, "PADDED_D": padded, "BM": ROW_TILE, "BN": 32 if narrow else 64}
    slots = {"TOPK": topk, "SLOTS": next_power_of_2(topk)}
    # Lanes that give away all of `depth` keys, in a row: comb(topk - 1, depth) / BN^(depth - 1) where scores are independent
    # and, as tiles are turned, about as many where favourites lie at a regular distance. Such rows are done again, at about
    # three times the cost. With as many keys as there are tiles no lane runs out.
    depth = 1
    while depth < 4 and comb(topk - 1, depth) > REDONE_ROWS * tile["BN"] ** (depth - 1):
        depth += 1
    depth = min(depth, cdiv(n_blocks - 1, tile["BN"]))
    variant = {"DEPTH": depth, "PACKED": n_blocks <= PACKED_BLOCKS, "ASM": True, "STAGES": 3 if padded <= 128 else 2}
    variant["num_warps"] = 4
    if hopper and narrow and padded <= 128 and topk <= (12 if variant["PACKED"] else 8):
        variant["maxnreg"] = 128  # four programs an SM, without a spill
    return tile, slots, variant


def _select_whole(rows: QueryRows, q_heads: int, topk: int, dtype: torch.dtype) -> Tensor:
    """The selection where every row's candidates are all selected."""
    number = rows.block[:, None] + torch.arange(1 - topk, 1, dtype=torch.int32, device=rows.block.device)
    number = torch.where(number >= rows.first_block[:, None], number, -1).to(dtype)
    return number.expand(q_heads, -1, -1).contiguous()


def select_blocks(q: Tensor, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
    """For each q head and row: its own block and the `topk - 1` best-scored blocks before it in its document.

    Scores are `<q, centroid>`, unscaled, in fp32. Equal scores: the later block wins; NaN ranks above every number.

    Args:
        q: `[T, Hq, D]`, bf16 or fp16, unit stride in the last dimension.
        centroids: `[n_blocks, Hkv, D]`, likewise; those of blocks that no query may choose may hold anything.
        rows: where the `T` rows stand, in any order.
        topk: blocks a row attends to at most, own block counted.

    Returns:
        int16 `[Hq, T, topk]`, or int32 where int16 cannot count the blocks: block numbers ascending, so the own block is
        last; -1 first where there are fewer.
    """
    tokens, q_heads, dim = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    if tokens * q_heads == 0 or topk == 1 or topk >= n_blocks:
        return _select_whole(rows, q_heads, topk, selection_dtype(n_blocks))
    out = torch.empty(q_heads, tokens, topk, dtype=selection_dtype(n_blocks), device=q.device)
    tile, slots, variant = shapes(dim, n_blocks, topk, configs.capability(q.device) >= (9, 0))
    if centroids.stride(0) * tile["BN"] >= 1 << 31:
        centroids = centroids.contiguous()  # offsets inside a tile have 32 bits
    if topk > LIST_TOPK:
        select_sorted(q, centroids, rows, topk, tile, out)
        return out
    fast = topk <= FAST_TOPK
    again_count = torch.zeros(q_heads if fast else 0, dtype=torch.int32, device=q.device)
    again = torch.empty(q_heads, tokens if fast else 0, dtype=torch.int32, device=q.device)
    strides = (q.stride(0), q.stride(1), centroids.stride(0), centroids.stride(1))
    tensors = (q, centroids, rows.block, rows.first_block, out, again_count, again)
    arguments = (*tensors, tokens, q_heads, q_heads // kv_heads, *strides)
    row_tiles = cdiv(tokens, ROW_TILE)
    if fast:
        variant["ASM"] = q.is_cuda
        _gate_kernel[(row_tiles * q_heads,)](*arguments, **slots, **tile, **variant)
    programs = min(row_tiles, cdiv(EXACT_PROGRAMS_PER_SM * configs.multiprocessors(q.device), q_heads))
    _gate_exact_kernel[(programs * q_heads,)](*arguments, **slots, **tile, LISTED=fast, num_warps=4)
    return out
