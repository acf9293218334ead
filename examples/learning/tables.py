"""Tables of the page, each from the results alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .summary import (
    SMOOTH,
    STUDENT_T,
    Run,
    arms,
    every_run,
    first_long_step,
    gaps,
    mean_and_error,
    seconds_to,
    shown,
    spread_of_gaps,
    table,
)


def loss_table(results: dict[str, Any], runs: list[Run]) -> str:
    found = arms(runs)
    full = found.get("full", {})
    target = max((float(np.mean(r["loss_curve"][-SMOOTH:])) for r in runs), default=math.nan)
    rows = []
    for arm, seeds in found.items():
        each = list(seeds.values())
        seconds = [s for s in (seconds_to(r, target) for r in each) if s is not None]
        speeds = [r["tokens_per_second"] / 1e3 for r in each if r["tokens_per_second"]]
        peak = [r["peak_memory_bytes"] for r in each if r.get("peak_memory_bytes")]
        rows.append(
            [
                arm,
                ", ".join(map(str, sorted(seeds))),
                shown([r["eval_loss"] for r in each]),
                "0" if arm == "full" else shown(gaps(seeds, full), sign=True),
                "0" if arm == "full" else shown(gaps(seeds, full, "trailing_2k"), sign=True),
                shown(speeds, 0),
                shown(seconds, 0),
                f"{max(peak) / 2**30:.1f}" if peak else "–",
            ]
        )
    head = [
        "arm",
        "seeds",
        "held-out loss",
        "gap to full",
        "gap to full, last 2K of a window",
        "K tokens/s",
        f"GPU s to loss {target:.3f}",
        "peak GiB",
    ]
    return table(head, rows)


def answer(results: dict[str, Any], runs: list[Run]) -> str:
    """A row per arm: loss and retrieval at the training length against full attention, paired by seed."""
    length = runs[0]["config"]["data"]["length"]
    found = arms([r | {"answered": percent_answered(r)} for r in runs])
    full, rows = found.get("full", {}), []
    for arm, seeds in found.items():
        values = gaps(seeds, full)
        interval = "–"
        if arm != "full" and len(values) > 1:
            width = STUDENT_T[min(len(values), len(STUDENT_T) - 1)] * mean_and_error(values)[1]
            interval = f"{np.mean(values) - width:+.3f} to {np.mean(values) + width:+.3f}"
        answered = [r["answered"] for r in seeds.values() if r["answered"] is not None]
        rows.append(
            [arm, str(len(seeds)), "0" if arm == "full" else shown(values, sign=True), interval, shown(answered, 0)]
        )
    text = table(["arm", "seeds", "gap of held-out loss, nats", "95 % interval", f"% answered at {length:,}"], rows)
    spread = spread_of_gaps(runs)
    if spread is not None and any(len(seeds) == 1 for seeds in found.values()):
        text += (
            "\n\nOne seed has no error bar; gaps of the other arms have a standard deviation of "
            f"{spread[0]:.4f} between seeds."
        )
    return text


def switch_table(results: dict[str, Any], runs: list[Run]) -> str:
    rows = []
    for run in runs:
        if "switch" not in run["spec"]:
            continue
        at = round(run["spec"]["switch"]["at"] * run["steps"])
        base = next(
            (
                r
                for r in runs
                if r["arm"] == run["arm"].replace("hybrid_90_full", "moba_512_3").replace("full_90_moba", "full")
                and r["seed"] == run["seed"]
            ),
            None,
        )
        curve = np.array(run["loss_curve"])
        before, after = curve[max(0, at - 50) : at].mean(), curve[at : at + 50].mean()
        first = curve[at : at + 3]
        noise = float(np.std(np.diff(curve[max(0, at - 100) : at])))
        paired = "–"
        if base is not None and base["arm"] != run["arm"]:
            other = np.array(base["loss_curve"])
            paired = " ".join(f"{d:+.4f}" for d in first - other[at : at + 3])
        rows.append(
            [
                run["arm"],
                str(run["seed"]),
                str(at),
                f"{before:.4f}",
                " ".join(f"{x:.3f}" for x in first),
                f"{after:.4f}",
                f"{noise:.4f}",
                paired,
            ]
        )
    if not rows:
        return "No hybrid run is in the results yet."
    head = [
        "arm",
        "seed",
        "step",
        "mean of 50 before",
        "three steps from the switch on",
        "mean of 50 after",
        "standard deviation between neighbouring steps",
        "difference to the arm that did not switch, same batches",
    ]
    return table(head, rows)


def retrieval_table(results: dict[str, Any], runs: list[Run]) -> str:
    """Share of prompts answered exactly: a row per arm and number of needles (that of none only where some are answered)."""
    found = arms([r for r in runs if r.get("retrieval")])
    if not found:
        return "No retrieval is in the results yet."
    every = [e for seeds in found.values() for r in seeds.values() for e in r["retrieval"]]
    lengths = sorted({e["length"] for e in every})
    if not any(e["exact"] for e in every):
        best = max(e["log_prob"] for e in every)
        return f"No arm answered any of {sum(e['trials'] for e in every):,} prompts; the best mean log-probability is {best:.1f}."
    rows = []
    for arm, seeds in found.items():
        for needles in sorted({e["needles"] for e in every}):
            cells, entries = [], [e for r in seeds.values() for e in r["retrieval"] if e["needles"] == needles]
            if not needles and not any(e["exact"] for e in entries):
                continue
            for length in lengths:
                values = [100 * e["exact"] for e in entries if e["length"] == length]
                cells.append(shown(values, 0).replace(" (one seed)", ""))
            rows.append([arm, str(len(seeds)), str(needles), *cells])
    return table(["arm", "seeds", "needles", *(f"{n:,}" for n in lengths)], rows)


def against_window(results: dict[str, Any], runs: list[Run]) -> str:
    """What MoBA arms with several seeds gain or lose against the sliding window, paired by seed."""
    asked = [r | {"answered": percent_answered(r)} for r in runs]
    found, lines = arms([r for r in asked if r["answered"] is not None]), []
    for window in (arm for arm in found if arm.startswith("window")):
        for arm, seeds in found.items():
            loss, answered = (gaps(seeds, found[window], key) for key in ("eval_loss", "answered"))
            if arm.startswith("moba") and len(loss) > 1:
                lines.append(
                    f"- `{arm}` − `{window}`, {len(loss)} seeds: {shown(loss, sign=True)} nats, "
                    f"{shown(answered, 1, sign=True)} points of retrieval."
                )
    return "Against the sliding window, same seeds:\n\n" + "\n".join(lines) if lines else ""


def context_parallel(results: dict[str, Any], runs: list[Run]) -> str:
    """Training loss over several ranks against one rank, same seed and batches, of runs that were stopped as well."""
    found, lines = arms([r for r in every_run(results) if r.get("loss_curve")]), []
    for arm, seeds in found.items():
        for seed, run in sorted(seeds.items()):
            ranks = run["spec"].get("cp", 1)
            one = found.get(arm.removesuffix(f"_cp{ranks}"), {}).get(seed)
            first, steps = first_long_step(run), len(run["loss_curve"])
            if ranks == 1 or one is None or steps - first < 2:
                continue
            difference = np.array(run["loss_curve"], float) - np.array(one["loss_curve"][:steps], float)
            mean, error = mean_and_error(difference[first:].tolist())
            text = f"- `{arm}` seed {seed}: {mean:+.4f} nats over {steps - first:,} long steps"
            text += f", standard error between steps {error:.4f}"
            if first:
                text += f"; {difference[max(0, first - 100) : first].mean():+.4f} at the end of the short windows"
            lines.append(text + ("." if run.get("complete") else f". Stopped after {steps:,} steps."))
    head = "Training loss over several ranks minus that on one rank, one pair of runs each:\n\n"
    return head + "\n".join(lines) if lines else "No run over several ranks is in the results yet."


def percent_answered(run: Run) -> float | None:
    """Percent of the prompts of the training length that hide a needle; None where none was asked."""
    length = run["config"]["data"]["length"]
    shares = [100 * e["exact"] for e in run.get("retrieval", []) if e["length"] == length and e["needles"]]
    return float(np.mean(shares)) if shares else None


def routing_table(results: dict[str, Any], runs: list[Run]) -> str:
    """Of seed 0 at the last step that was measured: mean over layers, first and last layer."""
    keys = ("wanted_share", "entropy", "far", "sink_share", "agreement_in_group", "agreement_across")
    rows = []
    for run in runs:
        if run["seed"] or not run["routing"]:
            continue
        last = max(fact["step"] for fact in run["routing"])
        facts = [fact | {"far": far_share(fact)} for fact in run["routing"] if fact["step"] == last]
        for name, chosen in (
            ("mean", facts),
            (str(facts[0]["layer"]), facts[:1]),
            (str(facts[-1]["layer"]), facts[-1:]),
        ):
            cells = []
            for key in keys:
                values = [f[key] for f in chosen if f[key] is not None]
                cells.append(f"{np.mean(values):.2f}" if values else "–")
            rows.append([run["arm"], f"{last:,}", name, *cells])
    if not rows:
        return "No routing is in the results yet."
    head = [
        "arm",
        "step",
        "layer",
        "wanted share, 4 ranks",
        "entropy",
        "8 blocks back and more",
        "sink share",
        "agreement in a group",
        "agreement across groups",
    ]
    return table(head, rows)


def far_share(fact: dict[str, Any]) -> float:
    """Selections of blocks 8 and more back (bucket 4 on) among those of earlier blocks."""
    histogram = np.array(fact["distance_histogram"][1:], dtype=float)
    return float(histogram[3:].sum() / max(1.0, histogram.sum()))
