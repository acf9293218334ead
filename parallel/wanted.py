"""Which (kv head, block) pairs each rank's queries selected, known to all ranks: what `fetch` moves and `auto` weighs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import HomePlan, RankPlan
from .comm import CommGroup, to_host

_AT_ONCE = 1 << 23
"""Most bits of the table that are unpacked at once to count tokens."""


@dataclass
class Wanted:
    """Wanted pairs of every rank, 8 to a byte.

    Attributes:
        packed: uint8 `[P, Hkv, ceil(n_blocks / 8)]` on the device: `Hkv * n_blocks / 8` bytes per rank, 16 MiB for 128 ranks
            that hold 16M tokens in blocks of 128, with 8 kv heads.
        n_blocks: blocks over all documents.
    """

    packed: Tensor
    n_blocks: int
    _read_tokens: Callable[[], Tensor]

    def tokens(self) -> np.ndarray:
        """int64 `[destination, home, Hkv]`, tokens of the pairs that `destination` wants of `home`. Waits for the device
        the first time, though not for work enqueued after the table was gathered."""
        return self._read_tokens().numpy()

    def of_rank(self, rank: int, heads: slice) -> Tensor:
        """bool `[H, n_blocks]`: what `rank` wants of these kv heads."""
        return unpack_bits(self.packed[rank, heads], self.n_blocks)

    def of_blocks(self, blocks: Tensor, heads: slice) -> Tensor:
        """bool `[P, H, n]`: which ranks want these blocks, int64 `[n]`, of these kv heads."""
        return (self.packed[:, heads].index_select(2, blocks >> 3) >> (blocks & 7).to(torch.uint8)) & 1 != 0


def exchange_wanted(mine: Tensor, plan: RankPlan, comm: CommGroup) -> Wanted:
    """Gather every rank's wanted pairs (one bit per pair), and start reading how many tokens go from where to where.

    Args:
        mine: bool `[Hkv, n_blocks]`, pairs that the rows of this rank selected.
        plan: this rank's plan.
        comm: the group.
    """
    kv_heads, n_blocks = mine.shape
    packed = comm.all_gather(pack_bits(mine), "wanted pairs").wait()
    home, length = home_and_length(plan.plan, packed.device)
    tokens = torch.zeros(comm.size, kv_heads, comm.size, dtype=torch.int64, device=packed.device)
    ranks = max(1, _AT_ONCE // max(1, kv_heads * n_blocks))
    for first in range(0, comm.size, ranks):
        here = slice(first, first + ranks)
        tokens[here].index_add_(2, home, unpack_bits(packed[here], n_blocks) * length)
    return Wanted(packed, n_blocks, to_host(tokens.transpose(1, 2).contiguous()))


def pack_bits(mask: Tensor) -> Tensor:
    """bool `[..., n]` as uint8 `[..., ceil(n / 8)]`, the lowest bit first; padded with zeros."""
    n = mask.shape[-1]
    bits = torch.zeros(*mask.shape[:-1], -(-n // 8) * 8, dtype=torch.uint8, device=mask.device)
    bits[..., :n] = mask
    return (bits.unflatten(-1, (-1, 8)) << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`."""
    return ((packed[..., None] >> _shifts(packed.device)) & 1 != 0).flatten(-2)[..., :n]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def home_and_length(plan: HomePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Home rank and length of every block: int64 `[n_blocks]` twice, on the device."""
    return plan.memo.get(
        ("home and length", device),
        lambda: (torch.from_numpy(plan.home).to(device), torch.from_numpy(plan.blocks.length).to(device)),
    )
