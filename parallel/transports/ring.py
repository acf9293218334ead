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

from collections.abc import Callable, Iterator

from torch import Tensor

from ..comm import CommGroup, Pending
from ..home import HomeBlocks, home_start
from ..rows import pack
from .base import Part, PartGradient, Transport, gradient_of, unpack


class Ring(Transport):
    """See the module."""

    name = "ring"
    resident = False

    def __init__(self, home: HomeBlocks, comm: CommGroup) -> None:
        super().__init__(home, comm)
        self._under_way: dict[int, Pending] = {}
        self._arriving: list[Pending] = []

    def prefetch(self, heads: slice) -> None:
        if heads.start not in self._under_way:
            local = self.local_part(heads)
            self._under_way[heads.start] = self._pass_on(pack(local.k, local.v), 1)

    def forward(self, heads: slice) -> Iterator[Part]:
        local = self.local_part(heads)
        packed = self._travel(heads)
        next(packed)
        yield local
        for step, current in enumerate(packed, start=1):
            yield self._part(current, step, heads, local)

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        local = self.local_part(heads)
        packed = self._travel(heads)
        next(packed)
        yield PartGradient(local, dk, dv)
        travelling: Pending | None = None
        for step, current in enumerate(packed, start=1):
            gradient = gradient_of(self._part(current, step, heads, local), current)
            own = gradient.packed
            assert own is not None
            yield gradient
            if travelling is not None:
                own += travelling.wait()
            # What leaves here belongs to rank - step; what arrives belongs to rank - step - 1, in the end to this rank.
            arriving = own.new_empty(self._tokens(step + 1), *own.shape[1:])
            travelling = self.comm.shift(own, arriving, "ring gradients")
        if travelling is not None:
            self._arriving.append(travelling)

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> Callable[[], list[Tensor]]:
        arriving, self._arriving = self._arriving, []
        return lambda: [pending.wait() for pending in arriving]

    def _travel(self, heads: slice) -> Iterator[Tensor]:
        """Start the first step; after that the packed part of each step, the next one under way."""
        self.prefetch(heads)
        pending = self._under_way.pop(heads.start)
        yield self.home.k[:0]
        for step in range(1, self.comm.size):
            current = pending.wait()
            if step + 1 < self.comm.size:
                pending = self._pass_on(current, step + 1)
            yield current

    def _tokens(self, step: int) -> int:
        return int(self.home.plan.plan.home_tokens[self.comm.source(step)])

    def _pass_on(self, current: Tensor, step: int) -> Pending:
        arriving = current.new_empty(self._tokens(step), *current.shape[1:])
        return self.comm.shift(current, arriving, "ring keys and values")

    def _part(self, packed: Tensor, step: int, heads: slice, local: Part) -> Part:
        source = self.comm.source(step)
        start = home_start(self.home.plan.plan, source, packed.device).expand(heads.stop - heads.start, -1)
        return Part(*unpack(packed, local.k.shape[-1]), start, f"ring from rank {source}")
