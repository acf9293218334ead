"""MoBA on one GPU: forward and forward+backward through the public call, by stage, beside dense attention and the floors.

    python -m scripts.bench_kernels --out docs/results/kernels.json   # everything
    python -m scripts.bench_kernels --quick --out kernels.json        # 128K tokens, 16/16 heads, 5 iterations

Each timed configuration is checked on the tensors that were timed (`harness.checks`); the program fails beyond
`harness.limits`. Times are medians of CUDA events over back-to-back calls, so that launch overhead shows where it is not hidden;
`host_ms` is what a call costs the CPU. Launch configurations: `scripts.tune`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.config import DEFAULT_WORKSPACE_BYTES

from .harness import checks, limits, options
from .harness.inputs import HEAD_DIM, draw_inputs
from .harness.records import Results, about
from .harness.timing import Times, peak_bytes, stage_milliseconds, time_calls

FLOPS, BYTES_PER_SECOND = 800e12, 3.0e12
"""Of the floors: sustained rates of an H100."""
DENSE = {"dense cuDNN": SDPBackend.CUDNN_ATTENTION, "dense flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Case:
    """What is measured, and how.

    Attributes:
        seed: of the timed inputs.
        seeds: inputs whose routing is checked, the timed ones among them.
        iterations, seconds: calls timed for one figure, and the time after which fewer are.
        check: compare results with fp32.
        workspace_gib: `workspace_bytes` of MoBA's calls, in GiB; 0 for the default.
    """

    tokens: int
    q_heads: int
    kv_heads: int
    device: torch.device
    seed: int
    seeds: int
    iterations: int
    seconds: float
    check: bool
    workspace_gib: float = 0

    @property
    def workspace_bytes(self) -> int:
        return math.ceil(self.workspace_gib * 2**30) or DEFAULT_WORKSPACE_BYTES

    @property
    def shape(self) -> dict[str, int]:
        return {"tokens": self.tokens, "q_heads": self.q_heads, "kv_heads": self.kv_heads}

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return draw_inputs(self.tokens, self.q_heads, self.kv_heads, seed, self.device)

    def time(self, call: Any) -> Times:
        return time_calls(call, self.device, iterations=self.iterations, seconds=self.seconds)

    def peak_gib(self, call: Any) -> float:
        return round(peak_bytes(call, self.device) / 2**30, 3)


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written after every configuration", dir_okay=False)],
    tokens: Annotated[str, typer.Option(help="comma-separated")] = "8192,32768,131072,524288",
    heads: Annotated[str, typer.Option(help="q/kv heads, comma-separated")] = "16/16,32/8",
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "128:8,512:8,4096:12",
    iterations: Annotated[int, typer.Option(help="timed calls; fewer where --budget ends", min=1)] = 20,
    budget: Annotated[float, typer.Option(help="seconds of timed calls for one figure")] = 6.0,
    seed: Annotated[int, typer.Option(help="of the timed inputs")] = 0,
    seeds: Annotated[int, typer.Option(help="inputs whose routing is checked, the timed ones among them", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cuda; cpu tries the program, without cuDNN")] = "cuda",
    commit: options.Commit = "",
    dense: Annotated[bool, typer.Option(help="also dense attention")] = True,
    check: Annotated[bool, typer.Option(help="compare results with fp32")] = True,
    quick: Annotated[bool, typer.Option(help="128K tokens, 16/16 heads, 5 iterations")] = False,
    workspace_gib: Annotated[float, typer.Option(help="workspace_bytes in GiB; 0: the default", min=0)] = 0,
) -> None:
    """Time the layer on one GPU, check what was timed, and write one JSON entry per configuration."""
    if quick:
        tokens, heads, iterations, budget = "131072", "16/16", 5, min(budget, 3.0)
    lengths, pairs, sizes = options.integers(tokens), options.heads(heads), options.configs(configs)
    place = options.device(device)
    backends = [name for name in DENSE if place.type == "cuda" or DENSE[name] != SDPBackend.CUDNN_ATTENTION]
    torch.backends.cuda.matmul.allow_tf32 = False
    head = {"about": about(commit) | {"seed": seed, "dtype": "bfloat16", "head_dim": HEAD_DIM}}
    results = Results(out, head, "results", "dense")
    for q_heads, kv_heads in pairs:
        for length in lengths:
            case = Case(length, q_heads, kv_heads, place, seed, seeds, iterations, budget, check, workspace_gib)
            for name in backends if dense else ():
                results.attempt("dense", case.shape | {"name": name}, lambda: measure_dense(case, name))  # noqa: B023
            for size, topk in sizes:
                more = {"workspace_gib": workspace_gib} if workspace_gib else {}
                shape = {**case.shape, "block_size": size, "topk": topk, **more}
                results.attempt("results", shape, lambda: measure(case, MoBAConfig(size, topk)))  # noqa: B023
    print_table(results.content)
    for entry in results.failed:
        print("FAILED", {key: value for key, value in entry.items() if key != "trace"})
    if results.failed:
        sys.exit(1)
    limits.end(limits.broken(results.content["results"]))


def measure(case: Case, config: MoBAConfig) -> dict[str, Any]:
    """One configuration through `moba_attention`: timed, checked, and its routing checked on more inputs."""
    found = measure_call(case, config)
    for seed in range(case.seed + 1, case.seed + case.seeds) if case.check else ():
        routing = checks.check_routing(*case.inputs(seed)[:2], config)
        for key in ("rows", "wrong_rows", "reordered_rows"):
            found["checks"][key] += routing[key]
    return found


def measure_call(case: Case, config: MoBAConfig) -> dict[str, Any]:
    """Times, memory, stages and errors of one set of inputs."""
    q, k, v, dout = case.inputs(case.seed)
    layout = SequenceLayout.contiguous([0, case.tokens], 1)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    @torch.no_grad()
    def forward() -> Tensor:
        return moba_attention(q, k, v, config, layout=layout, workspace_bytes=case.workspace_bytes)

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = moba_attention(q, k, v, config, layout=layout, workspace_bytes=case.workspace_bytes)
        return out, torch.autograd.grad(out, leaves, dout)

    found: dict[str, Any] = {
        "forward_ms": case.time(forward).record(),
        "forward_backward_ms": case.time(forward_backward).record(),
        "forward_peak_gib": case.peak_gib(forward),
        "forward_backward_peak_gib": case.peak_gib(forward_backward),
        "forward_stages_ms": stage_milliseconds(forward, case.device),
        "forward_backward_stages_ms": stage_milliseconds(forward_backward, case.device),
        "floors_ms": floors(case.tokens, case.q_heads, case.kv_heads, config),
    }
    if not case.check:
        return found
    out = moba_attention(q, k, v, config, layout=layout, workspace_bytes=case.workspace_bytes)
    assert out.grad_fn is not None
    lse, selected = out.grad_fn.saved_tensors[4:6]  # type: ignore[attr-defined]  # freed by the backward pass
    gradients = torch.autograd.grad(out, leaves, dout)
    again = forward_backward()
    same = all(torch.equal(a, b) for a, b in zip([out, *gradients], [again[0], *again[1]], strict=True))
    errors = checks.check_run(q, k, v, dout, out, gradients, lse, selected, config)
    return found | {"checks": {"same_bits_again": same} | errors | {"seeds": case.seeds}}


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


def measure_dense(case: Case, name: str) -> dict[str, Any]:
    """Full causal attention by torch's `scaled_dot_product_attention` with one backend."""
    q, k, v, dout = (x.transpose(0, 1)[None] for x in case.inputs(case.seed))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def call() -> Tensor:
        with sdpa_kernel(DENSE[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=case.q_heads != case.kv_heads)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(), leaves, dout)

    alone = torch.no_grad()(call)
    forward = case.time(alone)
    found: dict[str, Any] = {"forward_ms": forward.record(), "forward_peak_gib": case.peak_gib(alone)}
    if forward.median < 1000:
        found |= {"forward_backward_ms": case.time(both).record(), "forward_backward_peak_gib": case.peak_gib(both)}
    return found


def print_table(content: dict[str, Any]) -> None:
    """Totals of everything measured."""
    print(f"\n{content['about']}\n")
    print(f"{'tokens':>7} {'heads':>6} {'what':>12} {'forward':>9} {'fwd+bwd':>9} {'GiB':>11}  checks")
    for entry in sorted(content["dense"] + content["results"], key=lambda entry: (entry["q_heads"], entry["tokens"])):
        what = entry.get("name") or f"({entry['block_size']}, {entry['topk']})"
        times = " ".join(
            f"{entry[key]['median']:9.3f}" if key in entry else f"{'-':>9}"
            for key in ("forward_ms", "forward_backward_ms")
        )
        peak = f"{entry.get('forward_peak_gib', 0):5.2f} {entry.get('forward_backward_peak_gib', 0):5.2f}"
        heads = f"{entry['q_heads']}/{entry['kv_heads']}"
        print(
            f"{entry['tokens']:7} {heads:>6} {what:>12} {times} {peak}  {entry.get('error') or entry.get('checks', '')}"
        )


if __name__ == "__main__":
    typer.run(main)
