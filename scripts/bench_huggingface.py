"""The attention function of moba_cp.transformers against transformers' own SDPA, on one GPU: prefill, a chunk, decoding.

    python -m scripts.bench_huggingface --out docs/results/huggingface.json

Each function is called as a model's attention layer calls it, bf16, with a cache of `--tokens` tokens. Decoding walks over
`--layers` caches, as a model does, so that no cache stays in L2; it is timed called from Python and as a CUDA graph, per
layer. Every MoBA output is compared with an fp32 evaluation of the definition for rows of the very run that was timed: all of
a decoding step, sampled ones of a prefill. The program fails beyond the limit of `harness.limits`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from moba_cp import CachedTokens, MoBAConfig

from .harness import checks, limits, options
from .harness.inputs import HEAD_DIM
from .harness.records import Results, about
from .harness.timing import Times, time_calls

SCALE = HEAD_DIM**-0.5
SAMPLED_ROWS = 16


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written after every case", dir_okay=False)],
    tokens: Annotated[int, typer.Option(help="tokens in the cache")] = 131072,
    chunk: Annotated[int, typer.Option(help="queries of the chunk that is timed at the end of the cache")] = 4096,
    heads: Annotated[str, typer.Option(help="q/kv heads")] = "32/8",
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "512:8,128:8,4096:12",
    layers: Annotated[int, typer.Option(help="caches that a decoding step walks over", min=1)] = 8,
    iterations: Annotated[int, typer.Option(help="timed calls of each figure", min=1)] = 11,
    device_name: Annotated[str, typer.Option("--device", help="cuda, or cpu to try the program")] = "cuda",
    commit: options.Commit = "",
) -> None:
    """Run every case and write the file."""
    try:
        import transformers
    except ImportError:
        raise typer.BadParameter('transformers is not installed: pip install -e ".[scripts,transformers]"') from None

    (q_heads, kv_heads), sizes = options.single(options.heads, heads), options.configs(configs)
    if not 1 <= chunk <= tokens:
        raise typer.BadParameter(f"--chunk must be from 1 to --tokens, got {chunk} and {tokens}")
    device = options.device(device_name)
    results = Results(out, {"about": about(commit) | {"transformers": transformers.__version__}}, "results")
    bench = Bench(tokens, chunk, q_heads, kv_heads, layers, iterations, device)
    for config in (None, *(MoBAConfig(*pair) for pair in sizes)):
        case: dict[str, Any] = {"attention": "sdpa"} if config is None else {"attention": "moba"}
        case |= {"tokens": tokens, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
        if config is not None:
            case |= {"block_size": config.block_size, "topk": config.topk}
        for name, measure in (("prefill", bench.prefill), ("chunk", bench.chunk), ("decode", bench.decode)):
            results.attempt("results", {"what": name} | case, partial(measure, config))
    if results.failed:
        raise typer.Exit(1)
    limits.end(limits.broken(results.content["results"]))


class Bench:
    """Inputs, and one method per thing that is timed."""

    def __init__(
        self, tokens: int, chunk: int, q_heads: int, kv_heads: int, layers: int, iterations: int, device: torch.device
    ) -> None:
        self.tokens, self.queries, self.q_heads, self.iterations, self.device = (
            tokens,
            chunk,
            q_heads,
            iterations,
            device,
        )
        generator = torch.Generator(device).manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)  # noqa: E731
        self.keys = [normal(1, kv_heads, tokens, HEAD_DIM) for _ in range(layers)]
        self.values = [normal(1, kv_heads, tokens, HEAD_DIM) for _ in range(layers)]
        self.q = normal(1, tokens, q_heads, HEAD_DIM).transpose(1, 2)  # as a projection makes it

    def module(self, config: MoBAConfig | None) -> Any:
        """What the attention functions read of a model's attention layer."""
        from moba_cp.transformers import Settings

        module: Any = torch.nn.Module()
        settings = {} if config is None else {"moba": vars(Settings(config.block_size, config.topk))}
        module.config = SimpleNamespace(num_hidden_layers=1, **settings)
        module.layer_idx, module.is_causal = 0, True
        module.num_key_value_groups = self.q_heads // self.keys[0].shape[1]
        return module

    def function(self, config: MoBAConfig | None, queries: int, left: int = 0) -> Callable[[Tensor, int], Tensor]:
        """The attention of `queries` queries to cache number i, as a function of both; `left` slots behind them are unused."""
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from moba_cp.transformers.attention import moba_attention_forward
        from moba_cp.transformers.masks import pack

        module = self.module(config)
        if config is None:
            mask = None
            if 1 < queries < self.tokens:  # what transformers makes for a chunk
                position = torch.arange(self.tokens, device=self.device)
                mask = (position <= position[-queries:, None])[None, None]
            return lambda q, i: sdpa_attention_forward(
                module, q, self.keys[i], self.values[i], mask, scaling=SCALE, is_causal=True
            )[0]
        mask = None
        if queries < self.tokens:
            mask = pack(
                CachedTokens.of(
                    None,
                    samples=1,
                    queries=queries,
                    slots=self.tokens,
                    offset=self.tokens - queries - left,
                    device=self.device,
                )
            )

        def attend(q: Tensor, i: int) -> Tensor:
            kept = getattr(self.keys[i], "_moba_kept", (None,))[0] if mask is not None else None
            return moba_attention_forward(
                module, q, self.keys[i], self.values[i], mask, scaling=SCALE, moba_centroids=kept
            )[0]

        return attend

    @torch.no_grad()
    def prefill(self, config: MoBAConfig | None) -> dict[str, Any]:
        """All queries of the sequence at once."""
        return self._once(config, self.tokens)

    @torch.no_grad()
    def chunk(self, config: MoBAConfig | None) -> dict[str, Any]:
        """The last queries against a cache of all keys; centroids of the cache are known but for the chunk's."""
        return self._once(config, self.queries)

    def _once(self, config: MoBAConfig | None, queries: int) -> dict[str, Any]:
        attend, q = self.function(config, queries), self.q[:, :, -queries:]
        times, out = self.timed(lambda: attend(q, 0))
        self._forget()
        result = {"queries": queries, "ms": times.record()}
        if config is not None:
            rows = torch.linspace(0, queries - 1, SAMPLED_ROWS).long().tolist()
            result["output_error"] = max(
                self._error(out[0, row], q[0, :, row], self.tokens - queries + row, 0, config) for row in rows
            )
        return result

    @torch.no_grad()
    def decode(self, config: MoBAConfig | None) -> dict[str, Any]:
        """One query per layer; times are per layer.

        At the last slot but one no block becomes complete, as in all steps but one per block. `completing_graph_ms` is at the
        last slot, where the step also computes a centroid (`tokens` is a multiple of the block size).
        """
        result = self._steps(config, left=0 if config is None else 1)
        if config is not None:
            last = self._steps(config, left=0)
            result |= {f"completing_{name}": last[name] for name in last if name.endswith("_ms")}
            result["output_error"] = max(result["output_error"], last["output_error"])
        return result

    def _steps(self, config: MoBAConfig | None, left: int) -> dict[str, Any]:
        """Steps at the last slot but `left`."""
        attend, q, layers = self.function(config, 1, left), self.q[:, :, -1:], len(self.keys)
        position = self.tokens - 1 - left
        out: list[Tensor] = []

        def step() -> list[Tensor]:
            out[:] = [attend(q, i) for i in range(layers)]
            return out

        result: dict[str, Any] = {"queries": 1, "layers": layers, "called_ms": self.timed(step)[0].record()}
        called = out.copy()
        if self.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            result["graph_ms"] = self.timed(graph.replay)[0].record()
        for name in ("called_ms", "graph_ms"):
            if name in result:
                result[name] |= {key: round(x / layers, 5) for key, x in result[name].items() if key != "count"}
        if config is not None:
            read = [self._selected(q[0, :, 0], position, i, config) for i in range(layers)]
            wanted = statistics.mean(int(chosen.sum()) for chosen in read)
            group = self.q_heads // self.keys[0].shape[1]
            shared = statistics.mean(int(chosen.unflatten(0, (-1, group)).any(1).sum()) for chosen in read)
            key_bytes = config.block_size * HEAD_DIM * 4
            result["bytes_read_once_per_q_head"] = int(wanted * key_bytes)
            result["bytes_read_once_per_kv_head"] = int(shared * key_bytes)
            result["output_error"] = max(
                self._error(outputs[i][0, 0], q[0, :, 0], position, i, config)
                for outputs in (called, out)
                for i in range(layers)
            )
        else:
            result["bytes_read"] = self.keys[0].nbytes + self.values[0].nbytes
        self._forget()
        return result

    def _forget(self) -> None:
        for keys in self.keys:
            if hasattr(keys, "_moba_kept"):
                del keys._moba_kept

    def _selected(self, q: Tensor, position: int, layer: int, config: MoBAConfig) -> Tensor:
        return checks.blocks_of_query(q, self.keys[layer][0], position, config)

    def _error(self, out: Tensor, q: Tensor, position: int, layer: int, config: MoBAConfig) -> float:
        """Norm of the difference of `out` `[Hq, Dv]` from the definition in fp32, relative to the norm of that."""
        expected = checks.attend_query(q, self.keys[layer][0], self.values[layer][0], position, config, SCALE)
        return float((out.float() - expected).norm() / expected.norm())

    def timed(self, step: Callable[[], Any]) -> tuple[Times, Any]:
        """Times of `step`, and what the last timed call returned."""
        last: list[Any] = [None]

        def call() -> None:
            last[0] = step()

        return time_calls(call, self.device, iterations=self.iterations, warmup=3), last[0]


if __name__ == "__main__":
    typer.run(main)
