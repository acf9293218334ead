"""Every split trains alike: tables of `parallel_equality` and `pretrain_gpt_stock`."""

from __future__ import annotations

from typing import Any

from .text import Entry


def equality_table(content: dict[str, Any]) -> str:
    """Markdown of `parallel_equality`: one row per model, with all splits that it was trained under."""
    about = content["about"]
    models: dict[str, list[Entry]] = {}
    for run in content["runs"]:
        if "relative_differences" in run:
            models.setdefault(run["model"], []).append(run)
    lines = [
        f"Training steps with Megatron's optimizer, {about['device']}, megatron-core {about['megatron_core']}: largest relative "
        f"difference from one process, over steps and splits (allowed: {content['tolerance']:.0e}).",
        "",
        "| model | splits | loss | gradient norm | evaluation loss |",
        "|---|---|---|---|---|",
    ]
    for model, runs in models.items():
        worst = [max(r["relative_differences"][key] for r in runs) for key in ("loss", "grad_norm", "evaluation_loss")]
        splits = list(dict.fromkeys(split_label(r["split"]) for r in runs))
        lines.append(f"| {model} | {'; '.join(splits)} | {' | '.join(f'{x:.0e}' for x in worst)} |")
    return "\n".join(lines)


def split_label(split: dict[str, Any]) -> str:
    """The settings of a split that are not the defaults: "TP 2 CP 2 SP"."""
    if split["plain"]:
        return "plain torch"
    names = {"tensor": "TP", "context": "CP", "pipeline": "PP", "virtual_pipeline": "VPP", "data": "DP"}
    parts = [f"{name} {split[key]}" for key, name in names.items() if split[key] > 1]
    parts += ["SP"] * split["sequence"] + [f"micro-batch {split['micro_batch']}"] * (split["micro_batch"] > 1)
    return " ".join(parts + [f"{split['recompute']} recomputation"] * (split["recompute"] != "none"))


def pretrain_table(content: dict[str, Any]) -> str:
    """Markdown of `pretrain_gpt_stock`: one row per way to start it and split."""
    about = content["about"]
    lines = [
        f"Megatron-LM's own `pretrain_gpt.py`, unmodified (commit {about['megatron_lm_commit'][:10]}), {about['device']}: "
        "largest relative difference of the losses from CP 1. The commands are in docs/results/pretrain_gpt.json.",
        "",
        "| started by | split | loss, first and last step | difference |",
        "|---|---|---|---|",
    ]
    for run in content["runs"]:
        losses = f"{run['loss'][0]:.6f}, {run['loss'][-1]:.6f}"
        lines.append(f"| `{run['how']}` | {run['split']} | {losses} | {run['relative_difference']:.0e} |")
    return "\n".join(lines)
