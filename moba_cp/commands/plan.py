"""`moba-cp plan`: what a layer will take on GPUs that need not be here, and what to set.

moba-cp plan --model configs/gpt_1b_1m.yaml --tokens 1M --gpus 64
moba-cp plan --model 32/8 --block-size 512 --topk 8 --tokens 10M --gpus 64 --gpus-per-node 8 --link 300 --fabric 40
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..config import MoBAConfig
from ..kernels.sizes import LEAST_BLOCK, MOST_DIM
from ..planning.advice import (
    ALIKE,
    Option,
    automatic,
    block_sizes,
    changed_budgets,
    label,
    options,
    recomputation,
    slower_than_half,
    visiting_pays_from,
    with_default_budgets,
)
from ..planning.calibration import DEFAULT, Calibration, known
from ..planning.measured import SMALLEST_TOKENS, calibrate, read
from ..planning.prediction import predict, walks
from ..planning.sizes import Cluster, Layer
from .values import read_model, read_tokens

H200, H200_GIB = "NVIDIA H200", 140.0
"""A calibrated GPU with more memory than `Cluster.memory`."""
MOST_GPUS = 1 << 20
"""With as many a plan takes seconds."""


def plan(
    model: Annotated[str, typer.Option(help="a training configuration (YAML), or query/kv heads such as 32/8")],
    tokens: Annotated[str, typer.Option(help="of the sequence, over all GPUs: 1048576, 128K, 10M")],
    gpus: Annotated[int, typer.Option(help="GPUs of the context-parallel group", min=1)],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one host", min=1)] = Cluster.gpus_per_node,
    link: Annotated[
        float, typer.Option(help="GB/s that a GPU receives from its node (`moba-cp doctor` measures it)")
    ] = Cluster.link,
    fabric: Annotated[float, typer.Option(help="GB/s that a GPU receives from other nodes")] = Cluster.fabric,
    memory: Annotated[
        float | None, typer.Option(help=f"GiB of a GPU; default: {Cluster.memory:g}, of an H200 {H200_GIB:g}")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="tokens per block; default: of the model, or 512", min=1)
    ] = None,
    topk: Annotated[
        int | None, typer.Option(help="blocks per query, its own among them; default: of the model, or 8", min=1)
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="default: of the model, or 128", min=1)] = None,
    layers: Annotated[
        int | None, typer.Option(help="layers that keep something for backward; default: of the model, or 1", min=1)
    ] = None,
    wanted_share: Annotated[
        float, typer.Option(help="MoBAReport.wanted_share; 1 is uniform routing", min=0, max=1)
    ] = 1.0,
    device: Annotated[
        str | None,
        typer.Option(help=f"calibrated GPU: {', '.join(known())}; default: {DEFAULT}, or that of the results"),
    ] = None,
    results: Annotated[list[Path] | None, typer.Option(help="calibrate from these result files", exists=True)] = None,
    save: Annotated[Path | None, typer.Option(help="write the calibration there, as JSON", dir_okay=False)] = None,
) -> None:
    """Predict time by stage, bytes by link and memory by part, and recommend how to split a layer over GPUs."""
    try:
        if gpus > MOST_GPUS:
            raise ValueError(f"--gpus must be at most {MOST_GPUS}, got {gpus}")
        sizes = read_model(model)
        layer = Layer(
            tokens=read_tokens(tokens),
            q_heads=sizes.q_heads,
            kv_heads=sizes.kv_heads,
            block_size=block_size or sizes.block_size or 512,
            topk=topk or sizes.topk or 8,
            head_dim=head_dim or sizes.head_dim,
            wanted_share=wanted_share,
        )
        MoBAConfig(layer.block_size, layer.topk)  # refuses what the library would refuse
        if layer.head_dim > MOST_DIM or layer.block_size < LEAST_BLOCK:
            raise ValueError(
                f"the kernels serve heads of at most {MOST_DIM} and blocks of at least {LEAST_BLOCK} tokens, got D = "
                f"{layer.head_dim}, block size {layer.block_size}"
            )
        if results and device is not None:
            raise ValueError(f"--device {device} names a calibration, and --results makes one: give one of them")
        calibration = (
            calibrate(*read(results), Cluster(1, link=link, fabric=fabric))
            if results
            else Calibration.of(DEFAULT if device is None else device)
        )
        gib = (H200_GIB if calibration.device == H200 else Cluster.memory) if memory is None else memory
        cluster = Cluster(gpus, gpus_per_node, link, fabric, gib)
        if save is not None:
            if save.exists() and any(save.samefile(path) for path in results or []):
                raise ValueError(f"--save {save} would replace these --results")
            save.write_text(calibration.to_json())
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    lines, fits = report(layer, cluster, calibration, layers or sizes.layers)
    if save is not None:
        lines += ["", f"calibration written to {save}"]
    print("\n".join(lines))
    raise typer.Exit(not fits)


def report(layer: Layer, cluster: Cluster, calibration: Calibration, layers: int) -> tuple[list[str], bool]:
    """Lines for people: the recommendation with its parts, the alternatives, and what block sizes cost; and whether any split
    fits a GPU's memory. Where none does, the fastest stands in place of the recommendation."""
    found = options(layer, cluster, calibration)
    best = found[0]
    heads = f"{layer.q_heads}/{layer.kv_heads} heads, D = {layer.head_dim}"
    lines = [
        f"{layer.tokens:,} tokens, {heads}, block size {layer.block_size}, topk {layer.topk}, on {cluster.gpus} "
        f"GPU{'s' * (cluster.gpus > 1)} of {cluster.memory:g} GiB ({cluster.node} per node, {cluster.link:g} GB/s inside, "
        f"{cluster.fabric:g} GB/s between nodes)",
        f"calibrated on {calibration.device}: {', '.join(calibration.sources)}",
    ]
    if layer.tokens < SMALLEST_TOKENS:
        lines.append(
            f"below {SMALLEST_TOKENS // 1024}K tokens times are too short: the host is the bound, and is not counted"
        )
    if not best.fits:
        lines.append(f"No split fits {cluster.memory:g} GiB. Below is what would take the least time.")
    lines += [
        "",
        *recommended(best, layer, cluster, calibration, layers),
        "",
        *parts(best),
        "",
        "alternatives, forward+backward ms, GiB; recommended is the least memory of those that fit and are within "
        f"{ALIKE:.0%} of the least time:",
    ]
    lines += [
        f"  {label(option.split):24} {option.milliseconds:10.1f} {option.memory.peak:8.1f}"
        + "  does not fit" * (not option.fits)
        for option in alternatives(found)[:7]
    ]
    lines += [
        "",
        f"block sizes, each {'as recommended' if best.fits else 'at its fastest'}: forward / forward+backward ms, GiB:",
    ]
    for block_size, topk, option in block_sizes(layer, cluster, calibration):
        mark = "*" if (block_size, topk) == (layer.block_size, layer.topk) else " "
        prediction = option.prediction
        lines.append(
            f" {mark}({block_size}, {topk})".ljust(14)
            + f"{label(option.split):24} {prediction.forward_ms:9.1f} / {prediction.forward_backward_ms:9.1f} "
            + f"{option.memory.peak:8.1f}"
            + "  does not fit" * (not option.fits)
        )
    lines += [
        "",
        f"Sending queries to blocks would begin to pay above {visiting_pays_from(layer):.0f} sequence ranks (uniform routing); "
        f"here there are {best.split.sequence_ranks}.",
    ]
    return lines, best.fits


def alternatives(found: list[Option]) -> list[Option]:
    """But for the recommended one: of each way the first, whatever its budgets."""
    ways = {label(option.split): option for option in reversed(found)}
    return [option for option in found[1:] if ways[label(option.split)] is option]


def recommended(best: Option, layer: Layer, cluster: Cluster, calibration: Calibration, layers: int) -> list[str]:
    """What to set."""
    split = best.split
    arguments = f'comm="{split.comm}"' if split.ranks > 1 else "one GPU"
    if 1 < split.head_parallel < split.ranks:
        arguments += f", head_parallel={split.head_parallel}"
    arguments += "".join(f", {name}={value}" for name, value in changed_budgets(split).items())
    layout = "any (each rank computes whole sequences of its heads)"
    if split.sequence_ranks > 1:
        zigzag, balanced = (
            predict(layer, replace(split, layout=x), cluster, calibration).forward_backward_ms
            for x in ("zigzag", "balanced")
        )
        layout = f"balanced ({1 - balanced / zigzag:.0%} less time)" if balanced < 0.98 * zigzag else "zigzag"
    size, reason = automatic(layer, cluster)
    by_auto = reason.removeprefix("auto: ") or (
        "no split of heads: the call is small" if split.ranks > 1 else f"U = {size}"
    )
    return [
        f"{'recommended' if best.fits else 'does not fit'}: {arguments}: heads over U = {split.head_parallel}, sequence over "
        f"S = {split.sequence_ranks}",
        *(f"  {line}" for line in saved_by_budgets(best, layer, cluster, calibration)),
        *(f"  {line}" for line in faster_with_half(best, layer, cluster, calibration)),
        f"  layout: {layout}",
        f"  auto would choose: {by_auto}",
        f"  recomputation: {recomputation(best, layers, cluster)}",
    ]


def saved_by_budgets(best: Option, layer: Layer, cluster: Cluster, calibration: Calibration) -> list[str]:
    """What budgets other than the default ones change."""
    changed = changed_budgets(best.split)
    if not changed:
        return []
    default = with_default_budgets(best.split)
    times = predict(layer, default, cluster, calibration).forward_backward_ms
    walked = [(walks(layer, best.split, backward), walks(layer, default, backward)) for backward in (False, True)]
    travel = ""
    if any(now != before for now, before in walked):
        counts = " / ".join(f"{now} instead of {before}" for now, before in walked)
        travel = f"keys and values travel {counts} times forward / backward; "
    sizes = ", ".join(f"{name} {value / 2**30:g} GiB" for name, value in changed.items())
    untried = ["a workspace above the default has run on one GPU only"] * ("workspace_bytes" in changed)
    return [f"{sizes}: {travel}{times:.1f} ms with the defaults", *untried]


def faster_with_half(best: Option, layer: Layer, cluster: Cluster, calibration: Calibration) -> list[str]:
    """Where half of the GPUs would take less time, how much, and why."""
    found = slower_than_half(best, layer, cluster, calibration)
    if found is None:
        return []
    few = found.few
    why = f", since each GPU receives {found.reason}" if found.reason else ""
    return [
        f"half of the GPUs would take less: {few.milliseconds:.1f} instead of {best.milliseconds:.1f} ms, by "
        f"{label(few.split)}{why}"
    ]


def parts(option: Option) -> list[str]:
    """Time by stage, bytes by link, memory by part."""
    prediction, memory = option.prediction, option.memory
    lines = []
    for name, stages, moved in (
        ("forward", prediction.forward, prediction.forward_bytes),
        ("backward", prediction.backward, prediction.backward_bytes),
    ):
        lines.append(
            f"{name} {sum(stages.values()):.1f} ms: " + ", ".join(f"{stage} {ms:.1f}" for stage, ms in stages.items())
        )
        lines.append(
            f"  received per GPU: {moved.inside / 2**30:.2f} GiB inside the node, {moved.between / 2**30:.2f} GiB between nodes"
        )
    lines.append("beside these: " + ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in prediction.beside.items()))
    lines.append(f"memory of attention, {memory.peak:.1f} GiB at the peak of one layer:")
    lines += [f"  {gib:8.2f}  {part}" for part, gib in memory.parts.items()]
    if prediction.assumed:
        lines.append(f"not measured, assumed: the overhead of {', '.join(prediction.assumed)}")
    return lines
