"""Run a function on every rank of an NCCL process group: a GPU for each where there are enough, else ranks share them.

NCCL refuses two ranks of one host on one GPU. With a host ID of its own, each counts as a host, and messages go through sockets.
Results are the same. Ranks that share a GPU cannot read each other's memory: `pull`, and `a2a` through memory, need several GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scripts.harness.training import hosted_store


def group_size() -> int:
    """Ranks of a test that wants four: two where there are two or three GPUs, so that each rank has its own."""
    return 2 if torch.cuda.device_count() in (2, 3) else 4


def share_gpus(size: int) -> bool:
    """Whether `size` ranks have to share GPUs."""
    return torch.cuda.device_count() < size


def run_gpu_ranks(size: int, function: Callable[..., None], *args: Any) -> None:
    """Call `function(rank, size, *args)`, a module-level function, on each of `size` ranks, and raise what one of them raises."""
    store, variables = hosted_store(size, 600.0)  # noqa: RUF059 # lives while its name does
    mp.spawn(_on_rank, (size, variables, function, args), nprocs=size)


def _on_rank(
    rank: int, size: int, variables: dict[str, str], function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.environ |= variables | {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    if share_gpus(size):
        os.environ |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=device)
    function(rank, size, *args)
    dist.destroy_process_group()
