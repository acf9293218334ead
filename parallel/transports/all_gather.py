"""`all_gather`: every rank gets all keys and values of a range of kv heads at once.

Receives `(P - 1) * max home tokens * H * (D + Dv)` elements a rank, whatever was selected. Gradients go home by one all-to-all
in the accumulation dtype and are added in order of rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..blocks import RankPlan
from ..comm import Pending
from .base import Part, PartGradient, Transport, accumulation_room, pack, unpack


class AllGather(Transport):
    """See the module."""

    name = "all_gather"

    def forward(self, heads: slice) -> Iterator[Part]:
        local = self.local_part(heads)
        pending = self._start(local)
        yield local
        yield self._remote(pending.wait(), heads, local)

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        local = self.local_part(heads)
        pending = self._start(local)
        yield PartGradient(local, dk, dv)
        gathered = pending.wait()
        remote = self._remote(gathered, heads, local)
        yield PartGradient(remote, *unpack(accumulation_room(gathered.flatten(0, 1)), local.k.shape[-1]))

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> None:
        size, rank = self.comm.size, self.comm.rank
        packed = pack(gradients[1].dk, gradients[1].dv)
        rows = [packed.shape[0] // size] * size
        received = self.comm.all_to_all(packed, rows, rows, "all_gather gradients").wait().unflatten(0, (size, -1))
        width, tokens = dk.shape[-1], dk.shape[0]
        for source in range(size):
            if source != rank:
                dk += received[source, :tokens, :, :width]
                dv += received[source, :tokens, :, width:]

    def _start(self, local: Part) -> Pending:
        most = int(self.home.plan.plan.home_tokens.max())
        packed = pack(local.k, local.v)
        if packed.shape[0] < most:
            padded = packed.new_zeros(most, *packed.shape[1:])
            padded[: packed.shape[0]] = packed
            packed = padded
        return self.comm.all_gather(packed, "all_gather keys and values")

    def _remote(self, gathered: Tensor, heads: slice, local: Part) -> Part:
        start = _remote_start(self.home.plan, gathered.device).expand(heads.stop - heads.start, -1)
        return Part(*unpack(gathered.flatten(0, 1), local.k.shape[-1]), start, "all_gather")


@lru_cache(maxsize=64)
def _remote_start(plan: RankPlan, device: torch.device) -> Tensor:
    """int32 `[n_blocks]`: row of each block's first key in the flattened gathered keys; -1 for home blocks."""
    home = plan.plan.home
    start = np.where(home == plan.rank, -1, home * int(plan.plan.home_tokens.max()) + plan.plan.home_row)
    return torch.from_numpy(start.astype(np.int32)).to(device)
