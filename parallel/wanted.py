"""Which (kv head, block) pairs each rank's queries selected, known to all ranks: what `fetch` moves and `auto` weighs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import HomePlan, RankPlan
from .comm import CommGroup, to_host


@dataclass
class Wanted:
    """Wanted pairs of every rank.

    Attributes:
        masks: bool `[P, Hkv, n_blocks]` on the device.
    """

    masks: Tensor
    _read_tokens: Callable[[], Tensor]

    def tokens(self) -> np.ndarray:
        """int64 `[destination, home, Hkv]`, tokens of the pairs that `destination` wants of `home`. Waits for the device
        the first time, though not for work enqueued after the masks were made."""
        return self._read_tokens().numpy()


def exchange_wanted(mine: Tensor, plan: RankPlan, comm: CommGroup) -> Wanted:
    """Gather every rank's wanted pairs (one byte a pair), and start reading how many tokens go from where to where.

    Args:
        mine: bool `[Hkv, n_blocks]`, pairs that the rows of this rank selected.
        plan: this rank's plan.
        comm: the group.
    """
    masks = comm.all_gather(mine.view(torch.uint8), "wanted pairs").wait()
    home, length = home_and_length(plan.plan, masks.device)
    tokens = torch.zeros(comm.size, mine.shape[0], comm.size, dtype=torch.int64, device=masks.device)
    tokens.index_add_(2, home, masks.long() * length)
    return Wanted(masks.view(torch.bool), to_host(tokens.transpose(1, 2).contiguous()))


def home_and_length(plan: HomePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Home rank and length of every block: int64 `[n_blocks]` twice, on the device."""
    return plan.memo.get(
        ("home and length", device),
        lambda: (torch.from_numpy(plan.home).to(device), torch.from_numpy(plan.blocks.length).to(device)),
    )
