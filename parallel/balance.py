"""Runs of tokens that give every rank the same number of tokens and the same work, in closed form.

A row at position t of its document, in block j = t // B, attends to `min(topk - 1, j) * B + t % B + 1` keys and scores j
candidates. Early rows are cheap until `topk` blocks lie before them, and scoring grows to the end. Zigzag pairs chunk i with
chunk 2P - 1 - i, which balances dense attention (linear in t), not this::

    keys per row   zigzag, 2 ranks                      balanced, 2 ranks
       ______      rank 0 has the cheap start           both cuts move until tokens and work are equal
      /            | 0 |   1   |   1   | 0 |            |  0  |    1    |    1    |0|
     /

Each document is cut like an onion. One rank after the other takes n tokens, some from the start and the rest from the end of
what is left, so that its work is its share. Work from the start only: too little; from the end only: too much; so a cut between
exists where work per row grows along the document. It does, but for the sawtooth of less than one block inside blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

KEY_WORK, CANDIDATE_WORK = 7, 1
"""Work per attended key and per scored candidate: FLOPs of forward and backward in units of 2 D (4 D + 10 D, and 2 D)."""

_FEW_DOCUMENTS = 24
"""At most this many documents are cut one by one, in Python's integers."""
_MOST_WORK = 1 << 62
"""Ranks times the work of a document fit 64 bits below this bound."""
_SLAB = 1 << 20
"""Most numbers in a temporary matrix."""


Positions = TypeVar("Positions", int, np.ndarray)


def keys_before(position: Positions, block_size: int, topk: int) -> Positions:
    """Keys that the rows before a position of a document attend to, per q head: int64 of the same shape.

    Args:
        position: counted from the document's start: int64, or one of Python's integers, which do not overflow.
        block_size, topk: of the attention.
    """
    block, rest = position // block_size, position % block_size
    keys = block_size * block_size * _past_before(block, topk) + block * (block_size * (block_size + 1) // 2)
    return keys + rest * _least(block, topk - 1) * block_size + rest * (rest + 1) // 2


def pairs_before(position: Positions, block_size: int, topk: int) -> Positions:
    """Blocks that these rows attend to, own ones among them: one partial result each."""
    block, rest = position // block_size, position % block_size
    return block_size * (_past_before(block, topk) + block) + rest * (_least(block, topk - 1) + 1)


def candidates_before(position: Positions, block_size: int) -> Positions:
    """Blocks that these rows score."""
    block, rest = position // block_size, position % block_size
    return block_size * (block * (block - 1) // 2) + rest * block


def _past_before(block: Positions, topk: int) -> Positions:
    """Sum of min(topk - 1, j) over the blocks j before one: a triangle, then a rectangle."""
    past = _least(block, topk - 1)
    return past * (past - 1) // 2 + (block - past) * (topk - 1)


def _least(block: Positions, bound: int) -> Positions:
    return min(block, bound) if isinstance(block, int) else np.minimum(block, bound)


def work_before(position: Positions, block_size: int, topk: int) -> Positions:
    """Work of these rows, in units of 2 D FLOPs; see `KEY_WORK`."""
    return KEY_WORK * keys_before(position, block_size, topk) + CANDIDATE_WORK * candidates_before(position, block_size)


class Cuts(NamedTuple):
    """What the ranks that have taken their shares leave of each document: `[low, high)`, int64 `[P + 1, documents]`.

    The rank that takes place p holds `[low[p], low[p + 1])` and `[high[p + 1], high[p])`. Tokens count from the document's start.
    """

    low: np.ndarray
    high: np.ndarray


def balanced_runs(cu_seqlens: np.ndarray, size: int, block_size: int, topk: int) -> list[np.ndarray]:
    """For each rank its runs `[start, end)` of token numbers, int64 `[n, 2]`: ascending, not empty, as few as possible.

    Per document, numbers of tokens differ by at most one between ranks. Ranks take turns in being the first to take from a
    document, so that remainders even out over documents.

    Args:
        cu_seqlens: int64 `[documents + 1]`.
        size: number of ranks.
        block_size, topk: of the attention.
    """
    cuts, begin = balanced_cuts(np.diff(cu_seqlens), size, block_size, topk), cu_seqlens[:-1]
    document, step = np.arange(begin.size), max(1, _SLAB // max(1, begin.size))
    found = []
    for first in range(0, size, step):  # in slabs: large groups take nothing from most short documents
        low, high = (begin + x[first : first + step + 1] for x in cuts)
        start, end = np.stack([low[:-1], high[1:]]), np.stack([low[1:], high[:-1]])
        rank = np.broadcast_to((first + np.arange(len(low) - 1)[:, None] + document) % size, start.shape)
        held = start < end
        found.append(np.stack([rank[held], start[held], end[held]]))
    rank, start, end = np.concatenate(found, axis=1)
    order = np.lexsort((start, rank))
    rank, start, end = rank[order], start[order], end[order]
    begins = np.flatnonzero(np.append(True, (rank[1:] != rank[:-1]) | (start[1:] != end[:-1]))[: rank.size])
    runs = np.stack([start[begins], end[np.append(begins[1:], rank.size)[: begins.size] - 1]], axis=1)
    last = np.cumsum(np.bincount(rank[begins], minlength=size)).tolist()
    return [runs[i:j] for i, j in zip([0, *last[:-1]], last, strict=True)]


def balanced_cuts(length: np.ndarray, size: int, block_size: int, topk: int) -> Cuts:
    """Where each document is cut, place by place.

    Args:
        length: int64 `[documents]`, tokens of each.
        size: number of ranks.
        block_size, topk: of the attention.
    """
    longest = int(length.max(initial=0))
    block_size, topk = min(block_size, max(1, longest)), min(topk, longest + 1)  # larger values mean the same
    low, high = (np.empty((size + 1, length.size), dtype=np.int64) for _ in range(2))
    if length.size <= _FEW_DOCUMENTS or size * work_before(longest, block_size, topk) > _MOST_WORK:
        for document, tokens in enumerate(length.tolist()):
            low[:, document], high[:, document] = _cuts_of(tokens, size, block_size, topk)
        return Cuts(low, high)
    low[0], high[0] = 0, length
    for place in range(size):
        count = (high[place] - low[place]) // (size - place)  # the last ones take the remainder
        front = _from_front(low[place], high[place], count, size - place, block_size, topk)
        low[place + 1], high[place + 1] = low[place] + front, high[place] - (count - front)
    return Cuts(low, high)


def _from_front(
    low: np.ndarray, high: np.ndarray, count: np.ndarray, shares: int, block_size: int, topk: int
) -> np.ndarray:
    """Of `count` rows taken from `[low, high)` of each document, how many from its start, so that their work is one of
    `shares` equal shares: by bisection, all documents at once."""
    excess = _excess(low, high, count, shares, block_size, topk)
    few, many = np.zeros_like(count), count.copy()  # more from the start, less work
    for _ in range(int(count.max(initial=0)).bit_length() + 1):
        middle = (few + many + 1) // 2
        enough = excess(middle) >= 0
        few, many = (
            np.where(enough & (middle <= many), middle, few),
            np.where(enough, many, np.maximum(middle - 1, few)),
        )
    after = np.minimum(few + 1, count)
    return np.where(np.abs(excess(after)) < np.abs(excess(few)), after, few)


def _excess(
    low: Positions, high: Positions, count: Positions, shares: int, block_size: int, topk: int
) -> Callable[[Positions], Positions]:
    """Work beyond one share, by how many of `count` rows are taken from the start."""
    start, end, rest = work_before(low, block_size, topk), work_before(high, block_size, topk), high - count

    def excess(front: Positions) -> Positions:
        mine = work_before(low + front, block_size, topk) - start + end - work_before(rest + front, block_size, topk)
        return shares * mine - (end - start)

    return excess


def _cuts_of(length: int, size: int, block_size: int, topk: int) -> tuple[list[int], list[int]]:
    """`low` and `high` of one document, in Python's integers. A call of numpy costs more than the few numbers of a document take,
    and a group of 65,536 makes a million calls."""
    lows, highs = [0], [length]
    for shares in range(size, 0, -1):
        low, high = lows[-1], highs[-1]
        count = (high - low) // shares
        front = _front_of(low, high, count, shares, block_size, topk)
        lows.append(low + front)
        highs.append(high - (count - front))
    return lows, highs


def _front_of(low: int, high: int, count: int, shares: int, block_size: int, topk: int) -> int:
    """`_from_front` of one document."""
    excess = _excess(low, high, count, shares, block_size, topk)
    few, many = 0, count
    while few < many:
        middle = (few + many + 1) // 2
        if excess(middle) >= 0:
            few = middle
        else:
            many = middle - 1
    return few + 1 if few < count and abs(excess(few + 1)) < abs(excess(few)) else few
