"""Heads for tokens: neighbouring ranks exchange their shares, so that each has all their tokens of its share of the heads.

P ranks are S groups of U neighbours; rank `s * U + u` is member u of group s. Heads in turns `[T, H, D]` on each member into
`[tokens of the group, H / U, D]`; heads out is the inverse. To the S *wide ranks* this is the same attention problem with
`Hq / U` q heads. P = 4, U = 2, a sequence of four quarters and four heads::

              before: rank r holds quarter r, all heads        after: wide rank s holds two quarters, u two heads of them
    rank 0    [0]      heads 0 1 2 3                           [0 1]    heads 0 1
    rank 1      [1]    heads 0 1 2 3                           [0 1]    heads     2 3
    rank 2        [2]  heads 0 1 2 3                             [2 3]  heads 0 1
    rank 3         [3] heads 0 1 2 3                             [2 3]  heads     2 3

Tokens of a group stand one member after another, each member's in its own order. Each byte is packed in one pass on the side that
has all heads, and lies where it is needed when it arrives on the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import torch
from torch import Tensor

from .comm import CommGroup, SideStream
from .head_rows import put_heads, take_heads
from .layout import SequenceLayout
from .partition import merge_adjacent, partition_of
from .plan_cache import PLANS, Memo
from .subgroups import sub_group

IN, OUT = "heads in", "heads out"
"""Stages of the traffic: towards attention, and back."""


@dataclass(frozen=True)
class HeadSplit:
    """How heads are divided among the members of a head group.

    Attributes:
        size: members, U.
        q_heads: q heads of each member.
        kv_heads: kv heads that each member works with; each serves `q_heads / kv_heads` of its q heads.
        copies: on how many of these kv heads, over all members, one kv head of the caller stands. Where it is more than 1,
            kv head `e` of all members' is a copy of the caller's `e // copies`.
    """

    size: int
    q_heads: int
    kv_heads: int
    copies: int


def head_split(q_heads: int, kv_heads: int, size: int) -> HeadSplit:
    """The split of `q_heads` and `kv_heads` over `size` members; `size` divides `q_heads`."""
    mine, group = q_heads // size, q_heads // kv_heads
    served = gcd(group, mine)  # consecutive q heads of a member that read the same kv head, whichever member
    return HeadSplit(size, mine, mine // served, group // served)


@dataclass(frozen=True, eq=False)
class _WideLayout:
    """A layout as the plan cache keeps it."""

    layout: SequenceLayout
    memo: Memo = field(default_factory=Memo, repr=False)


def wide_layout(layout: SequenceLayout, size: int) -> SequenceLayout:
    """The layout over wide ranks: each holds what `size` neighbours hold, one after another. Kept in `plan_cache.PLANS`."""
    if size == 1:
        return layout
    return PLANS.get(("wide", layout, size), lambda: _WideLayout(_wide_layout(layout, size))).layout


def _wide_layout(layout: SequenceLayout, size: int) -> SequenceLayout:
    runs = [
        merge_adjacent(np.concatenate([layout.runs_of(rank) for rank in range(first, first + size)]))
        for first in range(0, layout.cp_size, size)
    ]
    cu_seqlens = layout.cu_seqlens_array
    return SequenceLayout(cu_seqlens, partition_of(runs, cu_seqlens))


def head_groups(comm: CommGroup, size: int, device: torch.device) -> tuple[CommGroup, CommGroup]:
    """The U neighbours that split heads with this rank, and the S ranks of the same heads, which split the sequence. Both count
    into the traffic of `comm`.

    Args:
        comm: the whole group, whose ranks have agreed on the call.
        size: U, divides its size.
        device: where its tensors are.
    """
    if size == 1:
        return CommGroup(None, 1, comm.traffic), comm
    first = comm.rank // size * size
    heads, sequence = (
        CommGroup(
            sub_group(comm.group, ranks, device) if len(ranks) > 1 else None,
            len(ranks),
            comm.traffic,
            tuple(comm.nodes[rank] for rank in ranks),
        )
        for ranks in (range(first, first + size), range(comm.rank % size, comm.size, size))
    )
    return heads, sequence


class HeadTransfer:
    """Heads in and heads out over one head group, beside the caller's stream on CUDA; see the module.

    Tensors are `[tokens, heads, width]`. `heads` are a range of one member's heads; every member sends and receives that range of
    each other's. Any tensor whose heads are split evenly may travel, whatever it holds. All members make the same calls in the
    same order. What `start_in` and `start_out` return is called once, and gives the result to the caller's stream.

    Args:
        comm: the head group.
        tokens: tokens of each member.
    """

    def __init__(self, comm: CommGroup, tokens: tuple[int, ...]) -> None:
        self.comm, self.tokens = comm, tokens

    @property
    def wide_tokens(self) -> int:
        """Tokens of the whole group."""
        return sum(self.tokens)

    def without_traffic(self) -> HeadTransfer:
        """The same, for what is not traffic of the call."""
        return HeadTransfer(CommGroup(self.comm.group, self.comm.size), self.tokens)

    def start_in(self, x: Tensor, heads: slice, per_member: int, copies: int = 1) -> Callable[[], Tensor]:
        """Start to bring a range of this member's heads of all tokens of the group.

        Args:
            x: `[T, H, W]`, all heads of this rank's tokens, unit stride in the last dimension.
            heads: range of a member's heads.
            per_member: heads of a member.
            copies: members' head `e` is head `e // copies` of `x`; see `HeadSplit`.

        Returns:
            A function that waits for `[tokens of the group, h, W]`, contiguous.
        """
        count, size, mine = heads.stop - heads.start, self.comm.size, len(x)
        side = SideStream(x.device, IN)
        side.mark()
        with side.use():
            packed = take_heads(x, size, heads.start, count, per_member, copies)
            pending = self.comm.all_to_all(packed.flatten(0, 1), [mine] * size, self.tokens, IN)
        side.uses(x)
        return pending.wait

    def start_out(self, x: Tensor) -> Callable[[], Tensor]:
        """Start to send a range of this member's heads to the ranks that hold the tokens.

        Args:
            x: `[tokens of the group, h, W]`, contiguous.

        Returns:
            A function that waits for `[U, T, h, W]`: the same range of each member's heads, of this rank's tokens.
        """
        size, mine = self.comm.size, self.tokens[self.comm.rank]
        side = SideStream(x.device, OUT)
        side.mark()
        with side.use():
            pending = self.comm.all_to_all(x, self.tokens, [mine] * size, OUT)
        side.uses(x)
        return lambda: pending.wait().unflatten(0, (size, mine))


class HeadsBack:
    """Gathers ranges of heads that come back into one tensor of all heads.

    Args:
        transfer: the head group.
        heads: members' heads in all: `U * per_member`.
        width, dtype, device: of what comes back.
    """

    def __init__(
        self, transfer: HeadTransfer, heads: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._transfer, self._per_member = transfer, heads // transfer.comm.size
        mine = transfer.tokens[transfer.comm.rank]
        self._result = torch.empty(mine, heads, width, dtype=dtype, device=device)
        self._side = SideStream(device, "heads back")
        self._side.mark()  # the result's memory is free for it
        self._coming: list[tuple[Callable[[], Tensor], int]] = []

    def start(self, x: Tensor, heads: slice) -> None:
        """Send `[tokens of the group, h, W]`, this member's `heads`."""
        self._put(1)
        self._coming.append((self._transfer.start_out(x), heads.start))

    def finish(self) -> Tensor:
        """`[T, heads, W]`, for the caller's stream."""
        self._put(0)
        self._side.join(self._side.done())
        self._side.uses(self._result)
        return self._result

    def _put(self, most: int) -> None:
        """Take what came, but for the latest `most`."""
        while len(self._coming) > most:
            wait, first = self._coming.pop(0)
            with self._side.use():
                put_heads(wait(), self._result, first, self._per_member)


def add_copies(x: Tensor, copies: int, dtype: torch.dtype) -> Tensor:
    """Gradients `[T, H * copies, W]` of copies of kv heads as those of the kv heads `[T, H, W]`: added in order, rounded once."""
    if copies == 1:
        return x.to(dtype)
    parts = x.unflatten(1, (x.shape[1] // copies, copies)).unbind(2)
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(dtype)
