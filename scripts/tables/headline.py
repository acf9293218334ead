"""The README's first table: full attention against MoBA, one layer and training steps."""

from __future__ import annotations

from typing import Any

from .scaling import times
from .speed import attention_name, sizes, step_rows
from .text import short_device

TOKENS = 1 << 17


def headline(scaling: dict[str, Any], training: dict[str, Any]) -> str:
    """Markdown: one layer on one GPU with as many kv heads as q heads, steps of `training` with both, and its longest step.

    Args:
        scaling: of `scripts.scaling`: MoBA and full attention of one run.
        training: of `scripts.training_speed`.
    """
    device = short_device(scaling["device"])
    lines = [
        f"| {TOKENS >> 10}K tokens, one {device}, unless it says otherwise | full attention | MoBA | times as fast |",
        "|---|---|---|---|",
        *_layers(scaling),
        *step_rows(training),
    ]
    runs = [run for run in training["runs"] if "error" not in run]
    ours = [run for run in runs if run["attention"].startswith("moba")]
    if ours:
        run = max(ours, key=lambda run: (run["tokens_per_step"], -run["step_seconds"]))
        what = (
            f"training step, {run['parameters'] / 1e9:.1f}B, {attention_name(run['attention']).removeprefix('MoBA ')}"
        )
        where = f"{run['tokens_per_step']:,} tokens, {run['gpus']} {short_device(training['about']['device'])}"
        alike = [r for r in runs if r["attention"].startswith("full") and _on_gpus(r) == _on_gpus(run)]
        full = f"{alike[0]['step_seconds']:.1f} s" if alike else "not measured"
        faster = f" {alike[0]['step_seconds'] / run['step_seconds']:.1f}x" if alike else ""
        lines.append(f"| {what}, {where} | {full} | **{run['step_seconds']:.1f} s** |{faster} |")
    return "\n".join(lines)


def _on_gpus(run: dict[str, Any]) -> tuple[object, ...]:
    return *sizes(run), run["gpus"]


def _layers(scaling: dict[str, Any]) -> list[str]:
    dense = {
        b["q_heads"]: b
        for b in scaling["baselines"]
        if b["baseline"] == "dense_heads" and (b["ranks"], b["tokens"]) == (1, TOKENS) and "forward_ms" in b
    }
    rows = []
    for r in sorted(scaling["results"], key=lambda r: r["block_size"]):
        ordinary = r["q_heads"] == r["kv_heads"] and r["routing"] == "uniform" and "forward_backward_ms" in r
        full = dense.get(r["q_heads"])
        if ordinary and (r["ranks"], r["tokens"]) == (1, TOKENS) and full:
            what = f"layer, {r['q_heads']}/{r['kv_heads']} heads, ({r['block_size']}, {r['topk']})"
            faster = " / ".join(f"{full[key] / r[key]:.1f}x" for key in ("forward_ms", "forward_backward_ms"))
            rows.append(f"| {what} | {times(full)} ms | **{times(r)} ms** | {faster} |")
    return rows
