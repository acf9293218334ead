"""One rank of one version of the package, for `scripts.compare_versions`: it times what standard input asks for.

It runs as a file with another checkout first on PYTHONPATH, so it imports nothing of this repository but the public package, and
calls only what all versions have. Requests and answers are lines of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, moba_attention

HEAD_DIM = {"cuda": 128, "cpu": 16}
MODES = ("forward", "forward_backward")
TIMEOUT = timedelta(minutes=4)
"""After which a rank that waits for one that failed ends."""
PORTION = 1 << 24
"""Elements that are hashed at once."""
FACTOR = 0x1E3779B97F4A7C15
"""2^64 over the golden ratio, without its highest bit so that int64 holds it. Factors of nearby elements differ in many bits."""


def main() -> None:
    """Answer until standard input ends. Arguments: device, rank, number of ranks, file of the store."""
    name, rank, ranks, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    device = torch.device(name, rank) if name == "cuda" else torch.device(name)
    torch.set_num_threads(1)
    if name == "cuda":
        torch.cuda.set_device(device)
    if ranks > 1:
        backend = "nccl" if name == "cuda" else "gloo"
        files = dist.FileStore(store, ranks)
        dist.init_process_group(backend, store=files, rank=rank, world_size=ranks, timeout=TIMEOUT)
    answer({"package": os.path.dirname(moba_cp.__file__)})
    calls: dict[str, dict[str, Callable[[], tuple[Tensor, ...]]]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = json.dumps(request["case"])
        if key not in calls:
            calls = {key: calls_of(request["case"], device, rank, ranks)}  # inputs of one case at a time
        answer(bits(calls[key]) if request["what"] == "bits" else time_modes(calls[key], device, request["seconds"]))
    if ranks > 1:
        dist.destroy_process_group()


def answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def calls_of(
    case: dict[str, Any], device: torch.device, rank: int, ranks: int
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """The layer's forward pass alone, and with its backward pass, on this rank's tokens."""
    layout = SequenceLayout.zigzag([0, case["tokens"]], ranks)
    config = MoBAConfig(case["block_size"], case["topk"])
    generator = torch.Generator(device).manual_seed(0)
    dtype, heads = torch.bfloat16 if device.type == "cuda" else torch.float32, (case["q_heads"], case["kv_heads"])
    drawn = [
        torch.randn(case["tokens"], n, HEAD_DIM[device.type], device=device, dtype=dtype, generator=generator)
        for n in (heads[0], heads[1], heads[1], heads[0])
    ]
    q, k, v, dout = (x if ranks == 1 else layout.shard(x, rank) for x in drawn)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (moba_attention(q, k, v, config, layout=layout, comm=case["comm"]),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = moba_attention(leaves[0], leaves[1], leaves[2], config, layout=layout, comm=case["comm"])
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        return out.detach(), dq, dk, dv

    return {"forward": forward, "forward_backward": forward_backward}


def bits(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> dict[str, str]:
    """Hashes of what a call computes."""
    tensors = dict(zip(("out", "dq", "dk", "dv"), calls["forward_backward"](), strict=True))
    return {name: digest(x) for name, x in tensors.items()}


def digest(x: Tensor) -> str:
    """A hash of a tensor's bits, computed where it is: each element times an odd number of its own, summed modulo 2^64.

    Hashing gigabytes on the host takes minutes.
    """
    whole = x.contiguous().flatten()
    whole = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    total = 0
    for first in range(0, len(whole), PORTION):
        part = whole[first : first + PORTION].long()
        factor = torch.arange(first, first + len(part), device=x.device) * FACTOR | 1
        total += int((part * factor).sum())
    return f"{total % 2**64:016x}"


def time_modes(
    calls: dict[str, Callable[[], tuple[Tensor, ...]]], device: torch.device, seconds: float
) -> dict[str, dict[str, float]]:
    """Milliseconds per call of each mode.

    Returns:
        by mode: `ms`, of calls back to back; `host_ms`, until a call on an idle device returns, the median.
    """
    found = {}
    for mode in MODES:
        call = calls[mode]
        call()
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        count = agreed(max(2, min(50, int(seconds / 2 / (time.perf_counter() - began)))), device)
        host = []
        for _ in range(min(count, 20)):
            start_together(device)
            began = time.perf_counter()
            call()
            host.append(time.perf_counter() - began)
        start_together(device)
        began = time.perf_counter()
        for _ in range(count):
            call()
        wait(device)
        ms = 1e3 * (time.perf_counter() - began) / count
        found[mode] = {"ms": ms, "host_ms": 1e3 * statistics.median(host)}
    return found


def agreed(count: int, device: torch.device) -> int:
    """The least of all ranks' counts."""
    if not dist.is_initialized():
        return count
    least = torch.tensor(count, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def start_together(device: torch.device) -> None:
    if dist.is_initialized():
        dist.barrier()
    wait(device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
