"""Collectives of one context-parallel group: counted, named, asynchronous.

Every call returns a `Pending`; `wait` gives the result and, where a peer died or stalled, an error that names what was waited
for. Tensors travel as bytes, so every dtype travels over every backend. On CUDA, communication
runs beside the work of the caller's stream; `SideStream` puts other work there too.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh


@dataclass
class StageTraffic:
    """What one rank sent and received in one stage, in payload bytes; its own share of a collective does not count, and
    what other ranks read out of its memory is received there but not sent here. `between_bytes` are those of
    `received_bytes` that came from ranks of other nodes, counted where the call knows the nodes: calls that split heads, and
    calls with a report."""

    collectives: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    between_bytes: int = 0


@dataclass
class Traffic:
    """Traffic of one call by stage name, filled as collectives are started (also by the backward pass)."""

    _stages: dict[str, StageTraffic] = field(default_factory=dict)
    _reads: list[tuple[str, Callable[[], int]]] = field(default_factory=list, repr=False, compare=False)

    def add(self, stage: str, sent: int, received: int, between: int = 0) -> None:
        """Count one collective; `between` of the bytes received came from other nodes."""
        entry = self._stages.setdefault(stage, StageTraffic())
        entry.collectives += 1
        entry.sent_bytes += sent
        entry.received_bytes += received
        entry.between_bytes += between

    def add_read(self, stage: str, received: Callable[[], int]) -> None:
        """Count what this rank reads from other ranks' memory; no rank counts it as sent. `received` gives the bytes and is
        called when the traffic is read."""
        self._stages.setdefault(stage, StageTraffic())
        self._reads.append((stage, received))

    @property
    def stages(self) -> dict[str, StageTraffic]:
        """By stage. Waits for the device if the bytes of a read are known there only."""
        for stage, received in self._reads:
            self._stages[stage].received_bytes += received()
        self._reads.clear()
        return self._stages

    def __getstate__(self) -> dict[str, object]:
        return {"_stages": self.stages, "_reads": []}

    @property
    def received_bytes(self) -> int:
        """Received from other ranks, over all stages."""
        return sum(s.received_bytes for s in self.stages.values())

    @property
    def between_bytes(self) -> int:
        """Of these, from other nodes."""
        return sum(s.between_bytes for s in self.stages.values())

    @property
    def sent_bytes(self) -> int:
        """Sent to other ranks, over all stages."""
        return sum(s.sent_bytes for s in self.stages.values())

    @property
    def collectives(self) -> int:
        """Number of collectives, over all stages."""
        return sum(s.collectives for s in self.stages.values())


class Pending:
    """A collective under way."""

    def __init__(self, works: Sequence[dist.Work], result: Tensor, keep: object, describe: str) -> None:
        self._works, self._result, self._keep, self._describe = works, result, keep, describe

    def wait(self) -> Tensor:
        """The result, ready for work enqueued on the current stream from here on.

        Raises:
            RuntimeError: a peer did not take part within the group's timeout, or is gone.
        """
        with named_error(self._describe):
            for work in self._works:
                work.wait()
        for x in (self._result, self._keep):  # may have been made on another stream, which has not waited
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(torch.cuda.current_stream(x.device))
        self._works, self._keep = (), None
        return self._result


class CommGroup:
    """One rank's view of a context-parallel group, with the traffic of one call.

    It does not keep the process group alive. The graph of an output holds this object, and a process that exits while a gloo
    group is alive may be aborted, even after `destroy_process_group`.

    Attributes:
        rank, size: this rank in the group, and its size.
        traffic: counts what is sent and received.
        nodes: node of each rank where it is known, else empty; see `topology`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        size: int,
        traffic: Traffic | None = None,
        nodes: tuple[int, ...] = (),
    ) -> None:
        self._group, self.size, self.nodes = weakly(group), size, nodes
        self.rank = dist.get_rank(group) if size > 1 else 0
        self.traffic = Traffic() if traffic is None else traffic

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None for a group of one, or the default one.

        Raises:
            RuntimeError: it was destroyed.
        """
        return self._group()

    def _elsewhere(self, rank: int) -> bool:
        """Whether `rank` is known to be on another node."""
        return bool(self.nodes) and self.nodes[rank % self.size] != self.nodes[self.rank]

    def source(self, step: int) -> int:
        """The rank whose part this one works on at a step, where all go round the ring; `source(-step)` works on this one's."""
        return (self.rank - step) % self.size

    def all_gather(self, x: Tensor, stage: str) -> Pending:
        """`x` of every rank (equal shapes): `[P, *x.shape]`."""
        x = x.contiguous()
        if self.size == 1:
            return Pending([], x[None], None, "")
        result = x.new_empty(self.size, *x.shape)
        n = _bytes(x).numel()
        between = n * sum(map(self._elsewhere, range(self.size)))
        self.traffic.add(stage, n * (self.size - 1), n * (self.size - 1), between)
        describe = self._waited_for("all-gather", stage)
        with named_range(x.device, stage, n * (self.size - 1)), named_error(describe):
            work = start_all_gather(_bytes(result), _bytes(x), self.group)
        return Pending([work], result, x, describe)

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], receive_rows: Sequence[int], stage: str) -> Pending:
        """Rows of `x` `[sum(send_rows), ...]` to each rank in turn; the rows received, in order of source rank."""
        x = x.contiguous()
        result = x.new_empty(sum(receive_rows), *x.shape[1:])
        row = x.itemsize * x[0:0].new_empty(x.shape[1:]).numel()
        send, receive = [n * row for n in send_rows], [n * row for n in receive_rows]
        between = sum(n for rank, n in enumerate(receive) if self._elsewhere(rank))
        self.traffic.add(stage, sum(send) - send[self.rank], sum(receive) - receive[self.rank], between)
        describe = self._waited_for("all-to-all", stage)
        with named_range(x.device, stage, sum(receive) - receive[self.rank]), named_error(describe):
            work = dist.all_to_all_single(_bytes(result), _bytes(x), receive, send, group=self.group, async_op=True)
        return Pending([work], result, x, describe)

    def shift(self, x: Tensor, result: Tensor, stage: str) -> Pending:
        """Send `x` to the next rank of the ring and receive `result` from the one before; what is empty does not travel."""
        x, operations = x.contiguous(), []
        if x.numel():
            operations.append(dist.P2POp(dist.isend, _bytes(x), self._global(self.rank + 1), self.group))
        if result.numel():
            operations.append(dist.P2POp(dist.irecv, _bytes(result), self._global(self.rank - 1), self.group))
        self.traffic.add(stage, x.nbytes, result.nbytes, result.nbytes if self._elsewhere(self.rank - 1) else 0)
        describe = self._waited_for("ring send and receive", stage)
        with named_range(result.device, stage, result.nbytes), named_error(describe):
            works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, result, x, describe)

    def _global(self, rank: int) -> int:
        rank %= self.size
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _waited_for(self, name: str, stage: str) -> str:
        return f"rank {self.rank} of {self.size} waited for the {name} of {stage}"


def process_group_of(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group of a `DeviceMesh` of one dimension; anything else as it is, for `check_group` to judge.

    Raises:
        ValueError: this rank is not in the mesh. The ranks that are do not wait for it.
    """
    if isinstance(group, DeviceMesh) and group.ndim == 1:
        if group.get_coordinate() is None:
            raise ValueError(
                f"group must be a DeviceMesh that this rank belongs to, got {group!r} on rank {dist.get_rank()}"
            )
        return group.get_group()
    return group  # type: ignore[return-value]


def weakly(group: dist.ProcessGroup | None) -> Callable[[], dist.ProcessGroup | None]:
    """A function that gives `group` and does not keep it alive; it raises a RuntimeError where the group was destroyed."""
    if group is None:
        return lambda: None
    kept, name = weakref.ref(group), group.group_name

    def found() -> dist.ProcessGroup:
        if (alive := kept()) is None:
            raise RuntimeError(f"process group {name!r} of this call was destroyed")
        return alive

    return found


def check_group(group: object) -> None:
    """It is a process group, or None for the default one."""
    if isinstance(group, DeviceMesh):
        raise ValueError(f"group must be a DeviceMesh of one dimension, such as mesh['cp'], got {group!r}")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed ProcessGroup this rank belongs to, got {group!r}")


def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """`group`, that of a mesh of one dimension, or the default one."""
    group = process_group_of(group)
    check_group(group)
    return distributed_c10d._get_default_group() if group is None else group


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """The backend of each type of device that `group` (None: the default one) serves; empty where torch does not know."""
    try:
        served = dist.get_backend_config(group)
    except (AssertionError, TypeError):
        return {}
    return dict(entry.split(":") for entry in served.split(","))


@contextlib.contextmanager
def named_error(describe: str) -> Iterator[None]:
    """A RuntimeError of a collective says what was waited for, also where a peer is found gone when it starts."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{describe}: it did not come ({error})") from error


class SideStream:
    """A stream beside the caller's, one for each purpose; does nothing for CPU tensors."""

    _streams: dict[tuple[int, str], torch.cuda.Stream] = {}

    def __init__(self, device: torch.device, purpose: str) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            if (index, purpose) not in self._streams:
                self._streams[index, purpose] = torch.cuda.Stream(device, priority=-1)
            self._stream = self._streams[index, purpose]
            self._device, self._main = device, torch.cuda.current_stream(device)
            self._ready = torch.cuda.Event()

    def mark(self) -> None:
        """Work on the side stream may use what the caller's stream has produced so far."""
        if self._stream is not None:
            self._ready.record(self._main)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Enqueue on the side stream, after the last `mark`."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(self._ready)
        with self.alone():
            yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Enqueue on the side stream without waiting for the caller's: what runs there uses nothing of the caller's."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def done(self) -> torch.cuda.Event | None:
        """What `join` waits for: all that is enqueued on the side stream so far."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, done: torch.cuda.Event | None, *made: Tensor) -> None:
        """The current stream waits for `done`; it will use `made`, which the side stream allocated."""
        if done is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(done)
            for tensor in made:
                tensor.record_stream(current)

    def uses(self, *tensors: Tensor) -> None:
        """The side stream reads `tensors`, which the caller's stream allocated."""
        if self._stream is not None:
            for tensor in tensors:
                tensor.record_stream(self._stream)


@contextlib.contextmanager
def named_range(device: torch.device, stage: str, received_bytes: int) -> Iterator[None]:
    """An NVTX range around the start of a collective, with the bytes this rank receives; nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.nvtx.range_push(f"moba_cp {stage} {received_bytes} B")
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def start_all_gather(result: Tensor, x: Tensor, group: dist.ProcessGroup | None) -> dist.Work:
    """Flat `x` of every rank into flat `result`, under the name this torch version has for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(result, x, group=group, async_op=True)


class HostCopy:
    """A small device tensor on its way to the host, from the current stream; a CPU tensor is there already."""

    def __init__(self, x: Tensor) -> None:
        self._host, self._copied = x, None
        if x.device.type != "cpu":
            self._host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> Tensor:
        """The tensor on the host; waits for the copy alone, not for work enqueued after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host


def _bytes(x: Tensor) -> Tensor:
    """A contiguous tensor as flat bytes."""
    return x.view(-1).view(torch.uint8)
