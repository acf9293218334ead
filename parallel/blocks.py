"""Blocks of the packed documents, the one home rank of each, and what has to move so that every block is whole there.

Everything here is a pure function of host integers. Two ranks, contiguous, one document of 20 tokens, blocks of 8::

    tokens   0      7 8    15 16 19
    blocks  |   0   |   1   |  2 |
    ranks   |  rank 0  |  rank 1 |        rank 0 holds [0, 10), rank 1 holds [10, 20)
    home         0       1     1          block 1 has 2 tokens on rank 0 and 6 on rank 1: tokens 8, 9 go to rank 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from .layout import SequenceLayout
from .partition import expand_runs


@dataclass(frozen=True)
class BlockTable:
    """Blocks over all documents in order; block numbers are global. int64 arrays `[n_blocks]`.

    Attributes:
        start: token number of the first key.
        length: keys: `block_size`, but for a short last block of a document.
        first_of_document: number of the first block of the block's document.
        is_last: whether it is the last block of its document (such a block is no candidate of any query).
    """

    start: np.ndarray
    length: np.ndarray
    first_of_document: np.ndarray
    is_last: np.ndarray

    def __len__(self) -> int:
        return self.start.size

    @cached_property
    def most_of_a_document(self) -> int:
        """Blocks of the longest document, at least 1."""
        return int((np.arange(len(self)) - self.first_of_document).max(initial=0)) + 1


@dataclass(frozen=True, eq=False)
class HomePlan:
    """Where every block lives, and the pieces of blocks that each rank holds.

    Attributes:
        layout, block_size: what the plan was made of.
        blocks: the block table.
        home: int64 `[n_blocks]`, the rank that holds most of the block's tokens (the lowest of equals).
        home_row: int64 `[n_blocks]`, row of the block's first key among the keys at home there.
        home_tokens: int64 `[P]`, keys at home on each rank.
        piece_rank, piece_row, piece_block, piece_position, piece_length: int64 `[pieces]`, stretches of tokens of one
            block that lie side by side on one rank: the rank, its local row of the first token, the block, the first
            token's position in the block, and the number of tokens. In order of (rank, local row).
    """

    layout: SequenceLayout
    block_size: int
    blocks: BlockTable
    home: np.ndarray
    home_row: np.ndarray
    home_tokens: np.ndarray
    piece_rank: np.ndarray
    piece_row: np.ndarray
    piece_block: np.ndarray
    piece_position: np.ndarray
    piece_length: np.ndarray

    @cached_property
    def has_fragments(self) -> bool:
        """Whether any token lives on another rank than its block's home; every rank knows alike."""
        return bool((self.home[self.piece_block] != self.piece_rank).any())


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's side of a `HomePlan`, as host arrays.

    Attributes:
        plan, rank: what it is made of.
        block, first_block, position: int64 `[local tokens]`, see `kernels.QueryRows`.
        send_rows: int64, local rows of tokens that go to another rank's home blocks, by (destination, block, position).
        send_tokens, receive_tokens: int64 `[P]`, tokens sent to and received from each rank.
        home_from: int64 `[home tokens]`, each home key's row in `[local rows | received rows]`; None when the local
            rows are the home keys already.
        local_from: int64 `[local tokens]`, each local token's row in `[home rows | rows that come back]`; None likewise.
        centroid_rows: int64, home row of each home block that can be a candidate, ascending block numbers.
        centroid_blocks: int64, the numbers of those blocks.
    """

    plan: HomePlan
    rank: int
    block: np.ndarray
    first_block: np.ndarray
    position: np.ndarray
    send_rows: np.ndarray
    send_tokens: np.ndarray
    receive_tokens: np.ndarray
    home_from: np.ndarray | None
    local_from: np.ndarray | None
    centroid_rows: np.ndarray
    centroid_blocks: np.ndarray


def block_table(cu_seqlens: np.ndarray, block_size: int) -> BlockTable:
    """Blocks of documents with the boundaries `cu_seqlens` `[documents + 1]`; an empty document has none."""
    length = np.diff(cu_seqlens)
    count = -(-length // block_size)
    first = np.cumsum(count) - count
    document = np.repeat(np.arange(length.size), count)
    index = np.arange(int(count.sum())) - first[document]
    start = cu_seqlens[document] + index * block_size
    return BlockTable(
        start=start,
        length=np.minimum(block_size, cu_seqlens[document + 1] - start),
        first_of_document=first[document],
        is_last=index == count[document] - 1,
    )


@lru_cache(maxsize=64)
def home_plan(layout: SequenceLayout, block_size: int) -> HomePlan:
    """Give every block its home rank. Costs O(blocks + runs) host work; kept for the last layouts seen."""
    blocks = block_table(layout.cu_seqlens_array, block_size)
    n_ranks = layout.cp_size
    run_rank = np.repeat(np.arange(n_ranks), [len(r) for r in layout.runs])
    runs = np.concatenate(layout.runs)
    block_end = blocks.start + blocks.length
    # A run [start, end) touches the blocks first..last: cut it there.
    first = np.searchsorted(block_end, runs[:, 0], side="right")
    last = np.searchsorted(blocks.start, runs[:, 1], side="left") - 1
    per_run = last - first + 1
    of_run = np.repeat(np.arange(len(runs)), per_run)
    piece_block = expand_runs(np.stack([first, last + 1], axis=1))
    piece_start = np.maximum(runs[of_run, 0], blocks.start[piece_block])
    piece_length = np.minimum(runs[of_run, 1], block_end[piece_block]) - piece_start
    piece_rank = run_rank[of_run]
    before = np.cumsum(piece_length) - piece_length
    local_tokens = np.array([layout.local_tokens(r) for r in range(n_ranks)])
    piece_row = before - (np.cumsum(local_tokens) - local_tokens)[piece_rank]

    home = _largest_holder(piece_block, piece_rank, piece_length, len(blocks))
    home_tokens = np.bincount(home, weights=blocks.length, minlength=n_ranks).astype(np.int64)
    by_home = np.argsort(home, kind="stable")
    row = np.cumsum(blocks.length[by_home]) - blocks.length[by_home]
    home_row = np.empty_like(home)
    home_row[by_home] = row - (np.cumsum(home_tokens) - home_tokens)[home[by_home]]
    return HomePlan(
        layout,
        block_size,
        blocks,
        home,
        home_row,
        home_tokens,
        piece_rank,
        piece_row,
        piece_block,
        piece_start - blocks.start[piece_block],
        piece_length,
    )


def _largest_holder(block: np.ndarray, rank: np.ndarray, tokens: np.ndarray, n_blocks: int) -> np.ndarray:
    """For each block the rank that holds most of its tokens, the lowest of equals: int64 `[n_blocks]`."""
    pair, index = np.unique(np.stack([block, rank], axis=1), axis=0, return_inverse=True)
    held = np.bincount(index.reshape(-1), weights=tokens, minlength=len(pair)).astype(np.int64)
    order = np.lexsort((pair[:, 1], -held, pair[:, 0]))
    pair = pair[order]
    first = np.ones(len(pair), dtype=bool)
    first[1:] = pair[1:, 0] != pair[:-1, 0]
    home = pair[first, 1]
    assert home.size == n_blocks, "every block has a holder because the layout covers every token"
    return home


@lru_cache(maxsize=64)
def rank_plan(plan: HomePlan, rank: int) -> RankPlan:
    """One rank's side of `plan`."""
    home, n_ranks = plan.home[plan.piece_block], plan.layout.cp_size
    mine = plan.piece_rank == rank
    block = np.repeat(plan.piece_block[mine], plan.piece_length[mine])
    position = _expand(plan.piece_position[mine], plan.piece_length[mine])

    def moved(here: np.ndarray, peer: np.ndarray) -> np.ndarray:
        """Pieces `here` that do not stay, in the order of the wire: by (peer, block, position)."""
        index = np.flatnonzero(here & (home != plan.piece_rank))
        return index[np.lexsort((plan.piece_position[index], plan.piece_block[index], peer[index]))]

    sent = moved(mine, home)
    received = moved(home == rank, plan.piece_rank)
    tokens_of = lambda index, peer: np.bincount(  # noqa: E731
        peer[index], weights=plan.piece_length[index], minlength=n_ranks
    ).astype(np.int64)

    home_row_of_piece = plan.home_row[plan.piece_block] + plan.piece_position
    kept = np.flatnonzero(mine & (home == rank))
    home_from = np.empty(int(plan.home_tokens[rank]), dtype=np.int64)
    local_from = np.empty(block.size, dtype=np.int64)
    kept_local = _expand(plan.piece_row[kept], plan.piece_length[kept])
    kept_home = _expand(home_row_of_piece[kept], plan.piece_length[kept])
    home_from[kept_home] = kept_local
    local_from[kept_local] = kept_home
    home_from[_expand(home_row_of_piece[received], plan.piece_length[received])] = block.size + np.arange(
        int(plan.piece_length[received].sum())
    )
    send_rows = _expand(plan.piece_row[sent], plan.piece_length[sent])
    local_from[send_rows] = home_from.size + np.arange(send_rows.size)
    in_place = home_from.size == block.size and bool((home_from == np.arange(home_from.size)).all())

    candidate = np.flatnonzero((plan.home == rank) & ~plan.blocks.is_last)
    return RankPlan(
        plan,
        rank,
        block,
        plan.blocks.first_of_document[block],
        position,
        send_rows,
        tokens_of(sent, home),
        tokens_of(received, plan.piece_rank),
        None if in_place else home_from,
        None if in_place else local_from,
        plan.home_row[candidate],
        candidate,
    )


def _expand(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Numbers `first[i], ..., first[i] + length[i] - 1` for all i, in order: int64."""
    return expand_runs(np.stack([first, first + length], axis=1))
