"""What `all_gather` and `fetch` share: one remote part per range, which stays for all chunks of query rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from torch import Tensor

from .base import Exchange, Part, PartGradient, Visit, added_to


class AtOnce(Exchange):
    """An exchange that brings everything of a range over by one collective."""

    @abstractmethod
    def remote(self, visit: Visit) -> tuple[Part, Tensor]:
        """The remote part, and the packed tensor that it is a view of; called once per visit, after the local part."""

    def forward(self, visit: Visit, chunk: int) -> Iterator[Part]:
        yield self.local_part(visit.heads)
        if not visit.parts:
            visit.parts.append(self.remote(visit)[0])
        yield visit.parts[0]

    def backward(self, visit: Visit, chunk: int, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        yield PartGradient(self.local_part(visit.heads), dk, dv, chunk > 0)
        if visit.gradients:
            yield added_to(visit.gradients[0])
            return
        visit.gradients.append(self.gradient_of(*self.remote(visit)))
        yield visit.gradients[0]
