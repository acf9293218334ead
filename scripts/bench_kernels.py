"""MoBA on one GPU: forward and forward+backward through the public call, by stage, beside dense attention and the floors.

    PYTHONPATH=. python3 scripts/bench_kernels.py --out docs/results/kernels.json   # everything
    PYTHONPATH=. python3 scripts/bench_kernels.py --quick --out kernels.json        # 128K tokens, 16/16 heads
    PYTHONPATH=. python3 scripts/bench_kernels.py --sweep --out sweep.json          # launch configurations, forward kernels

Every timed configuration is checked on the very tensors that were timed (`bench_checks`). Times are medians of CUDA events
over back-to-back calls, so that launch overhead shows where it is not hidden; `host_ms` is what a call costs the CPU.
Needs nothing but torch, Triton and numpy; run it from the repository root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_checks
import bench_sweep
import torch
import torch.nn.functional as F
from bench_about import about
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.stages import time_stages

HEAD_DIM = 128
FLOPS, BYTES_PER_SECOND = 800e12, 3.0e12
DENSE = {"dense cuDNN": SDPBackend.CUDNN_ATTENTION, "dense flash": SDPBackend.FLASH_ATTENTION}


def main() -> None:
    options = parse()
    torch.backends.cuda.matmul.allow_tf32 = False
    results: dict[str, Any] = {"about": run_about(options), "results": [], "dense": []}
    pairs = [tuple(int(n) for n in h.split("/")) for h in options.heads.split(",")]
    configs = [tuple(int(n) for n in c.split(":")) for c in options.configs.split(",")]
    for q_heads, kv_heads in pairs:
        for tokens in (int(t) for t in options.tokens.split(",")):
            case = {"tokens": tokens, "q_heads": q_heads, "kv_heads": kv_heads}
            if options.sweep:
                for block_size, topk in configs:
                    attempt(
                        results,
                        "results",
                        case,
                        bench_sweep.sweep,
                        options,
                        tokens,
                        q_heads,
                        kv_heads,
                        block_size,
                        topk,
                    )
                continue
            for name in DENSE if options.dense else ():
                attempt(
                    results, "dense", case | {"name": name}, measure_dense, options, tokens, q_heads, kv_heads, name
                )
            for block_size, topk in configs:
                shape = case | {"block_size": block_size, "topk": topk}
                attempt(
                    results, "results", shape, measure, options, tokens, q_heads, kv_heads, MoBAConfig(block_size, topk)
                )
    if not options.sweep:
        print_table(results)
    failed = [r for r in results["results"] + results["dense"] if "error" in r]
    for r in failed:
        print("FAILED", {k: v for k, v in r.items() if k != "trace"})
    sys.exit(1 if failed else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every configuration")
    parser.add_argument("--tokens", default="8192,32768,131072,524288")
    parser.add_argument("--heads", default="16/16,32/8", help="q/kv heads, comma-separated")
    parser.add_argument("--configs", default="128:8,512:8,4096:12", help="block size:topk, comma-separated")
    parser.add_argument("--iterations", type=int, default=20, help="timed calls, at least 1; fewer where --budget ends")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of timed calls for one figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=1, help="inputs whose routing is checked, the timed ones among them"
    )
    parser.add_argument("--commit", default="", help="git commit to note, where the checkout has no .git")
    parser.add_argument("--no-dense", dest="dense", action="store_false", help="leave out dense attention")
    parser.add_argument("--no-check", dest="check", action="store_false", help="leave out the numeric checks")
    parser.add_argument("--quick", action="store_true", help="128K tokens, 16/16 heads, 5 iterations")
    parser.add_argument("--sweep", action="store_true", help="launch configurations instead; 128K tokens, 16/16 heads")
    options = parser.parse_args()
    if options.quick or options.sweep:
        options.tokens, options.heads, options.iterations = "131072", "16/16", 5
        options.budget = min(options.budget, 3.0)
    return options


def run_about(options: argparse.Namespace) -> dict[str, Any]:
    return about(options.commit) | {"seed": options.seed, "dtype": "bfloat16", "head_dim": HEAD_DIM}


def attempt(results: dict, key: str, case: dict, function: Callable, *arguments) -> None:
    """Add what `function` measures to `results`; a failure is noted and the rest goes on."""
    began = time.perf_counter()
    try:
        found = function(*arguments)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {str(error)[:300]}", "trace": traceback.format_exc()}
    torch.cuda.empty_cache()
    entry = case | found
    results[key].append(entry)
    arguments[0].out.parent.mkdir(parents=True, exist_ok=True)
    arguments[0].out.write_text(json.dumps(results, indent=1))
    shown = {k: v for k, v in entry.items() if k not in ("trace", "launches")}
    print(f"[{time.perf_counter() - began:.1f} s]", json.dumps(shown), flush=True)


def make_inputs(tokens: int, q_heads: int, kv_heads: int, seed: int) -> list[Tensor]:
    """q, k, v, dout: N(0, 1), `[tokens, heads, HEAD_DIM]`."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    draw = lambda heads: torch.randn(  # noqa: E731
        tokens, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator
    )
    return [draw(q_heads), draw(kv_heads), draw(kv_heads), draw(q_heads)]


def timed(call: Callable[[], Any], options: argparse.Namespace) -> dict[str, float]:
    """Median and quartiles of milliseconds of `call` on the GPU, and the median on the host."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    count = max(1, min(options.iterations, int(options.budget / (time.perf_counter() - began))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    host = []
    for start, end in events:
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        host.append(1e3 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    gpu = sorted(start.elapsed_time(end) for start, end in events)
    spread = statistics.quantiles(gpu, n=4) if count > 1 else [gpu[0]] * 3
    return {
        "median": round(statistics.median(gpu), 4),
        "quartile_1": round(spread[0], 4),
        "quartile_3": round(spread[2], 4),
        "count": count,
        "host_ms": round(statistics.median(host), 4),
    }


def peak_gib(call: Callable[[], Any]) -> float:
    """Peak memory of one call, inputs and all that it leaves behind included."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    left = call()
    torch.cuda.synchronize()
    del left
    return round(torch.cuda.max_memory_allocated() / 2**30, 3)


def measure(
    options: argparse.Namespace, tokens: int, q_heads: int, kv_heads: int, config: MoBAConfig
) -> dict[str, Any]:
    """One configuration through `moba_attention`, timed and checked."""
    q, k, v, dout = make_inputs(tokens, q_heads, kv_heads, options.seed)
    layout = SequenceLayout.contiguous([0, tokens], 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    @torch.no_grad()
    def forward():
        return moba_attention(q, k, v, config, layout=layout)

    def forward_backward():
        out = moba_attention(q, k, v, config, layout=layout)
        return out, torch.autograd.grad(out, leaves, dout)

    found: dict[str, Any] = {
        "forward_ms": timed(forward, options),
        "forward_backward_ms": timed(forward_backward, options),
        "forward_peak_gib": peak_gib(forward),
        "forward_backward_peak_gib": peak_gib(forward_backward),
        "forward_stages_ms": stages(forward),
        "forward_backward_stages_ms": stages(forward_backward),
        "floors_ms": floors(tokens, q_heads, kv_heads, config),
    }
    if options.check:
        out = moba_attention(q, k, v, config, layout=layout)
        saved = out.grad_fn.saved_tensors  # freed by the backward pass
        gradients = torch.autograd.grad(out, leaves, dout)
        again = forward_backward()
        same = all(torch.equal(a, b) for a, b in zip([out, *gradients], [again[0], *again[1]]))
        del again
        checks = bench_checks.check_run(q, k, v, dout, out, gradients, saved[4], saved[5], config)
        found["checks"] = {"same_bits_again": same} | checks | {"seeds": options.seeds}
        del q, k, v, dout, leaves, out, saved, gradients
        for seed in range(options.seed + 1, options.seed + options.seeds):
            q, k = make_inputs(tokens, q_heads, kv_heads, seed)[:2]
            routing = bench_checks.check_routing(q, k, config)
            for key in ("rows", "wrong_rows", "reordered_rows"):
                found["checks"][key] += routing[key]
    return found


def stages(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """GPU milliseconds of a call by stage, medians."""
    runs = []
    for _ in range(repeats):
        with time_stages() as timer:
            call()
        runs.append(timer.milliseconds())
    return {name: round(statistics.median(r[name] for r in runs), 4) for name in runs[0]}


def floors(tokens: int, q_heads: int, kv_heads: int, config: MoBAConfig) -> dict[str, float]:
    """Milliseconds that arithmetic alone (FLOPS) and memory traffic alone (BYTES_PER_SECOND) would take.

    A row attends to (position in block + 1) + B * min(k - 1, blocks before) keys: 4 D FLOPs each forward, 10 D backward.
    It is scored against every block before: 2 D FLOPs. Traffic is that of a block-major design: each of a row's partial
    results (forward 2 D + 4 bytes, backward 2 D) is written and read once; inputs, outputs and gradients pass once.
    """
    block, size = torch.arange(tokens) // config.block_size, config.block_size
    past = block.clamp(max=config.topk - 1)
    keys = int((torch.arange(tokens) % size + 1 + size * past).sum())
    slots, scored = int((past + 1).sum()), int(block.sum())
    row, pair = 2 * HEAD_DIM * tokens, q_heads * slots
    forward = 2 * pair * (2 * HEAD_DIM + 4) + row * (2 * q_heads + 2 * kv_heads)
    backward = 2 * pair * 2 * HEAD_DIM + row * (4 * q_heads + 4 * kv_heads)
    found = {
        "forward_attention": q_heads * keys * 4 * HEAD_DIM / FLOPS,
        "backward_attention": q_heads * keys * 10 * HEAD_DIM / FLOPS,
        "scoring": q_heads * scored * 2 * HEAD_DIM / FLOPS,
        "forward_traffic": forward / BYTES_PER_SECOND,
        "backward_traffic": backward / BYTES_PER_SECOND,
    }
    return {name: round(1e3 * seconds, 4) for name, seconds in found.items()}


def measure_dense(options: argparse.Namespace, tokens: int, q_heads: int, kv_heads: int, name: str) -> dict[str, Any]:
    """Full causal attention by torch's `scaled_dot_product_attention` with one backend."""
    q, k, v, dout = (x.transpose(0, 1)[None] for x in make_inputs(tokens, q_heads, kv_heads, options.seed))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(DENSE[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q_heads != kv_heads)

    with torch.no_grad():
        forward = timed(lambda: call(*leaves), options)
    found = {"forward_ms": forward, "forward_peak_gib": peak_gib(torch.no_grad()(lambda: call(*leaves)))}
    both = lambda: torch.autograd.grad(call(*leaves), leaves, dout)  # noqa: E731
    if forward["median"] < 1000:
        found |= {"forward_backward_ms": timed(both, options), "forward_backward_peak_gib": peak_gib(both)}
    return found


def print_table(results: dict[str, Any]) -> None:
    """Totals of everything measured."""
    print(f"\n{results['about']}\n")
    print(f"{'tokens':>7} {'heads':>6} {'what':>12} {'forward':>9} {'fwd+bwd':>9} {'GiB':>11}  checks")
    for r in sorted(results["dense"] + results["results"], key=lambda r: (r["q_heads"], r["tokens"])):
        what = r.get("name") or f"({r['block_size']}, {r['topk']})"
        cell = lambda key: f"{r[key]['median']:9.3f}" if key in r else f"{'-':>9}"  # noqa: B023, E731
        peak = f"{r.get('forward_peak_gib', 0):5.2f} {r.get('forward_backward_peak_gib', 0):5.2f}"
        heads = f"{r['q_heads']}/{r['kv_heads']}"
        checks = r.get("error") or r.get("checks", "")
        print(
            f"{r['tokens']:7} {heads:>6} {what:>12} {cell('forward_ms')} {cell('forward_backward_ms')} {peak}  {checks}"
        )


if __name__ == "__main__":
    main()
