"""`pull`: each rank reads the blocks that it wants out of the other ranks' memory, and its gradients out of theirs.

For ranks of one host. Keys and values are copied once to memory that all ranks can read, beside the gate; after that nobody
sends: each rank reads the wanted (block, kv head) pairs of one rank after another, the next while one is computed. Which pairs
those are stays on the device, so the host never waits, and no addresses or counts travel. Ranks tell each other only that
something is ready, by barriers. Four ranks, whose part each one works on at each step::

    step       0     1     2     3
    rank 0     0     3     2     1
    rank 1     1     0     3     2
    rank 2     2     1     0     3
    rank 3     3     2     1     0

In backward the gradients of a part stay where they are computed, in one half of a second shared buffer; when all ranks have
computed a step, each reads those of its own blocks, and the next step is computed into the other half. Both buffers are kept
from call to call: a rank's keys and values of all heads, and the gradients of two parts of one range of heads in the
accumulation dtype.

A part of which most pairs are wanted is read whole: by copy engines, which leave the multiprocessors to attention. A rank
decides that for itself, by the last call of which the host knows it, since it changes what is moved and not what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..comm import CommGroup, SideStream
from ..home import HomeBlocks, home_start
from ..peer_memory import aligned, peer_memory
from ..rows import add_wanted, copy_wanted, pack
from ..wanted import home_and_length
from .base import Part, PartGradient, Transport, gradient_dtype, unpack

WHOLE_SHARE = 0.5
"""A part is read whole where at least this share of its bytes is wanted. A copy engine is faster than the kernel that reads
wanted pairs (366 against about 300 GB/s over NVLink) and costs attention beside it nothing visible."""


class Pull(Transport):
    """See the module. It is made when keys and values are there; `want` starts what the other ranks need.

    Args:
        home, comm: as for every transport.
        ranges: the ranges of kv heads that will be asked for.
    """

    name = "pull"
    resident = False

    def __init__(self, home: HomeBlocks, comm: CommGroup, ranges: list[slice]) -> None:
        super().__init__(home, comm)
        self._ranges, self._plan = ranges, home.plan.plan
        self._kv_heads, self._width = home.k.shape[1], home.k.shape[2] + home.v.shape[2]
        self._most = int(self._plan.home_tokens.max())
        self._masks_at = aligned(self._most * self._kv_heads * self._width * home.k.itemsize)
        size = self._masks_at + self._kv_heads * len(self._plan.blocks)
        self._memory = peer_memory(comm, home.k.device, "keys", size)
        self._under_way: dict[int, tuple[Part, Tensor, torch.cuda.Event | None]] = {}
        self._peers_want: list[Tensor] = []
        self._arrived: Tensor | None = None
        self._begun = False
        self._turns = 0
        self._free: torch.cuda.Event | None = None
        self._side = SideStream(home.k.device, "pull")
        self._side.mark()

    def want(self, wanted: Tensor) -> None:
        """Put keys and values into shared memory, and which pairs the local queries selected: bool `[Hkv, n_blocks]`.

        The former goes on beside what was enqueued since this object was made.
        """
        self._wanted, rank = wanted.view(torch.uint8), self.comm.rank
        with self._side.use():
            self._barrier()  # every rank has read what the last call left there
            for heads in self._ranges:
                local = self.local_part(heads)
                pack(local.k, local.v, self._keys(rank, heads))
        self._side.mark()
        with self._side.use():
            self._mask(rank).copy_(self._wanted)
            self._barrier()
            home, length = home_and_length(self._plan, wanted.device)
            tokens = torch.zeros(self.comm.size, dtype=torch.int64, device=wanted.device)
            tokens.index_add_(0, home, length * self._wanted.sum(0))
            self._memory.wanted_of.copy_(tokens, non_blocking=True)
        self._side.uses(self.home.k, self.home.v, self._wanted)

    def prefetch(self, heads: slice) -> None:
        if heads.start not in self._under_way:
            self._read(heads, 1)

    def forward(self, heads: slice) -> Iterator[Part]:
        self.prefetch(heads)
        yield self.local_part(heads)
        for step in range(1, self.comm.size):
            yield self._part(heads, step)

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        self.prefetch(heads)
        local = PartGradient(self.local_part(heads), dk, dv)
        # Remote parts first where they are likely to be there: their gradients then travel beside the local part.
        local_first, self._begun = not self._begun, True
        if local_first:
            yield local
        for step in range(1, self.comm.size):
            part = self._part(heads, step)
            half = self._next_half(heads)
            source = self.comm.source(step)
            packed = self._gradients(half, self.comm.rank, source, heads)
            yield PartGradient(part, *unpack(packed, dk.shape[2]), packed)
            self._collect(heads, step, half)
        if not local_first:
            yield local

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> Callable[[], list[Tensor]]:
        arrived, self._arrived = self._arrived, None
        assert arrived is not None
        done = self._side.done()

        def finish() -> list[Tensor]:
            self._side.join(done, arrived)
            return [arrived]

        return finish

    def _barrier(self) -> None:
        """What follows on the side stream comes after what every rank has enqueued on its own so far."""
        self._memory.barrier(self.comm, "pull barriers")

    def _keys(self, rank: int, heads: slice) -> Tensor:
        """Keys and values at home on `rank`: `[home tokens, H, D + Dv]`, each range of heads dense."""
        shape = (int(self._plan.home_tokens[rank]), heads.stop - heads.start, self._width)
        offset = self._most * heads.start * self._width * self.home.k.itemsize
        return self._memory.view(rank, offset, shape, self.home.k.dtype)

    def _mask(self, rank: int) -> Tensor:
        """uint8 `[Hkv, n_blocks]`: pairs that `rank` wants."""
        return self._memory.view(rank, self._masks_at, (self._kv_heads, len(self._plan.blocks)), torch.uint8)

    def _whole(self, wanted: Tensor, peer: int, home: int) -> bool:
        """Whether to read all that is at home on `home`, by what was `wanted` of `peer` or by it, as far as is known."""
        return int(wanted[peer]) >= WHOLE_SHARE * self._kv_heads * int(self._plan.home_tokens[home])

    def _read(self, heads: slice, step: int) -> None:
        """Start to read the part of one step."""
        source, wanted = self.comm.source(step), self._wanted[heads]
        start = home_start(self._plan, source, wanted.device)
        shared = self._keys(source, heads)
        with self._side.use():
            packed = torch.empty_like(shared)
            if self._whole(self._memory.wanted_of, source, source):
                packed.copy_(shared)
                self._count_whole("pull keys and values", packed)
            else:
                length = home_and_length(self._plan, wanted.device)[1]
                copy_wanted(shared, packed, wanted, start, length, self._plan.block_size)
                self._count("pull keys and values", wanted, start, length, packed)
            done = self._side.done()
        start = start.expand(heads.stop - heads.start, -1)
        part = Part(*unpack(packed, self.home.k.shape[2]), start, f"pull from rank {source}")
        self._under_way[heads.start] = (part, packed, done)

    def _part(self, heads: slice, step: int) -> Part:
        """The part of one step, the next one under way."""
        part, packed, done = self._under_way.pop(heads.start)
        if step + 1 < self.comm.size:
            self._read(heads, step + 1)
        self._side.join(done, packed)
        return part

    def _next_half(self, heads: slice) -> int:
        """Which half of the gradients' memory is written next; free from here on for work of the caller's stream.

        That of the first two turns is: the caller's stream has waited for keys and values, which came after the barriers of
        `want`, and so after all that ranks have read in calls before.
        """
        n_heads, itemsize = heads.stop - heads.start, gradient_dtype(self.home.k.dtype).itemsize
        size = aligned(self._most * n_heads * self._width * itemsize)
        self._sums = peer_memory(self.comm, self.home.k.device, "gradients", 2 * size)
        if self._turns >= 2:
            self._side.join(self._free)
        self._turns += 1
        return self._turns % 2

    def _gradients(self, half: int, rank: int, source: int, heads: slice) -> Tensor:
        """What `rank` computes for the keys and values at home on `source`: `[home tokens there, H, D + Dv]`."""
        shape = (int(self._plan.home_tokens[source]), heads.stop - heads.start, self._width)
        return self._sums.view(rank, half * self._sums.half, shape, gradient_dtype(self.home.k.dtype))

    def _collect(self, heads: slice, step: int, half: int) -> None:
        """Once every rank has computed the step: add what one of them has for this rank's blocks."""
        rank, peer = self.comm.rank, self.comm.source(-step)
        self._side.mark()
        with self._side.use():
            self._barrier()
            # Whoever has come here has read all of the step before, in the other half.
            self._free = self._side.done()
            there = self._gradients(half, peer, rank, heads)
            if not self._peers_want:
                self._learn_what_peers_want()
            if self._whole(self._memory.wanted_by, peer, rank):
                self._count_whole("pull gradients", there)
                came = torch.empty_like(there).copy_(there)
                self._arrived = came if self._arrived is None else self._arrived.add_(came)
            else:
                self._add_wanted(there, peer, heads)

    def _learn_what_peers_want(self) -> None:
        """Copy their masks: a look at one of them there takes microseconds."""
        self._peers_want = [self._mask(r).clone() for r in range(self.comm.size)]
        home, length = home_and_length(self._plan, self.home.k.device)
        mine = torch.where(home == self.comm.rank, length, 0)
        tokens = (torch.stack(self._peers_want).sum(1) * mine).sum(1)
        self._memory.wanted_by.copy_(tokens, non_blocking=True)

    def _add_wanted(self, there: Tensor, peer: int, heads: slice) -> None:
        """Add the pairs that `peer` wanted to what has arrived."""
        wanted, start = self._peers_want[peer][heads], home_start(self._plan, self.comm.rank, there.device)
        length, first = home_and_length(self._plan, there.device)[1], self._arrived is None
        arrived = torch.empty_like(there) if self._arrived is None else self._arrived
        add_wanted(there, arrived, wanted, start, length, self._plan.block_size, first)
        self._count("pull gradients", wanted, start, length, arrived)
        self._arrived = arrived

    def _count_whole(self, stage: str, x: Tensor) -> None:
        """Note the bytes of `x`. What is noted may outlive the tensor."""
        size = x.numel() * x.itemsize
        self.comm.traffic.add_read(stage, lambda: size)

    def _count(self, stage: str, wanted: Tensor, start: Tensor, length: Tensor, x: Tensor) -> None:
        """Note the bytes of wanted rows; on the device until somebody asks."""
        row = x.shape[2] * x.itemsize
        self.comm.traffic.add_read(stage, lambda: int((torch.where(start >= 0, length, 0) * wanted).sum()) * row)
