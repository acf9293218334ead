"""The planner: predictions beside measurements, and tables of clusters that were not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from moba_cp import SequenceLayout
from moba_cp.parallel.balance import work_before
from moba_cp.planning.advice import Option, changed_budgets, crossings, fastest, label, slower, visiting_pays_from
from moba_cp.planning.calibration import Calibration
from moba_cp.planning.measured import compare, judged, read
from moba_cp.planning.sizes import Cluster, Layer

from .scaling import tokens_text

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = (1 << 20, 10 << 20, 100 << 20)
_SHORT = {"exchange_bytes": "exchange", "workspace_bytes": "workspace"}
LAYER = Layer(1 << 20, 32, 8, 512, 8)


def predictions_table(results: Path) -> str:
    """Markdown: errors of the predictions by device, exchange and number of GPUs.

    Files of GPUs without a calibration of their own are predicted with the default one.
    """
    lines = [
        "| device | GPUs | exchange | rows | forward, median / worst | forward+backward, median / worst |",
        "|" + "---|" * 6,
    ]
    everything = []
    for calibration, paths in judged(results):
        device, measured = read(paths)
        compared = compare(measured, calibration)
        everything += compared
        held_out = "" if device == calibration.device else f", with the coefficients of {calibration.device}"
        for ranks, comm in sorted({(c.measured.split.ranks, c.measured.split.comm) for c in compared}):
            some = [c for c in compared if (c.measured.split.ranks, c.measured.split.comm) == (ranks, comm)]
            errors = np.abs([c.errors for c in some])
            cells = [f"{np.median(errors[:, i]):.0%} / {errors[:, i].max():.0%}" for i in (0, 1)]
            lines.append(f"| {device}{held_out} | {ranks} | {comm} | {len(some)} | {cells[0]} | {cells[1]} |")
    errors = np.abs([c.errors for c in everything])
    lines += ["", f"All {len(everything)} rows: median {np.median(errors):.1%}, worst {errors.max():.0%}."]
    return "\n".join(lines)


def balance_table() -> str:
    """Markdown: attention and scoring work of the busiest rank over the mean, counted, zigzag beside balanced."""
    lines = ["| 128K tokens per rank, busiest rank over mean, counted | zigzag | balanced |", "|---|---|---|"]
    for block_size, topk in ((4096, 12), (512, 8), (128, 8)):
        for ranks in (2, 4, 8):
            ends = [0, ranks << 17]
            layouts = SequenceLayout.zigzag(ends, ranks), SequenceLayout.balanced(ends, ranks, block_size, topk)
            cells = " | ".join(f"{imbalance(layout, block_size, topk):.3f}" for layout in layouts)
            lines.append(f"| ({block_size}, {topk}), {ranks} ranks | {cells} |")
    return "\n".join(lines)


def imbalance(layout: SequenceLayout, block_size: int, topk: int) -> float:
    """Of one document: most work of a rank over the mean."""
    work = []
    for rank in range(layout.cp_size):
        start, end = layout.runs_of(rank).T
        work.append(int((work_before(end, block_size, topk) - work_before(start, block_size, topk)).sum()))
    return max(work) * layout.cp_size / sum(work)


def _cell(best: Option | None) -> str:
    if best is None:
        return "does not fit"
    budgets = "".join(f", {_SHORT[name]} {x / 2**30:g} GiB" for name, x in changed_budgets(best.split).items())
    gib = best.memory.peak
    return f"{label(best.split)}{budgets}: {best.milliseconds:,.0f} ms, {gib:.{0 if gib >= 10 else 1}f} GiB"


def _changes(best: Mapping[int, Option]) -> str:
    return "; ".join(f"{before} to {after} at {gpus} GPUs" for before, after, gpus in crossings(best)) or "none"


def _slower(best: Mapping[int, Option]) -> str:
    found = []
    for one in slower(best):
        gpus = f"{one.few.split.ranks} to {one.many.split.ranks} GPUs"
        found.append(f"{gpus}, {one.few.milliseconds:,.0f} to {one.many.milliseconds:,.0f} ms: {one.reason}")
    return "; ".join(found) or "nowhere"


def clusters_table(calibration: Calibration) -> str:
    """Markdown: the fastest split that fits, by number of GPUs and tokens, and where the best way changes."""
    cluster = Cluster(8)
    lines = [
        f"Predicted, not measured: one layer, {LAYER.q_heads}/{LAYER.kv_heads} heads, D = {LAYER.head_dim}, ({LAYER.block_size}, "
        f"{LAYER.topk}), bf16, one document, uniform routing, forward+backward; {calibration.device}, nodes of "
        f"{cluster.gpus_per_node}, {cluster.link:g} GB/s received per GPU inside a node, {cluster.fabric:g} GB/s between nodes "
        f"(one 400 Gb/s adapter per GPU, less protocol), full bisection, {cluster.memory:g} GiB. *exchange*, *workspace*: "
        "`exchange_bytes` and `workspace_bytes` where they are not the default, so that keys and values travel fewer times.",
        "",
        "| GPUs | " + " | ".join(f"{tokens_text(t)} tokens" for t in TOKENS) + " |",
        "|" + "---|" * (1 + len(TOKENS)),
    ]
    found = {tokens: fastest(replace(LAYER, tokens=tokens), cluster, calibration, GPUS) for tokens in TOKENS}
    lines += [f"| {gpus} | " + " | ".join(_cell(found[tokens].get(gpus)) for tokens in TOKENS) + " |" for gpus in GPUS]
    lines += ["", "Where another way becomes the fastest:", ""]
    for tokens in TOKENS:
        lines.append(f"- {tokens_text(tokens)} tokens: {_changes(found[tokens])}")
    routed = fastest(replace(LAYER, tokens=10 << 20, wanted_share=0.3), cluster, calibration, GPUS)
    lines.append(f"- 10M tokens, routing that wants 30 % of what it sees: {_changes(routed)}")
    lines += ["", "Where twice the GPUs take longer, since a GPU receives more and computes less beside it:", ""]
    for tokens in TOKENS:
        lines.append(f"- {tokens_text(tokens)} tokens: {_slower(found[tokens])}")
    pays = visiting_pays_from(LAYER)
    lines += [
        "",
        f"Sending queries to blocks would move fewer bytes above {pays:.0f} sequence ranks: with heads over nodes of "
        f"{cluster.gpus_per_node}, above {pays * cluster.gpus_per_node:.0f} GPUs (uniform routing). It is not built.",
    ]
    if calibration.assumed:
        lines.append(f"The overhead of {', '.join(calibration.assumed)} is assumed, not measured.")
    return "\n".join(lines)
