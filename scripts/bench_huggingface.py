"""The attention function of moba_cp.transformers against transformers' own SDPA, on one GPU: prefill, a chunk, decoding.

    python scripts/bench_huggingface.py --out docs/results/huggingface.json

Each function is called as a model's attention layer calls it, bf16, with a cache of `--tokens` tokens. Decoding walks over
`--layers` caches, as a model does, so that no cache stays in L2; it is timed called from Python and as a CUDA graph. Every
time is a median over `--iterations` rounds, with the 10th and 90th percentile. Every MoBA output is compared with an fp32
evaluation of the definition for rows of the very run that was timed: all of a decoding step, sampled ones of a prefill.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from bench_about import about
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moba_cp import CachedTokens, MoBAConfig
from moba_cp.transformers.attention import moba_attention_forward
from moba_cp.transformers.masks import pack
from moba_cp.transformers.settings import Settings

HEAD_DIM = 128
SCALE = HEAD_DIM**-0.5
SAMPLED_ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every configuration")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument(
        "--chunk", type=int, default=4096, help="queries of the chunk that is timed at the end of the cache"
    )
    parser.add_argument("--heads", default="32/8", help="q/kv heads")
    parser.add_argument("--configs", default="512:8,128:8,4096:12", help="block size:topk, comma-separated")
    parser.add_argument("--layers", type=int, default=8, help="caches that a decoding step walks over")
    parser.add_argument("--iterations", type=int, default=11)
    parser.add_argument("--commit", default="", help="git commit to note, where the checkout has no .git")
    options = parser.parse_args()
    q_heads, kv_heads = (int(x) for x in options.heads.split("/"))
    results: list[dict[str, Any]] = []
    facts = about(options.commit) | {"transformers": transformers.__version__}
    bench = Bench(options.tokens, options.chunk, q_heads, kv_heads, options.layers, options.iterations)
    for config in (None, *(MoBAConfig(*(int(n) for n in text.split(":"))) for text in options.configs.split(","))):
        for name, measure in (("prefill", bench.prefill), ("chunk", bench.chunk), ("decode", bench.decode)):
            result = {"what": name, "attention": "sdpa" if config is None else "moba", "tokens": options.tokens}
            result |= {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": HEAD_DIM}
            if config is not None:
                result |= {"block_size": config.block_size, "topk": config.topk}
            try:
                result |= measure(config)
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {error}"[:500]
            results.append(result)
            print(
                {key: value for key, value in result.items() if key not in ("q_heads", "kv_heads", "head_dim")},
                flush=True,
            )
            options.out.write_text(json.dumps({"about": facts, "results": results}, indent=1) + "\n")
            torch.cuda.empty_cache()


class Bench:
    """Inputs, and one method per thing that is timed."""

    def __init__(self, tokens: int, chunk: int, q_heads: int, kv_heads: int, layers: int, iterations: int) -> None:
        self.tokens, self.queries, self.q_heads, self.iterations = tokens, chunk, q_heads, iterations
        generator = torch.Generator("cuda").manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        self.keys = [normal(1, kv_heads, tokens, HEAD_DIM) for _ in range(layers)]
        self.values = [normal(1, kv_heads, tokens, HEAD_DIM) for _ in range(layers)]
        self.q = normal(1, tokens, q_heads, HEAD_DIM).transpose(1, 2)  # as a projection makes it

    def module(self, config: MoBAConfig | None) -> Any:
        """What the attention functions read of a model's attention layer."""
        module = torch.nn.Module()
        settings = {} if config is None else {"moba": vars(Settings(config.block_size, config.topk))}
        module.config = SimpleNamespace(num_hidden_layers=1, **settings)
        module.layer_idx, module.is_causal = 0, True
        module.num_key_value_groups = self.q_heads // self.keys[0].shape[1]
        return module

    def function(self, config: MoBAConfig | None, queries: int) -> Callable[[Tensor, int], Tensor]:
        """The attention of the last `queries` queries to cache number i, as a function of both."""
        module = self.module(config)
        if config is None:
            mask = None
            if 1 < queries < self.tokens:  # what transformers makes for a chunk
                position = torch.arange(self.tokens, device="cuda")
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
                    offset=self.tokens - queries,
                    device=self.q.device,
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
        times, out = timed(lambda: attend(q, 0), self.iterations)
        self._forget()
        result = {"queries": queries} | times
        if config is not None:
            rows = torch.linspace(0, queries - 1, SAMPLED_ROWS).long().tolist()
            result["error"] = max(
                self._error(out[0, row], q[0, :, row], self.tokens - queries + row, 0, config) for row in rows
            )
        return result

    @torch.no_grad()
    def decode(self, config: MoBAConfig | None) -> dict[str, Any]:
        """One query, the last one, per layer; times are per layer."""
        attend, q, layers = self.function(config, 1), self.q[:, :, -1:], len(self.keys)
        out: list[Tensor] = []

        def step() -> list[Tensor]:
            out[:] = [attend(q, i) for i in range(layers)]
            return out

        called, _ = timed(step, self.iterations, layers)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replayed, _ = timed(graph.replay, self.iterations, layers)
        result: dict[str, Any] = {"queries": 1, "layers": layers, "called": called, "graph": replayed}
        if config is not None:
            read = [self._selected(q[0, :, 0], self.tokens - 1, i, config) for i in range(layers)]
            wanted = statistics.mean(int(chosen.sum()) for chosen in read)
            group = self.q_heads // self.keys[0].shape[1]
            shared = statistics.mean(int(chosen.unflatten(0, (-1, group)).any(1).sum()) for chosen in read)
            key_bytes = config.block_size * HEAD_DIM * 4
            result["bytes_read_once_per_q_head"] = int(wanted * key_bytes)
            result["bytes_read_once_per_kv_head"] = int(shared * key_bytes)
            result["error"] = max(
                self._error(out[i][0, 0], q[0, :, 0], self.tokens - 1, i, config) for i in range(layers)
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
        """bool `[Hq, blocks]`: what the query `[Hq, D]` at `position` selects, by the definition in fp32."""
        keys, own = self.keys[layer][0], position // config.block_size
        group = self.q_heads // keys.shape[0]
        chosen = torch.zeros(self.q_heads, own + 1, dtype=torch.bool, device=q.device)
        chosen[:, own] = True
        if own and config.topk > 1:
            whole = keys[:, : own * config.block_size].unflatten(1, (own, config.block_size))
            means = whole.float().mean(2).to(keys.dtype).float().repeat_interleave(group, 0)  # [Hq, own, D]
            scores = torch.einsum("hd,hbd->hb", q.float(), means)
            chosen.scatter_(1, scores.topk(min(config.topk - 1, own), 1).indices, True)
        return chosen

    def _error(self, out: Tensor, q: Tensor, position: int, layer: int, config: MoBAConfig) -> float:
        """Norm of the difference of `out` `[Hq, Dv]` from the definition in fp32, relative to the norm of that."""
        group = self.q_heads // self.keys[layer].shape[1]
        visible = self._selected(q, position, layer, config).repeat_interleave(config.block_size, 1)[:, : position + 1]
        expected = torch.empty_like(out, dtype=torch.float32)
        for head in range(self.q_heads):
            keys, values = (x[layer][0, head // group, : position + 1].float() for x in (self.keys, self.values))
            scores = (keys @ q[head].float()) * SCALE
            expected[head] = torch.softmax(scores.masked_fill(~visible[head], float("-inf")), 0) @ values
        return float((out.float() - expected).norm() / expected.norm())


def timed(step: Callable[[], Any], iterations: int, per: int = 1) -> tuple[dict[str, Any], Any]:
    """Milliseconds of `step`, divided by `per`, and what the last timed call returned."""
    for _ in range(3):
        step()
    times, result = [], None
    for _ in range(iterations):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        result = step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / per)
    times.sort()
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return {"ms": statistics.median(times), "p10_ms": low, "p90_ms": high, "iterations": iterations}, result


if __name__ == "__main__":
    main()
