"""`ring`: keys and values of each rank travel once round the ring; only routed rows are computed at each step.

Double-buffered: while the part of one rank is computed, the next is in flight. In backward the gradients of a part travel one
step behind it, each rank adding its own, and reach home in the last step. Four ranks, who holds whose part at each step::

    step       0     1     2     3
    rank 0     0     3     2     1
    rank 1     1     0     3     2
    rank 2     2     1     0     3
    rank 3     3     2     1     0

A rank sends `P - 1` messages of its neighbours' home tokens x H x (D + Dv) elements forward, and in backward as many again
and `P - 1` of gradients in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..comm import Pending
from ..home import home_start
from .base import Part, PartGradient, Transport, accumulation_room, pack, unpack


class Ring(Transport):
    """See the module."""

    name = "ring"
    resident = False

    def forward(self, heads: slice) -> Iterator[Part]:
        local = self.local_part(heads)
        current = pack(local.k, local.v)
        pending = self._pass_on(current, 1)
        yield local
        for step in range(1, self.comm.size):
            current = pending.wait()
            if step + 1 < self.comm.size:
                pending = self._pass_on(current, step + 1)
            yield self._part(current, step, heads, local)

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        size, width = self.comm.size, dk.shape[-1]
        local = self.local_part(heads)
        current = pack(local.k, local.v)
        pending = self._pass_on(current, 1)
        yield PartGradient(local, dk, dv)
        travelling: Pending | None = None
        for step in range(1, size):
            current = pending.wait()
            if step + 1 < size:
                pending = self._pass_on(current, step + 1)
            own = accumulation_room(current)
            yield PartGradient(self._part(current, step, heads, local), *unpack(own, width))
            if travelling is not None:
                own += travelling.wait()
            # What leaves here belongs to rank - step; what arrives belongs to rank - step - 1, in the end to this rank.
            arriving = own.new_empty(self._tokens(step + 1), *own.shape[1:])
            travelling = self.comm.shift(own, arriving, "ring gradients")
        if travelling is not None:
            home = travelling.wait()
            dk += home[..., :width]
            dv += home[..., width:]

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> None:
        pass  # they went home with the parts

    def _source(self, step: int) -> int:
        return (self.comm.rank - step) % self.comm.size

    def _tokens(self, step: int) -> int:
        return int(self.home.plan.plan.home_tokens[self._source(step)])

    def _pass_on(self, current: Tensor, step: int) -> Pending:
        arriving = current.new_empty(self._tokens(step), *current.shape[1:])
        return self.comm.shift(current, arriving, "ring keys and values")

    def _part(self, packed: Tensor, step: int, heads: slice, local: Part) -> Part:
        source = self._source(step)
        start = home_start(self.home.plan.plan, source, packed.device).expand(heads.stop - heads.start, -1)
        return Part(*unpack(packed, local.k.shape[-1]), start, f"ring from rank {source}")
