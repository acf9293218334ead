"""FSDP2 with context parallelism and `torch.compile`: the tables of `bench_fsdp` and `bench_compile`."""

from __future__ import annotations

from typing import Any


def fsdp_table(content: dict[str, Any]) -> str:
    """Markdown: one row per number of GPUs, with the speed relative to one GPU."""
    about, results = content["about"], sorted(content["results"], key=lambda result: result["ranks"])
    alone = results[0]
    difference = max(result["largest_relative_loss_difference"] for result in results)
    lines = [
        f"{about['device']}, a model of {alone['parameters'] / 1e6:.0f}M parameters with {alone['layers']} layers, "
        f"{alone['q_heads']}/{alone['kv_heads']} heads, D = {alone['hidden'] // alone['q_heads']}, "
        f"MoBA ({alone['block_size']}, {alone['topk']}) in each, AdamW, bf16; one sequence of {alone['tokens']} tokens; torch "
        f"{about['torch']}, Triton {about['triton']}, commit {about['commit'][:10]}. Medians of {len(alone['step_ms_all'])} "
        f"steps of the slowest rank, in brackets the fastest and the slowest step. Losses of {len(alone['losses'])} steps "
        f"agree to {difference:.0e}.",
        "",
        "| GPUs | ms per step | tokens per second | of one GPU | peak memory, GiB per GPU |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        spread = f"{min(result['step_ms_all']):.0f} to {max(result['step_ms_all']):.0f}"
        faster = result["tokens_per_second"] / alone["tokens_per_second"]
        lines.append(
            f"| {result['ranks']} | {result['step_ms']:.0f} ({spread}) | {result['tokens_per_second']} | {faster:.2f}x | "
            f"{result['peak_gib']:.1f} |"
        )
    return "\n".join(lines)


def compile_table(content: dict[str, Any]) -> str:
    """Markdown: eager and compiled, on the device and on the host."""
    about, results = content["about"], content["results"]
    first = results[0]
    lines = [
        f"{about['device']}, bf16, {first['tokens']} tokens, {first['q_heads']}/{first['kv_heads']} heads, D = 128; torch "
        f"{about['torch']} ({about['backend']}), Triton {about['triton']}, commit {about['commit'][:10]}. Medians of "
        f"{first['forward_eager_ms']['count']} calls in milliseconds, eager / compiled, and quartiles of the compiled ones in "
        "brackets. *Host*: until the call returns. *Difference*: of outputs and gradients, relative norm.",
        "",
        "| what | forward | forward, host | forward and backward | forward and backward, host | difference |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [f"{result['what']} ({result['block_size']}, {result['topk']})"]
        for what in ("forward", "forward_backward"):
            for host in ("", "host_"):
                eager, compiled = (result[f"{what}_{name}_{host}ms"] for name in ("eager", "compiled"))
                spread = f"{compiled['quartile_1']:.2f} to {compiled['quartile_3']:.2f}"
                cells.append(f"{eager['median']:.2f} / {compiled['median']:.2f} ({spread})")
        same = "none" if result["bitwise_equal"] else f"{result['largest_difference']:.0e}"
        lines.append("| " + " | ".join([*cells, same]) + " |")
    alone = [
        f"({result['block_size']}, {result['topk']}) {result['forward_operators_host_ms']['median']:.2f} and "
        f"{result['forward_backward_operators_host_ms']['median']:.2f}"
        for result in results
        if "forward_operators_host_ms" in result
    ]
    if alone:
        lines += [
            "",
            f"On the host, attention's operators by themselves, forward, and with backward: {'; '.join(alone)}.",
        ]
    return "\n".join(lines)
