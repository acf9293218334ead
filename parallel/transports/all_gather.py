"""`all_gather`: every rank gets all keys and values of a range of kv heads at once.

Receives `(P - 1) * max home tokens * H * (D + Dv)` elements a rank, whatever was selected. Gradients go home by one all-to-all
in the accumulation dtype and are added in order of rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..blocks import RankPlan
from ..comm import CommGroup, Pending
from ..home import HomeBlocks
from ..rows import pack
from .base import Part, PartGradient, Transport, gradient_of, unpack


class AllGather(Transport):
    """See the module."""

    name = "all_gather"

    def __init__(self, home: HomeBlocks, comm: CommGroup) -> None:
        super().__init__(home, comm)
        self._under_way: dict[int, Pending] = {}

    def prefetch(self, heads: slice) -> None:
        if heads.start in self._under_way:
            return
        local = self.local_part(heads)
        most = int(self.home.plan.plan.home_tokens.max())
        tokens, n_heads, dim = local.k.shape
        packed = local.k.new_empty(most, n_heads, dim + local.v.shape[2])
        packed[tokens:] = 0
        pack(local.k, local.v, packed[:tokens])
        self._under_way[heads.start] = self.comm.all_gather(packed, "all_gather keys and values")

    def forward(self, heads: slice) -> Iterator[Part]:
        self.prefetch(heads)
        local = self.local_part(heads)
        yield local
        gathered = self._under_way.pop(heads.start).wait()
        yield self._remote(gathered.flatten(0, 1), heads, local)

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        self.prefetch(heads)
        local = self.local_part(heads)
        yield PartGradient(local, dk, dv)
        gathered = self._under_way.pop(heads.start).wait().flatten(0, 1)
        yield gradient_of(self._remote(gathered, heads, local), gathered)

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> Callable[[], list[Tensor]]:
        size, rank = self.comm.size, self.comm.rank
        packed = gradients[1].packed
        assert packed is not None
        rows = [packed.shape[0] // size] * size
        pending = self.comm.all_to_all(packed, rows, rows, "all_gather gradients")

        def finish() -> list[Tensor]:
            received = pending.wait().unflatten(0, (size, -1))
            return [received[source, : dk.shape[0]] for source in range(size) if source != rank]

        return finish

    def _remote(self, packed: Tensor, heads: slice, local: Part) -> Part:
        start = _remote_start(self.home.plan, packed.device).expand(heads.stop - heads.start, -1)
        return Part(*unpack(packed, local.k.shape[-1]), start, "all_gather")


@lru_cache(maxsize=64)
def _remote_start(plan: RankPlan, device: torch.device) -> Tensor:
    """int32 `[n_blocks]`: row of each block's first key in the flattened gathered keys; -1 for home blocks."""
    home = plan.plan.home
    start = np.where(home == plan.rank, -1, home * int(plan.plan.home_tokens.max()) + plan.plan.home_row)
    return torch.from_numpy(start.astype(np.int32)).to(device)
