"""Attention, and a block of a model around it, eager and compiled by `torch.compile` as one graph.

    python -m scripts.bench_compile --out docs/results/compile.json

Eager and compiled calls take turns. Times are milliseconds on the device, back to back, and on the host until the call returns.
Attention's operators are also called by themselves, without graph and autograd: that is what they cost inside a larger graph, and
the rest of a compiled call is torch's, once per graph.
Outputs and gradients of the timed calls are compared; the program fails where they differ by more than `DIFFERENCES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, set_layout
from moba_cp.config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES

from .harness import limits, options
from .harness.inputs import draw_inputs
from .harness.llama import Block, rotary
from .harness.records import Results, about
from .harness.timing import Times, time_calls

DIFFERENCES = {"attention": 0.0, "block": 2.0**-6}
"""Largest relative difference between eager and compiled, norm against norm. Attention is one operator, which launches the same
kernels: equal bits. A compiled block keeps fp32 between fused operations where the eager one rounds to bf16 (2^-9) a dozen times,
and may route rows whose scores nearly tie to other blocks; measured: 0.002."""


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written after every case", dir_okay=False)],
    tokens: Annotated[int, typer.Option(help="tokens of the sequence")] = 8192,
    heads: Annotated[str, typer.Option(help="q/kv heads")] = "32/8",
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "512:3,512:8,128:8",
    hidden: Annotated[int, typer.Option(help="hidden size of the block; 0 leaves it out")] = 4096,
    rounds: Annotated[int, typer.Option(help="rounds of eager and compiled in turns", min=1)] = 5,
    iterations: Annotated[int, typer.Option(help="calls of each in a round", min=1)] = 10,
    backend: Annotated[str, typer.Option(help="of torch.compile")] = "inductor",
    device_name: Annotated[str, typer.Option("--device", help="cuda, or cpu to try the program")] = "cuda",
    commit: options.Commit = "",
) -> None:
    """Eager against compiled, forward alone and with backward, on one device."""
    (q_heads, kv_heads), pairs = options.single(options.heads, heads), options.configs(configs)
    place = options.device(device_name)
    results = Results(out, {"about": about(commit) | {"backend": backend}}, "results")
    for sizes in pairs:
        config, layout = MoBAConfig(*sizes), SequenceLayout.contiguous([0, tokens], 1)
        case = {
            "tokens": tokens, "q_heads": q_heads, "kv_heads": kv_heads, "block_size": sizes[0], "topk": sizes[1],
        }  # fmt: skip
        *inputs, dout = draw_inputs(tokens, q_heads, kv_heads, 0, place)
        attend = lambda q, k, v, config=config, layout=layout: moba_attention(q, k, v, config, layout=layout)  # noqa: E731
        calls: list[tuple[str, Callable[..., Tensor], list[Tensor], Tensor]] = [("attention", attend, inputs, dout)]
        if hidden:
            torch.manual_seed(0)
            with place:
                block = Block(hidden, (q_heads, kv_heads), config, None).to(torch.bfloat16)
            set_layout(block, layout)
            x = torch.randn(tokens, hidden, device=place, dtype=torch.bfloat16)
            turns = rotary(torch.arange(tokens, device=place), block.head_dim, x.dtype)
            calls.append(("block", lambda x, b=block, t=turns: b(x, *t), [x], torch.randn_like(x)))
        for what, function, arguments, gradient in calls:
            alone = _operators(inputs, dout, config, layout) if what == "attention" else {}
            measure = lambda f=function, a=arguments, g=gradient, others=alone: _in_turns(  # noqa: E731
                f, a, g, others, backend, rounds, iterations, place
            )
            results.attempt("results", {"what": what} | case, measure)
        torch.compiler.reset()
    if results.failed:
        raise typer.Exit(1)
    for what, limit in DIFFERENCES.items():
        some = [entry for entry in results.content["results"] if entry["what"] == what]
        limits.end(limits.broken(some, {"largest_difference": limit}))


def _operators(
    inputs: list[Tensor], dout: Tensor, config: MoBAConfig, layout: SequenceLayout
) -> dict[str, dict[str, Callable[[], None]]]:
    """The operators of a call of attention, called by themselves: forward, and both."""
    described, sizes = layout.described, (config.block_size, config.topk, config.softmax_scale, "", "auto")
    most = (DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES, None)

    def attend(gradients: bool) -> tuple[Tensor, ...]:
        return torch.ops.moba_cp.attention(*inputs, described, None, None, None, *sizes, True, False, gradients, *most)

    @torch.no_grad()
    def forward() -> None:
        attend(False)

    @torch.no_grad()
    def both() -> None:
        out, lse, selected, _, _, route = attend(True)
        torch.ops.moba_cp.attention_backward(dout, *inputs, out, lse, selected, described, route, *sizes, *most)

    return {"operators": {"forward": forward, "forward_backward": both}}


def _in_turns(
    function: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, others: dict[str, dict[str, Callable[[], None]]],
    backend: str, rounds: int, iterations: int, device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of `function` eager and compiled, and of `others`, by what runs; and the largest relative differences between
    eager and compiled."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    variants = {"eager": function, "compiled": torch.compile(function, backend=backend, fullgraph=True)}
    last: dict[str, list[Tensor]] = {}

    def calls(name: str) -> dict[str, Callable[[], None]]:
        @torch.no_grad()
        def forward() -> None:
            variants[name](*inputs)

        def both() -> None:
            for leaf in leaves:
                leaf.grad = None
            out = variants[name](*leaves)
            out.backward(dout)
            last[name] = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

        return {"forward": forward, "forward_backward": both}

    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, passes in ({name: calls(name) for name in variants} | others).items():
            for what, call in passes.items():
                found = time_calls(call, device, iterations=iterations)
                times.setdefault(f"{what}_{name}_ms", []).extend(found.all)
                times.setdefault(f"{what}_{name}_host_ms", []).extend(found.host)
    result: dict[str, Any] = {name: Times(tuple(values)).record() for name, values in times.items()}
    pairs = list(zip(last["compiled"], last["eager"], strict=True))
    result["largest_difference"] = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    result["bitwise_equal"] = all(torch.equal(a, b) for a, b in pairs)
    return result


if __name__ == "__main__":
    typer.run(main)
