"""Dense attention over a group: which rows of two shards see each other, and how whole shards of keys and values travel.

Nothing is selected: every earlier key of a document is needed. Two transports deliver the other ranks' shards in the same order
(rank - 1, rank - 2, ...) and add gradients in the same order, so they give the same bits:

- `ring`: `P - 1` messages each way. A rank holds its own shard, the one it computes with and the one that arrives. Backward adds
  two shards of gradients in the accumulation dtype.
- `all_gather`: one collective brings all shards, padded to the largest. Backward holds the gradients of all shards in the
  accumulation dtype and returns them by one all-to-all.

A shard travels as one flat tensor: its keys, then its values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .comm import CommGroup, Pending
from .cost import GATHER_BYTES
from .layout import SequenceLayout
from .plan_cache import PLANS, Memo
from .relay import GradientRelay, Relay

COMMS = ("auto", "all_gather", "ring")
"""Values of `comm` for dense attention."""


@dataclass(frozen=True)
class Pair:
    """Rows of queries and the rows of keys they see: all of them, or (`causal`, the same rows) those up to their own."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class _Run:
    """Consecutive tokens of one document: `[start, end)`, from local row `row` on."""

    row: int
    start: int
    end: int

    @property
    def row_end(self) -> int:
        return self.row + self.end - self.start


def visible_pairs(layout: SequenceLayout, rank: int, source: int) -> tuple[Pair, ...]:
    """Which rows of `rank` see which keys of `source`, in as few pairs as possible.

    Causal pairs come first; each query row is in one of them with its own shard. Under zigzag, a document takes one pair per
    source rank::

        queries of rank 1 of 2      own keys 2 3 4 5     keys of rank 0: 0 1 6 7
          2 3 4 5                   causal               all four see 0 1; none sees 6 7
    """
    return _memo(layout).get(("pairs", rank, source), lambda: _visible_pairs(layout, rank, source))


def _memo(layout: SequenceLayout) -> Memo:
    """What full attention derived from the layout, kept with it."""
    return PLANS.get((layout, "full attention"), Memo)


def _visible_pairs(layout: SequenceLayout, rank: int, source: int) -> tuple[Pair, ...]:
    queries, keys = (
        _memo(layout).get(("runs", r), lambda r=r: _runs_of_documents(layout, r))  # type: ignore[misc]
        for r in (rank, source)
    )
    pairs: list[Pair] = []
    for document, mine in queries.items():
        if rank != source:
            pairs += _full_pairs(mine, keys.get(document, []))
            continue
        spans = _ascending(mine)
        pairs += [Pair(rows, rows, True) for rows in (slice(s[0].row, s[-1].row_end) for s in spans)]
        for span in spans:
            pairs += _full_pairs(span, [run for other in spans if other is not span for run in other])
    return tuple(sorted(pairs, key=lambda pair: not pair.causal))


def equal_documents(layout: SequenceLayout) -> bool:
    """Whether all documents that hold tokens are equally long, as in batches that are not packed."""
    return len(set(np.diff(layout.cu_seqlens_array).tolist()) - {0}) <= 1


def _runs_of_documents(layout: SequenceLayout, rank: int) -> dict[int, list[_Run]]:
    """This rank's runs by document, in the order of its rows."""
    boundaries = layout.cu_seqlens_array
    found: dict[int, list[_Run]] = {}
    row = 0
    for start, end in layout.runs_of(rank).tolist():
        first = int(np.searchsorted(boundaries, start, side="right"))
        while start < end:
            stop = min(end, int(boundaries[first]))
            if start < stop:
                found.setdefault(first - 1, []).append(_Run(row, start, stop))
                row += stop - start
                start = stop
            first += 1
    return found


def _ascending(runs: list[_Run]) -> list[list[_Run]]:
    """Groups of runs in adjacent rows whose tokens ascend: within a group, causal attention in row order is the usual
    triangle."""
    spans: list[list[_Run]] = []
    for run in runs:
        if spans and spans[-1][-1].row_end == run.row and spans[-1][-1].end <= run.start:
            spans[-1].append(run)
        else:
            spans.append([run])
    return spans


def _full_pairs(queries: Iterable[_Run], keys: list[_Run]) -> list[Pair]:
    """Pairs of whole runs, merged where their rows are adjacent."""
    wanted: list[tuple[slice, list[slice]]] = []
    for query in queries:
        seen: list[slice] = []
        for key in keys:
            if key.end <= query.start:
                if seen and seen[-1].stop == key.row:
                    seen[-1] = slice(seen[-1].start, key.row_end)
                else:
                    seen.append(slice(key.row, key.row_end))
        if wanted and wanted[-1][0].stop == query.row and wanted[-1][1] == seen:
            wanted[-1] = (slice(wanted[-1][0].start, query.row_end), seen)
        else:
            wanted.append((slice(query.row, query.row_end), seen))
    return [Pair(rows, key_rows, False) for rows, seen in wanted for key_rows in seen]


def choose_transport(layout: SequenceLayout, token_bytes: int) -> str:
    """`auto`, the same on every rank.

    `all_gather` where all other ranks hold at most `moba_cp.parallel.cost.GATHER_BYTES` of keys and values: one collective then
    costs less than the latency of the ring's steps. Otherwise `ring`, whose memory does not grow with the number of ranks.

    Args:
        layout: which rank holds which token.
        token_bytes: bytes of one token's keys and values, all kv heads.
    """
    fewest = min(layout.all_local_tokens)
    return "all_gather" if (layout.total_tokens - fewest) * token_bytes <= GATHER_BYTES else "ring"


@dataclass(frozen=True)
class Shard:
    """Keys `[m, Hkv, D]` and values `[m, Hkv, Dv]` of one rank; or their gradients, in the accumulation dtype."""

    k: Tensor
    v: Tensor


class DenseTransport(ABC):
    """Brings the other ranks' shards. Every rank exhausts its iterators.

    Args:
        layout: which rank holds which token.
        comm: the group.
        local: this rank's own shard.
    """

    def __init__(self, layout: SequenceLayout, comm: CommGroup, local: Shard) -> None:
        self.layout, self.comm, self.local = layout, comm, local

    @abstractmethod
    def forward(self) -> Iterator[tuple[int, Shard]]:
        """Rank and shard, this rank's own first. A shard is valid until the next one is taken."""

    @abstractmethod
    def backward(self, home: Shard) -> Iterator[tuple[int, Shard, Shard]]:
        """Rank, shard, and the buffer to which the caller adds the shard's gradients before it takes the next shard. Once the
        iterator is exhausted, `home` also holds what the other ranks added.

        Args:
            home: the gradients of this rank's own shard, zeros at first.
        """

    def _numel(self, rank: int) -> int:
        """Numbers in the shard of `rank`."""
        _, heads, dim = self.local.k.shape
        return self.layout.local_tokens(rank) * heads * (dim + self.local.v.shape[2])

    def _flat(self) -> Tensor:
        return torch.cat([self.local.k.flatten(), self.local.v.flatten()])

    def _shard(self, flat: Tensor, rank: int) -> Shard:
        """Views of a flat shard, or of its gradients."""
        tokens, (_, heads, dim), value_dim = self.layout.local_tokens(rank), self.local.k.shape, self.local.v.shape[2]
        cut = tokens * heads * dim
        return Shard(
            flat[:cut].view(tokens, heads, dim),
            flat[cut : cut + tokens * heads * value_dim].view(tokens, heads, value_dim),
        )

    def _add_home(self, home: Shard, arrived: Tensor) -> None:
        shard = self._shard(arrived, self.comm.rank)
        home.k.add_(shard.k)
        home.v.add_(shard.v)


class DenseRing(DenseTransport):
    """The ring; see the module. In a group of one, nothing moves."""

    def forward(self) -> Iterator[tuple[int, Shard]]:
        relay = self._relay()
        yield self.comm.rank, self.local
        for source, flat in relay:
            yield source, self._shard(flat, source)

    def backward(self, home: Shard) -> Iterator[tuple[int, Shard, Shard]]:
        relay, dtype = self._relay(), home.k.dtype
        gradients = GradientRelay(self.comm, lambda rank: self._empty(rank, dtype), "dense ring gradients")
        yield self.comm.rank, self.local, home
        for source, flat in relay:
            own = torch.zeros_like(flat, dtype=dtype)
            yield source, self._shard(flat, source), self._shard(own, source)
            gradients.send(own)
        if (pending := gradients.home()) is not None:
            self._add_home(home, pending.wait())

    def _relay(self) -> Relay:
        first = self._flat() if self.comm.size > 1 else self.local.k
        return Relay(self.comm, first, lambda rank: self._empty(rank, first.dtype), "dense ring keys and values")

    def _empty(self, rank: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(self._numel(rank), dtype=dtype, device=self.local.k.device)


class DenseAllGather(DenseTransport):
    """One all-gather; see the module."""

    def forward(self) -> Iterator[tuple[int, Shard]]:
        pending = self._gather()
        yield self.comm.rank, self.local
        gathered = pending.wait()
        for step in range(1, self.comm.size):
            source = self.comm.source(step)
            yield source, self._shard(gathered[source], source)

    def backward(self, home: Shard) -> Iterator[tuple[int, Shard, Shard]]:
        pending = self._gather()
        rank, size = self.comm.rank, self.comm.size
        yield rank, self.local, home
        gathered = pending.wait()
        held = [self._numel(source) if source != rank else 0 for source in range(size)]
        outgoing = gathered.new_zeros(sum(held), dtype=home.k.dtype)
        buffers = outgoing.split(held)
        for step in range(1, size):
            source = self.comm.source(step)
            yield source, self._shard(gathered[source], source), self._shard(buffers[source], source)
        received = [self._numel(rank) if source != rank else 0 for source in range(size)]
        incoming = self.comm.all_to_all(outgoing, held, received, "dense all_gather gradients").wait().split(received)
        total = incoming[(rank + 1) % size].clone()
        for step in range(2, size):
            total += incoming[(rank + step) % size]
        self._add_home(home, total)

    def _gather(self) -> Pending:
        _, heads, dim = self.local.k.shape
        flat = self.local.k.new_zeros(self.layout.most_local_tokens * heads * (dim + self.local.v.shape[2]))
        flat[: self._numel(self.comm.rank)] = self._flat()
        return self.comm.all_gather(flat, "dense all_gather keys and values")


def transport(comm: str, layout: SequenceLayout, group: CommGroup, local: Shard) -> DenseTransport:
    """The transport that `comm`, one of `COMMS`, stands for."""
    if comm == "auto":
        comm = choose_transport(layout, (local.k.shape[2] + local.v.shape[2]) * local.k.shape[1] * local.k.itemsize)
    return (
        DenseAllGather(layout, group, local)
        if comm == "all_gather" and group.size > 1
        else DenseRing(layout, group, local)
    )
