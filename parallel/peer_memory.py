"""Memory that every rank of a group reads directly: torch's symmetric memory on GPUs, a file in memory for CPU tensors.

Both need all ranks on one host. A buffer belongs to a group and a purpose, is kept from call to call and grows when a call
needs more, so that ranks set it up together only rarely.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .comm import CommGroup

ALIGNMENT = 256
"""Pieces of a buffer begin at multiples of so many bytes."""
GROWTH = 1.25
"""A buffer that has to grow becomes at least so many times as large."""
_TEXT_BYTES = 512
_MANY = 1 << 62


@dataclass
class PeerMemory:
    """A buffer of equal size on every rank of a group.

    Attributes:
        buffers: uint8 `[bytes]` of every rank, readable from here; this rank's own among them.
        handle: torch's handle of the symmetric memory, None on the CPU.
        own: what it is the handle of.
        timeout_ms: of the group.
        turns: how often a half of the buffer was given out to be written, for those who take its halves in turn.
        free: after this event every rank has read what was written in the turn before the last.
        counts: int64 `[2, P]` on the host, for the users: what the device last wrote there; large at first.
    """

    buffers: list[Tensor]
    counts: Tensor
    handle: Any = None
    own: Tensor | None = None
    timeout_ms: int = 0
    turns: int = 0
    free: torch.cuda.Event | None = None

    def meet(self, comm: CommGroup, stage: str) -> None:
        """What follows on the current stream comes after what every rank has enqueued before it met.

        A kernel of symmetric memory, which ends the process's work on the GPU with an error where a rank does not come
        within the group's timeout; on the CPU an all-gather of one byte, counted as `stage`.
        """
        if self.handle is not None:
            self.handle.barrier(channel=0, timeout_ms=self.timeout_ms)
        else:
            comm.all_gather(torch.zeros(1, dtype=torch.uint8), stage).wait()

    @property
    def half(self) -> int:
        """Where the second half begins, in bytes."""
        return self.buffers[0].numel() // (2 * ALIGNMENT) * ALIGNMENT

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of `shape` in the buffer of `rank` from byte `offset` on."""
        size = prod(shape) * dtype.itemsize
        return self.buffers[rank][offset : offset + size].view(dtype).view(shape)


_memories: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[torch.device, str], PeerMemory]] = (
    weakref.WeakKeyDictionary()
)
_can_share: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, bool]] = weakref.WeakKeyDictionary()


def aligned(size: int) -> int:
    """`size` bytes rounded up to `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@lru_cache(maxsize=1)
def host() -> str:
    """What is the same for processes that can share memory, and different on other hosts of the same name and in other
    containers: name, boot, and namespace of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    return f"{platform.node()} ({boot}-{namespace})"


def kept_bytes(group: dist.ProcessGroup | None = None) -> int:
    """Bytes of this rank's buffers for `group` (None: the default one), which live as long as the group. Torch's own count of
    GPU memory does not have them."""
    memories = _memories.get(distributed_c10d._get_default_group() if group is None else group, {})
    return sum(memory.buffers[0].numel() for memory in memories.values())


def peer_memory(comm: CommGroup, device: torch.device, purpose: str, size: int) -> PeerMemory:
    """The group's buffer of at least `size` bytes for `purpose`; set up together where there is none so large yet.

    Args:
        comm: the group. All its ranks ask alike.
        device: where the buffer is.
        purpose: what tells buffers of one group apart.
        size: bytes.

    Raises:
        RuntimeError: the ranks cannot read each other's memory, or one did not take part.
    """
    group = _group(comm)
    memories = _memories.setdefault(group, {})
    memory = memories.get((device, purpose))
    if memory is not None and memory.buffers[0].numel() >= size:
        return memory
    quiet = CommGroup(comm.group, comm.size)  # set-up is not traffic of the call that happens to need it
    if memory is not None:
        _meet(quiet, device)  # nobody reads the old buffer any more
        size = max(size, int(memory.buffers[0].numel() * GROWTH))
        del memory, memories[device, purpose]
    size = aligned(max(size, 1))
    # Whether or not this call is in inference mode, others that are not will write to the memory.
    with _explained(comm), torch.inference_mode(False):
        memory = _symmetric(group, comm.size, device, size) if device.type == "cuda" else _shared_file(quiet, size)
    memories[device, purpose] = memory
    return memory


def can_share(comm: CommGroup, device: torch.device) -> bool:
    """Whether the ranks of a group can read each other's GPU memory; found out together at the first call and kept.

    They can where all are on one host, each sees the GPUs of the others and may access them, and symmetric memory works.
    """
    known = _can_share.setdefault(_group(comm), {})
    if device not in known:
        quiet = CommGroup(comm.group, comm.size)
        known[device] = _all(quiet, device, _reaches_all(quiet, device)) and _all(quiet, device, _tries(quiet, device))
    return known[device]


def _reaches_all(comm: CommGroup, device: torch.device) -> bool:
    mine = f"{host()} {torch.cuda.get_device_properties(device).uuid}"
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for where, uuid in (text.rsplit(" ", 1) for text in _gather_text(comm, device, mine)):
        if where != host() or uuid not in visible:
            return False
        if visible[uuid] != device.index and not torch.cuda.can_device_access_peer(device, visible[uuid]):
            return False
    return True


def _tries(comm: CommGroup, device: torch.device) -> bool:
    try:
        _symmetric(_group(comm), comm.size, device, ALIGNMENT)
    except RuntimeError:
        return False
    return True


def _all(comm: CommGroup, device: torch.device, fact: bool) -> bool:
    """Whether it holds on every rank."""
    mine = torch.full((1,), fact, dtype=torch.uint8, device=device)
    return bool(comm.all_gather(mine, "pull set-up").wait().all())


def _gather_text(comm: CommGroup, device: torch.device, mine: str) -> list[str]:
    """A short text of every rank."""
    text = torch.tensor(list(mine.encode().ljust(_TEXT_BYTES)), dtype=torch.uint8).to(device)
    return [bytes(x).decode().rstrip() for x in comm.all_gather(text, "pull set-up").wait().tolist()]


def _group(comm: CommGroup) -> dist.ProcessGroup:
    return distributed_c10d._get_default_group() if comm.group is None else comm.group


@contextlib.contextmanager
def _explained(comm: CommGroup) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"rank {comm.rank} of {comm.size} could not share memory with the other ranks on {host()}, as comm='pull' "
            f"needs; 'ring', 'fetch' and 'all_gather' do without ({error})"
        ) from error


def _meet(comm: CommGroup, device: torch.device) -> None:
    """Return when all that every rank has enqueued so far is done."""
    for _ in range(2):  # once for this rank's own work, and once for the meeting itself
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        comm.all_gather(torch.zeros(1, dtype=torch.uint8, device=device), "pull set-up").wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _symmetric(group: dist.ProcessGroup, ranks: int, device: torch.device, size: int) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric_memory

    own = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(own, group.group_name)
    buffers = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(ranks)]
    counts = torch.full((2, ranks), _MANY, pin_memory=True)
    timeout = group._get_backend(device).options._timeout
    return PeerMemory(buffers, counts, handle, own, int(timeout.total_seconds() * 1000))


def _shared_file(comm: CommGroup, size: int) -> PeerMemory:
    """A file without a name on every rank, in memory, which the others open through its process."""
    own = os.memfd_create("moba_cp")
    try:
        os.ftruncate(own, size)
        paths = _gather_text(comm, torch.device("cpu"), f"/proc/{os.getpid()}/fd/{own}")
        buffers = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]
        _meet(comm, buffers[0].device)
    finally:
        os.close(own)
    return PeerMemory(buffers, torch.full((2, comm.size), _MANY))
