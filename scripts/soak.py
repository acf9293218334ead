"""Call after call of changing shapes, layouts and exchanges for minutes, to see that nothing grows and nothing goes wrong.

    torchrun --nproc-per-node 4 -m scripts.soak --minutes 30 --device cpu --out docs/results/soak.json
    torchrun --nproc-per-node 2 -m scripts.soak --minutes 1 --distinct 60 --out docs/results/soak_gpu.json

Every call draws documents, layout (also ranks without tokens), heads, block size, topk, exchange, ranks that share heads, one
to three layers and how they are recomputed. Some are compared with the definition. Now and then one rank passes bad
input, so that all ranks have to refuse. What each rank holds is noted now and then: memory of the process, file descriptors,
threads, keys in the store, what the library keeps, and device memory.

On GPUs most new sizes compile kernels and load them, and longer sequences need larger buffers, so memory grows for hours.
`--distinct N` makes N calls, then these again in random order, and the minutes begin with the first repeated one.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moba_cp import MoBAConfig, SequenceLayout, kept_bytes, moba_attention, reference
from moba_cp.parallel.splits import COMMS, HEADS

from .harness import options
from .harness.records import about, check_writable, write_json
from .harness.teams import join

BETWEEN_CHECKS, BETWEEN_REFUSALS = 10, 40
"""Calls from one comparison with the definition to the next, and from one bad input to the next."""
MAY_GROW = 16 << 20
"""Bytes by which a process may grow from the first half's samples to the second half's: fragments and caches of libraries."""
TOLERANCE = {torch.float64: 1e-10, torch.bfloat16: 2e-2}
"""Norm of the error over the norm of the definition's result: fp64 sums in another order; bf16 inputs of backward's products."""


@dataclass(frozen=True)
class Drawn:
    """One call. All ranks draw the same."""

    lengths: tuple[int, ...]
    layout: str
    q_heads: int
    kv_heads: int
    block_size: int
    topk: int
    comm: str
    head_parallel: int | None
    layers: int
    recompute: str

    def sequence(self, world: int) -> SequenceLayout:
        ends = list(accumulate(self.lengths, initial=0))
        if self.layout == "one rank":
            return SequenceLayout.from_runs([[(0, ends[-1])]] + [[] for _ in range(world - 1)], ends)
        if self.layout == "balanced":
            return SequenceLayout.balanced(ends, world, self.block_size, self.topk)
        return getattr(SequenceLayout, self.layout)(ends, world)


def main(
    minutes: Annotated[float, typer.Option(help="how long", min=0)] = 30.0,
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)] = Path("runs/soak.json"),
    tokens: Annotated[int, typer.Option(help="of the longest sequence", min=64)] = 1024,
    seed: Annotated[int, typer.Option(help="of the calls")] = 0,
    distinct: Annotated[int, typer.Option(help="different calls; 0: as many as time allows", min=0)] = 0,
    count: Annotated[
        int, typer.Option("--samples", help="how often what ranks hold is noted, at most once a call", min=2)
    ] = 24,
    device: Annotated[str, typer.Option(help="cuda, or cpu over gloo")] = "cuda",
    may_grow: Annotated[
        bool, typer.Option(help="end without an error if something grew: in a run of seconds, what loads late grows")
    ] = False,
    commit: options.Commit = "",
) -> None:
    """Call for `minutes`; exits with an error if a result is wrong, a refusal is missed or something grows."""
    place = join(options.device(device))
    check_writable(out)
    soak = Soak(place, tokens, seed, distinct)
    samples: list[dict[str, int]] = []
    for _ in range(distinct):
        soak.call()
    began = time.perf_counter()
    while len(samples) < count:
        due = over_ranks([time.perf_counter() - began], place)[0] >= minutes * 60 * (len(samples) + 1) / count
        if due or not samples:
            samples.append(soak.sample())
        soak.call()
    found: dict[str, Any] = {
        "calls": soak.calls,
        "compared": soak.compared,
        "largest_error": soak.error,
        "refused": soak.refused,
        "comms": dict(sorted(soak.comms.items())),
        "grew": grown(samples),
    }
    if dist.get_rank() == 0:
        head = about(commit, "" if device == "cuda" else "CPU")
        drawn = {"tokens": tokens, "seed": seed, "distinct": distinct}
        about_run = {"world_size": dist.get_world_size(), "minutes": minutes, **drawn}
        write_json(out, {"about": head | about_run, **found, "samples": samples})
        print(found, flush=True)
    dist.destroy_process_group()
    end(found["grew"], may_grow)


class Soak:
    """The calls, and what they found. A wrong result, or a rank that accepts another's bad input, raises."""

    def __init__(self, device: torch.device, tokens: int, seed: int, distinct: int) -> None:
        self.device, self.tokens, self.seed, self.distinct = device, tokens, seed, distinct
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        cuda = device.type == "cuda"
        self.dtype, self.dim = (torch.bfloat16, 128) if cuda else (torch.float64, 16)
        self.blocks = (64, 128, 256, 512) if cuda else (8, 16, 48)
        self.calls = self.compared = self.refused = 0
        self.error = 0.0
        self.comms: Counter[str] = Counter()

    def call(self) -> None:
        number = self.calls
        if self.distinct and number >= self.distinct:
            number = random.Random(f"{self.seed} again {number}").randrange(self.distinct)
        draw = random.Random(f"{self.seed} {number}")
        self.calls += 1
        if self.calls % BETWEEN_REFUSALS == 2:
            self.refuse(random.Random(f"{self.seed} refused {self.calls}").randrange(self.world))
        drawn = self.draw(draw)
        self.comms[drawn.comm] += 1
        layout = drawn.sequence(self.world)
        generator = torch.Generator(self.device).manual_seed(self.calls)
        heads = (drawn.q_heads, drawn.kv_heads, drawn.kv_heads, drawn.q_heads)
        whole = [
            torch.randn(layout.total_tokens, n, self.dim, device=self.device, dtype=self.dtype, generator=generator)
            for n in heads
        ]
        *qkv, dout = (layout.shard(x, self.rank) for x in whole)
        qkv = [x.contiguous().requires_grad_() for x in qkv]
        result = stacked(drawn, layout, qkv)
        result.backward(dout)
        gradients = [x.grad for x in qkv if x.grad is not None]
        if self.calls % BETWEEN_CHECKS == 1:
            self.compare(drawn, layout, whole, [result.detach(), *gradients])

    def draw(self, draw: random.Random) -> Drawn:
        """A call that is valid."""
        lengths = [draw.randrange(1, self.tokens // 2) for _ in range(draw.randrange(1, 5))]
        while sum(lengths) > self.tokens:
            lengths.pop()
        kv_heads = draw.choice((1, 2, 4))
        q_heads = kv_heads * draw.choice((1, 2)) if kv_heads > 1 else draw.choice((2, 4))
        comm = draw.choice(COMMS)
        sizes = [n for n in range(1, self.world + 1) if self.world % n == 0 and q_heads % n == 0]
        head_parallel = None
        if comm == HEADS and self.world not in sizes:
            comm = f"{HEADS}+ring"
        if comm.startswith(f"{HEADS}+"):
            head_parallel = draw.choice(sizes)
        return Drawn(
            tuple(lengths),
            draw.choice(("contiguous", "zigzag", "balanced", "one rank")),
            q_heads,
            kv_heads,
            draw.choice(self.blocks),
            draw.randrange(1, 7),
            comm,
            head_parallel,
            draw.choice((1, 1, 2, 3)),
            draw.choice(("none", "reentrant", "not reentrant")),
        )

    def compare(self, drawn: Drawn, layout: SequenceLayout, whole: list[Tensor], mine: list[Tensor]) -> None:
        """Output and gradients of this rank's tokens against the definition of the call's dtype, to which centroids are rounded.
        Several layers: of fp64 calls alone, since bf16 rounds what the second layer selects by."""
        if drawn.layers > 1 and self.dtype != torch.float64:
            return
        *qkv, dout = whole
        qkv = [x.detach().requires_grad_() for x in qkv]
        q, k, v = qkv
        for _ in range(drawn.layers):
            q = reference.moba_attention(q, k, v, layout.cu_seqlens, config_of(drawn))
        expected = [q.detach(), *torch.autograd.grad(q, qkv, dout)]
        squares = torch.tensor(
            [
                value
                for a, b in zip(mine, expected, strict=True)
                for value in (
                    (a.double() - layout.shard(b, self.rank)).square().sum(),
                    b.double().square().sum() / self.world,
                )
            ],
            dtype=torch.float64,
            device=self.device,
        )
        dist.all_reduce(squares)
        error = max((squares[0::2] / squares[1::2].clamp(min=1e-30)).sqrt().tolist())
        if not error <= TOLERANCE[self.dtype]:
            raise AssertionError(f"call {self.calls}: error {error:.1e} of {drawn}")
        self.error, self.compared = max(self.error, error), self.compared + 1

    def refuse(self, bad: int) -> None:
        """Rank `bad` passes q heads that are no multiple of the kv heads; every rank has to raise."""
        layout = SequenceLayout.contiguous([0, 64], self.world)
        tokens = layout.local_tokens(self.rank)
        q, k = (torch.zeros(tokens, n, self.dim, device=self.device, dtype=self.dtype) for n in (4, 2))
        try:
            moba_attention(q[:, :3] if self.rank == bad else q, k, k, MoBAConfig(self.blocks[0], 2), layout=layout)
        except ValueError:
            self.refused += 1
            return
        raise AssertionError(f"call {self.calls}: rank {self.rank} accepted what rank {bad} should have refused")

    def sample(self) -> dict[str, int]:
        """What is held now, of the rank that holds most of each. Calls so far first."""
        gc.collect()
        give_back()
        kept = asdict(kept_bytes())
        cuda = self.device.type == "cuda"
        held = {
            "calls": self.calls,
            "process_bytes": resident_bytes() - kept["host"],
            **{f"kept_{name}_bytes": size for name, size in kept.items()},
            "file_descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
            "system_threads": len(os.listdir("/proc/self/task")),
            "store_keys": dist.distributed_c10d._get_default_store().num_keys(),
            "device_bytes": torch.cuda.memory_allocated() - kept["device"] if cuda else 0,
        }
        return dict(zip(held, map(int, over_ranks([float(x) for x in held.values()], self.device)), strict=True))


def stacked(drawn: Drawn, layout: SequenceLayout, qkv: list[Tensor]) -> Tensor:
    """Layers of attention, each with the output before as q."""

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = moba_attention(
            q, k, v, config_of(drawn), layout=layout, comm=drawn.comm, head_parallel=drawn.head_parallel
        )
        return found

    q, k, v = qkv
    for _ in range(drawn.layers):
        q = layer(q, k, v) if drawn.recompute == "none" else recomputed(layer, drawn, q, k, v)
    return q


def recomputed(layer: Any, drawn: Drawn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found: Tensor = checkpoint(layer, q, k, v, use_reentrant=drawn.recompute == "reentrant")
    return found


def config_of(drawn: Drawn) -> MoBAConfig:
    return MoBAConfig(drawn.block_size, drawn.topk)


def over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The largest of each over all ranks."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    found: list[float] = largest.tolist()
    return found


def give_back() -> None:
    """Have glibc return freed memory, so that what a process holds is what it uses. Other allocators are left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def end(grew: dict[str, int], may_grow: bool) -> None:
    """Leave the program with exit status 1 if something grew that may not.

    Raises:
        SystemExit: it did.
    """
    if grew and not may_grow:
        raise SystemExit(f"grew: {grew}")


def grown(samples: list[dict[str, int]]) -> dict[str, int]:
    """What the second half's samples exceed the first half's by, where it is more than may be. Bytes by their medians: a sample
    behind a large call may hold what the allocator keeps. Everything else by its largest number."""
    half = len(samples) // 2
    found = {}
    for name in samples[0]:
        if name == "calls" or name.startswith("kept_"):
            continue  # limited by the library: `moba_cp.KeptMemory`
        of_half, allowed = (median, MAY_GROW) if name.endswith("bytes") else (max, 0)
        more = int(of_half([s[name] for s in samples[half:]]) - of_half([s[name] for s in samples[:half]]))
        if more > allowed:
            found[name] = more
    return found


if __name__ == "__main__":
    typer.run(main)
