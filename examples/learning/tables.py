"""Tables of the page, each from the results alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .summary import (
    SMOOTH,
    STUDENT_T,
    Run,
    answer_loss,
    arms,
    commit_of,
    every_run,
    first_long_step,
    fold,
    gaps,
    interval,
    long_steps_to,
    loss_apart,
    mean_and_error,
    seconds_to,
    share_of_keys,
    shown,
    spread_of_gaps,
    switch_step,
    table,
)


def target_loss(runs: list[Run]) -> float:
    """The training loss that every run reaches."""
    return max((float(np.mean(r["loss_curve"][-SMOOTH:])) for r in runs), default=math.nan)


def loss_table(results: dict[str, Any], runs: list[Run]) -> str:
    found = arms(runs)
    full, target, rows = found.get("full", {}), target_loss(runs), []
    for arm, seeds in found.items():
        each = list(seeds.values())
        steps = [s for s in (long_steps_to(r, target) for r in each) if s is not None]
        gap = [shown(gaps(seeds, full, key), sign=True) for key in ("eval_loss", "trailing_2k")]
        rows.append(
            [
                arm,
                ", ".join(map(str, sorted(seeds))),
                f"{100 * share_of_keys(each[0]):.0f}",
                shown([r["eval_loss"] for r in each]),
                *(["0", "0"] if arm == "full" else gap),
                shown([x for x in map(answer_loss, each) if x is not None], 2),
                shown(steps, 0),
            ]
        )
    head = ["arm", "seeds", "% of keys", "held-out loss", "gap to full", "gap to full, last 2K of a window"]
    return table([*head, "second answers, end of training", f"long steps to loss {target:.3f}"], rows)


def speed_table(results: dict[str, Any], runs: list[Run]) -> str:
    """A row per commit and arm: speeds of two commits do not compare arms. Ranks that share a GPU have no speed."""
    runs = [r for r in runs if r["tokens_per_second"]]
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((commit_of(results, run), run["arm"]), []).append(run)
    rows, target, order = [], target_loss(runs), list(dict.fromkeys(commit_of(results, run) for run in runs))
    for (commit, arm), each in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        seconds = [s for s in (seconds_to(r, target) for r in each) if s is not None]
        peak = [r["peak_memory_bytes"] for r in each if r.get("peak_memory_bytes")]
        rows.append(
            [
                f"`{commit[:7]}`",
                arm,
                ", ".join(str(r["seed"]) for r in sorted(each, key=lambda r: int(r["seed"]))),
                shown([r["tokens_per_second"] / 1e3 for r in each], 0),
                shown(seconds, 0),
                f"{max(peak) / 2**30:.1f}" if peak else "–",
            ]
        )
    text = table(["commit", "arm", "seeds", "K tokens/s", f"GPU s to loss {target:.3f}", "peak GiB"], rows)
    alone = [f"`{commit[:7]}`" for commit in order if (commit, "full") not in groups]
    if alone:
        text += f"\n\nFull attention was not run at {' or '.join(alone)}: speeds measured there have no baseline."
    return text


def answer(results: dict[str, Any], runs: list[Run]) -> str:
    """A row per arm: loss and retrieval at the training length against full attention, paired by seed."""
    length = runs[0]["config"]["data"]["length"]
    found = arms([r | {"answered": percent_answered(r)} for r in runs])
    full, rows = found.get("full", {}), []
    for arm, seeds in found.items():
        values = gaps(seeds, full)
        between = interval(values) if arm != "full" else None
        answered = [r["answered"] for r in seeds.values() if r["answered"] is not None]
        rows.append(
            [
                arm,
                str(len(seeds)),
                "0" if arm == "full" else shown(values, sign=True),
                "–" if between is None else f"{between[0]:+.3f} to {between[1]:+.3f}",
                shown(answered, 0),
            ]
        )
    text = table(["arm", "seeds", "gap of held-out loss, nats", "95 % interval", f"% answered at {length:,}"], rows)
    spread = spread_of_gaps(runs)
    if spread is not None and any(len(seeds) == 1 for seeds in found.values()):
        width = STUDENT_T[min(spread[1] + 1, len(STUDENT_T) - 1)] * spread[0]
        by_arm = [
            float(np.std(v, ddof=1)) for v in (gaps(x, full) for a, x in found.items() if a != "full") if len(v) > 1
        ]
        text += "\n\n" + fold(
            "One seed has no error bar. Gaps of the arms with several have a standard deviation between seeds of "
            f"{min(by_arm):.4f} to {max(by_arm):.4f} by arm, {spread[0]:.4f} pooled ({spread[1]} degrees of freedom). If the "
            f"pooled one holds for every arm, the 95 % interval of a single seed is ± {width:.3f}, and that of two seeds "
            f"± {width / 2**0.5:.3f}."
        )
    return text


def plain_arm(runs: list[Run], run: Run, attention: dict[str, Any]) -> Run | None:
    """The run of the same seed whose layers have this attention from the first step to the last."""
    spec = {"attention": attention} | {k: v for k, v in run["spec"].items() if k == "full_layers"}
    if attention == {"kind": "full"}:
        spec.pop("full_layers", None)
    return next((r for r in runs if r["spec"] == spec and r["seed"] == run["seed"]), None)


def switch_table(results: dict[str, Any], runs: list[Run]) -> str:
    """Training loss across the switch, beside that of the two arms that have one attention throughout, on the same batches."""
    rows = []
    for run in runs:
        if "switch" not in run["spec"]:
            continue
        at = switch_step(run)
        curve = np.array(run["loss_curve"], float)
        kept, taken = (plain_arm(runs, run, part["attention"]) for part in (run["spec"], run["spec"]["switch"]))
        began = [] if kept is None else loss_apart(run, kept, at, at + 3).tolist()
        later = [
            np.array([]) if taken is None else loss_apart(run, taken, first, last)
            for first, last in ((at, at + 50), (-50, None))
        ]
        rows.append(
            [
                run["arm"],
                str(run["seed"]),
                str(at),
                f"{curve[max(0, at - 50) : at].mean():.4f}",
                " ".join(f"{x:.3f}" for x in curve[at : at + 3]),
                f"{curve[at : at + 50].mean():.4f}",
                f"{float(np.std(np.diff(curve[max(0, at - 100) : at]))):.4f}",
                " ".join(f"{d:+.4f}" for d in began) or "–",
                *(f"{x.mean():+.4f}" if x.size else "–" for x in later),
            ]
        )
    if not rows:
        return "No hybrid run is in the results yet."
    head = ["arm", "seed", "step", "mean of 50 before", "three steps from the switch on", "mean of 50 after"]
    head += [
        "standard deviation between neighbouring steps",
        "three steps, difference to the arm that did not switch",
        "50 after, difference to the arm that was so throughout",
        "last 50 steps, same difference",
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
                of_loss, of_answered = interval(loss), interval(answered)
                assert of_loss is not None
                assert of_answered is not None
                lines.append(
                    f"- `{arm}` − `{window}`, {len(loss)} seeds: {shown(loss, sign=True)} nats, "
                    f"{shown(answered, 1, sign=True)} points of retrieval\n"
                    f"  (95 % intervals {of_loss[0]:+.3f} to {of_loss[1]:+.3f} and "
                    f"{of_answered[0]:+.0f} to {of_answered[1]:+.0f})."
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
            if run["gpus"] < ranks:
                text += f"; its {ranks} ranks shared {run['gpus']} GPU{'s' if run['gpus'] > 1 else ''}"
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
