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

import numpy as np

KEY_WORK, CANDIDATE_WORK = 7, 1
"""Work per attended key and per scored candidate: FLOPs of forward and backward in units of 2 D (4 D + 10 D, and 2 D)."""


def keys_before(position: np.ndarray, block_size: int, topk: int) -> np.ndarray:
    """Keys that the rows before a position of a document attend to, per q head: int64 of the same shape.

    Args:
        position: int64, counted from the document's start.
        block_size, topk: of the attention.
    """
    position = np.asarray(position, dtype=np.int64)
    block, rest = position // block_size, position % block_size
    keys = block_size * block_size * _past_before(block, topk) + block * (block_size * (block_size + 1) // 2)
    return keys + rest * np.minimum(block, topk - 1) * block_size + rest * (rest + 1) // 2


def pairs_before(position: np.ndarray, block_size: int, topk: int) -> np.ndarray:
    """Blocks that these rows attend to, own ones among them: one partial result each."""
    position = np.asarray(position, dtype=np.int64)
    block, rest = position // block_size, position % block_size
    return block_size * (_past_before(block, topk) + block) + rest * (np.minimum(block, topk - 1) + 1)


def candidates_before(position: np.ndarray, block_size: int) -> np.ndarray:
    """Blocks that these rows score."""
    position = np.asarray(position, dtype=np.int64)
    block, rest = position // block_size, position % block_size
    return block_size * (block * (block - 1) // 2) + rest * block


def _past_before(block: np.ndarray, topk: int) -> np.ndarray:
    """Sum of min(topk - 1, j) over the blocks j before one: a triangle, then a rectangle."""
    past = np.minimum(block, topk - 1)
    return past * (past - 1) // 2 + (block - past) * (topk - 1)


def work_before(position: np.ndarray, block_size: int, topk: int) -> np.ndarray:
    """Work of these rows, in units of 2 D FLOPs; see `KEY_WORK`."""
    return KEY_WORK * keys_before(position, block_size, topk) + CANDIDATE_WORK * candidates_before(position, block_size)


def balanced_runs(cu_seqlens: np.ndarray, size: int, block_size: int, topk: int) -> list[np.ndarray]:
    """For each rank its runs `[start, end)` of token numbers, int64 `[n, 2]`, ascending.

    Per document, numbers of tokens differ by at most one between ranks. Ranks take turns in being the first to take from a
    document, so that remainders even out over documents.

    Args:
        cu_seqlens: int64 `[documents + 1]`.
        size: number of ranks.
        block_size, topk: of the attention.
    """
    begin, length = cu_seqlens[:-1], np.diff(cu_seqlens)
    low, high = np.zeros_like(length), length.copy()  # what is left of each document
    taken: list[list[np.ndarray]] = [[] for _ in range(size)]
    document = np.arange(len(length))
    for place in range(size):
        count = (high - low) // (size - place)  # the last ones take the remainder
        front = _from_front(low, high, count, size - place, block_size, topk)
        rank = (place + document) % size
        runs = np.stack([begin + low, begin + low + front, begin + high - (count - front), begin + high], 1).reshape(
            -1, 2, 2
        )
        for r in np.unique(rank):
            taken[r].append(runs[rank == r].reshape(-1, 2))
        low, high = low + front, high - (count - front)
    found = []
    for parts in taken:
        whole = np.concatenate([np.empty((0, 2), dtype=np.int64), *parts])
        whole = whole[whole[:, 0] < whole[:, 1]]
        found.append(whole[np.argsort(whole[:, 0], kind="stable")])
    return found


def _from_front(
    low: np.ndarray, high: np.ndarray, count: np.ndarray, shares: int, block_size: int, topk: int
) -> np.ndarray:
    """Of `count` rows taken from `[low, high)` of each document, how many from its start, so that their work is one of
    `shares` equal shares: by bisection, all documents at once."""

    def excess(front: np.ndarray) -> np.ndarray:
        """Work taken beyond one share."""
        start, end = work_before(low, block_size, topk), work_before(high, block_size, topk)
        mine = work_before(low + front, block_size, topk) - start
        mine = mine + end - work_before(high - (count - front), block_size, topk)
        return shares * mine - (end - start)

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
