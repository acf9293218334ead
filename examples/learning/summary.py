"""Means, errors and differences over the runs of a results file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Run = dict[str, Any]
SMOOTH = 40
"""Steps over which a curve is averaged before two of them are compared."""
STUDENT_T = (math.nan, math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Factor of the standard error in a 95 % interval of a mean, by the number of values."""


def finished(results: dict[str, Any]) -> list[Run]:
    """Runs that came to their end and have a held-out loss."""
    return [r for r in results["runs"] if r.get("complete") and "eval_loss" in r]


def every_run(results: dict[str, Any]) -> list[Run]:
    """Also runs that diverged, failed or were stopped: `unfinished` of a results file."""
    return [*results["runs"], *results.get("unfinished", [])]


def arms(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs by arm and seed, arms in order of appearance."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (nan of one value)."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def gaps(of: dict[int, Run], full: dict[int, Run], key: str = "eval_loss") -> list[float]:
    """Differences to full attention over the seeds that both have: same weights at the start, same data."""
    return [of[s][key] - full[s][key] for s in sorted(of) if s in full]


def spread_of_gaps(runs: Sequence[Run]) -> tuple[float, int] | None:
    """Standard deviation of an arm's gap between seeds, pooled over the arms with several, and its degrees of freedom."""
    found = arms(runs)
    full = found.get("full", {})
    groups = [gaps(seeds, full) for arm, seeds in found.items() if arm != "full"]
    groups = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in groups)
    squares = sum(float(np.var(values, ddof=1)) * (len(values) - 1) for values in groups)
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def shown(values: Sequence[float], digits: int = 4, sign: bool = False) -> str:
    """Mean and standard error as text."""
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text + (f" ± {error:.{digits}f}" if len(values) > 1 else " (one seed)")


def first_long_step(run: Run) -> int:
    """The step from which windows have their full length."""
    short = run["config"]["data"].get("begin_with")
    return round(short["share"] * run["config"]["optimizer"]["steps"]) if short else 0


def smoothed(curve: Sequence[float | None]) -> np.ndarray:
    """Means of `SMOOTH` neighbouring steps (fewer where the curve is shorter)."""
    width = min(SMOOTH, len(curve))
    return np.convolve([math.nan if x is None else x for x in curve], np.ones(width) / width, "valid")


def seconds_to(run: Run, loss: float) -> float | None:
    """GPU seconds on windows of full length until the smoothed curve is at `loss` or below; None if it never is."""
    below = np.flatnonzero(smoothed(run["loss_curve"]) <= loss)
    if not below.size or not run.get("seconds_per_step"):
        return None
    return float(max(0, below[0] + SMOOTH - first_long_step(run)) * run["seconds_per_step"] * run["gpus"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
