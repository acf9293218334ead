"""Where wanted pairs lie in the messages of `fetch`, for all ranges of kv heads at once, on the device.

A message of one range holds the rows of its pairs by (rank, kv head, block); the rank is the destination where it is sent, and
the source where it is received. Both ends know this from the wanted pairs of all ranks, so no addresses travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .home import blocks_by_home
from .wanted import Wanted, home_and_length, home_blocks


@dataclass(frozen=True)
class Messages:
    """Of all kv heads, each in the message of its range.

    Attributes:
        sent: int64 `[P, Hkv, home blocks]`: for each rank, row of a pair's first key in what this rank sends; -1 for pairs that
            it does not want, and for this rank itself.
        start: int32 `[Hkv, n_blocks]`: row of a pair's first key in what this rank receives; -1 for pairs that do not come.
    """

    sent: Tensor
    start: Tensor


def messages(wanted: Wanted, rank: int, ranges: Sequence[slice]) -> Messages:
    """Addresses of all ranges, which together are all kv heads.

    Args:
        wanted: of all ranks.
        rank: this rank in the group.
        ranges: ranges of kv heads, a message each.
    """
    of_range = _ends(wanted, ranges)
    return Messages(_sent(wanted, rank, of_range), _start(wanted, rank, of_range))


def _sent(wanted: Wanted, rank: int, of_range: Tensor) -> Tensor:
    blocks, _, length = home_blocks(wanted.plan, wanted.packed.device)
    keys = wanted.of_blocks(blocks) * length
    keys[rank] = 0
    before = torch.cumsum(keys, 2) - keys
    return torch.where(keys > 0, before + _begins(keys.sum(2), of_range)[:, :, None], -1)


def _start(wanted: Wanted, rank: int, of_range: Tensor) -> Tensor:
    plan, device = wanted.plan.plan, wanted.packed.device
    source, length = home_and_length(plan, device)
    keys = wanted.of_rank(rank) * length
    keys.masked_fill_(source == rank, 0)
    order, ranks = blocks_by_home(plan, device), wanted.packed.shape[0]
    in_order = keys[:, order]
    before = torch.empty_like(keys)
    before[:, order] = torch.cumsum(in_order, 1) - in_order  # of the head: pairs of lower sources, then of lower blocks
    by_source = keys.new_zeros(ranks, keys.shape[0]).index_add_(0, source, keys.T)
    lower = torch.cumsum(by_source, 0) - by_source  # of the head: pairs of lower sources
    start = before + (_begins(by_source, of_range) - lower)[source].T
    return torch.where(keys > 0, start, -1).to(torch.int32)


def _begins(keys: Tensor, of_range: Tensor) -> Tensor:
    """int64 `[P, Hkv]`: row at which the pairs of a rank and a kv head begin in the message of the head's range.

    Args:
        keys: int64 `[P, Hkv]`, rows of these pairs.
        of_range: of `_ends`.
    """
    first, last = of_range
    through = torch.cumsum(keys, 1)
    below = through - keys  # of the rank: lower heads
    before_range = below[:, first]
    in_range = through[:, last] - before_range
    return torch.cumsum(in_range, 0) - in_range + below - before_range


def _ends(wanted: Wanted, ranges: Sequence[slice]) -> Tensor:
    """int64 `[2, Hkv]`: the first and the last head of each head's range."""
    ends = tuple((heads.start, heads.stop) for heads in ranges)

    def make() -> Tensor:
        first = [start for start, stop in ends for _ in range(start, stop)]
        last = [stop - 1 for start, stop in ends for _ in range(start, stop)]
        return torch.tensor([first, last], device=wanted.packed.device)

    return wanted.plan.plan.memo.get(("ends of ranges", ends, wanted.packed.device), make)
