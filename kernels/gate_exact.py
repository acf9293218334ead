"""The gate where the lanes of `gate.py` do not prove a selection: exact for any scores and any topk, and slower.

`gate_exact_kernel` streams the blocks past a list of the best in registers. `select_sorted` lets torch sort scores, a bounded
portion at a time. Both order scores by `_order_key` and then by block number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import GateConfig
from .launch import launch_kernel
from .sizes import cdiv, padded
from .types import QueryRows

SCORES_BYTES = 1 << 26
"""Most bytes of scores that exist at once in `select_sorted`."""
_LOWEST = tl.constexpr(-(1 << 31))
"""Key of a block that is no candidate: below the key of -inf."""
_HIGHEST = tl.constexpr((1 << 31) - 1)
"""Key of NaN."""


@triton.jit
def _order_key(score):
    """int32 in the order of the scores: one zero, NaN (of either sign) on top."""
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score == 0.0, 0, key)
    return tl.where(score != score, _HIGHEST, key)


@triton.jit
def load_tile(base, row, stride, inside, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Rows of a matrix with unit last stride; zeros where not `inside` and beyond D."""
    column = tl.arange(0, D_PADDED)
    pointer = base + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointer, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_selection(selected, selection, row, head, tokens, valid, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """The last TOPK of SLOTS columns into `[head, row, :]` of the contiguous `[heads, tokens, TOPK]`."""
    column = tl.arange(0, SLOTS) - (SLOTS - TOPK)
    pointer = selected + (head.to(tl.int64) * tokens + row)[:, None] * TOPK + column[None, :]
    tl.store(pointer, selection, mask=valid[:, None] & (column >= 0)[None, :])


@triton.jit(
    do_not_specialize=["tokens", "q_heads", "group", "first_list"],
    do_not_specialize_on_alignment=["own_block", "first_block"],
)
def gate_exact_kernel(
    q, centroids, own_block, first_block, selected, counts, unproved,
    tokens, q_heads, group, q_token, q_head, c_block, c_head, first_list,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """One program: some tiles of ROWS rows of one q head; with LISTED, of the rows that `gate_kernel` listed in
    list `first_list + head`.

    Reads 2 * D + 8 bytes per row (with LISTED 4 more) and 2 * D bytes per candidate for every ROWS rows (from L2); writes
    TOPK block numbers per row.

    Blocks pass from the last to the first. A block enters a row's list of TOPK - 1 where its key is greater than the least
    key there (an equal key belongs to an earlier block), and evicts the earliest of the least. Each round of the inner loop
    inserts into at least one row, so it terminates.
    """
    program = tl.program_id(0)
    head = program % q_heads
    lane = tl.arange(0, BLOCKS)
    slot = tl.arange(0, SLOTS)
    todo = tokens
    if LISTED:
        todo = tl.load(counts + first_list + head)
    row_tiles = tl.cdiv(todo, ROWS)
    c_base = centroids + (head // group).to(tl.int64) * c_head
    BIG: tl.constexpr = 1 << 30
    for tile in tl.range(program // q_heads, row_tiles, tl.num_programs(0) // q_heads):
        row = (row_tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
        valid = row < todo
        if LISTED:
            row = tl.load(unproved + (first_list + head).to(tl.int64) * tokens + row, mask=valid, other=0)
        own = tl.load(own_block + row, mask=valid, other=0)
        first = tl.load(first_block + row, mask=valid, other=0)
        q_tile = load_tile(q + head.to(tl.int64) * q_head, row, q_token, valid, D, D_PADDED)
        low = tl.min(tl.where(own > first, first, BIG), 0)
        high = tl.max(tl.where(own > first, own, 0), 0)
        tiles = tl.where(high > low, tl.cdiv(high - low, BLOCKS), 0)
        # Slots of the own block and of padding are never the least.
        best = tl.where(slot < TOPK - 1, _LOWEST, _HIGHEST)[None, :] + tl.zeros([ROWS, SLOTS], tl.int32)
        ids = (-1 - slot)[None, :] + tl.zeros([ROWS, SLOTS], tl.int32)
        for j in tl.range(0, tiles):
            begin = low + (tiles - 1 - j) * BLOCKS
            number = begin + lane
            c_tile = load_tile(c_base, number, c_block, number < high, D, D_PADDED)
            score = tl.dot(q_tile, tl.trans(c_tile))
            candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
            key = tl.where(candidate, _order_key(score), _LOWEST)
            greatest = tl.max(key, 1)
            least = tl.min(best, 1)
            more = tl.max((greatest > least).to(tl.int32), 0)
            while more > 0:
                found = tl.max(tl.where(key == greatest[:, None], lane[None, :], -1), 1)
                of_least = best == least[:, None]
                earliest = tl.min(tl.where(of_least, ids, BIG), 1)
                replace = of_least & (ids == earliest[:, None]) & (greatest > least)[:, None]
                best = tl.where(replace, greatest[:, None], best)
                ids = tl.where(replace, (begin + found)[:, None], ids)
                key = tl.where(lane[None, :] == found[:, None], _LOWEST, key)
                greatest = tl.max(key, 1)
                least = tl.min(best, 1)
                more = tl.max((greatest > least).to(tl.int32), 0)
        chosen = tl.where(ids >= 0, ids, -1)
        chosen = tl.where((slot == SLOTS - 1)[None, :], own[:, None], chosen)
        store_selection(selected, tl.sort(chosen), row, head, tokens, valid, TOPK, SLOTS)


@triton.jit(
    do_not_specialize=["row_begin", "row_end", "n_blocks", "head", "kv_head"],
    do_not_specialize_on_alignment=["own_block", "first_block"],
)
def scores_kernel(
    q, centroids, own_block, first_block, keys,
    row_begin, row_end, n_blocks, head, kv_head, q_token, q_head, c_block, c_head,
    D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: int64 keys `(order key << 32) | block` of ROWS rows x BLOCKS blocks of one q head.

    Reads 2 * D + 8 bytes per row and 2 * D per centroid; writes 8 bytes per key.
    """
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = row_begin + index
    valid = row < row_end
    own = tl.load(own_block + row, mask=valid, other=0)
    first = tl.load(first_block + row, mask=valid, other=0)
    number = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    q_tile = load_tile(q + tl.cast(head, tl.int64) * q_head, row, q_token, valid, D, D_PADDED)
    c_base = centroids + tl.cast(kv_head, tl.int64) * c_head
    c_tile = load_tile(c_base, number, c_block, number < n_blocks, D, D_PADDED)
    score = tl.dot(q_tile, tl.trans(c_tile))
    candidate = (number[None, :] >= first[:, None]) & (number[None, :] < own[:, None])
    key = tl.where(candidate, _order_key(score), _LOWEST).to(tl.int64) * (1 << 32) + number[None, :]
    pointer = keys + index.to(tl.int64)[:, None] * n_blocks + number[None, :]
    tl.store(pointer, key, mask=valid[:, None] & (number < n_blocks)[None, :])


def select_sorted(
    q: Tensor, centroids: Tensor, rows: QueryRows, topk: int, config: GateConfig, out: Tensor
) -> None:  # fmt: skip
    """The selection for any topk into `out`: scores of a bounded number of rows at a time, sorted by torch."""
    tokens, q_heads, dim = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    step = max(SCORES_BYTES // (8 * n_blocks), config.rows)
    keys = torch.empty(min(step, tokens), n_blocks, dtype=torch.int64, device=q.device)
    strides = (q.stride(0), q.stride(1), centroids.stride(0), centroids.stride(1))
    for head in range(q_heads):
        for begin in range(0, tokens, step):
            end = min(begin + step, tokens)
            grid = (cdiv(end - begin, config.rows), cdiv(n_blocks, config.blocks))
            where = (begin, end, n_blocks, head, head // (q_heads // kv_heads))
            launch_kernel(scores_kernel, grid,
                q, centroids, rows.block, rows.first_block, keys, *where, *strides, D=dim, D_PADDED=padded(dim),
                ROWS=config.rows, BLOCKS=config.blocks, num_warps=config.num_warps,
            )  # fmt: skip
            best = torch.topk(keys[: end - begin], topk - 1, dim=1, sorted=False).values
            # The key of a block that is no candidate has _LOWEST in its upper half.
            number = torch.where(best >> 32 > _LOWEST.value, best & 0xFFFFFFFF, -1).to(torch.int32)
            out[head, begin:end, :-1] = number.sort(1).values
            out[head, begin:end, -1] = rows.block[begin:end]
