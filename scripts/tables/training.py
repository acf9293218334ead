"""Training on one GPU and on two: the table and the plot of `bench_training`, and those of `long_run`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .text import pyplot


def training_table(content: dict[str, Any]) -> str:
    """Markdown of `bench_training`: one row per run, and how the loss curves differ."""
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
    plt = pyplot()
    figure, (losses, differences) = plt.subplots(2, 1, figsize=(7, 6), dpi=130, sharex=True, layout="constrained")
    for index, (name, run) in enumerate(sorted(content["runs"].items())):
        look = {"label": training_label(name), "color": f"C{index}"}
        if run["steps"]:
            losses.plot(range(1, run["steps"] + 1), run["loss"], ("-", "--", ":", "-.")[index % 4], **look)
        if name in content["comparison"]:
            # What is equal to the last bit cannot be drawn on a log scale.
            values = [value or float("nan") for value in content["comparison"][name]["by_step"]]
            differences.plot(range(1, len(values) + 1), values, "o-", markersize=3, **look)
    losses.set(ylabel="loss, nats per byte", title=f"{content['about']['device']}, {content['setup']['precision']}")
    differences.set(yscale="log", xlabel="step", ylabel="|loss - loss of CP 1|")
    for axis in (losses, differences):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)


NOT_RUN = "Not run on GPUs yet. On CPU, tests kill a small run and resume it over two ranks."


def long_run_text(contents: list[dict[str, Any]]) -> str:
    """Markdown of every result of `long_run`: what ran, and how the resumed run differs."""
    return "\n\n".join(map(_long_run_text, contents)) or NOT_RUN


def _long_run_text(content: dict[str, Any]) -> str:
    about, setup, resumed = content["about"], content["setup"], content.get("resumed", {})
    moba, loss, peak = setup["moba"], content["loss"], content["peak_memory_gib"]
    lines = [
        f"{about['device']}, torch {about['torch']}, megatron-core {about['megatron_core']}, commit {about['commit'][:10]}. "
        f"{content['parameters'] / 1e6:.0f}M parameters, MoBA ({moba['block_size']}, {moba['topk']}), "
        f"{setup['tokens_per_step']:,} tokens a step over {_gpus(_first_ranks(content))}, "
        f"{', '.join(filter(None, [setup['precision'], ' '.join(setup['overrides'])]))}.",
        "",
        f"- {content['steps']} steps: loss {loss[0]:.4f} to {loss[-1]:.4f}; every loss and gradient norm is "
        f"{'finite' if content['finite'] else '**not** finite'}.",
    ]
    if peak:
        early = peak[min(9, len(peak) - 1)]
        lines.append(
            f"- Peak memory: {early:.2f} GiB after {min(10, len(peak))} steps, {peak[-1]:.2f} GiB after {len(peak)}."
        )
    if resumed.get("loss"):
        first, last = resumed["first_step"], resumed["first_step"] + len(resumed["loss"]) - 1
        again = f"- Killed, and resumed from the checkpoint after step {setup['saved_after']} over {_gpus(resumed['ranks'])}: "
        if last == first:
            again += f"the loss of step {first} differs by {resumed['difference'][0]:.1e} from that of the killed run."
        else:
            again += f"losses of steps {first} to {last} differ by at most {resumed['largest_difference']:.1e} from those of the "
            again += f"killed run, the first by {resumed['difference'][0]:.1e}."
        lines.append(again)
    return "\n".join(lines)


def _first_ranks(content: dict[str, Any]) -> int:
    """GPUs of the run that was killed; results of earlier programs do not say, and had one."""
    return int(content["setup"].get("ranks", 1))


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count != 1 else ''}"


def long_run_plot(content: dict[str, Any], path: Path) -> None:
    """Loss by step of the killed run, and of the resumed one."""
    plt, resumed = pyplot(), content.get("resumed", {"loss": []})
    figure, axis = plt.subplots(figsize=(7, 3), dpi=130, layout="constrained")
    axis.plot(
        range(1, content["steps"] + 1), content["loss"], label=f"{_gpus(_first_ranks(content))}, killed", color="C0"
    )
    if resumed["loss"]:
        steps = range(resumed["first_step"], resumed["first_step"] + len(resumed["loss"]))
        axis.plot(
            steps, resumed["loss"], "o", markersize=3, label=f"resumed over {_gpus(resumed['ranks'])}", color="C1"
        )
    axis.set(xlabel="step", ylabel="loss, nats per byte", title=content["about"]["device"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path)
    plt.close(figure)
