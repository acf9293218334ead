"""Pictures of the page, each from the results alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .summary import SMOOTH, Run, arms, finished, first_long_step, smoothed


def pictures(results: dict[str, Any], folder: Path) -> None:
    """Write `learning_loss.png`, `learning_position.png`, and `learning_retrieval.png` where a run has answered a prompt."""
    import matplotlib

    matplotlib.use("Agg")
    runs = finished(results)
    losses(runs, folder / "learning_loss.png")
    by_position(runs, folder / "learning_position.png")
    if answered(runs):
        retrieval(runs, folder / "learning_retrieval.png")


def answered(runs: list[Run]) -> bool:
    """Whether a run has answered a prompt."""
    return any(e["exact"] for r in runs for e in r.get("retrieval", []))


def losses(runs: list[Run], path: Path) -> None:
    """Training curves, means over an arm's seeds, and their difference to full attention with its standard error."""
    from matplotlib import pyplot

    found = arms(runs)
    full = found.get("full", {})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for arm, seeds in found.items():
        curves = np.array([smoothed(r["loss_curve"]) for r in seeds.values()])
        width = len(next(iter(seeds.values()))["loss_curve"]) - curves.shape[1] + 1
        steps = np.arange(width, width + curves.shape[1])
        [line] = left.plot(steps, curves.mean(0), label=arm, linewidth=1)
        if arm == "full":
            continue
        first = first_long_step(next(iter(seeds.values())))
        band(right, steps, gaps_of(seeds, full, lambda r: smoothed(r["loss_curve"])), line.get_color(), after=first)
    tops = [line.get_ydata()[len(line.get_ydata()) // 10] for line in left.get_lines()]
    left.set(ylim=(None, max(tops)))  # the first steps would take all of the picture
    left.set(xlabel="step", ylabel="training loss of text, nats per token", title=f"Loss, mean of {SMOOTH} steps")
    right.set(xlabel="step", ylabel="loss − loss of full attention", title="Difference to full, same seed and batches")
    right.axhline(0, color="grey", linewidth=0.8)
    left.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def by_position(runs: list[Run], path: Path) -> None:
    """Difference of the held-out loss to full attention by position in the window."""
    from matplotlib import pyplot

    found = arms(runs)
    full = found.get("full", {})
    figure, axis = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for arm, seeds in found.items():
        rows = gaps_of(seeds, full, lambda r: np.array(r["by_position"]))
        if arm == "full" or not len(rows):
            continue
        length = next(iter(seeds.values()))["config"]["data"]["length"]
        [line] = axis.plot([], [], label=arm)
        band(axis, (np.arange(rows.shape[1]) + 0.5) * length / rows.shape[1], rows, line.get_color())
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel="position in the window", ylabel="loss − loss of full attention", title="Held-out loss by position")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def retrieval(runs: list[Run], path: Path) -> None:
    """Loss of answers while training, and share of prompts answered by length with one needle and with most."""
    from matplotlib import pyplot

    found = arms(runs)
    every = [e for r in runs for e in r.get("retrieval", [])]
    counts, lengths = sorted({e["needles"] for e in every} - {0}), sorted({e["length"] for e in every})
    chosen = sorted({counts[0], counts[-1]})
    figure, axes = pyplot.subplots(1, 1 + len(chosen), figsize=(4.5 * (1 + len(chosen)), 4), constrained_layout=True)
    for arm, seeds in found.items():
        [line] = axes[0].plot([], [], label=arm)
        told = [r["pairs"] for r in seeds.values() if "pairs" in r]
        if told:
            curves = np.array([[math.nan if x is None else x for x in t["answer_curve"]] for t in told])
            band(axes[0], (np.arange(curves.shape[1]) + 0.5) * told[0]["answer_curve_every"], curves, line.get_color())
        for axis, needles in zip(axes[1:], chosen):
            entries = [
                {e["length"]: e["exact"] for e in r["retrieval"] if e["needles"] == needles}
                for r in seeds.values()
                if r.get("retrieval")
            ]
            band(axis, lengths, np.array([[e[n] for n in lengths] for e in entries]), line.get_color(), "o-")
    axes[0].set(xlabel="step", ylabel="nats per token", title="Training: loss of second answers")
    axes[0].legend(fontsize=7)
    for axis, needles in zip(axes[1:], chosen):
        axis.set(
            xscale="log", xlabel="tokens of the prompt", ylim=(-0.03, 1.03), title=f"Prompts answered, {needles} hidden"
        )
        axis.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
        axis.minorticks_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def gaps_of(seeds: dict[int, Run], full: dict[int, Run], of: Callable[[Run], np.ndarray]) -> np.ndarray:
    """`[seeds, n]`: differences to full attention over the seeds that both have."""
    return np.array([of(seeds[s]) - of(full[s]) for s in sorted(seeds) if s in full])


def band(axis: Any, x: Any, rows: np.ndarray, colour: str, style: str = "-", after: int = 0) -> None:
    """The mean of `rows` as a line, from `after` on, and its standard error as a band where there are several."""
    if not len(rows):
        return
    x = np.asarray(x)
    x, rows = x[x >= after], rows[:, x >= after]
    axis.plot(x, rows.mean(0), style, color=colour, linewidth=1, markersize=3)
    if len(rows) > 1:
        error = rows.std(0, ddof=1) / math.sqrt(len(rows))
        axis.fill_between(x, rows.mean(0) - error, rows.mean(0) + error, color=colour, alpha=0.2)
