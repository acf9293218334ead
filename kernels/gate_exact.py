"""The gate where the lanes of `kernels/gate.py` do not prove a selection: exact for any scores and any topk, and slower.

`_gate_exact_kernel` streams the blocks past a list of the best in registers. `select_sorted` lets torch sort scores, a bounded
piece at a time. Both order scores by `_order_key` and then by block number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv
from .types import QueryRows

SCORES_BYTES = 1 << 26
"""Bound on the scores that exist at once beyond `LIST_TOPK`."""
_LOWEST = tl.constexpr(-(1 << 31))
"""Key of what is no candidate: below the key of -inf."""
_HIGHEST = tl.constexpr((1 << 31) - 1)
"""Key of NaN."""


@triton.jit
def _order_key(score):
    """int32 with the order of the scores: ordered bits, one zero, NaN (of either sign) on top."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, _HIGHEST, key)


@triton.jit
def _load_tile(base, row, stride, inside, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Rows of a matrix with unit last stride, zeros where not `inside` and beyond D."""
    column = tl.arange(0, PADDED_D)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _store_selection(out_ptr, selection, row, head, tokens, valid, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """The last TOPK of SLOTS columns into `[head, row, :]` of the contiguous `[heads, tokens, TOPK]`."""
    column = tl.arange(0, SLOTS) - (SLOTS - TOPK)
    pointer = out_ptr + (head.to(tl.int64) * tokens + row)[:, None] * TOPK + column[None, :]
    tl.store(pointer, selection, mask=valid[:, None] & (column >= 0)[None, :])


@triton.jit(do_not_specialize=["tokens", "q_heads", "group"], do_not_specialize_on_alignment=["own_ptr", "first_ptr"])
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


@triton.jit(
    do_not_specialize=["row_begin", "row_end", "n_blocks", "head", "kv_head"],
    do_not_specialize_on_alignment=["own_ptr", "first_ptr"],
)
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


def select_sorted(q: Tensor, centroids: Tensor, rows: QueryRows, topk: int, tile: dict[str, int], out: Tensor) -> None:
    """Any topk: scores of a bounded number of rows at a time, selected by torch."""
    tokens, q_heads, _ = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    step = max(SCORES_BYTES // (8 * n_blocks), tile["BM"])
    keys = torch.empty(min(step, tokens), n_blocks, dtype=torch.int64, device=q.device)
    strides = (q.stride(0), q.stride(1), centroids.stride(0), centroids.stride(1))
    for head in range(q_heads):
        for begin in range(0, tokens, step):
            end = min(begin + step, tokens)
            grid = (cdiv(end - begin, tile["BM"]), cdiv(n_blocks, tile["BN"]))
            where = (begin, end, n_blocks, head, head // (q_heads // kv_heads))
            _scores_kernel[grid](
                q, centroids, rows.block, rows.first_block, keys, *where, *strides, **tile, num_warps=4
            )
            best = torch.topk(keys[: end - begin], topk - 1, dim=1, sorted=False).values
            # The key of what is no candidate fills the upper half alone.
            number = torch.where(best >> 32 > _LOWEST.value, best & 0xFFFFFFFF, -1).to(torch.int32)
            out[head, begin:end, :-1] = number.sort(1).values
            out[head, begin:end, -1] = rows.block[begin:end]
