"""How far rounding alone drives two trainings apart: pairs of runs that compute the same, but began apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .summary import Run, every_run, first_long_step, fold, loss_apart, mean_and_error, switch_step, table

EARLY = 150
"""Long steps that are compared by themselves: about as many as a run over two ranks had before it was stopped."""


@dataclass(frozen=True)
class Twins:
    """Two runs of one seed whose short windows were trained apart.

    Attributes:
        run, other: the later run, and what it is compared with.
        short: steps of short windows.
        same: steps from the first on in which the attention of both is the same: `short` or more.
    """

    run: Run
    other: Run
    short: int
    same: int

    def difference(self, first: int, last: int) -> np.ndarray:
        """`loss_apart` of the two."""
        return loss_apart(self.run, self.other, first, last)

    @property
    def name(self) -> str:
        return f"`{self.run['arm']}` − `{self.other['arm']}`, seed {self.run['seed']}"


def twins(runs: list[Run]) -> list[Twins]:
    """Each run on one rank that did not share short windows with the first of its seed, beside a run that did.

    Preferred is a run whose long windows begin with the same attention.
    """
    found = []
    for run in runs:
        short = first_long_step(run)
        first = next(r for r in runs if r["seed"] == run["seed"])
        if not short or run["spec"].get("cp", 1) > 1 or run["loss_curve"][:short] == first["loss_curve"][:short]:
            continue
        alike = (r for r in runs if r["seed"] == run["seed"] and _start(r) == _start(run))
        other = next((r for r in alike if r["loss_curve"][:short] == first["loss_curve"][:short]), None)
        if other is None:
            found.append(Twins(run, first, short, short))
        else:
            found.append(Twins(run, other, short, min(_switch(run), _switch(other))))
    return found


def rounding_table(results: dict[str, Any], runs: list[Run]) -> str:
    """Differences of the training loss of twins, and how a run over several ranks compares with them."""
    pairs = twins(runs)
    if not pairs:
        return "How far rounding alone drives two runs apart is not measured here."
    rows = []
    for pair in pairs:
        cells = [f"{pair.difference(max(0, pair.short - 100), pair.short).mean():+.4f}", "–", "–"]
        if pair.same > pair.short:
            early, every = (pair.difference(pair.short, n) for n in (min(pair.short + EARLY, pair.same), pair.same))
            cells[1:] = [f"{m:+.4f} ± {e:.4f}" for m, e in (mean_and_error(x.tolist()) for x in (early, every))]
            cells[2] += f" ({pair.same - pair.short})"
        rows.append([pair.name, *cells])
    head = [
        "runs",
        "last 100 short steps",
        f"first {EARLY} long steps",
        "all long steps with the same attention (how many)",
    ]
    text = (
        "Rounding alone drives two trainings apart. These pairs of runs on one rank have the same weights, batches and "
        "attention, but trained the short windows in two calls, by other kernels or another version of the library. Difference "
        "of the training loss, nats; ± is the standard error between steps, which knows nothing of how trainings diverge:"
    )
    return fold(text) + "\n\n" + table(head, rows) + _verdict(results, pairs)


def _verdict(results: dict[str, Any], pairs: list[Twins]) -> str:
    """Whether a run over several ranks is further from that on one rank than twins are from each other."""
    early = [p.difference(p.short, p.short + EARLY).mean() for p in pairs if p.same >= p.short + EARLY]
    every, lines = every_run(results), []
    for run in (r for r in every if r["spec"].get("cp", 1) > 1 and r.get("loss_curve")):
        one = {"arm": run["arm"].removesuffix(f"_cp{run['spec']['cp']}"), "seed": run["seed"]}
        other = next((r for r in every if {k: r[k] for k in one} == one), None)
        if other is None or not early:
            continue
        short = first_long_step(run)
        steps = min(short + EARLY, len(run["loss_curve"]))
        apart = abs(Twins(run, other, short, steps).difference(short, steps).mean())
        known = max(abs(x) for x in early)
        lines.append(
            f"`{run['arm']}` is {apart:.4f} nats from one rank over {steps - short} long steps, "
            f"{'no further than' if apart <= known else 'further than'} the furthest of the {len(early)} pairs of this table "
            f"that have as many ({known:.4f})."
        )
    return "".join(f"\n\n{fold(line)}" for line in lines)


def _start(run: Run) -> tuple[Any, ...]:
    return run["spec"]["attention"], run["spec"].get("full_layers", 0), run["spec"].get("cp", 1)


def _switch(run: Run) -> int:
    """`switch_step`, or how many steps there are where the run was stopped before."""
    return min(len(run["loss_curve"]), switch_step(run))
