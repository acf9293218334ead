"""Launch configurations of the forward kernels, timed on one chunk of heads as the pipeline would cut it."""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moba_cp import SequenceLayout
from moba_cp.kernels import KVPart, backend_for, configs, merge
from moba_cp.kernels.configs import RowConfig, TileConfig
from moba_cp.kernels.forward import portable
from moba_cp.kernels.gpu import gpu_of
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.pipeline import device_rows

HEAD_DIM = 128


@torch.no_grad()
def sweep(
    options: argparse.Namespace, tokens: int, q_heads: int, kv_heads: int, block_size: int, topk: int
) -> dict[str, Any]:
    """Milliseconds for all heads of each kernel under each launch configuration, and its distance from the shipped one."""
    group = q_heads // kv_heads
    heads = max(1, min(kv_heads, (1 << 30) // (tokens * topk * group * (2 * HEAD_DIM + 4))))
    generator = torch.Generator(device="cuda").manual_seed(options.seed)
    draw = lambda n: torch.randn(  # noqa: E731
        tokens, n, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    q, k, v = draw(heads * group), draw(heads), draw(heads)
    backend = backend_for(q.device, q.dtype)
    plan = rank_plan(home_plan(SequenceLayout.contiguous([0, tokens], 1), block_size), 0)
    rows, blocks = device_rows(plan, q.device), plan.plan.blocks
    start = torch.tensor(blocks.start, dtype=torch.int32, device="cuda")
    length = torch.tensor(blocks.length, dtype=torch.int32, device="cuda")
    selected = backend.select_blocks(
        q, centroids=backend.centroids(k, start=start, block_size=block_size), rows=rows, topk=topk
    )
    part = KVPart(k, v, start.expand(heads, -1), length)
    lists = backend.route(selected, n_blocks=len(blocks), kv_heads=heads, block_size=block_size)
    partials = backend.new_partials(selected, HEAD_DIM, q.dtype)
    shared = (q, part, lists, rows, HEAD_DIM**-0.5, partials)
    gpu = gpu_of(q.device)
    hold = configs.hold_rows(HEAD_DIM, HEAD_DIM, block_size, gpu)
    stream = configs.stream_rows(HEAD_DIM, HEAD_DIM, block_size, gpu)
    shipped = stream or hold
    timer = Timer(kv_heads / heads)
    for tma in [True] if stream else [True, False]:
        choices = {
            "rows": [64, 128],
            "keys": [shipped.keys] if stream else [32, 64, 128],
            "num_warps": [4, 8],
            "num_stages": [2, 3, 4],
            "store": ["", ".cs"],
        }
        run = partial(portable.attend_listed, *shared, stream=stream is not None, tma=tma)
        timer.all("attend" if tma else "attend by pointers", shipped, choices, run, partials.out)
    for tma in [] if stream else [True, False]:
        choices = {"rows": [64, 128], "keys": [32, 64], "num_warps": [4, 8], "num_stages": [2, 3]}
        run = partial(portable.attend_own, *shared, tma=tma)
        timer.all(
            "own" if tma else "own by pointers",
            configs.own_blocks(HEAD_DIM, HEAD_DIM, gpu),
            choices,
            run,
            partials.out,
        )
    backend.attend(*shared)
    out, lse = torch.empty_like(q), backend.new_lse(q)
    choices = {"rows": [8, 16, 32], "num_warps": [1, 2, 4, 8], "num_stages": [1, 2, 3, 4, 5]}
    run_merge = lambda config: merge.merge(partials, selected=selected, out=out, lse=lse, config=config)  # noqa: E731
    timer.all("merge", configs.merge(HEAD_DIM), choices, run_merge, out)
    return {"block_size": block_size, "topk": topk, "launches": timer.found}


class Timer:
    """Times launches, scaled to all heads, and compares what they write with what the shipped launch writes."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.found: list[dict[str, Any]] = []

    def all(
        self,
        kernel: str,
        shipped: TileConfig | RowConfig,
        choices: dict[str, list],
        run: Callable[[Any], None],
        out: Tensor,
    ) -> None:
        """`run` under the shipped launch, then under every combination of `choices`."""
        combined = [replace(shipped, **dict(zip(choices, values))) for values in itertools.product(*choices.values())]
        expected: Tensor | None = None
        for launch in [shipped, *(c for c in combined if c != shipped)]:
            entry: dict[str, Any] = {"kernel": kernel, **asdict(launch)}
            try:
                out.fill_(0)
                entry["ms"] = round(self.median(partial(run, launch)) * self.factor, 4)
                values = out.flatten()[::1009].float()
                expected = values if expected is None else expected
                entry["difference"] = float((values - expected).norm() / expected.norm())
            except Exception as error:  # a launch that does not fit must not end the sweep
                entry["error"] = f"{type(error).__name__}: {str(error)[:120]}"
            self.found.append(entry)
            print("   ", entry, flush=True)

    @staticmethod
    def median(run: Callable[[], None], count: int = 5) -> float:
        run()
        times = []
        for _ in range(count):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)
