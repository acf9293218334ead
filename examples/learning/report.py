"""`docs/learning.md` and its pictures from `docs/results/learning.json`.

python -m examples.learning.report --results docs/results/learning.json --docs docs
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

Run = dict[str, Any]
TEMPLATE = Path(__file__).with_name("learning.md.in")
SMOOTH = 40
"""Steps over which a curve is averaged before two of them are compared."""


def main(
    results: Annotated[Path, typer.Option(help="what the runs wrote")] = Path("docs/results/learning.json"),
    docs: Annotated[Path, typer.Option(help="folder of the page and its pictures")] = Path("docs"),
) -> None:
    """Write the page and its pictures."""
    found = json.loads(results.read_text())
    counted = results.with_name("learning_bigram.json")
    if counted.exists():
        found["counting"] = json.loads(counted.read_text())
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "learning.md").write_text(page(found))
    pictures(found, docs)


def page(results: dict[str, Any]) -> str:
    """The text of the page; its tables come from `results` alone."""
    done = finished(results)
    if not done:
        raise ValueError("results hold no finished run")
    text = TEMPLATE.read_text()
    for name, make in SECTIONS.items():
        text = text.replace("{{" + name + "}}", make(results, done))
    return text


def finished(results: dict[str, Any]) -> list[Run]:
    """Runs that came to their end and have a held-out loss."""
    return [r for r in results["runs"] if r.get("complete") and "eval_loss" in r]


def arms(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs by arm and seed, arms in order of appearance."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        found.setdefault(run["arm"], {})[run["seed"]] = run
    return found


def compared(runs: Sequence[Run]) -> dict[str, dict[int, Run]]:
    """Runs by arm, of the seeds that every arm has: means of other runs would compare seeds. All runs where no seed is in all."""
    found = arms(runs)
    common = set.intersection(*(set(seeds) for seeds in found.values())) if found else set()
    return {arm: {s: r for s, r in seeds.items() if s in common} for arm, seeds in found.items()} if common else found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (nan of one value)."""
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def gaps(of: dict[int, Run], full: dict[int, Run], key: str = "eval_loss") -> list[float]:
    """Differences to full attention over the seeds that both have: same weights at the start, same data."""
    return [of[s][key] - full[s][key] for s in sorted(of) if s in full]


def shown(values: Sequence[float], digits: int = 4, sign: bool = False) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    text = f"{mean:{'+' if sign else ''}.{digits}f}"
    return text + (f" ± {error:.{digits}f}" if len(values) > 1 else " (one seed)")


def seconds_to(run: Run, loss: float) -> float | None:
    """GPU seconds of training until the smoothed curve is at `loss` or below; None if it never is."""
    curve = np.convolve([math.nan if x is None else x for x in run["loss_curve"]], np.ones(SMOOTH) / SMOOTH, "valid")
    below = np.flatnonzero(curve <= loss)
    if not below.size or not run.get("seconds_per_step"):
        return None
    return float((below[0] + SMOOTH) * run["seconds_per_step"] * run["gpus"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def loss_table(results: dict[str, Any], runs: list[Run]) -> str:
    found = arms(runs)
    full = found.get("full", {})
    ends = [np.mean(r["loss_curve"][-SMOOTH:]) for seeds in compared(runs).values() for r in seeds.values()]
    target = max(ends, default=math.nan)
    rows = []
    means = compared(runs)
    for arm, seeds in found.items():
        each = list(means[arm].values())
        seconds = [s for s in (seconds_to(r, target) for r in each) if s is not None]
        speeds = [r["tokens_per_second"] for r in each if r["tokens_per_second"]]
        peak = [r["peak_memory_bytes"] for r in each if r.get("peak_memory_bytes")]
        rows.append(
            [
                arm,
                ", ".join(map(str, sorted(seeds))),
                shown([r["eval_loss"] for r in each]),
                "0" if arm == "full" else shown(gaps(seeds, full), sign=True),
                shown([r["trailing_2k"] for r in each]),
                "0" if arm == "full" else shown(gaps(seeds, full, "trailing_2k"), sign=True),
                f"{np.mean(speeds) / 1e3:.0f}" if speeds else "–",
                f"{np.mean(seconds):.0f}" if seconds else "–",
                f"{max(peak) / 2**30:.1f}" if peak else "–",
            ]
        )
    head = [
        "arm",
        "seeds",
        "held-out loss",
        "gap to full",
        "trailing 2K",
        "gap to full",
        "K tokens/s",
        f"GPU s to loss {target:.3f}",
        "peak GiB",
    ]
    return table(head, rows)


def counting(results: dict[str, Any], runs: list[Run]) -> str:
    """What counting words gets: the loss that shows whether a model has learnt more than frequencies."""
    known = results.get("counting")
    if known is None or known["fingerprint"] != results["corpus"]["fingerprint"]:
        return (
            "What counting gets on this corpus is not known: `python -m examples.learning.corpus bigram` computes it."
        )
    best = min(runs, key=lambda r: float(r["eval_loss"]))
    return (
        f"For comparison, counting all training windows gets {known['unigram']:.3f} (single tokens) and {known['bigram']:.3f}\n"
        f"(pairs); the best run, `{best['arm']}` seed {best['seed']}, gets {best['eval_loss']:.3f}."
    )


def verdict(results: dict[str, Any], runs: list[Run]) -> str:
    """One line per arm: whether its gap is within two standard errors."""
    found = arms(runs)
    full = found.get("full", {})
    lines = []
    for arm, seeds in found.items():
        values = gaps(seeds, full)
        if arm == "full" or not values:
            continue
        mean, error = mean_and_error(values)
        if math.isnan(error):
            lines.append(f"- `{arm}`: {mean:+.4f} nats from full attention, one seed: no error bar.")
        else:
            within = "within" if abs(mean) <= 2 * error else "outside"
            lines.append(
                f"- `{arm}`: {mean:+.4f} ± {error:.4f} nats from full attention over {len(values)} seeds, "
                f"{within} two standard errors of zero."
            )
    return "\n".join(lines) or "- No arm has a seed in common with full attention yet."


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
    found = arms([r for r in runs if r.get("retrieval")])
    if not found:
        return "No retrieval is in the results yet."
    lengths = sorted({e["length"] for seeds in found.values() for r in seeds.values() for e in r["retrieval"]})
    rows = []
    for arm, seeds in found.items():
        for needles in (1, 4, 0):
            cells = []
            for length in lengths:
                entries = [
                    e
                    for r in seeds.values()
                    for e in r["retrieval"]
                    if (e["length"], e["needles"]) == (length, needles)
                ]
                exact = np.mean([e["exact"] for e in entries]) if entries else math.nan
                cells.append(f"{exact:.0%}, {np.mean([e['log_prob'] for e in entries]):.1f}" if entries else "–")
            rows.append([arm, str(needles), *cells])
    return table(["arm", "needles", *(f"{n:,}" for n in lengths)], rows)


def routing_table(results: dict[str, Any], runs: list[Run]) -> str:
    rows = []
    for run in runs:
        if run["seed"] or not run["routing"]:
            continue
        for fact in run["routing"]:
            histogram = np.array(fact["distance_histogram"][1:], dtype=float)
            far = histogram[3:].sum() / max(1.0, histogram.sum())  # bucket 4 on: 8 blocks and more
            cell = lambda x: "–" if x is None else f"{x:.2f}"  # noqa: E731
            rows.append(
                [
                    run["arm"],
                    str(fact["step"]),
                    str(fact["layer"]),
                    cell(fact["wanted_share"]),
                    cell(fact["entropy"]),
                    f"{far:.2f}",
                    cell(fact["sink_share"]),
                    cell(fact["agreement_in_group"]),
                    cell(fact["agreement_across"]),
                ]
            )
    if not rows:
        return "No routing is in the results yet."
    return table(
        [
            "arm",
            "step",
            "layer",
            "wanted share, 4 ranks",
            "entropy",
            "8 blocks back and more",
            "sink share",
            "agreement in a group",
            "agreement across groups",
        ],
        rows,
    )


def setup(results: dict[str, Any], runs: list[Run]) -> str:
    one, corpus = runs[0], results["corpus"]
    data, optimizer = one["config"]["data"], one["config"]["optimizer"]
    model = ", ".join(f"{k} {v:g}" for k, v in one["config"]["model"].items())
    short = data.get("begin_with")
    of_short = (
        f" (the first {short['share']:.0%} of the steps of as many tokens in windows of {short['length']:,})"
        if short
        else ""
    )
    rate = f"AdamW with peak learning rate {optimizer['lr']:g}"
    if "muon_lr" in optimizer:
        rate = f"Muon with peak learning rate {optimizer['muon_lr']:g} for the layers' matrices, {rate} for the rest"
    agree = "all runs of one seed have one order and one initialisation" if hashes_agree(runs) else "**HASHES DIFFER**"
    facts = [
        f"- Model: {one['parameters'] / 1e6:.1f}M parameters ({model}).",
        f"- Training: {optimizer['steps']:,} steps of {data['batch']} windows of {data['length']:,} tokens"
        f"{of_short}, {one['tokens'] / 1e6:.1f}M tokens a run; {rate}, "
        f"{optimizer['warmup']} steps of warm-up, cosine.",
        f"- Corpus: {corpus['train_tokens'] / 1e6:.1f}M training tokens in {corpus['train_documents']} documents, "
        f"{corpus['eval_tokens'] / 1e6:.2f}M held-out tokens in {corpus['eval_documents']}; {corpus['tokenizer']}, "
        f"{corpus['characters_per_token']} characters a token. A run sees {one['tokens'] / corpus['train_tokens']:.2f} epochs.",
        f"- Fingerprint of the tokens: `{corpus['fingerprint'][:16]}`. By hash of order and initial weights, {agree}.",
        f"- Machine: {', '.join(sorted({r['device'] for r in runs}))}; "
        f"torch {one['versions']['torch']}; commit `{results['commit'][:12]}`.",
    ]
    failed = [r for r in results["runs"] if r not in runs]
    for r in failed:
        why = "diverged" if r.get("diverged") else r.get("error", "stopped by the time limit")
        facts.append(f"- Not finished: `{r['arm']}` seed {r['seed']}: {why}")
    return "\n".join(facts)


def hashes_agree(runs: Sequence[Run]) -> bool:
    """Whether all runs share the data, and runs of one seed the order and the initial weights."""
    by_seed: dict[int, set[str]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], set()).add(json.dumps(run["hashes"], sort_keys=True))
    return all(len(found) == 1 for found in by_seed.values()) and len({r["hashes"]["data"] for r in runs}) == 1


def sources_table(results: dict[str, Any], runs: list[Run]) -> str:
    rows = [
        [s["name"], s["licence"], str(s["files"]), f"{s['characters'] / 1e6:.1f}", str(s["near_duplicates"])]
        for s in results["corpus"]["sources"]
    ]
    return table(["package", "licence", "files", "MB", "near-duplicates dropped"], rows)


def commands(results: dict[str, Any], runs: list[Run]) -> str:
    every = sorted({r["arm"] for r in results["runs"]})
    return "\n".join(f"python -m examples.learning.run --plan {results['plan']} --only {arm}" for arm in every)


SECTIONS: dict[str, Callable[[dict[str, Any], list[Run]], str]] = {
    "setup": setup,
    "loss": loss_table,
    "counting": counting,
    "verdict": verdict,
    "switch": switch_table,
    "retrieval": retrieval_table,
    "routing": routing_table,
    "sources": sources_table,
    "commands": commands,
    "plan": lambda results, runs: str(results["plan"]),
    "parameters": lambda results, runs: f"{runs[0]['parameters'] / 1e6:.0f}M",
}


def pictures(results: dict[str, Any], folder: Path) -> None:
    """`learning_loss.png`: training curves and their difference to full; `learning_position.png`: loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = finished(results)
    found, smooth = compared(runs), min(SMOOTH, min(len(r["loss_curve"]) for r in runs))
    average = lambda curve: np.convolve(np.array(curve, float), np.ones(smooth) / smooth, "valid")  # noqa: E731
    full = found.get("full", {})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for arm, seeds in found.items():
        curves = np.array([average(r["loss_curve"]) for r in seeds.values()])
        steps = np.arange(smooth, smooth + curves.shape[1])
        [line] = left.plot(steps, curves.mean(0), label=arm)
        paired = [average(r["loss_curve"]) - average(full[s]["loss_curve"]) for s, r in seeds.items() if s in full]
        if arm != "full" and paired:
            mean = np.mean(paired, 0)
            right.plot(steps, mean, color=line.get_color())
            if len(paired) > 1:
                error = np.std(paired, 0, ddof=1) / math.sqrt(len(paired))
                right.fill_between(steps, mean - error, mean + error, color=line.get_color(), alpha=0.2)
    left.set(xlabel="step", ylabel="training loss, nats per token", title=f"Loss, mean of {smooth} steps")
    right.set(xlabel="step", ylabel="loss − loss of full attention", title="Difference to full, same seed and batches")
    right.axhline(0, color="grey", linewidth=0.8)
    left.legend(fontsize=8)
    figure.savefig(folder / "learning_loss.png", dpi=110)
    pyplot.close(figure)
    figure, axis = pyplot.subplots(figsize=(7, 4), constrained_layout=True)
    for arm, seeds in found.items():
        rows = np.array([r["by_position"] for r in seeds.values()])
        length = next(iter(seeds.values()))["config"]["data"]["length"]
        at = (np.arange(rows.shape[1]) + 0.5) * length / rows.shape[1]
        axis.errorbar(
            at, rows.mean(0), rows.std(0, ddof=1) / math.sqrt(len(rows)) if len(rows) > 1 else None, label=arm
        )
    axis.set(xlabel="position in the window", ylabel="held-out loss, nats per token", title="Held-out loss by position")
    axis.legend(fontsize=8)
    figure.savefig(folder / "learning_position.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
