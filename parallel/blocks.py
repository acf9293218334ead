"""Blocks of the packed documents, the one home rank of each, and what has to move so that every block is whole there.

Everything here is a pure function of host integers. Two ranks, contiguous, one document of 20 tokens, blocks of 8::

    tokens   0      7 8    15 16 19
    blocks  |   0   |   1   |  2 |
    ranks   |  rank 0  |  rank 1 |        rank 0 holds [0, 10), rank 1 holds [10, 20)
    home         0       1     1          block 1 has 2 tokens on rank 0 and 6 on rank 1: tokens 8, 9 go to rank 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .layout import SequenceLayout
from .partition import expand_runs
from .plan_cache import PLANS, Memo


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

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest block."""
        return int(self.length.max(initial=0))


@dataclass(frozen=True, eq=False)
class HomePlan:
    """Where every block lives.

    Attributes:
        layout, block_size: what the plan was made of.
        blocks: the block table.
        home: int64 `[n_blocks]`, the rank that holds most of the block's tokens (the lowest of equals).
        home_row: int64 `[n_blocks]`, row of the block's first key among the keys at home there.
        home_tokens: int64 `[P]`, keys at home on each rank.
        whole: bool `[n_blocks]`, whether the home rank holds all of the block's tokens.
        keeps_rows: blocks stay where they lie if they can; see `home_plan`.
        memo: what was made of the plan and does not refer to it: index tensors on devices.
    """

    layout: SequenceLayout
    block_size: int
    blocks: BlockTable
    home: np.ndarray
    home_row: np.ndarray
    home_tokens: np.ndarray
    whole: np.ndarray
    keeps_rows: bool = False
    memo: Memo = field(default_factory=Memo, repr=False)

    @cached_property
    def has_fragments(self) -> bool:
        """Whether any token lives on another rank than its block's home; the same on every rank."""
        return not bool(self.whole.all())

    @cached_property
    def most_rows(self) -> int:
        """At least the rows of every block: few different numbers, since kernels are compiled for each."""
        return min(self.block_size, 1 << (max(self.blocks.longest, 1) - 1).bit_length())

    def pieces(self, rank: int) -> Pieces:
        """What `rank` holds, cut at the boundaries of blocks."""
        return cut_at_blocks(self.layout.runs_of(rank), self.blocks)


class Pieces(NamedTuple):
    """Consecutive tokens of one block in consecutive rows of one rank; int64 arrays of one length, in order of rows.

    Attributes:
        row: the rank's local row of the first token.
        block: number of the block.
        position: the first token's position in the block.
        length: tokens.
    """

    row: np.ndarray
    block: np.ndarray
    position: np.ndarray
    length: np.ndarray


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


def cut_at_blocks(runs: np.ndarray, blocks: BlockTable) -> Pieces:
    """Runs `[n, 2]`, held in consecutive rows, cut at the boundaries of blocks."""
    block_end = blocks.start + blocks.length
    # A run [start, end) touches the blocks first..last: cut it there.
    first = np.searchsorted(block_end, runs[:, 0], side="right")
    last = np.searchsorted(blocks.start, runs[:, 1], side="left") - 1
    of_run = np.repeat(np.arange(len(runs)), last - first + 1)
    block = expand_runs(np.stack([first, last + 1], axis=1))
    start = np.maximum(runs[of_run, 0], blocks.start[block])
    length = np.minimum(runs[of_run, 1], block_end[block]) - start
    return Pieces(np.cumsum(length) - length, block, start - blocks.start[block], length)


def home_plan(layout: SequenceLayout, block_size: int, keeps_rows: bool = False) -> HomePlan:
    """Give every block its home rank. Costs O(blocks) host work, and O(runs) for a layout listed as runs; kept in
    `plan_cache.PLANS`.

    Args:
        layout, block_size: what to plan for.
        keeps_rows: where one rank holds all, leave blocks where they lie, in any order, unless the keys of one lie apart. Else,
            and with several ranks, which have to know each other's rows, home rows are in order of block numbers.
    """
    return PLANS.get((layout, block_size, keeps_rows), lambda: _home_plan(layout, block_size, keeps_rows))


def _home_plan(layout: SequenceLayout, block_size: int, keeps_rows: bool) -> HomePlan:
    blocks = block_table(layout.cu_seqlens_array, block_size)
    home, held = layout.partition.largest(blocks.start, blocks.start + blocks.length)
    home_tokens = np.bincount(home, weights=blocks.length, minlength=layout.cp_size).astype(np.int64)
    by_home = np.argsort(home, kind="stable")
    row = np.cumsum(blocks.length[by_home]) - blocks.length[by_home]
    home_row = np.empty_like(home)
    home_row[by_home] = row - (np.cumsum(home_tokens) - home_tokens)[home[by_home]]
    if keeps_rows and layout.cp_size == 1:
        home_row = _rows_in_place(layout, blocks, home_row)
    return HomePlan(layout, block_size, blocks, home, home_row, home_tokens, held == blocks.length, keeps_rows)


def _rows_in_place(layout: SequenceLayout, blocks: BlockTable, in_order: np.ndarray) -> np.ndarray:
    """Local row of the first key of each block where one rank holds all; `in_order` if the keys of a block lie apart."""
    pieces = cut_at_blocks(layout.runs_of(0), blocks)
    first, begin = np.zeros_like(in_order), pieces.row - pieces.position
    first[pieces.block] = begin
    return first if np.array_equal(first[pieces.block], begin) else in_order


def rank_plan(plan: HomePlan, rank: int) -> RankPlan:
    """One rank's side of `plan`, kept beside it in `plan_cache.PLANS`. Costs O(blocks + what the rank holds and exchanges) host
    work."""
    return PLANS.beside((plan.layout, plan.block_size, plan.keeps_rows), plan, rank, lambda: _rank_plan(plan, rank))


def _rank_plan(plan: HomePlan, rank: int) -> RankPlan:
    n_ranks, mine = plan.layout.cp_size, plan.pieces(rank)
    block, position = np.repeat(mine.block, mine.length), _expand(mine.position, mine.length)
    home = plan.home[mine.block]

    # Both sides of the wire have tokens in order of (peer, block, position).
    sent = np.flatnonzero(home != rank)
    sent = sent[np.lexsort((mine.position[sent], mine.block[sent], home[sent]))]
    torn = np.flatnonzero((plan.home == rank) & ~plan.whole)
    start = plan.blocks.start[torn]
    found = plan.layout.partition.fragments(start, start + plan.blocks.length[torn])
    others = np.flatnonzero(found.rank != rank)
    others = others[np.lexsort((found.start[others], found.rank[others]))]
    received_block, received_length = torn[found.interval[others]], found.length[others]
    received_position = found.start[others] - plan.blocks.start[received_block]

    kept = np.flatnonzero(home == rank)
    home_from = np.empty(int(plan.home_tokens[rank]), dtype=np.int64)
    local_from = np.empty(block.size, dtype=np.int64)
    kept_local = _expand(mine.row[kept], mine.length[kept])
    kept_home = _expand(plan.home_row[mine.block[kept]] + mine.position[kept], mine.length[kept])
    home_from[kept_home] = kept_local
    local_from[kept_local] = kept_home
    arriving = _expand(plan.home_row[received_block] + received_position, received_length)
    home_from[arriving] = block.size + np.arange(arriving.size)
    send_rows = _expand(mine.row[sent], mine.length[sent])
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
        _tokens_by_peer(home[sent], mine.length[sent], n_ranks),
        _tokens_by_peer(found.rank[others], received_length, n_ranks),
        None if in_place else home_from,
        None if in_place else local_from,
        plan.home_row[candidate],
        candidate,
    )


def _tokens_by_peer(peer: np.ndarray, tokens: np.ndarray, n_ranks: int) -> np.ndarray:
    return np.bincount(peer, weights=tokens, minlength=n_ranks).astype(np.int64)


def _expand(first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Numbers `first[i], ..., first[i] + length[i] - 1` for all i, in order: int64."""
    return expand_runs(np.stack([first, first + length], axis=1))
