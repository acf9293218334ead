"""The attention function for transformers against SDPA: the table of `bench_huggingface`."""

from __future__ import annotations

from typing import Any


def huggingface_table(content: dict[str, Any]) -> str:
    """Markdown: one row per thing that was timed, SDPA first, then each MoBA setting with how many times as fast it is."""
    about, results = content["about"], content["results"]
    first = results[0]
    lines = [
        f"{about['device']}, bf16, {first['tokens']} tokens in the cache, {first['q_heads']}/{first['kv_heads']} heads, D = "
        f"{first['head_dim']}, N(0, 1) inputs; torch {about['torch']}, Triton {about['triton']}, transformers "
        f"{about['transformers']}, commit {about['commit'][:10]}. Medians of milliseconds per layer; in brackets, how many "
        "times as fast as SDPA. *Block completes*: the one step per block that also computes its centroid, in a CUDA graph. "
        "*Error*: the largest of the outputs, relative to an fp32 evaluation of the definition.",
        "",
        "| attention | prefill | chunk at the end | decode, CUDA graph | decode, block completes | decode, called | error |",
        "|---|---|---|---|---|---|---|",
    ]
    by_setting: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for result in results:
        if "ms" in result or "called_ms" in result:
            setting = result.get("block_size", 0), result.get("topk", 0)
            by_setting.setdefault(setting, {})[result["what"]] = result
    dense = by_setting[0, 0]
    for setting, cases in by_setting.items():
        cells = ["SDPA" if setting == (0, 0) else f"MoBA ({setting[0]}, {setting[1]})"]
        for what, figure in (
            ("prefill", "ms"),
            ("chunk", "ms"),
            ("decode", "graph_ms"),
            ("decode", "completing_graph_ms"),
            ("decode", "called_ms"),
        ):
            if figure not in cases[what]:
                cells.append("")
                continue
            time = cases[what][figure]["median"]
            faster = dense[what][figure.removeprefix("completing_")]["median"] / time
            cells.append(f"{time:.3g}" if setting == (0, 0) else f"{time:.3g} ({faster:.1f})")
        errors = [case["output_error"] for case in cases.values() if "output_error" in case]
        lines.append("| " + " | ".join([*cells, f"{max(errors):.1e}" if errors else ""]) + " |")
    return "\n".join(lines)
