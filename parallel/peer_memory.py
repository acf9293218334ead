"""Memory that every rank of a group reads directly: torch's symmetric memory on GPUs, a file in memory for CPU tensors.

Both need all ranks on one host. A buffer belongs to a group and a purpose, is kept from call to call and grows when a call
needs more, so that ranks set it up together only rarely.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .comm import CommGroup, process_group
from .subgroups import sub_groups_of, timeout_of
from .topology import gather_text, host

T = TypeVar("T")

ALIGNMENT = 256
"""Alignment of sub-buffers, in bytes."""
GROWTH = 1.25
"""Growth factor of a buffer that is too small."""
_SET_UP = "pull set-up"
_MANY = 1 << 62


@dataclass
class PeerMemory:
    """A buffer of equal size on every rank of a group.

    Attributes:
        buffers: uint8 `[bytes]` of every rank, readable from here; this rank's own among them.
        wanted_of, wanted_by: int64 `[P]` on the host, for `pull`: tokens that this rank wanted of each, and each of it,
            as far as the device has written them there; large at first.
        handle: torch's handle of the symmetric memory, None on the CPU.
        own: what it is the handle of.
        timeout_ms: of the group.
        uses: how often `next_half` was called.
    """

    buffers: list[Tensor]
    wanted_of: Tensor
    wanted_by: Tensor
    handle: Any = None
    own: Tensor | None = None
    timeout_ms: int = 0
    uses: int = 0

    def next_half(self) -> int:
        """Offset of the half of the buffer that is used next, for buffers whose halves are written alternately.

        If every use is written, passes a barrier and is read on one stream, the half is free: whoever has passed the barrier of
        the last use has read what came before it.
        """
        self.uses += 1
        return self.uses % 2 * (self.buffers[0].numel() // 2)

    def barrier(self, comm: CommGroup, stage: str) -> None:
        """What follows on the current stream comes after what every rank has enqueued before its barrier.

        A kernel of symmetric memory, which ends the process's work on the GPU with an error where a rank does not come
        within the group's timeout; on the CPU an all-gather of one byte, counted as `stage`.
        """
        if self.handle is not None:
            self.handle.barrier(channel=0, timeout_ms=self.timeout_ms)
        else:
            comm.all_gather(torch.zeros(1, dtype=torch.uint8, device="cpu"), stage).wait()

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


def kept_bytes(group: dist.ProcessGroup | DeviceMesh | None = None) -> int:
    """Bytes of this rank's buffers for `group` (None: the default one) and the groups made of its ranks. They live until
    `release` or as long as the group. Torch's own count of GPU memory does not have them."""
    memories = [memory for one in _with_sub_groups(group) for memory in _memories.get(one, {}).values()]
    return sum(memory.buffers[0].numel() for memory in memories)


def release(group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
    """Give the buffers of `group` (None: the default one) and of the groups made of its ranks back; all its ranks call alike. The
    next call that needs buffers sets up new ones."""
    for one in _with_sub_groups(group):
        memories = _memories.get(one, {})
        comm = CommGroup(one, dist.get_world_size(one))
        for device in {device for device, _ in memories}:
            _synchronize(comm, device)
        memories.clear()


def _with_sub_groups(group: dist.ProcessGroup | DeviceMesh | None) -> list[dist.ProcessGroup]:
    whole = process_group(group)
    return [whole, *sub_groups_of(whole)]


def peer_memory(comm: CommGroup, device: torch.device, purpose: str, size: int) -> PeerMemory:
    """The group's buffer of at least `size` bytes for `purpose`; set up together where there is none so large yet.

    Args:
        comm: the group. All its ranks ask alike.
        device: where the buffer is.
        purpose: what tells buffers of one group apart.
        size: bytes.

    Raises:
        RuntimeError: on every rank, one of them has too little memory; or the ranks cannot read each other's memory.
    """
    memories = _memories.setdefault(process_group(comm.group), {})
    memory = memories.get((device, purpose))
    if memory is not None and memory.buffers[0].numel() >= size:
        return memory
    quiet = CommGroup(comm.group, comm.size)  # set-up is not traffic of the call that happens to need it
    if memory is not None:
        size = max(size, int(memory.buffers[0].numel() * GROWTH))
        _synchronize(quiet, device)  # nobody reads the old buffer any more
        del memory, memories[device, purpose]
        _synchronize(quiet, device)  # and nobody has it mapped
    # Whether or not this call is in inference mode, others that are not will write to the memory.
    with torch.inference_mode(False):
        set_up = _symmetric if device.type == "cuda" else _file_in_memory
        memories[device, purpose] = set_up(quiet, device, aligned(max(size, 1)))
    return memories[device, purpose]


def can_share(comm: CommGroup, device: torch.device) -> bool:
    """Whether the ranks of a group can read each other's GPU memory; found out together at the first call and kept.

    They can where all are on one host, each sees the GPUs of the others and may access them, and symmetric memory works. A
    rank that sees its own GPU alone (`CUDA_VISIBLE_DEVICES`) cannot tell.
    """
    known = _can_share.setdefault(process_group(comm.group), {})
    if device not in known:
        quiet = CommGroup(comm.group, comm.size)
        known[device] = _all(quiet, device, _reaches_all(quiet, device)) and _all(quiet, device, _tries(quiet, device))
    return known[device]


def _reaches_all(comm: CommGroup, device: torch.device) -> bool:
    mine = f"{host()} {torch.cuda.get_device_properties(device).uuid}"
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    for where, uuid in (text.rsplit(" ", 1) for text in gather_text(comm, device, mine, _SET_UP)):
        if where != host() or uuid not in visible:
            return False
        if visible[uuid] != device.index and not torch.cuda.can_device_access_peer(device, visible[uuid]):
            return False
    return True


def _tries(comm: CommGroup, device: torch.device) -> bool:
    try:
        _symmetric(comm, device, ALIGNMENT)
    except RuntimeError:
        return False
    return True


def _symmetric(comm: CommGroup, device: torch.device, size: int) -> PeerMemory:
    import torch.distributed._symmetric_memory as symmetric_memory

    group = process_group(comm.group)

    def allocate() -> Tensor:
        torch.cuda.empty_cache()  # this memory comes from the driver, which does not know what torch keeps unused
        return symmetric_memory.empty(size, dtype=torch.uint8, device=device)

    def map_all() -> tuple[Any, list[Tensor]]:
        handle = symmetric_memory.rendezvous(own, group.group_name)
        return handle, [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(comm.size)]

    own = _together(comm, device, allocate)
    handle, buffers = _together(comm, device, map_all)
    wanted_of, wanted_by = torch.full((2, comm.size), _MANY, device="cpu", pin_memory=True)
    return PeerMemory(buffers, wanted_of, wanted_by, handle, own, int(timeout_of(group, device).total_seconds() * 1000))


def _file_in_memory(comm: CommGroup, device: torch.device, size: int) -> PeerMemory:
    """A file without a name on every rank, which the others open through its process."""
    files: list[int] = []

    def make() -> None:
        files.append(os.memfd_create("moba_cp"))
        os.ftruncate(files[0], size)

    def open_all() -> list[Tensor]:
        return [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths]

    try:
        _together(comm, device, make)
        paths = gather_text(comm, device, f"/proc/{os.getpid()}/fd/{files[0]}", _SET_UP)
        buffers = _together(comm, device, open_all)
    finally:
        for file in files:  # all have it open
            os.close(file)
    wanted_of, wanted_by = torch.full((2, comm.size), _MANY, device="cpu")
    return PeerMemory(buffers, wanted_of, wanted_by)


def _together(comm: CommGroup, device: torch.device, action: Callable[[], T]) -> T:
    """What `action` returns, if it works on every rank.

    Raises:
        RuntimeError: on every rank, it failed on one.
    """
    failure: Exception | None = None
    try:
        result = action()
    except (RuntimeError, OSError) as error:
        failure = error
    if not _all(comm, device, failure is None):
        raise RuntimeError(
            f"rank {comm.rank} of {comm.size} could not share memory with the other ranks on {host()}, as comm='pull' "
            f"needs; 'ring', 'fetch' and 'all_gather' do without ({failure or 'another rank failed'})"
        ) from failure
    return result


def _all(comm: CommGroup, device: torch.device, fact: bool) -> bool:
    """Whether it holds on every rank; knows when every rank has come here."""
    mine = torch.full((1,), fact, dtype=torch.uint8, device=device)
    return bool(comm.all_gather(mine, _SET_UP).wait().all())


def _synchronize(comm: CommGroup, device: torch.device) -> None:
    """Return when all that every rank has enqueued so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _all(comm, device, True)
