"""Turns `docs/results/*.json` of the benchmark scripts into tables and plots.

Tables go between the comments `<!-- results:NAME -->` and `<!-- /results:NAME -->` in README.md and docs/*.md; plots go
beside the JSON files.

python3 scripts/make_tables.py            # writes all
python3 scripts/make_tables.py --print    # the tables only, to standard output
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from layer_tables import layer_tables, thousands

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DENSE = "dense cuDNN"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    if options.print:
        print(*blocks().values(), sep="\n\n")
        return
    fill(blocks(), [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    plot(*load(sorted(RESULTS.glob("kernels*.json"))), RESULTS / "kernels.png")
    training_plot(json.loads((RESULTS / "training.json").read_text()), RESULTS / "training.png")


def blocks() -> dict[str, str]:
    """Markdown of every table, by the name of the block that it goes into."""
    about, results, dense = load(sorted(RESULTS.glob("kernels*.json")))
    training = json.loads((RESULTS / "training.json").read_text())
    return {
        "results:headline": headline(results, dense, training),
        "results:kernels": table(about, results, dense),
        "results:layer": layer_tables([json.loads(file.read_text()) for file in sorted(RESULTS.glob("layer*.json"))]),
        "results:training": training_table(training),
        "results:equality": equality_table(json.loads((RESULTS / "parallel_equality.json").read_text())),
        "results:pretrain": pretrain_table(json.loads((RESULTS / "pretrain_gpt.json").read_text())),
    }


def fill(blocks: dict[str, str], files: list[Path]) -> None:
    """Write every block wherever a file is marked for it.

    Raises:
        ValueError: no file is marked for a block.
    """
    for name, text in blocks.items():
        marked = [file for file in files if f"<!-- {name} -->" in file.read_text()]
        if not marked:
            raise ValueError(
                f"none of {', '.join(file.name for file in files)} has lines <!-- {name} --> and <!-- /{name} -->"
            )
        for file in marked:
            replace_between(file, name, text)


def headline(results: list[dict], dense: dict[tuple, dict], training: dict[str, Any]) -> str:
    """Markdown: full attention against MoBA at 128K tokens, one layer, and the training step of `bench_training.py`."""
    lines = ["| 128K tokens | full attention | MoBA | times as fast |", "|---|---|---|---|"]
    for r in results:
        reference = dense.get((*case(r), DENSE))
        if r["tokens"] == 1 << 17 and reference is not None:
            what = f"layer, {r['q_heads']}/{r['kv_heads']} heads, ({r['block_size']}, {r['topk']})"
            lines.append(f"| {what} | {both(reference)} ms | **{both(r)} ms** | {faster(r, reference)} |")
    setup, moba = training["setup"], training["setup"]["moba"]
    for name in ("cp1", "cp2"):
        run = training["runs"].get(name)
        if run and run["steps"]:
            gpus = f"{run['context']} GPU" + "s" * (run["context"] > 1)
            what = f"training step, {run['parameters'] / 1e6:.0f}M, ({moba['block_size']}, {moba['topk']}), {gpus}"
            seconds = setup["tokens_per_step"] / run["tokens_per_second"]
            lines.append(f"| {what} | not measured | {seconds:.2f} s | |")
    return "\n".join(lines)


def load(files: list[Path]) -> tuple[dict[str, Any], list[dict], dict[tuple, dict]]:
    """What the first file says about the machine, finished MoBA results, and dense ones by (tokens, heads, name).

    Raises:
        ValueError: no files, or files of different devices: their times are not comparable.
    """
    if not files:
        raise ValueError(f"no results: expected {RESULTS}/kernels*.json, made by scripts/bench_kernels.py")
    contents = [json.loads(f.read_text()) for f in files]
    devices = {c["about"]["device"] for c in contents}
    if len(devices) > 1:
        raise ValueError(f"results of different devices do not go into one table: {sorted(devices)}")
    done = {(*case(r), r["block_size"], r["topk"]): r for c in contents for r in c["results"] if "forward_ms" in r}
    dense = {(*case(r), r["name"]): r for c in contents for r in c["dense"] if "forward_ms" in r}
    return contents[0]["about"], [done[key] for key in sorted(done)], dense


def case(result: dict) -> tuple[int, int, int]:
    return result["q_heads"], result["kv_heads"], result["tokens"]


def table(about: dict[str, Any], results: list[dict], dense: dict[tuple, dict]) -> str:
    """Markdown: one row a (heads, tokens, block size, top-k), forward / forward+backward milliseconds."""
    lines = [
        f"{about['device']}, bf16, D = {about['head_dim']}, N(0, 1) inputs, one document; torch {about['torch']}, "
        f"Triton {about['triton']}, commit {about['commit'][:10]}. Medians of milliseconds, forward / forward+backward. "
        "*Floor*: scoring, and the larger of "
        "the attention FLOPs at 800 TFLOP/s and the bytes of a block-major design at 3.0 TB/s.",
        "",
        "| heads | tokens | (B, k) | moba_cp | of the floor | against dense cuDNN | dense cuDNN | dense flash | peak GiB "
        "| output / dq error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        reference, flash = (dense.get((*case(r), name)) for name in (DENSE, "dense flash"))
        checks = r.get("checks", {})
        cells = [
            f"{r['q_heads']}/{r['kv_heads']}",
            thousands(r["tokens"]),
            f"({r['block_size']}, {r['topk']})",
            f"**{both(r)}**",
            of_the_floor(r),
            faster(r, reference),
            both(reference),
            both(flash),
            f"{r['forward_peak_gib']:.1f} / {r['forward_backward_peak_gib']:.1f}",
            f"{checks['out_error']:.1e} / {checks['dq_error']:.1e}" if checks else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    checked = [r["checks"] for r in results if "checks" in r]
    if checked:
        rows, wrong = (sum(c[key] for c in checked) for key in ("rows", "wrong_rows"))
        seeds = sorted({c["seeds"] for c in checked})
        drawn = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        lines += ["", f"Rows whose blocks were checked against fp32 scores, {drawn} seeds: {rows:,}; wrong: {wrong}."]
    return "\n".join(lines)


def equality_table(content: dict[str, Any]) -> str:
    """Markdown of `parallel_equality.py`: one row a model, with all splits that it was trained under."""
    about = content["about"]
    models: dict[str, list[dict]] = {}
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
    """What of a split is not the default: "TP 2 CP 2 SP"."""
    if split["plain"]:
        return "plain torch"
    names = {"tensor": "TP", "context": "CP", "pipeline": "PP", "virtual_pipeline": "VPP", "data": "DP"}
    parts = [f"{name} {split[key]}" for key, name in names.items() if split[key] > 1]
    parts += ["SP"] * split["sequence"] + [f"micro-batch {split['micro_batch']}"] * (split["micro_batch"] > 1)
    return " ".join(parts + [f"{split['recompute']} recomputation"] * (split["recompute"] != "none"))


def pretrain_table(content: dict[str, Any]) -> str:
    """Markdown of `pretrain_gpt_stock.py`: one row a way to start it and a split."""
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


def training_table(content: dict[str, Any]) -> str:
    """Markdown of `bench_training.py`: one row a run, and how the loss curves differ."""
    about, setup = content["about"], content["setup"]
    runs = {name: run for name, run in content["runs"].items() if run["steps"]}
    if "cp1" not in runs:
        raise ValueError(f"no run with one rank in the training results, only {sorted(content['runs'])}")
    one = runs["cp1"]
    beside = " Runs on one GPU shared the machine, two at a time." if setup["side_by_side"] else ""
    lines = [
        f"{about['device']}, NCCL {about['nccl']}, megatron-core {about['megatron_core']} without Transformer Engine, torch "
        f"{about['torch']}, commit {about['commit'][:10]}. GPT with {one['parameters'] / 1e6:.0f}M parameters, "
        f"{setup['tokens_per_step']:,} tokens a step in sequences of {setup['seq_length']:,}, {setup['precision']}, "
        f"recomputation: {setup['recompute']}. Medians over the steps after the first {setup['warmup_steps']}; MFU counts "
        f"MoBA as what it computes and recomputation not at all.{beside}",
        "",
        "| run | GPUs | tokens/s | against CP 1 | TFLOP/s per GPU | MFU | peak GiB per GPU | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(runs, key=lambda n: (runs[n]["context"], n)):
        run = runs[name]
        cells = [
            training_label(name),
            str(run["context"]),
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / one['tokens_per_second']:.2f}x",
            f"{run['tflops_per_device']:.0f}",
            f"{run['mfu']:.1%}" if "mfu" in run else "-",
            f"{run['peak_memory_gib']:.1f}" if "peak_memory_gib" in run else "-",
            f"{run['loss'][0]:.4f}, {run['loss'][-1]:.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Difference of the loss from CP 1, over steps:", ""]
    for name, found in sorted(content["comparison"].items()):
        verdict = ""
        if "within_noise" in found:
            times = f"{setup['factor']:g} times the noise"
            verdict = f": within {times}" if found["within_noise"] else f": **not** within {times}"
        lines.append(
            f"- {training_label(name)}, {found['steps']} steps: largest {found['max']:.1e}, median {found['median']:.1e}, "
            f"last {found['last']:.1e}{verdict}"
        )
    return "\n".join(lines)


def training_label(name: str) -> str:
    """`cp1`, `cp2`, `cp2_ring`, `noise4` for readers."""
    if name.startswith("noise"):
        return f"CP 1, sums rounded in {name.removeprefix('noise')} parts"
    ranks, _, comm = name.removeprefix("cp").partition("_")
    return f"CP {ranks}" + f" ({comm})" * bool(comm)


def training_plot(content: dict[str, Any], path: Path) -> None:
    """Loss curves, and below them the differences from CP 1, log scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, differences) = plt.subplots(2, 1, figsize=(7, 6), dpi=130, sharex=True, layout="constrained")
    for index, (name, run) in enumerate(sorted(content["runs"].items())):
        look = {"label": training_label(name), "color": f"C{index}"}
        if run["steps"]:
            losses.plot(range(1, run["steps"] + 1), run["loss"], ("-", "--", ":", "-.")[index % 4], **look)
        if name in content["comparison"]:
            # What is equal to the last bit has no place on a log scale.
            values = [value or float("nan") for value in content["comparison"][name]["by_step"]]
            differences.plot(range(1, len(values) + 1), values, "o-", markersize=3, **look)
    losses.set(ylabel="loss, nats per byte", title=f"{content['about']['device']}, {content['setup']['precision']}")
    differences.set(yscale="log", xlabel="step", ylabel="|loss - loss of CP 1|")
    for axis in (losses, differences):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def both(result: dict | None) -> str:
    if result is None:
        return "-"
    return " / ".join(milliseconds(result.get(key)) for key in ("forward_ms", "forward_backward_ms"))


def of_the_floor(result: dict) -> str:
    """Share of the lower bound in the time taken, forward / forward+backward; `floors` of bench_kernels.py."""
    floors = result["floors_ms"]
    forward = floors["scoring"] + max(floors["forward_attention"], floors["forward_traffic"])
    whole = forward + max(floors["backward_attention"], floors["backward_traffic"])
    shares = {"forward_ms": forward, "forward_backward_ms": whole}
    return " / ".join(f"{floor / result[key]['median']:.0%}" for key, floor in shares.items() if key in result)


def faster(result: dict, reference: dict | None) -> str:
    """How many times as fast as `reference`, forward / forward+backward."""
    if reference is None:
        return "-"
    cells = []
    for key in ("forward_ms", "forward_backward_ms"):
        known = key in reference and key in result
        cells.append(f"{reference[key]['median'] / result[key]['median']:.1f}x" if known else "-")
    return " / ".join(cells)


def milliseconds(time: dict | None) -> str:
    if time is None:
        return "-"
    value = time["median"]
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def replace_between(path: Path, name: str, text: str) -> None:
    """Put `text` between the comments `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the file lacks them.
    """
    content = path.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{path} has no lines <!-- {name} --> and <!-- /{name} -->")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", content))


def plot(about: dict[str, Any], results: list[dict], dense: dict[tuple, dict], path: Path) -> None:
    """Forward+backward time against tokens, one panel a pair of heads, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = sorted({case(r)[:2] for r in results})
    figure, axes = plt.subplots(1, len(heads), figsize=(5 * len(heads), 4), squeeze=False, sharey=True)
    for axis, pair in zip(axes[0], heads):
        lines: dict[str, list[tuple[int, float]]] = {}
        for r in [*results, *dense.values()]:
            if case(r)[:2] == pair and "forward_backward_ms" in r:
                label = r.get("name") or f"MoBA ({r['block_size']}, {r['topk']})"
                lines.setdefault(label, []).append((r["tokens"], r["forward_backward_ms"]["median"]))
        for label, points in sorted(lines.items()):
            tokens, times = zip(*sorted(points))
            axis.plot(tokens, times, "o--" if label.startswith("dense") else "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{pair[0]} q / {pair[1]} kv heads")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [thousands(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{about['device']}, bf16, D = {about['head_dim']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
