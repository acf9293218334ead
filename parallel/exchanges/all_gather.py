"""`all_gather`: every rank gets all keys and values of a range of kv heads by one collective.

Receives `(P - 1) * max home tokens * H * (D + Dv)` elements per rank, whatever was selected. Gradients go home by one
all-to-all in the accumulation dtype and are added in order of rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..blocks import RankPlan
from ..comm import Pending
from ..rows import pack
from .at_once import AtOnce
from .base import Arrived, Part, Visit, unpack


@dataclass
class GatherVisit(Visit):
    """Also: the all-gather under way."""

    pending: Pending | None = None


class AllGather(AtOnce):
    """See the module."""

    name = "all_gather"
    summary = "everything by one collective; short sequences"

    def start(self, heads: slice) -> GatherVisit:
        local = self.local_part(heads)
        most = int(self.home.plan.plan.home_tokens.max())
        tokens, n_heads, dim = local.k.shape
        packed = local.k.new_empty(most, n_heads, dim + local.v.shape[2])
        packed[tokens:] = 0
        pack(local.k, local.v, packed[:tokens])
        return GatherVisit(heads, pending=self.comm.all_gather(packed, "all_gather keys and values"))

    def remote(self, visit: Visit) -> tuple[Part, Tensor]:
        assert isinstance(visit, GatherVisit)
        assert visit.pending is not None
        packed, visit.pending = visit.pending.wait().flatten(0, 1), None
        start = _remote_start(self.home.plan, packed.device).expand(visit.heads.stop - visit.heads.start, -1)
        return Part(*unpack(packed, self.home.k.shape[-1]), start, "all_gather"), packed

    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        size, rank = self.comm.size, self.comm.rank
        tokens, packed = self.home.k.shape[0], visit.gradients.pop().packed
        assert packed is not None
        rows = [packed.shape[0] // size] * size
        pending = self.comm.all_to_all(packed, rows, rows, "all_gather gradients")

        def finish() -> list[Arrived]:
            received = pending.wait().unflatten(0, (size, -1))
            return [Arrived(received[source, :tokens]) for source in range(size) if source != rank]

        return finish


def _remote_start(plan: RankPlan, device: torch.device) -> Tensor:
    """int32 `[n_blocks]`: row of each block's first key in the flattened gathered keys; -1 for home blocks."""

    def make() -> Tensor:
        home = plan.plan.home
        start = np.where(home == plan.rank, -1, home * int(plan.plan.home_tokens.max()) + plan.plan.home_row)
        return torch.from_numpy(start.astype(np.int32)).to(device)

    return plan.plan.memo.get(("gathered start", plan.rank, device), make)
