"""Which (kv head, block) pairs each rank's queries selected, known to all ranks: what `fetch` moves and `auto` weighs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import HomePlan, RankPlan
from .comm import CommGroup, HostCopy

_AT_ONCE = 1 << 23
"""Most bits of the table that are unpacked at once to count tokens."""


@dataclass
class Wanted:
    """Wanted pairs of every rank, 8 per byte.

    Attributes:
        packed: uint8 `[P, Hkv, ceil(n_blocks / 8)]` on the device: `Hkv * n_blocks / 8` bytes per rank, 16 MiB for 128 ranks
            that hold 16M tokens in blocks of 128, with 8 kv heads.
        plan: this rank's plan.
    """

    packed: Tensor
    plan: RankPlan
    _tokens: HostCopy

    @property
    def n_blocks(self) -> int:
        return len(self.plan.plan.blocks)

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the wanted pairs that this rank sends to and receives from each rank, itself included: int64 `[P, Hkv]`
        twice. Waits for the device the first time, but not for work enqueued after the table was gathered."""
        sent, received = self._tokens.wait().numpy()
        return sent, received

    def remote_tokens(self) -> np.ndarray:
        """int64 `[P]`: tokens of the pairs that each rank wants and that are at home elsewhere, over all kv heads. Reads the
        whole table, a bounded part at a time, and waits for the device."""
        ranks, kv_heads = self.packed.shape[:2]
        home, length = home_and_length(self.plan.plan, self.packed.device)
        tokens = torch.zeros(ranks, dtype=torch.int64, device=self.packed.device)
        step = max(1, _AT_ONCE // max(1, kv_heads * self.n_blocks))
        for first in range(0, ranks, step):
            some = torch.arange(first, min(first + step, ranks), device=home.device)
            keys = (unpack_bits(self.packed[first : first + step], self.n_blocks) * length).sum(1)
            tokens[first : first + step] = keys.masked_fill_(home == some[:, None], 0).sum(1)
        return tokens.cpu().numpy()

    def of_rank(self, rank: int) -> Tensor:
        """bool `[Hkv, n_blocks]`: what `rank` wants."""
        return unpack_bits(self.packed[rank], self.n_blocks)

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """bool `[P, Hkv, n]`: which ranks want these blocks, int64 `[n]`."""
        return _bits_of_blocks(self.packed, blocks)


def exchange_wanted(mine: Tensor, plan: RankPlan, comm: CommGroup) -> Wanted:
    """Gather every rank's wanted pairs (one bit per pair), and start reading how many tokens this rank sends and receives.

    Args:
        mine: bool `[Hkv, n_blocks]`, pairs that the rows of this rank selected.
        plan: this rank's plan.
        comm: the group.
    """
    packed = comm.all_gather(pack_bits(mine), "wanted pairs").wait()
    home, length = home_and_length(plan.plan, packed.device)
    received = torch.zeros(mine.shape[0], comm.size, dtype=torch.int64, device=packed.device)
    received.index_add_(1, home, mine * length)
    blocks, _, held = home_blocks(plan, packed.device)
    sent = (_bits_of_blocks(packed, blocks) * held).sum(2)
    return Wanted(packed, plan, HostCopy(torch.stack([sent, received.T])))


def pack_bits(mask: Tensor) -> Tensor:
    """bool `[..., n]` as uint8 `[..., ceil(n / 8)]`, the lowest bit first; padded with zeros."""
    n = mask.shape[-1]
    bits = torch.zeros(*mask.shape[:-1], -(-n // 8) * 8, dtype=torch.uint8, device=mask.device)
    bits[..., :n] = mask
    return (bits.unflatten(-1, (-1, 8)) << _shifts(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`."""
    return ((packed[..., None] >> _shifts(packed.device)) & 1 != 0).flatten(-2)[..., :n]


def _bits_of_blocks(packed: Tensor, blocks: Tensor) -> Tensor:
    """bool `[P, H, n]`: the bits of some blocks."""
    return (packed.index_select(2, blocks >> 3) >> (blocks & 7).to(torch.uint8)) & 1 != 0


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def home_and_length(plan: HomePlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Home rank and length of every block: int64 `[n_blocks]` twice, on the device."""
    return plan.memo.get(
        ("home and length", device),
        lambda: (torch.from_numpy(plan.home).to(device), torch.from_numpy(plan.blocks.length).to(device)),
    )


def home_blocks(plan: RankPlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks at home on this rank, ascending: int64 numbers, rows of their first keys, and lengths."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        mine = np.flatnonzero(plan.plan.home == plan.rank)
        arrays = (mine, plan.plan.home_row[mine], plan.plan.blocks.length[mine])
        return tuple(torch.from_numpy(x).to(device) for x in arrays)  # type: ignore[return-value]

    return plan.plan.memo.get(("home blocks", plan.rank, device), make)
