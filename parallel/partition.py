"""How the tokens of a packed sequence are divided among ranks: by a rule (`Chunked`) or by lists of runs (`Listed`).

A rule answers for one rank, or for any interval of tokens, without listing what the other ranks hold. Chunk `c` of a segment of
`L` tokens cut into `C` chunks is `[c * L // C, (c + 1) * L // C)`. Two ranks, one segment of 16 tokens::

    C = P   contiguous   chunk r belongs to rank r                    rank 0: [0, 8)            rank 1: [8, 16)
    C = 2P  zigzag       chunks r and 2P - 1 - r belong to rank r     rank 0: [0, 4) [12, 16)   rank 1: [4, 12)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_SLAB = 1 << 20
"""Most numbers in a temporary matrix."""


class Fragments(NamedTuple):
    """Runs of consecutive tokens of an interval in consecutive rows of one rank; int64 arrays of equal length, in token order.

    Attributes:
        interval: index of the interval.
        rank: the rank that holds them.
        start: token number of the first.
        length: tokens, at least 1.
    """

    interval: np.ndarray
    rank: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Partition(Protocol):
    """What a layout needs to know. Intervals are disjoint, ascending, not empty, and do not cross documents."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""

    @property
    def key(self) -> bytes:
        """Equal for two partitions exactly if they are the same."""

    def runs(self, rank: int) -> np.ndarray:
        """int64 `[n, 2]`: the runs `[start, end)` of one rank in its own order, as few as possible."""

    def tokens(self) -> np.ndarray:
        """int64 `[P]`: tokens of each rank."""

    def fragments(self, start: np.ndarray, end: np.ndarray) -> Fragments:
        """The ranks that hold the tokens of the intervals `[start, end)`."""

    def largest(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per interval: the rank that holds most of its tokens (the lowest on a tie), and how many it holds."""


@dataclass(frozen=True, eq=False)
class Chunked:
    """Segments cut into chunks. No interval crosses a segment.

    Attributes:
        bounds: int64 `[segments + 1]`, ascending from 0: segment i is `[bounds[i], bounds[i + 1])`, never empty.
        size: number of ranks.
        mirrored: zigzag; else contiguous.
    """

    bounds: np.ndarray
    size: int
    mirrored: bool

    @property
    def chunks(self) -> int:
        """Chunks per segment."""
        return 2 * self.size if self.mirrored else self.size

    @property
    def nbytes(self) -> int:
        return self.bounds.nbytes

    @property
    def key(self) -> bytes:
        return b"zigzag " * self.mirrored + np.int64(self.size).tobytes() + self.bounds.tobytes()

    def runs(self, rank: int) -> np.ndarray:
        first, length = self.bounds[:-1], np.diff(self.bounds)
        chunk = [rank, self.chunks - 1 - rank] if self.mirrored else [rank]
        cuts = [first + length * c // self.chunks for i in chunk for c in (i, i + 1)]
        return merge_adjacent(np.stack(cuts, axis=1).reshape(-1, 2))

    def tokens(self) -> np.ndarray:
        """O(P) memory; O(P x distinct remainders of segment length modulo chunks) time."""
        n = self.chunks
        length = np.diff(self.bounds)
        times = np.bincount(length % n, minlength=1)
        rest = np.flatnonzero(times)
        dtype = np.dtype(np.int32 if n < 1 << 15 else np.int64)  # of numbers below n * n
        cut, before = np.arange(n + 1).astype(dtype), np.zeros(n + 1, dtype=np.int64)
        step = max(1, _SLAB // (n + 1))
        for i in range(0, rest.size, step):
            some = rest[i : i + step]
            before += (cut * some.astype(dtype)[:, None] // n * times[some][:, None]).sum(0)
        held = np.diff(before) + int((length // n).sum())
        return held[: self.size] + held[: self.size - 1 : -1] if self.mirrored else held

    def fragments(self, start: np.ndarray, end: np.ndarray) -> Fragments:
        begin, length = self._segment(start)
        n = self.chunks
        first = self._chunk(start - begin, length)
        # A segment of fewer tokens than chunks has no two tokens in one chunk, and most of its chunks are empty.
        short = length < n
        count = np.where(short, end - start, self._chunk(end - 1 - begin, length) - first + 1)
        interval = np.repeat(np.arange(start.size), count)
        index = np.arange(interval.size) - np.repeat(np.cumsum(count) - count, count)
        begin, length, short = begin[interval], length[interval], short[interval]
        token = start[interval] + index
        chunk = np.where(short, self._chunk(token - begin, length), first[interval] + index)
        at = np.where(short, token, np.maximum(start[interval], begin + chunk * length // n))
        stop = np.where(short, token + 1, np.minimum(end[interval], begin + (chunk + 1) * length // n))
        return Fragments(interval, self._rank(chunk), at, stop - at)

    def largest(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Compares a few candidate ranks per interval; the answer is always among them.

        All chunks inside an interval have `L // C` tokens or one more. So the first chunk that the interval cuts, the last
        one, the first and the last inside it, and the first and the last inside it of the larger size hold the answer, unless
        both chunks of a rank reach into the interval. Then it holds the middle of its segment: see `_of_the_middle`.
        """
        begin, length = self._segment(start)
        s, e = start - begin, end - begin
        low, high = self._chunk(s, length), self._chunk(e - 1, length)
        rest = length % self.chunks
        chunks = (low, high, low + 1, high - 1, *self._larger(low + 1, high, rest))
        ranks = np.stack([self._rank(np.clip(c, low, high)) for c in chunks])
        best, held = self._most(ranks, s, e, length)
        if not self.mirrored:
            return best, held
        middle = np.flatnonzero((low < self.size) & (high >= self.size))
        s, e, length, rest = s[middle], e[middle], length[middle], rest[middle]
        both = np.maximum(low[middle], self.chunks - 1 - high[middle]) + 1  # from here on, both chunks are inside
        candidates = np.concatenate([best[None, middle], np.minimum(self._of_the_middle(both, rest), self.size - 1)])
        best[middle], held[middle] = self._most(candidates, s, e, length)
        return best, held

    def _segment(self, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token and length of the segments that hold the tokens `start`."""
        index = np.searchsorted(self.bounds, start, side="right") - 1
        return self.bounds[index], self.bounds[index + 1] - self.bounds[index]

    def _chunk(self, token: np.ndarray, length: np.ndarray) -> np.ndarray:
        """The chunk of a token, counted from its segment's start: the last `c` with `c * length // C <= token`."""
        return ((token + 1) * self.chunks - 1) // length

    def _rank(self, chunk: np.ndarray) -> np.ndarray:
        return np.minimum(chunk, self.chunks - 1 - chunk) if self.mirrored else chunk

    def _most(
        self, ranks: np.ndarray, s: np.ndarray, e: np.ndarray, length: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of `ranks` `[candidates, n]` the one that holds most of `[s, e)` of its segment, the lowest of equals."""
        n = self.chunks
        best, most = ranks[0], np.full(s.shape, -1)
        for rank in ranks:
            held = np.zeros(s.shape, dtype=np.int64)
            for chunk in (rank, n - 1 - rank) if self.mirrored else (rank,):
                inside = np.minimum(e, (chunk + 1) * length // n) - np.maximum(s, chunk * length // n)
                held += np.maximum(inside, 0)
            better = (held > most) | ((held == most) & (rank < best))
            best, most = np.where(better, rank, best), np.where(better, held, most)
        return best, most

    def _larger(self, low: np.ndarray, high: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first chunk from `low` on, and the last before `high`, with one token more than `L // C`, if there is one.

        Chunk `c` is larger where a multiple of `C` is in `(c * rest, (c + 1) * rest]`, with `rest = L % C`.
        """
        n, divisor = self.chunks, np.maximum(rest, 1)
        return (
            -(-(low * rest // n + 1) * n // divisor) - 1,
            -(-(high * rest // n) * n // divisor) - 1,
        )

    def _of_the_middle(self, first: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """`[candidates, n]`: where all ranks from `first` on have both their chunks inside, these are the first of all, the
        first with one token more, and the first with two tokens more.

        Rank `r` has one more in chunk `r` where a multiple of `C` is in `(r * rest, (r + 1) * rest]`, and one more in its
        other chunk where one is in `[r * rest, (r + 1) * rest)`. It is the same multiple, as the interval is shorter than `C`.
        """
        n, divisor = self.chunks, np.maximum(rest, 1)
        above, from_ = first * rest // n + 1, -(-first * rest // n)
        return np.stack(
            [
                first,
                -(-above * n // divisor) - 1,
                from_ * n // divisor,
                # Both, unless the multiple is a multiple of `rest` too; then the next one is not, or none is.
                above * n // divisor,
                (above + 1) * n // divisor,
            ]
        )


class Listed:
    """Runs of each rank.

    Args:
        runs: for each rank an int64 array `[n, 2]`, as few runs as possible; together they hold each token once.
    """

    def __init__(self, runs: Sequence[np.ndarray]) -> None:
        self._runs = tuple(runs)
        for r in self._runs:
            r.flags.writeable = False

    @property
    def size(self) -> int:
        return len(self._runs)

    @cached_property
    def _by_token(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start, end and rank of all runs, in token order."""
        whole = np.concatenate(self._runs)
        rank = np.repeat(np.arange(self.size), [len(r) for r in self._runs])
        order = np.argsort(whole[:, 0], kind="stable")
        return whole[order, 0], whole[order, 1], rank[order]

    @property
    def nbytes(self) -> int:
        """Includes the arrays that are derived on first use."""
        return sum(r.nbytes for r in self._runs) * 5 // 2

    @property
    def key(self) -> bytes:
        return b"runs" + b"".join(np.int64(len(r)).tobytes() + r.tobytes() for r in self._runs)

    def runs(self, rank: int) -> np.ndarray:
        return self._runs[rank]

    def tokens(self) -> np.ndarray:
        return np.array([int((r[:, 1] - r[:, 0]).sum()) for r in self._runs], dtype=np.int64)

    def fragments(self, start: np.ndarray, end: np.ndarray) -> Fragments:
        run_start, run_end, run_rank = self._by_token
        first = np.searchsorted(run_end, start, side="right")
        count = np.searchsorted(run_start, end, side="left") - first
        interval = np.repeat(np.arange(start.size), count)
        run = first[interval] + np.arange(interval.size) - np.repeat(np.cumsum(count) - count, count)
        at = np.maximum(run_start[run], start[interval])
        return Fragments(interval, run_rank[run], at, np.minimum(run_end[run], end[interval]) - at)

    def largest(self, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if start.size == 0:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        found = self.fragments(start, end)
        pair = found.interval * self.size + found.rank
        order = np.argsort(pair, kind="stable")
        pair = pair[order]
        first = np.flatnonzero(np.append(True, pair[1:] != pair[:-1]))
        held, pair = np.add.reduceat(found.length[order], first), pair[first]
        interval = pair // self.size
        begins = np.flatnonzero(np.append(True, interval[1:] != interval[:-1]))
        most = np.maximum.reduceat(held, begins)
        top = np.flatnonzero(held == most[interval])
        top = top[np.append(True, interval[top[1:]] != interval[top[:-1]])]  # ranks ascend within an interval
        return pair[top] % self.size, most


def chunked(cu_seqlens: np.ndarray, size: int, mirrored: bool, per_document: bool) -> Chunked:
    """The rule in its one normal form: rules that put every token on the same rank become equal.

    Args:
        cu_seqlens: int64 `[documents + 1]`.
        size: number of ranks.
        mirrored: zigzag; else contiguous, over the whole sequence.
        per_document: cut each document; else the whole sequence.
    """
    if 2 * size * int(cu_seqlens[-1]) > np.iinfo(np.int64).max:
        raise ValueError(f"{size} ranks are too many for {cu_seqlens[-1]} tokens: twice their product must fit 63 bits")
    whole = np.unique(cu_seqlens[[0, -1]])
    if not mirrored or size == 1 or whole.size == 1:
        return Chunked(whole, size, False)
    over_all = Chunked(whole, size, True)
    if not per_document:
        return over_all
    by_document = Chunked(np.unique(cu_seqlens), size, True)
    # The whole sequence cut, as documents of 1 and 7 tokens on 2 ranks are: only if all documents but one have one token, since
    # rank 0 holds the last token of each document, and of the whole sequence no token but those near its ends.
    if np.count_nonzero(np.diff(by_document.bounds) > 1) <= 1 and _same(by_document, over_all):
        return over_all
    return by_document


class Kind(IntEnum):
    """How a partition is kept."""

    CONTIGUOUS = 0
    ZIGZAG = 1
    ZIGZAG_PER_DOCUMENT = 2
    LISTED = 3


def as_tensor(array: np.ndarray) -> Tensor:
    """An ordinary tensor on `array`, also under `torch.inference_mode` and modes that record or fake tensors."""
    with torch.inference_mode(False), _disable_current_modes():
        return torch.from_numpy(array)


def head_of_description(kind: Kind, size: int) -> int:
    """The first number of a description: the kind, and the number of ranks."""
    return size * len(Kind) + kind


def describe(cu_seqlens: np.ndarray, partition: Partition) -> np.ndarray:
    """int64: `head_of_description`; of listed runs their number on each rank, and the runs; last, `cu_seqlens`."""
    kind, listed = Kind.LISTED, []
    if isinstance(partition, Chunked):
        whole = partition.bounds.size <= 2
        kind = (Kind.ZIGZAG if whole else Kind.ZIGZAG_PER_DOCUMENT) if partition.mirrored else Kind.CONTIGUOUS
    else:
        runs = [partition.runs(rank) for rank in range(partition.size)]
        listed = [np.array([len(r) for r in runs]), *(r.reshape(-1) for r in runs)]
    return np.concatenate([np.array([head_of_description(kind, partition.size)]), *listed, cu_seqlens])


def partition_of(runs: Sequence[np.ndarray], cu_seqlens: np.ndarray) -> Partition:
    """The partition that gives each rank its `runs`: a rule if there is one.

    Args:
        runs: int64 `[n, 2]` of each rank, merged; together they hold each token once.
        cu_seqlens: int64 `[documents + 1]`.
    """
    size = len(runs)
    for mirrored, per_document in ((False, False), (True, False), (True, True)):
        rule = chunked(cu_seqlens, size, mirrored, per_document)
        if all(np.array_equal(rule.runs(rank), runs[rank]) for rank in range(size)):
            return rule
    return Listed(runs)


def _same(a: Chunked, b: Chunked) -> bool:
    """Whether every token is on the same rank. Either has the tokens of a rank in ascending order."""
    holders = []
    for rule in (a, b):
        found = rule.fragments(rule.bounds[:-1], rule.bounds[1:])
        first = np.append(True, found.rank[1:] != found.rank[:-1])
        holders.append((found.start[first], found.rank[first]))
    return all(np.array_equal(x, y) for x, y in zip(*holders, strict=True))


def merge_adjacent(runs: np.ndarray) -> np.ndarray:
    """The same tokens in the same order with as few runs as possible, none of them empty.

    Raises:
        ValueError: a run ends before it starts.
    """
    runs = np.asarray(runs, dtype=np.int64)
    backward = runs[runs[:, 1] < runs[:, 0]]
    if len(backward):
        raise ValueError(f"a run must not end before it starts, got {tuple(backward[0].tolist())}")
    runs = runs[runs[:, 1] > runs[:, 0]]
    if len(runs) == 0:
        return runs.copy()
    first = np.ones(len(runs), dtype=bool)
    first[1:] = runs[1:, 0] != runs[:-1, 1]
    last = np.append(first[1:], True)
    return np.stack([runs[first, 0], runs[last, 1]], axis=1)


def expand_runs(runs: np.ndarray) -> np.ndarray:
    """Every number of the runs `[n, 2]`, in order: int64."""
    length = runs[:, 1] - runs[:, 0]
    total = int(length.sum())
    return np.repeat(runs[:, 0] - (np.cumsum(length) - length), length) + np.arange(total)
