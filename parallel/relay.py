"""The ring: each rank's tensor visits all ranks once, and its gradients follow one step behind.

Four ranks, whose tensor each one holds at each step::

    step       0     1     2     3
    rank 0     0     3     2     1
    rank 1     1     0     3     2
    rank 2     2     1     0     3
    rank 3     3     2     1     0

The next tensor is in flight while one is worked on. Gradients of a tensor leave for the next rank once they are computed;
each rank adds its own, and after the last step they are at home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from .comm import CommGroup, Pending


class Relay:
    """One pass around the ring. The first message is sent on construction.

    Args:
        comm: the group.
        first: this rank's own tensor.
        empty: rank number -> uninitialized buffer for that rank's tensor.
        stage: name under which the traffic is counted.
    """

    def __init__(self, comm: CommGroup, first: Tensor, empty: Callable[[int], Tensor], stage: str) -> None:
        self._comm, self._empty, self._stage = comm, empty, stage
        self._pending = self._pass_on(first, 1) if comm.size > 1 else None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Source rank and tensor at steps 1 to P - 1."""
        for step in range(1, self._comm.size):
            assert self._pending is not None
            current = self._pending.wait()
            self._pending = self._pass_on(current, step + 1) if step + 1 < self._comm.size else None
            yield self._comm.source(step), current

    def _pass_on(self, current: Tensor, step: int) -> Pending:
        return self._comm.shift(current, self._empty(self._comm.source(step)), self._stage)


class GradientRelay:
    """Gradients on their way home, one step behind the tensors they belong to."""

    def __init__(self, comm: CommGroup, empty: Callable[[int], Tensor], stage: str) -> None:
        self._comm, self._empty, self._stage = comm, empty, stage
        self._travelling: Pending | None = None
        self._step = 0

    def send(self, own: Tensor) -> None:
        """Add what has arrived to this rank's gradients of the next step's tensor, and pass the sum on."""
        self._step += 1
        if self._travelling is not None:
            own += self._travelling.wait()
            self._travelling = None  # free what arrived before the next buffer is allocated
        # What leaves here belongs to rank - step; what arrives belongs to rank - step - 1, in the end to this rank.
        self._travelling = self._comm.shift(own, self._empty(self._comm.source(self._step + 1)), self._stage)

    def home(self) -> Pending | None:
        """Sum of the other ranks' gradients for this rank's tensor; None in a group of one."""
        return self._travelling
