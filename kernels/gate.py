"""The gate: scores and top-k fused, exact, and never a `tokens x blocks` tensor.

Scores are ordered as: no candidate < -inf < ... < -0 = +0 < ... < +inf < NaN, and of equals the later block is greater.
Rows whose candidates are all selected are not scored. For the others `_gate_kernel` keeps a few best scores in each lane
and proves for nearly every row that they contain the selection; rows without proof are listed on the device and done again
by `_gate_exact_kernel`, which streams the blocks past a list of the best. Both take the same products in the same order, so
a row's result does not depend on which of them made it. Nothing is read on the host.
"""

from __future__ import annotations

from math import comb

import torch
import triton
import triton.language as tl
from torch import Tensor

from .types import QueryRows

ROW_TILE = 64
"""Query rows a program: the smallest tile of Hopper's matrix instruction."""
FAST_TOPK = 16
"""Largest topk of the kernel with lists in lanes; its rounds are unrolled."""
LIST_TOPK = 64
"""Largest topk of the kernel that streams past a list in registers; beyond it scores are sorted in bounded pieces."""
PACKED_BLOCKS = 512
"""Up to so many blocks a key holds the whole block number; beyond, only the tile, which leaves more bits to the score."""
SCORES_BYTES = 1 << 26
"""Bound on the scores that exist at once beyond `LIST_TOPK`."""
REDONE_ROWS = 0.015
"""Share of the rows that the depth of the lists may leave to be done again."""
EXACT_PROGRAMS_PER_SM = 4

_LOWEST = tl.constexpr(-(1 << 31))
"""Key of what is no candidate: below the key of -inf."""
_HIGHEST = tl.constexpr((1 << 31) - 1)
"""Key of NaN."""
_EMPTY = tl.constexpr(-3.4028234663852886e38)
"""Fast key of an empty place: the lowest finite number. Keys of scores are greater, see `_gate_kernel`."""


@triton.jit
def _order_key(score):
    """int32 with the order of the scores: ordered bits, one zero, NaN (of either sign) on top."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, _HIGHEST, key)


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
def _load_tile(base, row, stride, inside, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Rows of a matrix with unit last stride, zeros where not `inside` and beyond D."""
    column = tl.arange(0, PADDED_D)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _load_centroids(base, number, stride, D: tl.constexpr, PADDED_D: tl.constexpr):
    """As `_load_tile`, every row inside: without a mask where D is a power of two."""
    column = tl.arange(0, PADDED_D)
    pointer = base + number.to(tl.int64)[:, None] * stride + column[None, :]
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


@triton.jit
def _store_selection(out_ptr, selection, row, head, tokens, valid, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """The last TOPK of SLOTS columns into `[head, row, :]` of the contiguous int32 `[heads, tokens, TOPK]`."""
    column = tl.arange(0, SLOTS) - (SLOTS - TOPK)
    pointer = out_ptr + (head.to(tl.int64) * tokens + row)[:, None] * TOPK + column[None, :]
    tl.store(pointer, selection, mask=valid[:, None] & (column >= 0)[None, :])


@triton.jit(do_not_specialize=["tokens", "q_heads", "group"])
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
    share them), BN at a time; writes BM x TOPK int32, and the numbers of the rows to be done again.

    A block's lane is its place in its tile of BN. Each (row, lane) keeps its DEPTH best keys in order; an insertion is
    minima and maxima of whole tiles. A key is the score with its low bits replaced by the tile's number from 1 (with PACKED,
    by the block's), no more bits than this program needs. At the end the best key of a row is taken TOPK - 1 times. That is
    the selection unless
    - a lane gave all its keys away and may have dropped others,
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

    q = _load_tile(q_ptr + head.to(tl.int64) * stride_qh, row, stride_qt, valid, D, PADDED_D)
    c_base = c_ptr + (head // group).to(tl.int64) * stride_ch
    m1 = tl.full([BM, BN], _EMPTY, tl.float32)
    m2 = tl.full([BM, BN], _EMPTY, tl.float32)
    m3 = tl.full([BM, BN], _EMPTY, tl.float32)
    m4 = tl.full([BM, BN], _EMPTY, tl.float32)
    for j in tl.range(0, full, num_stages=STAGES):
        c = _load_centroids(c_base, low + j * BN + lane, stride_cn, D, PADDED_D)
        score = tl.dot(q, tl.trans(c))
        key = _label_score(score, score_mask, ((j + 1) * UNIT + label)[None, :], ASM)
        m1, m2, m3, m4 = _insert(m1, m2, m3, m4, key, DEPTH)
    for j in tl.range(full, tiles, num_stages=1):
        number = low + j * BN + lane
        c = _load_tile(c_base, number, stride_cn, number < high, D, PADDED_D)
        score = tl.dot(q, tl.trans(c))
        key = _label_score(score, score_mask, ((j + 1) * UNIT + label)[None, :], ASM)
        candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
        key = tl.where(candidate, key, _EMPTY)
        m1, m2, m3, m4 = _insert(m1, m2, m3, m4, key, DEPTH)

    unordered = tl.max((m1 != m1).to(tl.int32), 1) > 0
    GONE: tl.constexpr = float("-inf")
    chosen = tl.where((slot == SLOTS - 1)[None, :], own[:, None], -1)
    last = tl.max(m1, 1)
    for taken in tl.static_range(TOPK - 1):
        best = tl.max(m1, 1)
        found = best.to(tl.int32, bitcast=True) & label_mask
        if PACKED:
            hit = m1 == best[:, None]
            number = low - BN + found
        else:
            place = tl.max(tl.where(m1 == best[:, None], lane[None, :], -1), 1)
            hit = lane[None, :] == place[:, None]
            number = low + (found - 1) * BN + place
        chosen = tl.where((slot == SLOTS - 2 - taken)[None, :], number[:, None], chosen)
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
    tied = left.to(tl.float32, bitcast=True) == (last.to(tl.int32, bitcast=True) & score_mask).to(tl.float32, bitcast=True)
    exhausted = (tl.min(m1, 1) == GONE) & (own - first > DEPTH * BN)
    again = scored & (unordered | tied | exhausted)
    selection = tl.where(scored[:, None], tl.sort(chosen), whole)
    _store_selection(out_ptr, selection, row, head, tokens, valid, TOPK, SLOTS)
    # The order of the listed rows varies from run to run; their results do not depend on it.
    again_int = again.to(tl.int32)
    rows_again = tl.sum(again_int, 0)
    if rows_again > 0:
        begin = tl.atomic_add(again_count_ptr + head, rows_again)
        place = begin + tl.cumsum(again_int, 0) - again_int
        tl.store(again_ptr + head.to(tl.int64) * tokens + place, row, mask=again)


@triton.jit(do_not_specialize=["tokens", "q_heads", "group"])
def _gate_exact_kernel(
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
    LISTED: tl.constexpr,
):
    """One program: some tiles of BM rows of one q head; with LISTED, of the rows that `_gate_kernel` listed.

    Reads and writes as `_gate_kernel` does. Blocks pass from the last to the first. A block enters a row's list of
    TOPK - 1 where its key is greater than the least there (an equal one belongs to an earlier block) and drives out the
    earliest of the least. Each round of the inner loop inserts in at least one row, so it ends.
    """
    program = tl.program_id(0)
    head = program % q_heads
    lane = tl.arange(0, BN)
    slot = tl.arange(0, SLOTS)
    todo = tokens
    if LISTED:
        todo = tl.load(again_count_ptr + head)
    row_tiles = tl.cdiv(todo, BM)
    c_base = c_ptr + (head // group).to(tl.int64) * stride_ch
    BIG: tl.constexpr = 1 << 30
    for tile in tl.range(program // q_heads, row_tiles, tl.num_programs(0) // q_heads):
        row = (row_tiles - 1 - tile) * BM + tl.arange(0, BM)
        valid = row < todo
        if LISTED:
            row = tl.load(again_ptr + head.to(tl.int64) * tokens + row, mask=valid, other=0)
        own = tl.load(own_ptr + row, mask=valid, other=0)
        first = tl.load(first_ptr + row, mask=valid, other=0)
        q = _load_tile(q_ptr + head.to(tl.int64) * stride_qh, row, stride_qt, valid, D, PADDED_D)
        low = tl.min(tl.where(own > first, first, BIG), 0)
        high = tl.max(tl.where(own > first, own, 0), 0)
        tiles = tl.where(high > low, tl.cdiv(high - low, BN), 0)
        # Places of the own block and of padding are never the least.
        best = tl.where(slot < TOPK - 1, _LOWEST, _HIGHEST)[None, :] + tl.zeros([BM, SLOTS], tl.int32)
        ids = (-1 - slot)[None, :] + tl.zeros([BM, SLOTS], tl.int32)
        for j in tl.range(0, tiles):
            begin = low + (tiles - 1 - j) * BN
            number = begin + lane
            c = _load_tile(c_base, number, stride_cn, number < high, D, PADDED_D)
            score = tl.dot(q, tl.trans(c))
            candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
            key = tl.where(candidate, _order_key(score), _LOWEST)
            greatest = tl.max(key, 1)
            least = tl.min(best, 1)
            more = tl.max((greatest > least).to(tl.int32), 0)
            while more > 0:
                place = tl.max(tl.where(key == greatest[:, None], lane[None, :], -1), 1)
                of_least = best == least[:, None]
                earliest = tl.min(tl.where(of_least, ids, BIG), 1)
                replace = of_least & (ids == earliest[:, None]) & (greatest > least)[:, None]
                best = tl.where(replace, greatest[:, None], best)
                ids = tl.where(replace, (begin + place)[:, None], ids)
                key = tl.where(lane[None, :] == place[:, None], _LOWEST, key)
                greatest = tl.max(key, 1)
                least = tl.min(best, 1)
                more = tl.max((greatest > least).to(tl.int32), 0)
        chosen = tl.where(ids >= 0, ids, -1)
        chosen = tl.where((slot == SLOTS - 1)[None, :], own[:, None], chosen)
        _store_selection(out_ptr, tl.sort(chosen), row, head, tokens, valid, TOPK, SLOTS)


@triton.jit(do_not_specialize=["row_begin", "row_end", "n_blocks", "head", "kv_head"])
def _scores_kernel(
    q_ptr,
    c_ptr,
    own_ptr,
    first_ptr,
    out_ptr,
    row_begin,
    row_end,
    n_blocks,
    head,
    kv_head,
    stride_qt,
    stride_qh,
    stride_cn,
    stride_ch,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program: keys of BM rows x BN blocks of one q head, `(order key << 32) | block` in int64, written once."""
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    row = row_begin + place
    valid = row < row_end
    own = tl.load(own_ptr + row, mask=valid, other=0)
    first = tl.load(first_ptr + row, mask=valid, other=0)
    number = tl.program_id(1) * BN + tl.arange(0, BN)
    q = _load_tile(q_ptr + tl.cast(head, tl.int64) * stride_qh, row, stride_qt, valid, D, PADDED_D)
    c = _load_tile(c_ptr + tl.cast(kv_head, tl.int64) * stride_ch, number, stride_cn, number < n_blocks, D, PADDED_D)
    score = tl.dot(q, tl.trans(c))
    candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
    key = tl.where(candidate, _order_key(score), _LOWEST).to(tl.int64) * (1 << 32) + number[None, :]
    pointer = out_ptr + place.to(tl.int64)[:, None] * n_blocks + number[None, :]
    tl.store(pointer, key, mask=valid[:, None] & (number < n_blocks)[None, :])


def shapes(dim: int, n_blocks: int, topk: int, hopper: bool) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Constants of the kernels: tiles, sizes of the selection, and those and the options of `_gate_kernel` alone.

    They depend on the device, D, topk and the number of blocks in all, which no layout changes; never on the rows at hand.
    """
    padded = max(triton.next_power_of_2(dim), 16)
    narrow = n_blocks <= 1024 or padded > 128 or not hopper
    tile = {"D": dim, "PADDED_D": padded, "BM": ROW_TILE, "BN": 32 if narrow else 64}
    slots = {"TOPK": topk, "SLOTS": triton.next_power_of_2(topk)}
    # Lanes that give away all of `depth` keys, in a row of independent scores: comb(topk - 1, depth) / BN^(depth - 1).
    # Such rows are done again, at about three times the cost. With as many keys as there are tiles no lane runs out.
    depth = 1
    while depth < 4 and comb(topk - 1, depth) > REDONE_ROWS * tile["BN"] ** (depth - 1):
        depth += 1
    depth = min(depth, triton.cdiv(n_blocks - 1, tile["BN"]))
    variant = {"DEPTH": depth, "PACKED": n_blocks <= PACKED_BLOCKS, "ASM": True, "STAGES": 3 if padded <= 128 else 2}
    variant["num_warps"] = 4
    if hopper and narrow and padded <= 128:
        variant["maxnreg"] = 128  # four programs an SM, without a spill
    return tile, slots, variant


def _select_whole(rows: QueryRows, q_heads: int, topk: int) -> Tensor:
    """The selection where every row's candidates are all selected."""
    number = rows.block[:, None] + torch.arange(1 - topk, 1, dtype=torch.int32, device=rows.block.device)
    number = torch.where(number >= rows.first_block[:, None], number, -1)
    return number.expand(q_heads, -1, -1).contiguous()


def _select_sorted(q: Tensor, centroids: Tensor, rows: QueryRows, topk: int, tile: dict[str, int], out: Tensor) -> None:
    """Any topk: scores of a bounded number of rows at a time, selected by torch."""
    tokens, q_heads, _ = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    step = max(SCORES_BYTES // (8 * n_blocks), ROW_TILE)
    keys = torch.empty(min(step, tokens), n_blocks, dtype=torch.int64, device=q.device)
    strides = (q.stride(0), q.stride(1), centroids.stride(0), centroids.stride(1))
    for head in range(q_heads):
        for begin in range(0, tokens, step):
            end = min(begin + step, tokens)
            grid = (triton.cdiv(end - begin, tile["BM"]), triton.cdiv(n_blocks, tile["BN"]))
            where = (begin, end, n_blocks, head, head // (q_heads // kv_heads))
            _scores_kernel[grid](q, centroids, rows.block, rows.first_block, keys, *where, *strides, **tile, num_warps=4)
            best = torch.topk(keys[: end - begin], topk - 1, dim=1, sorted=False).values
            # The key of what is no candidate fills the upper half alone.
            number = torch.where(best >> 32 > _LOWEST.value, best & 0xFFFFFFFF, -1).to(torch.int32)
            out[head, begin:end, :-1] = number.sort(1).values
            out[head, begin:end, -1] = rows.block[begin:end]


def select_blocks(q: Tensor, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
    """For each q head and row: its own block and the `topk - 1` best-scored blocks before it in its document.

    Scores are `<q, centroid>`, unscaled, in fp32. Equal scores: the later block wins; NaN ranks above every number.

    Args:
        q: `[T, Hq, D]`, bf16 or fp16, unit stride in the last dimension.
        centroids: `[n_blocks, Hkv, D]`, likewise; those of blocks that no query may choose may hold anything.
        rows: where the `T` rows stand, in any order.
        topk: blocks a row attends to at most, own block counted.

    Returns:
        int32 `[Hq, T, topk]`: block numbers ascending, so the own block is last; -1 first where there are fewer.
    """
    tokens, q_heads, dim = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    if tokens * q_heads == 0 or topk == 1 or topk >= n_blocks:
        return _select_whole(rows, q_heads, topk)
    out = torch.empty(q_heads, tokens, topk, dtype=torch.int32, device=q.device)
    hopper = not q.is_cuda or torch.cuda.get_device_capability(q.device) >= (9, 0)
    tile, slots, variant = shapes(dim, n_blocks, topk, hopper)
    if topk > LIST_TOPK:
        _select_sorted(q, centroids, rows, topk, tile, out)
        return out
    fast = topk <= FAST_TOPK
    again_count = torch.zeros(q_heads if fast else 0, dtype=torch.int32, device=q.device)
    again = torch.empty(q_heads, tokens if fast else 0, dtype=torch.int32, device=q.device)
    strides = (q.stride(0), q.stride(1), centroids.stride(0), centroids.stride(1))
    tensors = (q, centroids, rows.block, rows.first_block, out, again_count, again)
    arguments = (*tensors, tokens, q_heads, q_heads // kv_heads, *strides)
    row_tiles = triton.cdiv(tokens, ROW_TILE)
    if fast:
        variant["ASM"] = q.is_cuda
        _gate_kernel[(row_tiles * q_heads,)](*arguments, **slots, **tile, **variant)
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    programs = min(row_tiles, triton.cdiv(EXACT_PROGRAMS_PER_SM * sms, q_heads))
    _gate_exact_kernel[(programs * q_heads,)](*arguments, **slots, **tile, LISTED=fast, num_warps=4)
    return out
