"""`ring`: keys and values of each rank travel once round the ring; only routed rows are computed at each step.

Double-buffered: while the part of one rank is computed, the next is in flight; gradients follow one step behind (`relay.py`
has the picture). A rank sends `P - 1` messages of its neighbours' home tokens x H x (D + Dv) elements forward; in backward as
many again, and `P - 1` of gradients in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import Pending
from ..relay import GradientRelay, Relay
from ..rows import pack
from .base import Arrived, Part, PartGradient, Streaming, Visit


@dataclass
class RingVisit(Visit):
    """Also: the walk under way; gradients of home blocks that the last walk brings, and the sum of those of the walks before."""

    relay: Relay | None = None
    arriving: Pending | None = None
    arrived: Tensor | None = None

    def add_arriving(self) -> Tensor | None:
        """The sum of all walks that ended, in their order; None where nothing came."""
        if self.arriving is not None:
            latest, self.arriving = self.arriving.wait(), None
            self.arrived = latest if self.arrived is None else self.arrived.add_(latest)
        return self.arrived


class Ring(Streaming):
    """See the module."""

    name = "ring"
    summary = "whole parts round a ring, each step behind the one before; any group"

    def start(self, heads: slice) -> RingVisit:
        return RingVisit(heads, relay=self._relay(heads))

    def walk(self, visit: Visit) -> Iterator[tuple[Part, Tensor]]:
        assert isinstance(visit, RingVisit)
        relay, visit.relay = visit.relay or self._relay(visit.heads), None
        for source, packed in relay:
            yield self.part_of(packed, source, visit.heads), packed

    def forward(self, visit: Visit, chunk: int) -> Iterator[Part]:
        self._again(visit)
        yield from super().forward(visit, chunk)

    def backward(self, visit: Visit, chunk: int, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        assert isinstance(visit, RingVisit)
        self._again(visit)
        yield PartGradient(self.local_part(visit.heads), dk, dv, chunk > 0)
        keeps, last = self.keeps(backward=True), chunk + 1 == self.work.chunks
        relay = GradientRelay(
            self.comm, lambda rank: self._empty(rank, visit.heads, self.work.gradient_dtype), "ring gradients"
        )
        for gradient in self.gradients(visit, keeps and not last):
            yield gradient
            if last or not keeps:
                assert gradient.packed is not None
                relay.send(gradient.packed)
        visit.add_arriving()  # of the walk before, which has had all this one to come home
        visit.arriving = relay.home()

    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        assert isinstance(visit, RingVisit)

        def home() -> list[Arrived]:
            total = visit.add_arriving()
            return [] if total is None else [Arrived(total)]

        return home

    def _again(self, visit: Visit) -> None:
        """Start another walk before the local part is computed, unless one is under way or parts were kept."""
        assert isinstance(visit, RingVisit)
        if visit.relay is None and not visit.parts and not visit.gradients:
            visit.relay = self._relay(visit.heads)

    def _relay(self, heads: slice) -> Relay:
        local = self.local_part(heads)
        first = pack(local.k, local.v)
        return Relay(self.comm, first, lambda rank: self._empty(rank, heads, first.dtype), "ring keys and values")

    def _empty(self, rank: int, heads: slice, dtype: torch.dtype) -> Tensor:
        shape = (int(self.home.plan.plan.home_tokens[rank]), heads.stop - heads.start)
        width = self.home.k.shape[2] + self.home.v.shape[2]
        return torch.empty(*shape, width, dtype=dtype, device=self.home.k.device)
