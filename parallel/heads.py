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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd

import numpy as np
import torch
from torch import Tensor

from .comm import CommGroup, SideStream
from .head_rows import put_heads, take_heads
from .layout import SequenceLayout
from .partition import merge_adjacent, partition_of
from .peer_memory import PeerMemory, aligned, can_share, peer_memory
from .plan_cache import PLANS, Memo
from .subgroups import sub_group

IN, OUT = "heads in", "heads out"
"""Stages of the traffic: towards attention, and back."""
THROUGH_MEMORY = True
"""Whether heads move through GPUs' memory (`PeerHeadTransfer`) where all members can access it; the same on all ranks. Elsewhere
they move by NCCL's all-to-all, which takes multiprocessors from attention."""
BARRIERS = "heads barriers"
"""On the CPU, where members wait for each other by a collective."""


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


def wide_layout(layout: SequenceLayout, size: int) -> SequenceLayout:
    """The layout over wide ranks: each holds what `size` neighbours hold, one after another. Kept in `plan_cache.PLANS`."""
    if size == 1:
        return layout
    return PLANS.get(("wide", layout, size), Memo).get("layout", lambda: _wide_layout(layout, size))


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


@dataclass(frozen=True)
class Share:
    """A tensor of which each member gets some heads. Any tensor whose heads are split evenly may travel, whatever it holds.

    Attributes:
        x: `[T, H, W]`, all heads of this rank's tokens, unit stride in the last dimension.
        heads: range of a member's heads that travels: every member gets that range of its own.
        per_member: heads of a member.
        copies: members' head `e` is head `e // copies` of `x`; see `HeadSplit`.
    """

    x: Tensor
    heads: slice
    per_member: int
    copies: int = 1

    @property
    def count(self) -> int:
        """Heads of a member that travel."""
        return self.heads.stop - self.heads.start


class HeadTransfer:
    """Heads in and heads out over one head group by all-to-all, beside the caller's stream on CUDA; see the module.

    All members make the same calls in the same order.

    Args:
        comm: the head group.
        tokens: tokens of each member.
    """

    def __init__(self, comm: CommGroup, tokens: tuple[int, ...]) -> None:
        self.comm, self.tokens = comm, tokens

    @property
    def mine(self) -> int:
        """Tokens of this rank."""
        return self.tokens[self.comm.rank]

    @property
    def wide_tokens(self) -> int:
        """Tokens of the whole group."""
        return sum(self.tokens)

    def without_traffic(self) -> HeadTransfer:
        """The same, for what is not traffic of the call."""
        return type(self)(CommGroup(self.comm.group, self.comm.size), self.tokens)

    def start_in(self, shares: Sequence[Share]) -> Callable[[], list[Tensor]]:
        """Start to bring heads of all tokens of the group.

        Returns:
            A function, called once, that waits and gives `[tokens of the group, h, W]` of each share, contiguous, to the
            current stream.
        """
        size, device = self.comm.size, shares[0].x.device
        side = SideStream(device, IN)
        side.mark()
        pending = []
        with side.use():
            for share in shares:
                packed = take_heads(share.x, size, share.heads.start, share.count, share.per_member, share.copies)
                pending.append(self.comm.all_to_all(packed.flatten(0, 1), [self.mine] * size, self.tokens, IN))
        side.uses(*(share.x for share in shares))
        return lambda: [x.wait() for x in pending]

    def start_out(self, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Start to send heads of this member to the ranks that hold the tokens; on CUDA from the current stream.

        Args:
            parts: `[tokens of the group, h, W]` each.

        Returns:
            A function that waits and gives `[U, T, h, W]` of each to the current stream: the same heads of each member, of this
            rank's tokens. They are to be read before the next `start_out`.
        """
        size = self.comm.size
        pending = [self.comm.all_to_all(x, self.tokens, [self.mine] * size, OUT) for x in parts]
        return lambda: [x.wait().unflatten(0, (size, self.mine)) for x in pending]


class PeerHeadTransfer(HeadTransfer):
    """Heads in and heads out through memory that members read and write directly, for members who can (`can_share`).

    In: each member packs its shares into its own shared memory; after a barrier each reads its part of everybody's. Out: each
    writes what it has into the memory of the ranks that hold the tokens; after a barrier they put it in place. What crosses is
    contiguous, so copy engines move it and leave the multiprocessors to attention. A member's own part needs no barrier: it moves
    while others come to theirs. Buffers are used in halves; see `PeerMemory.next_half`.
    """

    def start_in(self, shares: Sequence[Share]) -> Callable[[], list[Tensor]]:
        device, rank = shares[0].x.device, self.comm.rank
        memory, at = self._memory(IN, device, [(share.x, share.count) for share in shares])
        wholes = [share.x.new_empty(self.wide_tokens, share.count, share.x.shape[2]) for share in shares]
        side = SideStream(device, IN)
        side.mark()
        with side.use():
            for share, offset in zip(shares, at, strict=True):
                packed = self._view(memory, rank, offset, share.x, share.count)
                take_heads(
                    share.x, self.comm.size, share.heads.start, share.count, share.per_member, share.copies, packed
                )
            self._read(memory, at, wholes, [rank])
            memory.barrier(self.comm, BARRIERS)
            self._read(memory, at, wholes, self._others())
            done = side.done()
        for whole in wholes:
            self._count(IN, whole, self.wide_tokens - self.mine)
        side.uses(*(share.x for share in shares), *wholes)

        def wait() -> list[Tensor]:
            side.join(done)
            return wholes

        return wait

    def start_out(self, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        rank = self.comm.rank
        memory, at = self._memory(OUT, parts[0].device, [(x, x.shape[1]) for x in parts])
        self._write(memory, at, parts, self._others())
        memory.barrier(self.comm, BARRIERS)
        self._write(memory, at, parts, [rank])
        for x in parts:
            self._count(OUT, x, (self.comm.size - 1) * self.mine)
        return lambda: [self._view(memory, rank, offset, x, x.shape[1]) for x, offset in zip(parts, at, strict=True)]

    def _memory(
        self, purpose: str, device: torch.device, shapes: Sequence[tuple[Tensor, int]]
    ) -> tuple[PeerMemory, list[int]]:
        """The buffer, and where what each of some tensors sends begins in the half that is used next: tensors like `x` with so
        many heads of each member."""
        most = self.comm.size * max(self.tokens)
        sizes = [aligned(most * count * x.shape[2] * x.itemsize) for x, count in shapes]
        memory = peer_memory(self.comm, device, purpose, 2 * sum(sizes))
        begin = memory.next_half()
        return memory, [begin + sum(sizes[:i]) for i in range(len(sizes))]

    def _view(self, memory: PeerMemory, rank: int, offset: int, x: Tensor, count: int) -> Tensor:
        """`[U, tokens of rank, count, W]` in the memory of `rank`, of the width and dtype of `x`."""
        return memory.view(rank, offset, (self.comm.size, self.tokens[rank], count, x.shape[2]), x.dtype)

    def _read(self, memory: PeerMemory, at: Sequence[int], wholes: Sequence[Tensor], members: Sequence[int]) -> None:
        """Fill the rows of `members` in `wholes` with what they packed for this rank."""
        for whole, offset in zip(wholes, at, strict=True):
            for source in members:
                packed = self._view(memory, source, offset, whole, whole.shape[1])
                whole[self._rows(source)].copy_(packed[self.comm.rank])

    def _write(self, memory: PeerMemory, at: Sequence[int], parts: Sequence[Tensor], members: Sequence[int]) -> None:
        """Give `members` their rows of `parts`."""
        for x, offset in zip(parts, at, strict=True):
            for target in members:
                self._view(memory, target, offset, x, x.shape[1])[self.comm.rank].copy_(x[self._rows(target)])

    def _others(self) -> list[int]:
        """The other members, on each of them in another order."""
        return [(self.comm.rank + step) % self.comm.size for step in range(1, self.comm.size)]

    def _rows(self, member: int) -> slice:
        """The rows of a member among the tokens of the group."""
        return slice(sum(self.tokens[:member]), sum(self.tokens[: member + 1]))

    def _count(self, stage: str, x: Tensor, tokens: int) -> None:
        size = tokens * x.shape[1] * x.shape[2] * x.itemsize
        self.comm.traffic.add_read(stage, lambda: size)


def head_transfer(comm: CommGroup, tokens: tuple[int, ...], device: torch.device) -> HeadTransfer:
    """How heads move between these members; alike on all of them."""
    direct = THROUGH_MEMORY and device.type == "cuda" and can_share(comm, device)
    return (PeerHeadTransfer if direct else HeadTransfer)(comm, tokens)


class HeadsBack:
    """Gathers ranges of heads that come back into whole tensors.

    Args:
        transfer: the head group.
        wholes: `[T, H, W]` each, uninitialized, for the results; `H` is a multiple of the group's size.
    """

    def __init__(self, transfer: HeadTransfer, wholes: Sequence[Tensor]) -> None:
        self._transfer, self._wholes = transfer, wholes
        self._cuda = wholes[0].is_cuda
        self._side = SideStream(wholes[0].device, OUT)
        self._coming: Callable[[], None] = _nothing

    def start(self, parts: Sequence[Tensor], heads: Sequence[slice]) -> None:
        """Send `[tokens of the group, h, W]`, this member's `heads`, for each of the wholes."""
        self._coming()
        self._side.mark()
        with self._side.use():
            arrived = self._transfer.start_out(parts)
            self._coming = partial(self._put, arrived, heads)
            if self._cuda:  # the stream waits, not the host
                self._coming()
        self._side.uses(*parts)

    def finish(self) -> None:
        """The wholes are complete for the current stream."""
        with self._side.use():
            self._coming()
        self._side.join(self._side.done())
        self._side.uses(*self._wholes)

    def _put(self, arrived: Callable[[], list[Tensor]], heads: Sequence[slice]) -> None:
        self._coming = _nothing
        for packed, whole, of in zip(arrived(), self._wholes, heads, strict=True):
            put_heads(packed, whole, of.start, whole.shape[1] // self._transfer.comm.size)


def _nothing() -> None:
    """Nothing is on its way."""


def add_copies(x: Tensor, copies: int, dtype: torch.dtype) -> Tensor:
    """Gradients `[T, H * copies, W]` of copies of kv heads as those of the kv heads `[T, H, W]`: added in order, rounded once."""
    if copies == 1:
        return x.to(dtype)
    parts = x.unflatten(1, (x.shape[1] // copies, copies)).unbind(2)
    total = parts[0] + parts[1]
    for part in parts[2:]:
        total += part
    return total.to(dtype)
