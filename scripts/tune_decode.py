"""Launch configurations of decoding attention on one GPU, in turns with SDPA: times of one step, and its error.

    python -m scripts.tune_decode --out docs/results/decode.json

A step attends with one query to each of `--layers` caches, as a model does, so that no cache stays in L2. Each variant's step is
captured as a CUDA graph, compared with the definition in fp32 and with itself, and replayed in turns with the others. The program
fails where a variant is further from the definition than `harness.limits` allows.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from moba_cp import CachedTokens, CentroidCache, MoBAConfig, moba_attention_cached
from moba_cp.kernels import configs as shipped

from .harness import checks, limits, options
from .harness.inputs import HEAD_DIM
from .harness.records import Results, about
from .harness.timing import time_calls

ROUNDS, REPLAYS = 5, 10
VARIANTS: tuple[dict[str, int], ...] = (
    {}, {"split": 1024}, {"split": 512}, {"split": 256}, {"split": 128}, {"keys": 64}, {"num_stages": 4},
)  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written after every setting", dir_okay=False)],
    tokens: Annotated[int, typer.Option(help="tokens in the cache")] = 131072,
    heads: Annotated[str, typer.Option(help="q/kv heads")] = "32/8",
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "512:8,128:8,4096:12",
    layers: Annotated[int, typer.Option(help="caches that a step walks over")] = 8,
    device_name: Annotated[
        str, typer.Option("--device", help="cuda; cpu tries the program, without variants")
    ] = "cuda",
    commit: options.Commit = "",
) -> None:
    """Time every variant of every setting and write the file."""
    (q_heads, kv_heads), pairs = options.single(options.heads, heads), options.configs(configs)
    device = options.device(device_name)
    results = Results(out, {"about": about(commit)}, "results")
    caches = Caches(tokens, q_heads, kv_heads, layers, device)
    sizes = {"tokens": tokens, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM, "layers": layers}
    for pair in pairs:
        for entry in caches.measure(MoBAConfig(*pair)):
            results.add("results", sizes | {"block_size": pair[0], "topk": pair[1]} | entry)
    limits.end(limits.broken(results.content["results"]))


class Caches:
    """Keys and values of all layers, and one query, which sees all slots but the last: no block becomes complete."""

    def __init__(self, tokens: int, q_heads: int, kv_heads: int, layers: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device, self.last = device, tokens - 2

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

        self.keys = [normal(1, tokens, kv_heads, HEAD_DIM) for _ in range(layers)]
        self.values = [normal(1, tokens, kv_heads, HEAD_DIM) for _ in range(layers)]
        self.q = normal(1, 1, q_heads, HEAD_DIM)
        self.captured: list[Callable[[], list[Tensor]]] = []  # a graph reads the caches that its step holds
        self.tokens = CachedTokens.of(None, samples=1, queries=1, slots=tokens, offset=self.last, device=device)

    @torch.no_grad()
    def measure(self, config: MoBAConfig) -> list[dict[str, Any]]:
        """An entry for SDPA and one per variant."""
        expected = [
            checks.attend_query(
                self.q[0, 0], k[0].transpose(0, 1), v[0].transpose(0, 1), self.last, config, HEAD_DIM**-0.5
            )
            for k, v in zip(self.keys, self.values, strict=True)
        ]
        replays: list[Callable[[], Any]] = [self._captured(self._sdpa)[0]]
        entries: list[dict[str, Any]] = [{"what": "sdpa"}]
        seen: list[Any] = []
        for changed in VARIANTS if self.device.type == "cuda" else VARIANTS[:1]:
            with decoding_with(changed) as used:
                replay, outputs = self._captured(self._decoding(config))
            if used and used[0] in seen:
                continue
            seen += used[:1]
            replay()
            first = [x.clone() for x in outputs()]
            replay()
            errors = [float((x[0, 0].float() - y).norm() / y.norm()) for x, y in zip(first, expected, strict=True)]
            entry = {"what": "step", "shipped": not changed, "output_error": max(errors)}
            if used:
                entry |= {name: getattr(used[0], name) for name in ("split", "keys", "num_stages")}
            entry["same_bits_again"] = all(torch.equal(a, b) for a, b in zip(first, outputs(), strict=True))
            entries.append(entry)
            replays.append(replay)
        times: list[list[float]] = [[] for _ in replays]
        for _ in range(ROUNDS):
            for replay, found in zip(replays, times, strict=True):
                calls = time_calls(replay, self.device, iterations=REPLAYS, warmup=1)
                found.append(calls.median * 1000 / len(self.keys))
        for entry, found in zip(entries, times, strict=True):
            entry["us"] = {"median": statistics.median(found), "least": min(found), "most": max(found), "count": ROUNDS}
        return entries

    def _decoding(self, config: MoBAConfig) -> Callable[[], list[Tensor]]:
        """Steps with caches of centroids of their own, which keep launches from step to step; the first one computes them."""
        kept = [CentroidCache() for _ in self.keys]
        return lambda: [
            moba_attention_cached(self.q, k, v, config, tokens=self.tokens, centroids=centroids)
            for k, v, centroids in zip(self.keys, self.values, kept, strict=True)
        ]

    def _captured(self, step: Callable[[], list[Tensor]]) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
        """What runs a step again, and what gives the outputs of the last run. On the CPU the step itself."""
        outputs = [step()]
        if self.device.type != "cuda":

            def again() -> None:
                outputs[0] = step()

            return again, lambda: outputs[0]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs[0] = step()
        self.captured.append(step)
        return graph.replay, lambda: outputs[0]

    def _sdpa(self) -> list[Tensor]:
        q = self.q.transpose(1, 2)
        return [
            scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True)
            for k, v in zip(self.keys, self.values, strict=True)
        ]


@contextmanager
def decoding_with(changed: dict[str, int]) -> Iterator[list[Any]]:
    """Launch decoding attention with a changed configuration; gives those that were used."""
    original, used = shipped.decode_attend, []

    def configured(dim: int, dim_v: int, block_size: int, group: int) -> shipped.DecodeAttendConfig:
        config = replace(original(dim, dim_v, block_size, group), **changed)
        split = min(config.split, block_size)
        used.append(replace(config, split=split, splits=-(-block_size // split), keys=min(config.keys, split)))
        return used[-1]

    shipped.decode_attend = configured  # type: ignore[assignment]
    try:
        yield used
    finally:
        shipped.decode_attend = original


if __name__ == "__main__":
    typer.run(main)
