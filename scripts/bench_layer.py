"""The attention layer over 1..N GPUs: time by stage, bytes, peak memory, for every exchange, uniform and correlated routing.

    torchrun --nproc-per-node 2 -m scripts.bench_layer --out docs/results/layer.json
    torchrun --nproc-per-node 8 -m scripts.bench_layer --tokens-per-gpu 131072 --total-tokens 1048576 --out layer.json

Every timed configuration is checked: output and dq of sampled rows against the definition in fp64 (`harness.definition`), and
bit for bit against the first exchange. One entry of the JSON is one (ranks, heads, block size, top-k,
tokens, routing, exchange); times are medians over iterations of the slowest rank. The same ranks also run the layer
alone (`ranks: 1`), so that one file holds the scaling curve.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.parallel.peer_memory import kept_bytes
from moba_cp.parallel.splits import COMMS

from .harness import definition, options
from .harness.inputs import HEAD_DIM, correlate, draw_inputs
from .harness.records import Results, about
from .harness.teams import join
from .harness.timing import peak_bytes, stage_milliseconds, time_on_ranks

LAYOUTS = {"contiguous": SequenceLayout.contiguous, "zigzag": SequenceLayout.zigzag}
ROUTINGS = ("uniform", "correlated")
QUIET = (
    *("forward_ms_all", "forward_backward_ms_all", "stages_ms_rank0", "traffic_forward_rank0", "lower_bound_bytes"),
    *("visible_bytes", "attended_keys"),
)


@dataclass(frozen=True)
class Case:
    """One set of inputs. With `ranks == 1`, every rank works for itself."""

    ranks: int
    tokens: int
    q_heads: int
    kv_heads: int
    config: MoBAConfig
    routing: str
    layout_name: str
    device: torch.device

    @property
    def layout(self) -> SequenceLayout:
        return LAYOUTS[self.layout_name]([0, self.tokens], self.ranks)

    @property
    def rank(self) -> int:
        return dist.get_rank() if self.ranks > 1 else 0

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout of the local tokens. Other layouts draw other numbers from the same distribution."""
        tokens = self.layout.local_tokens(self.rank)
        q, k, v, dout = draw_inputs(tokens, self.q_heads, self.kv_heads, 1 + self.rank, self.device)
        if self.routing == "correlated":
            correlate(q, k, self.layout, self.rank, self.config)
        return q, k, v, dout

    def entry(self, comm: str) -> dict[str, Any]:
        """What was measured, for the results."""
        return {
            "ranks": self.ranks,
            "tokens": self.tokens,
            "q_heads": self.q_heads,
            "kv_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "block_size": self.config.block_size,
            "topk": self.config.topk,
            "routing": self.routing,
            "layout": self.layout_name,
            "comm": comm,
        }


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written by rank 0")],
    tokens_per_gpu: Annotated[int, typer.Option(help="weak scaling: tokens on each GPU; 0 leaves it out")] = 131072,
    total_tokens: Annotated[int, typer.Option(help="strong scaling: tokens in all; 0 leaves it out")] = 0,
    heads: Annotated[str, typer.Option(help="q/kv heads, comma-separated")] = "16/16,32/8",
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "128:8,512:8,4096:12",
    transports: Annotated[
        str, typer.Option(help="values of comm=, comma-separated")
    ] = "all_gather,ring,fetch,pull,auto",
    routing: Annotated[str, typer.Option(help="uniform, correlated, or both comma-separated")] = "uniform,correlated",
    layout: Annotated[str, typer.Option(help="contiguous or zigzag")] = "zigzag",
    iterations: Annotated[int, typer.Option(help="timed iterations of each configuration", min=1)] = 5,
    alone: Annotated[bool, typer.Option(help="also one rank by itself, for the scaling curve")] = True,
    device: Annotated[str, typer.Option(help="cuda; cpu tries the program over gloo")] = "cuda",
    commit: Annotated[str, typer.Option(help="git commit to note, where the checkout has no .git")] = "",
) -> None:
    """Run the sweep on all ranks that torchrun started."""
    head_pairs, sizes = options.heads(heads), options.configs(configs)
    routings = options.choices(routing, ROUTINGS)
    (layout_name,) = options.choices(layout, LAYOUTS)
    comms = options.choices(transports, COMMS)
    place = join(options.device(device))
    world = dist.get_world_size()
    head = about(commit) | {"world_size": world}
    results = Results(out if dist.get_rank() == 0 else None, head, "results", quiet=QUIET)
    for (q_heads, kv_heads), size, kind in itertools.product(head_pairs, sizes, routings):
        runs = [(tokens, world) for tokens in sorted({tokens_per_gpu * world, total_tokens} - {0})]
        if alone and world > 1 and tokens_per_gpu:
            runs.append((tokens_per_gpu, 1))
        for tokens, ranks in runs:
            case = Case(ranks, tokens, q_heads, kv_heads, MoBAConfig(*size), kind, layout_name, place)
            measure(case, comms if ranks > 1 else ["auto"], iterations, results)
    dist.destroy_process_group()


def measure(case: Case, comms: list[str], iterations: int, results: Results) -> None:
    """One set of inputs through every exchange, the same on every rank."""
    q, k, v, dout = case.inputs()
    first: tuple[Tensor, Tensor] | None = None
    for comm in comms:
        entry = case.entry(comm)
        try:
            measured, outputs = run(case, (q, k, v), dout, comm, iterations)
            entry |= measured
            holders = definition.Ranks(dist.group.WORLD if case.ranks > 1 else None)
            entry |= definition.check_rows(q, k, v, dout, *outputs, None, case.config, case.layout, case.rank, holders)
            first = first or outputs
            same = all(torch.equal(a, b) for a, b in zip(outputs, first, strict=True))
            entry["bitwise_equal_to_first"] = on_all_ranks(same, case)
            del outputs
        except torch.OutOfMemoryError as error:
            entry["error"] = str(error).split(".")[0]
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
        results.add("results", entry)


def run(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor, comm: str, iterations: int
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Median times in ms over ranks' maxima, stages, bytes, peak memory; and (output, dq) of the last iteration."""
    layout, device = case.layout, case.device
    leaves = [x.detach().requires_grad_() for x in inputs]
    last: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward() -> None:
        moba_attention(*inputs, case.config, layout=layout, comm=comm)

    def both() -> None:
        for x in leaves:
            x.grad = None
        q, k, v = leaves
        last["out"] = moba_attention(q, k, v, case.config, layout=layout, comm=comm)
        last["out"].backward(dout)

    with torch.no_grad():
        _, report = moba_attention(*inputs, case.config, layout=layout, comm=comm, return_report=True)
    forward_peak, peak = peak_bytes(forward, device), peak_bytes(both, device)
    forward_times = time_on_ranks(forward, device, iterations=iterations, ranks=case.ranks)
    both_times = time_on_ranks(both, device, iterations=iterations, ranks=case.ranks)
    stages = stage_milliseconds(both, device, repeats=1)
    dq = leaves[0].grad
    assert dq is not None
    shared = kept_bytes() if report.transport == "pull" else 0
    measured = {
        "transport": report.transport,
        "forward_ms": forward_times.median,
        "forward_ms_all": forward_times.all,
        "forward_backward_ms": both_times.median,
        "forward_backward_ms_all": both_times.all,
        "stages_ms_rank0": stages,
        "traffic_forward_rank0": {name: vars(stage) for name, stage in report.traffic.stages.items()},
        "lower_bound_bytes": report.lower_bound_bytes.tolist(),
        "visible_bytes": report.visible_bytes.tolist(),
        "wanted_share": report.wanted_share,
        "imbalance": report.imbalance,
        "attended_keys": report.attended_keys.tolist(),
        "peak_gib_forward": (forward_peak + shared) / 2**30,
        "peak_gib_forward_backward": (peak + shared) / 2**30,
        "shared_gib": shared / 2**30,
    }
    return measured, (last["out"].detach(), dq)


def on_all_ranks(fact: bool, case: Case) -> bool:
    """Whether it holds on every rank."""
    flag = torch.tensor(int(fact), device=case.device)
    if case.ranks > 1:
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


if __name__ == "__main__":
    typer.run(main)
