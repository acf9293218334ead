"""Means, errors and differences over the runs of a results file."""

from __future__ import annotations

import math
import textwrap
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


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean by Student's t; None of one value."""
    if len(values) < 2:
        return None
    mean, error = mean_and_error(values)
    width = STUDENT_T[min(len(values), len(STUDENT_T) - 1)] * error
    return mean - width, mean + width


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


def switch_step(run: Run) -> int:
    """The first step after the attention changed; the number of steps where it does not change."""
    at = run["spec"].get("switch", {"at": 1.0})["at"]
    return round(at * run["config"]["optimizer"]["steps"])


def loss_apart(run: Run, other: Run, first: int, last: int | None) -> np.ndarray:
    """Training loss of `run` minus that of `other`, steps `first` to `last - 1`; None for all steps from `first` on."""
    both = (np.array(r["loss_curve"][first:last], float) for r in (run, other))
    return np.subtract(*both)


def answer_loss(run: Run) -> float | None:
    """Training loss of answers that the window tells, over the last `SMOOTH` steps; None where windows hold no pairs."""
    if "pairs" not in run:
        return None
    last = max(1, SMOOTH // run["pairs"]["answer_curve_every"])
    return float(np.mean([x for x in run["pairs"]["answer_curve"][-last:] if x is not None]))


def share_of_keys(run: Run) -> float:
    """(query, key) pairs attended to, over those of causal attention: mean over layers, of the attention at the run's end."""
    spec, at = run["spec"], np.arange(run["config"]["data"]["length"])
    attention = spec.get("switch", spec)["attention"]
    keys = at + 1
    if attention["kind"] == "window":
        keys = np.minimum(keys, attention["window"])
    if attention["kind"] == "moba":
        size = attention["block_size"]
        keys = at % size + 1 + np.minimum(at // size, attention["topk"] - 1) * size
    full = spec.get("full_layers", 0) / run["config"]["model"]["layers"]
    return float(full + (1 - full) * keys.sum() / (at + 1).sum())


def commit_of(results: dict[str, Any], run: Run) -> str:
    """The commit that ran; results that do not say so for each run say it once for all."""
    return str(run.get("commit") or results["commit"])


def smoothed(curve: Sequence[float | None]) -> np.ndarray:
    """Means of `SMOOTH` neighbouring steps (fewer where the curve is shorter)."""
    width = min(SMOOTH, len(curve))
    return np.convolve([math.nan if x is None else x for x in curve], np.ones(width) / width, "valid")


def long_steps_to(run: Run, loss: float) -> int | None:
    """Steps on windows of full length until the smoothed curve is at `loss` or below; None if it never is."""
    below = np.flatnonzero(smoothed(run["loss_curve"]) <= loss)
    return max(0, int(below[0]) + SMOOTH - first_long_step(run)) if below.size else None


def seconds_to(run: Run, loss: float) -> float | None:
    """GPU seconds of `long_steps_to`."""
    steps = long_steps_to(run, loss)
    if steps is None or not run.get("seconds_per_step"):
        return None
    return float(steps * run["seconds_per_step"] * run["gpus"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def fold(text: str) -> str:
    """A paragraph in lines of the page's length."""
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)
