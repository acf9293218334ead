"""The attention function for transformers against SDPA: the table of `bench_huggingface`."""

from __future__ import annotations

from typing import Any


def huggingface_table(content: dict[str, Any]) -> str:
    """Markdown: one row per attention, SDPA first, then each MoBA setting with how many times as fast it is.

    Decoding is left out where it was measured before its kernels took two launches, and a step that completes a block by itself.
    """
    about, results = content["about"], content["results"]
    first = results[0]
    columns = [("prefill", "prefill", "ms"), ("chunk at the end", "chunk", "ms")]
    if any("completing_graph_ms" in result for result in results):
        columns += [
            ("decode, CUDA graph", "decode", "graph_ms"),
            ("decode, block completes", "decode", "completing_graph_ms"),
            ("decode, called", "decode", "called_ms"),
        ]
    lines = [
        f"{about['device']}, bf16, {first['tokens']} tokens in the cache, {first['q_heads']}/{first['kv_heads']} heads, D = "
        f"{first['head_dim']}, N(0, 1) inputs; torch {about['torch']}, Triton {about['triton']}, transformers "
        f"{about['transformers']}, commit {about['commit'][:10]}. Medians of milliseconds per layer; in brackets, how many "
        "times as fast as SDPA. *Error*: the largest of the outputs, relative to an fp32 evaluation of the definition.",
        "",
        f"| attention | {' | '.join(title for title, _, _ in columns)} | error |",
        "|---" * (len(columns) + 2) + "|",
    ]
    by_setting: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for result in results:
        if "ms" in result or "called_ms" in result:
            setting = result.get("block_size", 0), result.get("topk", 0)
            by_setting.setdefault(setting, {})[result["what"]] = result
    dense = by_setting[0, 0]
    for setting, cases in by_setting.items():
        cells = ["SDPA" if setting == (0, 0) else f"MoBA ({setting[0]}, {setting[1]})"]
        for _, what, figure in columns:
            if figure not in cases[what]:
                cells.append("")
                continue
            time = cases[what][figure]["median"]
            faster = dense[what][figure.removeprefix("completing_")]["median"] / time
            cells.append(f"{time:.3g}" if setting == (0, 0) else f"{time:.3g} ({faster:.1f})")
        shown = {what for _, what, _ in columns}
        errors = [case["output_error"] for what, case in cases.items() if what in shown and "output_error" in case]
        lines.append("| " + " | ".join([*cells, f"{max(errors):.1e}" if errors else ""]) + " |")
    return "\n".join(lines)


def decode_table(content: dict[str, Any]) -> str:
    """Markdown: SDPA and each MoBA setting as shipped, in microseconds per layer; then the launch configurations tried."""
    about, results = content["about"], content["results"]
    first = results[0]
    lines = [
        f"{about['device']}, bf16, {first['tokens']} tokens in the cache, {first['q_heads']}/{first['kv_heads']} heads, D = "
        f"{first['head_dim']}, N(0, 1) inputs; torch {about['torch']}, Triton {about['triton']}, commit "
        f"{about['commit'][:10]}. Microseconds per layer in a CUDA graph, medians of {first['us']['count']} rounds in turns, and "
        "the least and the most. *Split*: most keys per program. *Error*: relative to an fp32 evaluation of the definition.",
        "",
        "| attention | split, keys per tile, stages | step | times as fast as SDPA | error |",
        "|---|---|---|---|---|",
    ]
    sdpa = {(r["block_size"], r["topk"]): r["us"] for r in results if r["what"] == "sdpa"}
    lines.append(f"| SDPA | | {', '.join(map(_spread, sdpa.values()))} | | |")
    for result in sorted(results, key=lambda r: (r["block_size"], not r.get("shipped"))):
        if result["what"] != "step":
            continue
        setting = result["block_size"], result["topk"]
        name = f"MoBA {setting}" if result["shipped"] else f"{setting}, tried"
        faster = sdpa[setting]["median"] / result["us"]["median"]
        lines.append(
            f"| {name} | {result['split']}, {result['keys']}, {result['num_stages']} | {_spread(result['us'])} | {faster:.1f} | "
            f"{result['output_error']:.1e} |"
        )
    return "\n".join(lines)


def _spread(us: dict[str, float]) -> str:
    return f"{us['median']:.1f} ({us['least']:.1f} to {us['most']:.1f})"
