"""Routing lists under other launch configurations: times, and whether the lists stay the same.

    PYTHONPATH=. python3 scripts/bench_lists.py --out lists.json

One chunk of `--heads-at-once` kv heads is timed and scaled to all heads. A variant that fails is noted and the rest goes on.
Other kernels of the forward: `bench_kernels.py --sweep`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_about import about

from moba_cp import SequenceLayout
from moba_cp.kernels import backend_for, configs, lists
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.pipeline import device_rows

HEAD_DIM = 128
SORTED = [
    {"entries": entries, "warps": warps, "programs": programs, "few_blocks": 0}
    for (entries, warps), programs in itertools.product(
        [(1024, 4), (512, 1), (1024, 2), (1024, 8), (512, 2), (1024, 1), (2048, 8), (512, 4)], [1024, 2048]
    )
]
COUNTED = [
    {"count_entries": entries, "count_warps": warps, "register_bins": bins}
    for entries, warps, bins in [
        (1024, 8, 1024), (2048, 4, 1024), (2048, 8, 1024), (4096, 4, 1024), (4096, 8, 1024), (1024, 4, 0),
    ]
]  # fmt: skip
FEW = [
    {"few_blocks": 256, "few_tokens": tokens, "few_warps": warps, "programs": programs}
    for tokens, warps, programs in [
        (32, 1, 1024), (32, 2, 1024), (32, 4, 1024), (32, 8, 1024), (64, 4, 1024), (64, 8, 1024), (128, 4, 1024),
        (128, 8, 1024), (32, 4, 2048), (32, 2, 2048), (32, 1, 4096), (32, 4, 4096),
    ]
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every configuration")
    parser.add_argument("--configs", default="128:8,512:8,4096:12", help="block size:topk, comma-separated")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=16, help="q and kv heads that times are scaled to")
    parser.add_argument("--heads-at-once", type=int, default=3, help="heads of the timed chunk")
    parser.add_argument(
        "--budget", type=float, default=18.0, help="seconds a configuration; what does not fit is left out"
    )
    options = parser.parse_args()
    results = {"about": about(), "results": []}
    for config in options.configs.split(","):
        block_size, topk = (int(n) for n in config.split(":"))
        bench = Bench(options, block_size, topk)
        try:
            bench.lists()
        except Exception as error:
            bench.found.append({"error": f"{type(error).__name__}: {error}"[:500]})
        results["results"] += bench.found
        options.out.write_text(json.dumps(results, indent=1))
        bench.print()


class Bench:
    """One configuration: inputs, and what was found."""

    @torch.no_grad()
    def __init__(self, options: argparse.Namespace, block_size: int, topk: int) -> None:
        tokens, heads = options.tokens, options.heads_at_once
        self.case = {"block_size": block_size, "topk": topk}
        self.factor, self.budget, self.end = options.heads / heads, options.budget, 0.0
        self.found: list[dict[str, Any]] = []
        generator = torch.Generator(device="cuda").manual_seed(0)
        q, k = torch.randn(2, tokens, heads, HEAD_DIM, device="cuda", generator=generator).bfloat16()
        backend = backend_for(q.device, q.dtype)
        plan = rank_plan(home_plan(SequenceLayout.contiguous([0, tokens], 1), block_size), 0)
        rows, blocks = device_rows(plan, q.device), plan.plan.blocks
        start = torch.tensor(blocks.start, dtype=torch.int32, device="cuda")
        selected = backend.select_blocks(
            q, centroids=backend.centroids(k, start=start, block_size=block_size), rows=rows, topk=topk
        )
        self.routing = partial(lists.route, selected, n_blocks=len(blocks), kv_heads=heads, block_size=block_size)
        self.n_blocks = len(blocks)

    def lists(self) -> None:
        """`route`: all its passes together, under other configurations."""
        self.end = time.perf_counter() + self.budget
        expected = self.routing()
        valid, used = int(expected.pointer[-1]), expected.item_bin >= 0
        few = [x for x in FEW if self.n_blocks * x["few_tokens"] <= 8192]  # larger tables would not fit the registers
        for constants in [{}, *COUNTED, *few, *SORTED]:
            entry = dict(constants)
            run = partial(self.routing, config=replace(configs.LISTS, **constants))
            if self.timed(entry, run):
                found = run()
                entry["same"] = (
                    torch.equal(found.pointer, expected.pointer)
                    and torch.equal(found.entry[:valid], expected.entry[:valid])
                    and torch.equal(found.item_bin, expected.item_bin)
                    and torch.equal(found.item_start[used], expected.item_start[used])
                    and torch.equal(found.item_end[used], expected.item_end[used])
                )

    def timed(self, entry: dict[str, Any], call: Callable[[], Any], count: int = 7) -> bool:
        """Milliseconds for all heads into `entry`; False where there are none."""
        self.found.append(entry)
        entry |= self.case
        if time.perf_counter() > self.end:
            entry["error"] = "no time left"
            return False
        try:
            call()
            torch.cuda.synchronize()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
            torch.cuda._sleep(3_000_000)  # the host runs ahead, so that launches cost nothing
            for begin, end in events:
                begin.record()
                call()
                end.record()
            torch.cuda.synchronize()
            entry["ms"] = round(statistics.median(b.elapsed_time(e) for b, e in events) * self.factor, 4)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"[:300]
            return False
        return True

    def print(self) -> None:
        print(f"\n{self.case}")
        for entry in sorted(self.found, key=lambda e: e.get("ms", 1e9)):
            print("  ", {k: v for k, v in entry.items() if k not in ("block_size", "topk", "store")})


if __name__ == "__main__":
    main()
