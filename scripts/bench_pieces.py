"""Own-block attention and routing lists under other launch configurations: times, and whether the result stays the same.

    PYTHONPATH=. python3 scripts/bench_pieces.py --out pieces.json

One chunk of `--heads-at-once` kv heads is timed and scaled to all heads. Every variant must give what the shipped one gives:
the same bits where it cuts the keys alike, else within rounding (own blocks), the same lists (routing). A variant that fails
is noted and the rest goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from bench_about import about

from moba_cp import SequenceLayout
from moba_cp.kernels import KVPart, backend_for, configs, forward, lists
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.pipeline import device_rows

HEAD_DIM = 128
SORTED = [
    {"ENTRIES": entries, "WARPS": warps, "PROGRAMS": programs, "FEW_BLOCKS": 0}
    for (entries, warps), programs in itertools.product(
        [(1024, 4), (512, 1), (1024, 2), (1024, 8), (512, 2), (1024, 1), (2048, 8), (512, 4)], [1024, 2048]
    )
]
COUNTED = [
    {"COUNT_ENTRIES": entries, "COUNT_WARPS": warps, "REGISTER_BINS": bins}
    for entries, warps, bins in [
        (1024, 8, 1024), (2048, 4, 1024), (2048, 8, 1024), (4096, 4, 1024), (4096, 8, 1024), (1024, 4, 0),
    ]
]  # fmt: skip
FEW = [
    {"FEW_BLOCKS": 256, "FEW_TOKENS": tokens, "FEW_WARPS": warps, "PROGRAMS": programs}
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
        for piece in (bench.own, bench.lists):
            try:
                piece()
            except Exception as error:
                bench.found.append({"piece": piece.__name__, "error": f"{type(error).__name__}: {error}"[:500]})
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
        q, k, v = torch.randn(3, tokens, heads, HEAD_DIM, device="cuda", generator=generator).bfloat16()
        backend = backend_for(q.device, q.dtype)
        plan = rank_plan(home_plan(SequenceLayout.contiguous([0, tokens], 1), block_size), 0)
        rows, blocks = device_rows(plan, q.device), plan.plan.blocks
        start = torch.tensor(blocks.start, dtype=torch.int32, device="cuda")
        length = torch.tensor(blocks.length, dtype=torch.int32, device="cuda")
        selected = backend.select_blocks(q, backend.centroids(k, start, block_size), rows, topk)
        routed = backend.route(selected, len(blocks), heads, rows, block_size)
        self.routing = (selected, len(blocks), heads, rows, block_size)
        self.partials = backend.new_partials(selected, HEAD_DIM, q.dtype)
        part = KVPart(k, v, start.expand(heads, -1), length)
        self.attending = (q, part, routed, rows, selected, HEAD_DIM**-0.5, self.partials)
        self.keys = int((torch.arange(tokens) % block_size + 1).sum()) * options.heads

    def own(self) -> None:
        """`attend_own`: rows, keys, warps, stages, with and without descriptors."""
        if self.attending[2].block_size <= configs.SMALL_BLOCK:
            return
        self.end = time.perf_counter() + self.budget
        shipped = configs.own_blocks(HEAD_DIM, HEAD_DIM, configs.capability(self.attending[0].device))
        shapes = [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (128, 64, 8, 3)]
        variants = [replace(shipped, rows=r, keys=k, num_warps=w, num_stages=s) for r, k, w, s in shapes]
        expected = None
        for launch, tma in itertools.product([shipped, *(x for x in variants if x != shipped)], [True, False]):
            self.partials.out.fill_(float("nan"))
            entry = {"piece": "own", **asdict(launch), "tma": tma}
            if self.timed(entry, lambda: forward.attend_own(*self.attending, launch, tma=tma)):  # noqa: B023
                out = self.partials.out[:, :, -1].clone()
                expected = out if expected is None else expected
                same, wrong = (
                    torch.equal(out, expected),
                    (out.float() - expected.float()).norm() / expected.float().norm(),
                )
                entry |= {"same": same, "difference": float(wrong)}
                entry["tflops"] = round(self.keys * 4 * HEAD_DIM / entry["ms"] / 1e9)

    def lists(self) -> None:
        """`route`: all its passes together, under other module constants."""
        self.end = time.perf_counter() + self.budget
        expected = lists.route(*self.routing)
        valid = int(expected.pointer[-1])
        few = [x for x in FEW if self.routing[1] * x["FEW_TOKENS"] <= 8192]  # larger tables would not fit the registers
        for constants in [{}, *COUNTED, *few, *SORTED]:
            entry = {"piece": "lists", **constants}
            with patched(constants):
                if self.timed(entry, lambda: lists.route(*self.routing)):
                    found = lists.route(*self.routing)
                    entry["same"] = (
                        torch.equal(found.pointer, expected.pointer)
                        and torch.equal(found.entry[:valid], expected.entry[:valid])
                        and torch.equal(found.item_bin, expected.item_bin)
                        and torch.equal(found.item_start, expected.item_start)
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
        for entry in sorted(self.found, key=lambda e: (e["piece"], e.get("ms", 1e9))):
            print("  ", {k: v for k, v in entry.items() if k not in ("block_size", "topk", "store")})


@contextlib.contextmanager
def patched(constants: dict[str, int]) -> Iterator[None]:
    """Other values for constants of `lists`."""
    before = {name: getattr(lists, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(lists, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(lists, name, value)


if __name__ == "__main__":
    main()
