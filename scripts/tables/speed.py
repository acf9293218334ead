"""Speed of training: the table, the bar chart and the profile of `training_speed`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .text import pyplot, short_device, thousands

COLORS = {
    "attention": "C0",
    "matrices": "C1",
    "elementwise": "C2",
    "elementwise and gate": "C2",  # of profiles that did not know the gate's kernels
    "communication": "C4",
    "idle": "0.85",
}

CHECKED = (
    " *Errors*, relative, of what was timed: output and dq of sampled rows against the definition in fp64 (dq given the "
    "layer's output, against the norm of what is rounded, see `scripts/harness/limits.py`); the loss of a short sequence against "
    "attention by definition in every layer."
)


def attention_name(name: str) -> str:
    """`moba:512:8` and `full` for readers; `:N` behind it, the number of steps, is left out."""
    kind, *numbers = name.split(":")
    return f"MoBA ({numbers[0]}, {numbers[1]})" if kind == "moba" else "full attention"


def speed_table(content: dict[str, Any]) -> str:
    """Markdown of `training_speed`: one row per run that finished."""
    checked = _checked(content["runs"])
    lines = [
        f"{_measured_on(content)} MFU counts MoBA as what it computes and recomputation not at all. "
        "*Busy*: time that the GPU works in a profiled step, over a step's time; the profiler delays the host."
        f"{CHECKED if checked else ''}",
        "",
        "| layers | attention | GPUs | parameters | tokens a step | step | tokens/s | MFU | busy | peak GiB per GPU |"
        + " errors |" * checked,
        "|---|---|---|---|---|---|---|---|---|---|" + "---|" * checked,
    ]
    for run in content["runs"]:
        if "error" in run:
            continue
        cells = [
            run["label"],
            attention_name(run["attention"]),
            str(run["gpus"]),
            f"{run['parameters'] / 1e6:,.0f}M",
            thousands(run["tokens_per_step"]),
            f"{run['step_seconds']:.2f} s",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['mfu']:.1%}" if run["mfu"] else "-",
            f"{_busy(run):.0%}" if "profile" in run else "-",
            f"{run['peak_memory_gib']:.1f}" if run["peak_memory_gib"] else "-",
            *[_errors(run)] * checked,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _busy(run: dict[str, Any]) -> float:
    """GPU time of the profiled step over the time of a step without the profiler."""
    profile = run["profile"]
    busy: float = profile["busy"] * profile["step_ms"] / 1e3 / run["step_seconds"]
    return min(1.0, busy)


def _checked(runs: list[dict[str, Any]]) -> bool:
    """Whether any of them was checked; runs of earlier programs were not."""
    return any(run.get("check") for run in runs)


def _errors(run: dict[str, Any]) -> str:
    """Of output and dq of sampled rows, of the loss; and of the losses against other GPUs, where they were compared."""
    check, against = run.get("check") or {}, run.get("loss_against")
    names = ("output_error", "dq_rounding_error" if "dq_rounding_error" in check else "dq_error", "loss_error")
    cell = ", ".join(f"{check[name]:.1e}" if name in check else "-" for name in names) if check else "-"
    return f"{cell}; {against['largest_loss_difference']:.1e}" if against else cell


def gpus_table(content: dict[str, Any], others: dict[str, Any] | None = None) -> str:
    """Markdown of `training_speed` on one GPU and several: tokens/s per GPU against one GPU of the same run, and the peak against
    its estimate.

    A run on several GPUs is compared with the one on one GPU that has its parameters, attention, settings and tokens per GPU; it
    may be among the runs of `others`. Full attention is not: its work per token grows with the tokens.
    """
    checked = _checked(content["runs"])
    lines = [
        _measured_on(content)
        + (f"{CHECKED} Behind the semicolon: of the losses against those of one GPU." if checked else ""),
        "",
        "| parameters | tokens a step | attention | GPUs | how | step | tokens/s | against 1 GPU | MFU "
        "| peak GiB per GPU (estimate) | loss of the first steps |" + " errors |" * checked,
        "|---|---|---|---|---|---|---|---|---|---|---|" + "---|" * checked,
    ]
    runs = [run for run in content["runs"] if "error" not in run]
    known = [*(others or {"runs": []})["runs"], *runs]  # of equal ones the last counts, which is of the same file
    alone = {_per_gpu(run): run["tokens_per_second"] for run in known if "error" not in run and run["gpus"] == 1}
    for run in runs:
        compared = run["gpus"] > 1 and run["attention"].startswith("moba")
        one = alone.get(_per_gpu(run)) if compared else None
        estimate = run["peak_memory_by_part"]["estimated_peak"]
        tokens = run["tokens_per_step"]
        cells = [
            f"{run['parameters'] / 1e6:,.0f}M",
            f"{tokens >> 20}M" if tokens % (1 << 20) == 0 else thousands(tokens),
            attention_name(run["attention"]),
            str(run["gpus"]),
            run["label"],
            f"{run['step_seconds']:.2f} s",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / one:.2f}x" if one else "",
            f"{run['mfu']:.1%}" if run["mfu"] else "-",
            f"{run['peak_memory_gib']:.1f} ({estimate:.1f})" if run["peak_memory_gib"] else "-",
            ", ".join(f"{loss:.4f}" for loss in run["loss"][:3]),
            *[_errors(run)] * checked,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def exchanges_table(content: dict[str, Any]) -> str:
    """Markdown of `training_speed` with one exchange after another, which `moba.comm=` names: time of a step, of it attention and
    kernels of dq alone where a step was profiled."""
    lines = [
        _measured_on(content) + " Attention and dq: GPU time of one rank in a profiled step.",
        "",
        "| tokens per GPU | attention | exchange | commit | step | attention, ms | dq, ms | peak GiB per GPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in content["runs"]:
        asked = [x.removeprefix("moba.comm=") for x in run["overrides"] if x.startswith("moba.comm=")]
        profile = run.get("profile")
        dq = dq_ms(profile) if profile else None
        cells = [
            thousands(run["tokens_per_step"] // run["gpus"]),
            attention_name(run["attention"]),
            asked[-1] if asked else "auto",
            run["about"]["commit"][:7],
            f"{run['step_seconds']:.3f} s",
            f"{profile['by_category']['attention']:.0f}" if profile else "",
            "" if dq is None else f"{dq:.0f}",
            f"{run['peak_memory_gib']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dq_ms(profile: dict[str, Any]) -> float | None:
    """GPU time of the kernels that compute dq alone in a profiled step; None where none is among those that took most."""
    found = [ms for name, _, ms, _ in profile["top"] if name in ("dq_kernel", "dq_of_ds_kernel")]
    return sum(found) if found else None


def _measured_on(content: dict[str, Any]) -> str:
    """Device, versions, and the commits of the runs; a run without one is of the file's."""
    about = content["about"]
    commits = dict.fromkeys(run.get("commit", run.get("about", about)["commit"])[:10] for run in content["runs"])
    return (
        f"{about['device']}, torch {about['torch']}, megatron-core {about['megatron_core']} without Transformer Engine and apex, "
        f"commit {', later rows '.join(commits)}."
    )


def _per_gpu(run: dict[str, Any]) -> tuple[object, ...]:
    """What runs on one GPU and on several have in common. Lengths, ranks and exchanges are what differs; all configurations with
    long layers recompute all but attention, whether a run says so again or not."""
    differ = ("parallel.context=", "data.seq_length=", "moba.comm=", "run.recompute=all_but_attention")
    settings = tuple(change for change in run.get("overrides", ()) if not change.startswith(differ))
    return run["parameters"], attention_name(run["attention"]), settings, run["tokens_per_step"] / run["gpus"]


def step_rows(content: dict[str, Any]) -> list[str]:
    """Rows of the headline: MoBA against full attention with the same layers, sizes and GPUs."""
    rows, dense = [], {}
    runs = [run for run in content["runs"] if "error" not in run]
    for run in runs:
        if run["attention"].startswith("full"):
            dense[(run["label"], run["gpus"], sizes(run))] = run["step_seconds"]
    for run in runs:
        full, seconds = dense.get((run["label"], run["gpus"], sizes(run))), run["step_seconds"]
        if full and run["attention"].startswith("moba"):
            what = f"training step, {run['parameters'] / 1e6:.0f}M, {attention_name(run['attention']).removeprefix('MoBA ')}"
            where = f"{run['gpus']} {short_device(content['about']['device'])}"
            rows.append(
                f"| {what}, {thousands(run['tokens_per_step'])} tokens, {run['label']}, {where} | {full:.2f} s | "
                f"**{seconds:.2f} s** | {full / seconds:.1f}x |"
            )
    return rows


def profile_plot(content: dict[str, Any], path: Path) -> None:
    """Milliseconds of GPU time of a step by category, one bar per run of MoBA that has a profile and the first run's sizes."""
    plt = pyplot()
    first = content["runs"][0]
    runs = [run for run in content["runs"] if "profile" in run and sizes(run) == sizes(first)]
    runs = [run for run in runs if run["attention"].startswith("moba")]
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(runs) + 1.4), dpi=130, layout="constrained")
    for row, run in enumerate(reversed(runs)):
        left = 0.0
        for name, width in run["profile"]["by_category"].items():
            color = COLORS[name]
            axis.barh(row, width, left=left, color=color, label=name if row == 0 else None)
            if width > 0.04 * max(r["profile"]["step_ms"] for r in runs):
                axis.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", fontsize=8)
            left += width
    labels = [f"{attention_name(run['attention'])}, {run['label']}" for run in reversed(runs)]
    axis.set_yticks(range(len(runs)), labels)
    axis.set(xlabel="GPU time of a step, ms", title=f"{content['about']['device']}: {_what(first)}")
    figure.legend(*axis.get_legend_handles_labels(), ncols=5, fontsize=8, loc="outside lower center", frameon=False)
    figure.savefig(path)
    plt.close(figure)


def sizes(run: dict[str, Any]) -> tuple[int, int]:
    """Parameters, and tokens per step."""
    return run["parameters"], run["tokens_per_step"]


def _what(run: dict[str, Any]) -> str:
    return f"{run['parameters'] / 1e6:.0f}M parameters, {thousands(run['tokens_per_step'])} tokens a step"
