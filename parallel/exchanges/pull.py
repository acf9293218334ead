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

In backward the gradients of a part stay where they are computed, in a slot of a second shared buffer; when all ranks have
computed a step, each reads those of its own blocks, and the next step is computed into another slot. There are two slots; or P,
where several chunks of query rows add to the gradients of all parts before any is read. Slots are used in rotation. A slot is
free once every rank has passed the barrier of a later step than the one that used it last: whoever passes a barrier has read
what came before it. Both buffers are kept from call to call: a rank's keys and values of all heads, and the slots, each as
large as the gradients of one part of one range of heads.

A part of which most pairs are wanted is read whole, by copy engines, which leave the multiprocessors to attention. Each rank
decides that for itself, from the latest call whose counts have reached the host: it changes what is moved, not what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..comm import CommGroup, SideStream
from ..home import HomeBlocks, home_start
from ..peer_memory import aligned, peer_memory
from ..rows import add_wanted, copy_wanted, pack
from ..wanted import home_and_length
from .base import Arrived, Part, PartGradient, Route, Streaming, Visit, Work, unpack

WHOLE_SHARE = 0.5
"""A part is read whole where at least this share of its bytes is wanted. A copy engine is faster than the kernel that reads
wanted pairs (366 against about 300 GB/s over NVLink) and costs attention beside it nothing visible."""


@dataclass
class PullVisit(Visit):
    """Also: the read under way (part, packed tensor, event), the slots of its gradients by step, and the sum of gradients
    read so far."""

    reading: tuple[Part, Tensor, torch.cuda.Event | None] | None = None
    slots: dict[int, int] = field(default_factory=dict)
    arrived: Tensor | None = None


class Pull(Streaming):
    """See the module."""

    name = "pull"
    summary = "selected blocks, read out of the other GPUs' memory; one host"
    same_host = True

    def __init__(self, home: HomeBlocks, comm: CommGroup, work: Work) -> None:
        super().__init__(home, comm, work)
        self._plan = home.plan.plan
        self._kv_heads, self._width = home.k.shape[1], home.k.shape[2] + home.v.shape[2]
        self._most = int(self._plan.home_tokens.max())
        self._masks_at = aligned(self._most * self._kv_heads * self._width * home.k.itemsize)
        size = self._masks_at + self._kv_heads * len(self._plan.blocks)
        self._memory = peer_memory(comm, home.k.device, "keys", size)
        self._peers_want: list[Tensor] = []
        self._begun = False
        self._steps = 0
        self._free: torch.cuda.Event | None = None
        self._side = SideStream(home.k.device, "pull")
        self._side.mark()

    def route(self, wanted: Callable[[], Tensor], reason: str) -> Route:
        mine = wanted().view(torch.uint8)
        self._publish(mine)
        return Route(self.name, reason, self.walks, mine=mine, once_bytes=self.once_bytes)

    def resume(self, route: Route) -> None:
        assert route.mine is not None
        self._publish(route.mine)

    def _publish(self, wanted: Tensor) -> None:
        """Put keys and values into shared memory, and which pairs the local queries selected: uint8 `[Hkv, n_blocks]`.

        The former runs beside what was enqueued since this object was made.
        """
        self._wanted, rank = wanted, self.comm.rank
        with self._side.use():
            self._barrier()  # every rank has read what the last call left there
            for heads in self.work.ranges:
                local = self.local_part(heads)
                pack(local.k, local.v, self._keys(rank, heads))
        self._side.mark()
        with self._side.use():
            self._mask(rank).copy_(wanted)
            self._barrier()
            home, length = home_and_length(self._plan, wanted.device)
            tokens = torch.zeros(self.comm.size, dtype=torch.int64, device=wanted.device)
            tokens.index_add_(0, home, length * wanted.sum(0))
            self._memory.wanted_of.copy_(tokens, non_blocking=True)
        self._side.uses(self.home.k, self.home.v, wanted)

    def start(self, heads: slice) -> PullVisit:
        visit = PullVisit(heads)
        self._read(visit, 1)
        return visit

    def walk(self, visit: Visit) -> Iterator[tuple[Part, Tensor]]:
        assert isinstance(visit, PullVisit)
        if visit.reading is None:
            self._read(visit, 1)
        for step in range(1, self.comm.size):
            assert visit.reading is not None
            part, packed, done = visit.reading
            visit.reading = None
            if step + 1 < self.comm.size:
                self._read(visit, step + 1)
            self._side.join(done, packed)
            yield part, packed

    def backward(self, visit: Visit, chunk: int, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        assert isinstance(visit, PullVisit)
        if visit.reading is None and not visit.gradients:
            self._read(visit, 1)
        local = PartGradient(self.local_part(visit.heads), dk, dv, chunk > 0)
        # Remote parts first where they are likely to be there: their gradients then travel beside the local part.
        local_first, self._begun = not self._begun, True
        if local_first:
            yield local
        keeps, last = self.keeps(backward=True), chunk + 1 == self.work.chunks
        for step, gradient in enumerate(self.gradients(visit, keeps and not last), start=1):
            yield gradient
            if last or not keeps:
                assert gradient.packed is not None
                self._collect(visit, step)
        if not local_first:
            yield local

    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        assert isinstance(visit, PullVisit)
        arrived, visit.arrived = visit.arrived, None
        assert arrived is not None
        done = self._side.done()

        def finish() -> list[Arrived]:
            self._side.join(done, arrived)
            return [Arrived(arrived)]

        return finish

    def gradient_at(self, visit: Visit, step: int, part: Part, packed: Tensor) -> PartGradient:
        """As every exchange; the buffers are a slot of shared memory."""
        assert isinstance(visit, PullVisit)
        visit.slots[step] = self._next_slot()
        slot = self._gradient_slot(visit.slots[step], self.comm.rank, self.comm.source(step), visit.heads)
        return PartGradient(part, *unpack(slot, self.home.k.shape[2]), False, slot)

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

    def _read(self, visit: PullVisit, step: int) -> None:
        """Start to read the part of one step."""
        heads, source = visit.heads, self.comm.source(step)
        wanted, shared = self._wanted[heads], self._keys(source, heads)
        with self._side.use():
            # Made here: the side stream would not wait for what the caller's stream makes after the last `mark`.
            start = home_start(self._plan, source, wanted.device)
            packed = torch.empty_like(shared)
            if self._whole(self._memory.wanted_of, source, source):
                packed.copy_(shared)
                self._count_whole("pull keys and values", packed)
            else:
                length = home_and_length(self._plan, wanted.device)[1]
                copy_wanted(shared, packed, wanted, start, length, self._plan.most_rows)
                self._count("pull keys and values", wanted, start, length, packed)
            done = self._side.done()
        visit.reading = (self.part_of(packed, source, heads), packed, done)

    @property
    def _slots(self) -> int:
        """Slots for gradients: see the module."""
        return self.comm.size if self.work.chunks > 1 and self.keeps(backward=True) else 2

    def _next_slot(self) -> int:
        """The slot that is written next; free from here on for work of the caller's stream.

        The first ones are: the caller's stream has waited for keys and values, which came after the barriers of `_publish`,
        and so after all that ranks have read in earlier calls.
        """
        if self._steps >= self._slots:
            self._side.join(self._free)
        self._steps += 1
        return self._steps % self._slots

    def _gradient_slot(self, slot: int, rank: int, source: int, heads: slice) -> Tensor:
        """What `rank` computes for the keys and values at home on `source`: `[home tokens there, H, D + Dv]`."""
        dtype = self.work.gradient_dtype
        size = aligned(self._most * self.work.most_heads * self._width * dtype.itemsize)
        sums = peer_memory(self.comm, self.home.k.device, "gradients", self._slots * size)
        shape = (int(self._plan.home_tokens[source]), heads.stop - heads.start, self._width)
        return sums.view(rank, slot * size, shape, dtype)

    def _collect(self, visit: PullVisit, step: int) -> None:
        """Once every rank has computed the step: add what one of them has for this rank's blocks."""
        rank, peer = self.comm.rank, self.comm.source(-step)
        self._side.mark()
        with self._side.use():
            self._barrier()
            self._free = self._side.done()  # whoever has come here has read all slots of earlier steps
            there = self._gradient_slot(visit.slots[step], peer, rank, visit.heads)
            if not self._peers_want:
                self._learn_what_peers_want()
            if self._whole(self._memory.wanted_by, peer, rank):
                self._count_whole("pull gradients", there)
                came = torch.empty_like(there).copy_(there)
                visit.arrived = came if visit.arrived is None else visit.arrived.add_(came)
            else:
                self._add_wanted(visit, there, peer)

    def _learn_what_peers_want(self) -> None:
        """Copy their masks: a look at one of them there takes microseconds."""
        self._peers_want = [self._mask(r).clone() for r in range(self.comm.size)]
        home, length = home_and_length(self._plan, self.home.k.device)
        mine = torch.where(home == self.comm.rank, length, 0)
        tokens = (torch.stack(self._peers_want).sum(1) * mine).sum(1)
        self._memory.wanted_by.copy_(tokens, non_blocking=True)

    def _add_wanted(self, visit: PullVisit, there: Tensor, peer: int) -> None:
        """Add the pairs that `peer` wanted to what has arrived."""
        wanted, start = self._peers_want[peer][visit.heads], home_start(self._plan, self.comm.rank, there.device)
        length, first = home_and_length(self._plan, there.device)[1], visit.arrived is None
        arrived = torch.empty_like(there) if visit.arrived is None else visit.arrived
        add_wanted(there, arrived, wanted, start, length, self._plan.most_rows, first)
        self._count("pull gradients", wanted, start, length, arrived)
        visit.arrived = arrived

    def _count_whole(self, stage: str, x: Tensor) -> None:
        """Note the bytes of `x`. What is noted may outlive the tensor."""
        size = x.numel() * x.itemsize
        self.comm.traffic.add_read(stage, lambda: size)

    def _count(self, stage: str, wanted: Tensor, start: Tensor, length: Tensor, x: Tensor) -> None:
        """Note the bytes of wanted rows; on the device until somebody asks."""
        row = x.shape[2] * x.itemsize
        self.comm.traffic.add_read(stage, lambda: int((torch.where(start >= 0, length, 0) * wanted).sum()) * row)
