"""What the library keeps from call to call."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .parallel import peer_memory
from .parallel.plan_cache import PLANS


@dataclass(frozen=True)
class KeptMemory:
    """Bytes that this process keeps from call to call.

    Attributes:
        host: plans of the latest layouts, in host memory; at most `plan_cache.MOST_HOST_BYTES` and one plan.
        device: their index tensors on CUDA devices, at most `plan_cache.MOST_DEVICE_BYTES` and one plan. Torch counts them too.
        shared: this rank's buffers that other ranks read, for `comm="pull"`; torch does not count them. They live until
            `moba_cp.parallel.peer_memory.release(group)` or as long as the group.
        captured_host, captured_device: plans and index tensors of layouts whose calls CUDA graphs captured, kept for the life of
            the process. While such a layout is among the latest, it counts in both.
    """

    host: int
    device: int
    shared: int
    captured_host: int = 0
    captured_device: int = 0


def kept_bytes(group: dist.ProcessGroup | DeviceMesh | None = None) -> KeptMemory:
    """What is kept now: plans of all layouts, and the shared buffers of `group` (None: the default group, if there is one).

    Raises:
        TypeError: `group` is no process group.
    """
    plans = PLANS.kept_bytes()
    serves = group is not None or (dist.is_available() and dist.is_initialized())
    shared = peer_memory.kept_bytes(group) if serves else 0
    captured = PLANS.bytes_for_good()
    return KeptMemory(plans.host, plans.device, shared, captured.host, captured.device)
