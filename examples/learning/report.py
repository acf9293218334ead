"""`docs/learning.md` and its pictures from `docs/results/learning.json`.

python -m examples.learning.report --results docs/results/learning.json --docs docs
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .pictures import answered, pictures
from .reading import RESULTS, read_json
from .rounding import rounding_table
from .summary import (
    Run,
    arms,
    commit_of,
    every_run,
    finished,
    first_long_step,
    fold,
    gaps,
    mean_and_error,
    share_of_keys,
    table,
)
from .tables import (
    against_window,
    answer,
    context_parallel,
    loss_table,
    retrieval_table,
    routing_table,
    speed_table,
    switch_table,
)
from .transfers import recorded_shares, transfers

__all__ = ["gaps", "main", "mean_and_error", "page"]
TEMPLATE = Path(__file__).with_name("learning.md.in")


def main(
    results: Annotated[Path, typer.Option(help="what the runs wrote", exists=True, dir_okay=False)] = Path(
        "docs/results/learning.json"
    ),
    docs: Annotated[Path, typer.Option(help="folder of the page and its pictures")] = Path("docs"),
) -> None:
    """Write the page and its pictures."""
    try:
        found = load(results)
        text = page(found)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "learning.md").write_text(text)
    pictures(found, docs)


def load(results: Path) -> dict[str, Any]:
    """A results file, with what files beside it have: what counting words gets, what recorded selections want, and what was
    read out of the results.

    Raises:
        ValueError: it is no file of results.
    """
    found = read_json(results, RESULTS, "docs/results/learning.json")
    found["wanted"] = recorded_shares(results.parent, found)
    counted = results.with_name("learning_bigram.json")
    if counted.exists():
        found["counting"] = json.loads(counted.read_text())
    reading = results.with_name(f"{results.stem}_reading.md")
    if reading.exists():
        found["reading"] = reading.read_text().strip()
    return found


def page(results: dict[str, Any]) -> str:
    """The text of the page; its tables come from `results` alone.

    Raises:
        ValueError: no run is finished.
    """
    done = finished(results)
    if not done:
        raise ValueError("results hold no finished run")
    text = TEMPLATE.read_text()
    for name, make in SECTIONS.items():
        text = text.replace("{{" + name + "}}", make(results, done))
    return text


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
        f"- Each run has {' or '.join(sorted({str(r['gpus']) for r in runs}))} "
        f"{', '.join(sorted({r['device'] for r in runs}))}; torch {', '.join(sorted({r['versions']['torch'] for r in runs}))}.",
        *machines(results, runs),
    ]
    facts += [
        f"- Measured in part: `{r['arm']}` seed {r['seed']} lacks {' and '.join(r['lacks'])}: {r['error']}"
        for r in runs
        if r.get("lacks")
    ]
    failed = [r for r in every_run(results) if r not in runs]
    for r in failed:
        why = "diverged" if r.get("diverged") else r.get("error", "stopped by the time limit")
        facts.append(f"- Not finished: `{r['arm']}` seed {r['seed']}: {why}")
    return "\n".join(facts)


def machines(results: dict[str, Any], runs: list[Run]) -> list[str]:
    """Which runs are of which commit and machine."""
    groups: dict[tuple[str, int], list[str]] = {}
    for run in runs:
        key = commit_of(results, run), int(run.get("machine_gpus", results["machine_gpus"]))
        groups.setdefault(key, []).append(f"`{run['arm']}` seed {run['seed']}")
    largest = max(groups, key=lambda key: len(groups[key]))
    return [
        f"- Commit `{commit[:12]}`, on a machine of {gpus} GPU{'s' if gpus != 1 else ''}: "
        + (f"the other {len(names)} runs." if (commit, gpus) == largest and len(groups) > 1 else f"{', '.join(names)}.")
        for (commit, gpus), names in sorted(groups.items(), key=lambda item: item[0] == largest)
    ]


def keys(results: dict[str, Any], runs: list[Run]) -> str:
    """How much of the text before it a query reads, by arm."""
    shares = {arm: share_of_keys(next(iter(seeds.values()))) for arm, seeds in arms(runs).items()}
    shown = ", ".join(f"`{arm}` {100 * share:.0f} %" for arm, share in shares.items() if share < 1)
    return fold(
        "Arms do not read equally much. Of the keys that full attention reads in a window, a trained model reads, mean over "
        f"positions and layers: {shown}."
        if shown
        else ""
    )


def hashes_agree(runs: Sequence[Run]) -> bool:
    """Whether all runs share the data, and runs of one seed the order and the initial weights."""
    by_seed: dict[int, set[str]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], set()).add(json.dumps(run["hashes"], sort_keys=True))
    return all(len(found) == 1 for found in by_seed.values()) and len({r["hashes"]["data"] for r in runs}) == 1


def shared_starts(results: dict[str, Any], runs: list[Run]) -> str:
    """Which runs began from the same short windows, told by their curves."""
    first = first_long_step(runs[0])
    if not first:
        return "All windows have the full length."
    by_seed: dict[int, set[str]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], set()).add(json.dumps(run["loss_curve"][:first]))
    several = sorted(seed for seed, curves in by_seed.items() if len(curves) > 1)
    text = (
        "All arms compute full attention on the short windows and can share them: the first run of a seed writes a checkpoint, "
        "the others begin from it (`began_from` in the results). "
    )
    if several:
        text += (
            f"Of seed {', '.join(map(str, several))} not all runs had that checkpoint: some trained the short windows again, and "
            "differ from the others by rounding already where long windows begin. "
        )
    return fold(text + "Speeds are those of the long windows.")


def pairs_of_training(results: dict[str, Any], runs: list[Run]) -> str:
    """How the training windows teach retrieval."""
    pairs = runs[0]["config"]["data"].get("pairs")
    if pairs is None:
        return "Training windows hold text alone: no run was trained for the task."
    short = runs[0]["config"]["data"].get("begin_with")
    of_short = f" ({pairs['per_short_window']} in a short one)" if short else ""
    facts = runs[0]["pairs"]
    return fold(
        f"**Training shows the task.** Each training window holds {pairs['per_window']} pairs of such sentences{of_short}: a "
        "sentence stands at two uniformly drawn places of the window, and its second answer can be copied from the first. "
        "The sentences displace text at the window's end. They are the same for all arms; the hash of the order covers "
        f"them. None of their {facts['names']:,} names is one of the evaluation's, though single words occur in both; digits "
        "are drawn for each pair, never as one of the evaluation's answers. The loss of a second answer counts "
        f"{pairs['answer_weight']:g} times, that of a first answer, which nothing tells, not at all. Held-out loss is "
        "measured on text without sentences."
    )


def needles_asked(results: dict[str, Any], runs: list[Run]) -> str:
    """What a prompt is, how many there are, and what RoPE does beyond the training length."""
    asked = [r for r in runs if r.get("retrieval")]
    text = (
        "Percent of prompts answered exactly, mean over seeds ± its standard error. A sentence "
        "(`# The access code of amber_basil is 12345.`) is hidden in held-out text; the prompt ends with its question. With N "
        "needles N − 1 sentences with other names are hidden too: copying any of them is right once in N times. Depths are "
        "spread evenly. "
    )
    if not asked:
        return fold(text)
    trials = {e["length"]: e["trials"] for e in asked[0]["retrieval"]}
    counts = ", ".join(f"{n} of {length:,} tokens" for length, n in sorted(trials.items()))
    own = asked[0]["config"]["model"]["rope_theta"]
    scaled = any(e["rope_theta"] != round(own) for e in asked[0]["retrieval"])
    beyond = (
        "Beyond the training length RoPE's base is multiplied by (length / training length)^(D / (D − 2)), without training."
        if scaled
        else "Nothing is changed or trained for lengths beyond those of training."
    )
    return fold(f"{text}Prompts per seed and number of needles: {counts}. {beyond}")


def picture_of_retrieval(results: dict[str, Any], runs: list[Run]) -> str:
    return "\n![retrieval](learning_retrieval.png)\n" if answered(runs) else ""


def sources_table(results: dict[str, Any], runs: list[Run]) -> str:
    rows = [
        [s["name"], s["licence"], str(s["files"]), f"{s['characters'] / 1e6:.1f}", str(s["near_duplicates"])]
        for s in results["corpus"]["sources"]
    ]
    return table(["package", "licence", "files", "MB", "near-duplicates dropped"], rows)


def commands(results: dict[str, Any], runs: list[Run]) -> str:
    every = sorted({r["arm"] for r in every_run(results)})
    return "\n".join(f"python -m examples.learning.run --plan {results['plan']} --only {arm}" for arm in every)


def switches(results: dict[str, Any], runs: list[Run]) -> str:
    """How many runs the table of switches has."""
    counts = {arm: len(seeds) for arm, seeds in arms([r for r in runs if "switch" in r["spec"]]).items()}
    seeds = ", ".join(f"`{arm}` has {n} seed{'s' if n > 1 else ''}" for arm, n in counts.items())
    return f"{seeds}: a row per run, no error bars." if counts else ""


SECTIONS: dict[str, Callable[[dict[str, Any], list[Run]], str]] = {
    "setup": setup,
    "keys": keys,
    "loss": loss_table,
    "speed": speed_table,
    "counting": counting,
    "answer": answer,
    "switches": switches,
    "switch": switch_table,
    "retrieval": retrieval_table,
    "reading": lambda results, runs: str(results.get("reading", "")),
    "window": against_window,
    "ranks": context_parallel,
    "rounding": rounding_table,
    "pairs": pairs_of_training,
    "starts": shared_starts,
    "needles": needles_asked,
    "picture": picture_of_retrieval,
    "routing": routing_table,
    "transfers": transfers,
    "sources": sources_table,
    "commands": commands,
    "plan": lambda results, runs: str(results["plan"]),
    "parameters": lambda results, runs: f"{runs[0]['parameters'] / 1e6:.0f}M",
}


if __name__ == "__main__":
    typer.run(main)
