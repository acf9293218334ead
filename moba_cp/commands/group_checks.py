"""What the ranks that torchrun started find out together for `moba-cp doctor`."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import MoBAConfig, SequenceLayout, moba_attention
from ..parallel.comm import CommGroup
from ..parallel.peer_memory import PeerMemory, can_share, peer_memory, release
from ..parallel.topology import topology_of
from .checks import Finding, seconds

TIMEOUT = timedelta(seconds=60)
HEAD_DIM = 128


def join() -> torch.device:
    """Join the process group, over NCCL where there is a GPU per local rank; this rank's device."""
    local, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.device_count() >= here:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
        return device
    dist.init_process_group("gloo", timeout=TIMEOUT)
    return torch.device("cpu")


def leave() -> None:
    """End the process group."""
    dist.destroy_process_group()


def group_findings(device: torch.device, tokens: int, heads: tuple[int, int], size: int) -> list[Finding]:
    """Nodes, shared memory, speed of an all-to-all and of reading a peer's memory, and what `auto` chooses.

    Args:
        device: of this rank.
        tokens, heads: tokens per rank, q and kv heads of the call that `auto` is asked about. It is made on GPUs; without
            them a call of few tokens shows that ranks work together.
        size: bytes of the transfers that are timed.
    """
    comm = CommGroup(None, dist.get_world_size())
    found = []
    if torch.cuda.is_available() and device.type == "cpu":
        here = os.environ["LOCAL_WORLD_SIZE"]
        text = f"{torch.cuda.device_count()} GPUs for {here} ranks of this host; these ranks use the CPU"
        found.append(Finding("problem", "GPUs", text, "torchrun --nproc-per-node <number of GPUs>"))
    nodes = topology_of(comm, device).nodes
    per_node = sorted({nodes.count(node) for node in nodes})
    of_node = "/".join(map(str, per_node))
    found.append(
        Finding("ok", "ranks", f"{comm.size} over {dist.get_backend()}, {len(set(nodes))} node(s) of {of_node}")
    )
    if len(per_node) > 1:
        found.append(
            Finding(
                "note",
                "nodes",
                f"unequal: {of_node} ranks",
                "heads are split best over nodes with equal numbers of ranks",
            )
        )
    if comm.size == 1:
        return [*found, Finding("note", "auto", "one rank: nothing moves", "start several ranks")]
    found.append(_all_to_all(device, comm.size, size))
    found += _sharing(comm, device, size)
    found.append(_automatic(device, comm.size, tokens, heads))
    return found


def _all_to_all(device: torch.device, ranks: int, size: int) -> Finding:
    """GB/s that a rank receives from the others in an all-to-all of `size` bytes per rank (at most 8 MiB on the CPU)."""
    size = min(size, 8 << 20) if device.type == "cpu" else size
    x = torch.empty(size // ranks * ranks, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    taken = torch.tensor(seconds(lambda: dist.all_to_all_single(y, x), device), device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    speed = x.numel() * (ranks - 1) / ranks / taken.item() / 1e9
    return Finding("ok", "all-to-all", f"each rank receives {speed:.3g} GB/s")


def _sharing(comm: CommGroup, device: torch.device, size: int) -> list[Finding]:
    """Whether ranks read each other's memory, and how fast."""
    if device.type != "cuda":
        return [Finding("note", "symmetric memory", "is for GPUs; ranks on the CPU share files in memory")]
    if not can_share(comm, device):
        cure = (
            "needs one host, every GPU visible to every rank (no CUDA_VISIBLE_DEVICES per rank) and peer access; try "
            "TORCH_SYMM_MEM_DISABLE_MULTICAST=1"
        )
        return [Finding("note", "symmetric memory", 'not available between all ranks: comm="pull" will not work', cure)]
    memory = peer_memory(comm, device, "doctor", size)
    taken = torch.tensor(_seconds_to_read(memory, (comm.rank + 1) % comm.size, size, device), device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    del memory
    release()
    return [
        Finding(
            "ok", "symmetric memory", f"works; each rank reads its neighbour's at {size / taken.item() / 1e9:.3g} GB/s"
        )
    ]


def _seconds_to_read(memory: PeerMemory, rank: int, size: int, device: torch.device) -> float:
    """Seconds of a copy of `size` bytes out of the memory of `rank`."""
    mine = torch.empty(size, dtype=torch.uint8, device=device)
    theirs = memory.view(rank, 0, (size,), torch.uint8)
    return seconds(lambda: mine.copy_(theirs), device)


def _automatic(device: torch.device, ranks: int, tokens: int, heads: tuple[int, int]) -> Finding:
    """What `auto` chooses for a call of these sizes, by making it."""
    q_heads, kv_heads = heads
    tokens = tokens if device.type == "cuda" else min(tokens, 256)
    config = MoBAConfig(512 if device.type == "cuda" else 32, 8)
    layout = SequenceLayout.zigzag([0, tokens * ranks], ranks)
    held = layout.local_tokens(dist.get_rank())
    q, k, v = (
        torch.randn(held, n, HEAD_DIM, device=device, dtype=torch.bfloat16) for n in (q_heads, kv_heads, kv_heads)
    )
    with torch.no_grad():
        _, report = moba_attention(q, k, v, config, layout=layout, return_report=True)
    what = f"{tokens:,} tokens per rank, {q_heads}/{kv_heads} heads: {report.transport}"
    return Finding("ok", "auto", f"{what} ({report.reason})")
