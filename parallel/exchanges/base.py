"""The exchange of keys, values and gradients: the interface that the pipeline drives and every exchange implements.

The pipeline takes an exchange through these steps, and knows nothing of how bytes move::

    forward     open      before the gate: start what does not depend on routing
                route     after the gate: tell the peers what is wanted; gives the `Route` that backward needs
                start     per range of kv heads, one range ahead of its use: a `Visit`
                forward   per chunk of query rows: parts of the keys and values, the local part first
    backward    open, resume(route), start, then per chunk `backward`: the same parts with buffers for their gradients
                reduce    per range, after its last chunk: gradients of home blocks that other ranks computed

An exchange object serves one pass of one call. All ranks of the group take the same steps in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..comm import CommGroup
from ..home import HomeBlocks, home_start
from ..rows import Pairs
from ..wanted import Wanted


@dataclass(frozen=True)
class Work:
    """How the pipeline divides a pass, equal on every rank: what exchanges size their buffers by.

    Attributes:
        rows: query rows of the longest rank, over all q heads; those of a slab, where heads are split.
        ranges: ranges of kv heads, in the order in which they are worked on.
        chunks: chunks of query rows per range; each chunk visits all parts.
        keep_bytes: most bytes of remote keys, values and gradients of one range that an exchange may hold so that several
            chunks visit what came over once. Where they are more, everything travels once per chunk.
        gradient_dtype: dtype in which gradients of keys and values are accumulated and travel.
    """

    rows: int
    ranges: tuple[slice, ...]
    chunks: int
    keep_bytes: int
    gradient_dtype: torch.dtype

    @property
    def most_heads(self) -> int:
        """kv heads of the widest range."""
        return max(heads.stop - heads.start for heads in self.ranges)


@dataclass(frozen=True)
class Part:
    """Keys and values of some (kv head, block) pairs, as `kernels.KVPart` describes them.

    Attributes:
        k, v: `[N, H or 1, D]`, `[N, H or 1, Dv]`.
        start: int32 `[H, n_blocks]`, row of the block's first key; -1 where the part lacks the pair.
        name: "local", or where it came from.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    name: str


@dataclass(frozen=True)
class PartGradient:
    """A part, and buffers for its gradients, which the caller fills for every row of every pair in the part.

    Attributes:
        part: the part.
        dk, dv: of the shapes of `part.k` and `part.v`, in `Work.gradient_dtype` (the local part's: as the caller chose).
        accumulate: whether the buffers hold sums to add to; if not, they are uninitialized and are overwritten.
        packed: what `dk` and `dv` are views of, `[N, H or 1, D + Dv]`; None for the local part.
    """

    part: Part
    dk: Tensor
    dv: Tensor
    accumulate: bool
    packed: Tensor | None = None


@dataclass(frozen=True)
class Arrived:
    """Gradients of this rank's home blocks that came from another rank, still to be added.

    Attributes:
        values: `[home tokens, H, D + Dv]`; or `[rows, D + Dv]`, a message from all ranks.
        pairs: where pairs lie in the message; None where `values` has all home tokens in order.
    """

    values: Tensor
    pairs: Pairs | None = None


@dataclass(frozen=True)
class Route:
    """What forward decided and backward needs: the explicit handle between the two passes.

    Attributes:
        name: the exchange in use.
        reason: why this one, for people to read.
        walks: how often each byte crosses the wire in forward, and in backward: 1, or the number of chunks.
        mine: uint8 `[Hkv, n_blocks]`, 1 for pairs that the local queries selected; None where the exchange does not ask.
        wanted: wanted pairs of all ranks; None where the exchange does not ask.
        once_bytes: the least `exchange_bytes` with which each byte crosses the wire once in forward, and in backward; 0 where it
            does with any.
    """

    name: str
    reason: str
    walks: tuple[int, int]
    mine: Tensor | None = None
    wanted: Wanted | None = None
    once_bytes: tuple[int, int] = (0, 0)


@dataclass
class Visit:
    """One range of kv heads on its way through one pass: what `Exchange.start` gives, and its later steps take.

    Attributes:
        heads: the range of kv heads.
        parts: remote parts kept for later chunks.
        gradients: remote parts with their gradients, kept for later chunks or for `reduce`.
    """

    heads: slice
    parts: list[Part] = field(default_factory=list)
    gradients: list[PartGradient] = field(default_factory=list)


class Exchange(ABC):
    """Moves keys, values and gradients in one pass of one call. See the module for its life.

    Args:
        home: this rank's home blocks.
        comm: the group.
        work: how the pass is divided.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for users: how it moves bytes and what it is for."""
    same_host: ClassVar[bool] = False
    """Whether all ranks must be on one host."""

    def __init__(self, home: HomeBlocks, comm: CommGroup, work: Work) -> None:
        self.home, self.comm, self.work = home, comm, work

    def route(self, wanted: Callable[[], Tensor], reason: str) -> Route:
        """Tell the other ranks what the local queries want, where they need to know.

        Args:
            wanted: gives bool `[Hkv, n_blocks]`, (kv head, block) pairs that a local query selected.
            reason: why this exchange was chosen.
        """
        return Route(self.name, reason, self.walks, once_bytes=self.once_bytes)

    def resume(self, route: Route) -> None:  # noqa: B027  # most exchanges need nothing
        """Backward's counterpart of `route`: take up what forward decided."""

    @property
    def walks(self) -> tuple[int, int]:
        """How often each byte crosses the wire, forward and backward."""
        return 1, 1

    @property
    def once_bytes(self) -> tuple[int, int]:
        """See `Route`."""
        return 0, 0

    @abstractmethod
    def start(self, heads: slice) -> Visit:
        """Start what the first remote part of these kv heads needs."""

    @abstractmethod
    def forward(self, visit: Visit, chunk: int) -> Iterator[Part]:
        """Parts that together hold every pair that a local query selected: local first, remote ones as they arrive.

        Args:
            visit: what `start` gave for the range.
            chunk: number of the chunk of query rows, from 0; every chunk walks all parts before the next begins.
        """

    @abstractmethod
    def backward(self, visit: Visit, chunk: int, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        """The same parts with buffers for their gradients. An exchange may send a part's gradients on once the last chunk
        has taken the next part.

        Args:
            visit, chunk: as for `forward`.
            dk, dv: `[home tokens, H, D]`, `[home tokens, H, Dv]`: the local part's buffers.
        """

    @abstractmethod
    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        """Start what is left to send of the range's gradients. The function returned waits, and gives what other ranks
        computed for this rank's home blocks, in a fixed order."""

    def local_part(self, heads: slice) -> Part:
        """This rank's home blocks, where they lie in memory."""
        start = self.home.start.expand(heads.stop - heads.start, -1)
        return Part(of_heads(self.home.k, heads), of_heads(self.home.v, heads), start, "local")

    def part_of(self, packed: Tensor, source: int, heads: slice) -> Part:
        """All home blocks of rank `source`, `[home tokens there, H, D + Dv]`."""
        start = home_start(self.home.plan.plan, source, packed.device).expand(heads.stop - heads.start, -1)
        return Part(*unpack(packed, self.home.k.shape[-1]), start, f"{self.name} from rank {source}")

    def gradient_of(self, part: Part, packed: Tensor) -> PartGradient:
        """A part with fresh buffers for its gradients; its keys and values are `packed`."""
        buffer = torch.empty(packed.shape, dtype=self.work.gradient_dtype, device=packed.device)
        return PartGradient(part, *unpack(buffer, part.k.shape[-1]), False, buffer)


class Streaming(Exchange):
    """An exchange in `P - 1` steps, one part per step. Parts stay for later chunks where that fits `Work.keep_bytes`;
    otherwise each chunk of query rows walks the steps anew."""

    @property
    def walks(self) -> tuple[int, int]:
        chunks = self.work.chunks
        return 1 if self.keeps(backward=False) else chunks, 1 if self.keeps(backward=True) else chunks

    @property
    def once_bytes(self) -> tuple[int, int]:
        return (self._once(backward=False), self._once(backward=True)) if self.work.chunks > 1 else (0, 0)

    def keeps(self, backward: bool) -> bool:
        """Whether one walk serves all chunks; the same on every rank."""
        return self.work.chunks == 1 or self._once(backward) <= self.work.keep_bytes

    def _once(self, backward: bool) -> int:
        """Bytes of all parts of the widest range; backward also their gradients."""
        pair = self.home.k.itemsize + (self.work.gradient_dtype.itemsize if backward else 0)
        width = self.home.k.shape[2] + self.home.v.shape[2]
        most = int(self.home.plan.plan.home_tokens.max())
        return self.comm.size * most * self.work.most_heads * width * pair

    def forward(self, visit: Visit, chunk: int) -> Iterator[Part]:
        yield self.local_part(visit.heads)
        if visit.parts:
            yield from visit.parts
            return
        keep = self.keeps(backward=False) and chunk + 1 < self.work.chunks
        for part, _ in self.walk(visit):
            if keep:
                visit.parts.append(part)
            yield part

    def gradients(self, visit: Visit, keep: bool) -> Iterator[PartGradient]:
        """Remote parts with buffers for their gradients, in order of steps: fresh from a walk, or kept from an earlier chunk.

        Args:
            visit: what `start` gave for the range.
            keep: keep them for the next chunk.
        """
        if visit.gradients:
            kept, visit.gradients = visit.gradients, visit.gradients if keep else []
            yield from map(added_to, kept)
            return
        for step, (part, packed) in enumerate(self.walk(visit), start=1):
            gradient = self.gradient_at(visit, step, part, packed)
            if keep:
                visit.gradients.append(gradient)
            yield gradient

    def gradient_at(self, visit: Visit, step: int, part: Part, packed: Tensor) -> PartGradient:
        """The part of one step, whose keys and values are `packed`, with uninitialized buffers for its gradients."""
        return self.gradient_of(part, packed)

    @abstractmethod
    def walk(self, visit: Visit) -> Iterator[tuple[Part, Tensor]]:
        """Remote parts in order of steps, and the packed tensor that each is a view of; the next is under way."""


class LocalOnly(Exchange):
    """A group of one rank: nothing moves."""

    name = "local"
    summary = "a group of one rank: nothing moves"

    def start(self, heads: slice) -> Visit:
        return Visit(heads)

    def forward(self, visit: Visit, chunk: int) -> Iterator[Part]:
        yield self.local_part(visit.heads)

    def backward(self, visit: Visit, chunk: int, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        yield PartGradient(self.local_part(visit.heads), dk, dv, chunk > 0)

    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        return list


def added_to(gradient: PartGradient) -> PartGradient:
    """The same buffers for a later chunk, which adds to them."""
    return replace(gradient, accumulate=True)


def of_heads(x: Tensor, heads: slice) -> Tensor:
    """`x[:, heads]`; `x` itself where that is all of it, which spares the host a view."""
    return x if heads.stop - heads.start == x.shape[1] else x[:, heads]


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views of what `rows.pack` put side by side; `width` is D."""
    return packed[..., :width], packed[..., width:]
