"""`moba-cp plan`: what a layer will take on GPUs that need not be here, and what to set.

moba-cp plan --model configs/gpt_1b_1m.yaml --tokens 1M --gpus 64
moba-cp plan --model 32/8 --block-size 512 --topk 8 --tokens 10M --gpus 64 --gpus-per-node 8 --link 300 --fabric 40
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..planning.advice import Option, block_sizes, label, options, recomputation, visiting_pays_from
from ..planning.calibration import Calibration
from ..planning.measured import calibrate, read
from ..planning.sizes import Cluster, Layer

SUFFIXES = {"K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Model:
    """Sizes of a model; block size and topk are None where it does not say."""

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    layers: int = 1
    block_size: int | None = None
    topk: int | None = None


def plan(
    model: Annotated[str, typer.Option(help="a training configuration (YAML), or query/kv heads such as 32/8")],
    tokens: Annotated[str, typer.Option(help="of the sequence, over all GPUs: 1048576, 128K, 10M")],
    gpus: Annotated[int, typer.Option(help="GPUs of the context-parallel group", min=1)],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one host", min=1)] = 8,
    link: Annotated[
        float, typer.Option(help="GB/s that a GPU receives from its node (`moba-cp doctor` measures it)")
    ] = 300.0,
    fabric: Annotated[float, typer.Option(help="GB/s that a GPU receives from other nodes")] = 40.0,
    memory: Annotated[float, typer.Option(help="GiB of a GPU")] = 80.0,
    block_size: Annotated[int | None, typer.Option(help="tokens per block; default: of the model, or 512")] = None,
    topk: Annotated[
        int | None, typer.Option(help="blocks per query, its own among them; default: of the model, or 8")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="default: of the model, or 128")] = None,
    layers: Annotated[
        int | None, typer.Option(help="layers that keep something for backward; default: of the model, or 1")
    ] = None,
    wanted_share: Annotated[
        float, typer.Option(help="MoBAReport.wanted_share; 1 is uniform routing", min=0, max=1)
    ] = 1.0,
    results: Annotated[list[Path] | None, typer.Option(help="calibrate from these result files", exists=True)] = None,
    save: Annotated[Path | None, typer.Option(help="write the calibration there, as JSON")] = None,
) -> None:
    """Predict time by stage, bytes by link and memory by part, and recommend how to split a layer over GPUs."""
    try:
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
        cluster = Cluster(gpus, gpus_per_node, link, fabric, memory)
        calibration = (
            calibrate(*read(results), Cluster(1, link=link, fabric=fabric)) if results else Calibration.default()
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    if save is not None:
        save.write_text(calibration.to_json())
    print("\n".join(report(layer, cluster, calibration, layers or sizes.layers)))


def read_tokens(text: str) -> int:
    """ "10M" -> 10485760.

    Raises:
        ValueError: it is no number of tokens.
    """
    number, factor = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1)
    if not number.isdigit() or not int(number):
        raise ValueError(f"tokens must be a positive number such as 131072, 128K or 10M, got {text!r}")
    return int(number) * factor


def read_model(text: str) -> Model:
    """Of a YAML file with `model` (num_attention_heads, num_query_groups, hidden_size, num_layers, kv_channels) and `moba`
    (block_size, topk), or of heads such as "32/8".

    Raises:
        ValueError: it is neither.
    """
    heads = text.split("/")
    if len(heads) == 2 and all(part.isdigit() for part in heads):
        return Model(int(heads[0]), int(heads[1]))
    path = Path(text)
    if not path.is_file():
        raise ValueError(f"model must be a YAML file or heads such as 32/8, got {text!r}")
    import yaml

    content: Any = yaml.safe_load(path.read_text())
    try:
        model, moba = content["model"], content.get("moba", {})
        q_heads = model["num_attention_heads"]
        return Model(
            q_heads,
            model.get("num_query_groups") or q_heads,
            model.get("kv_channels") or model["hidden_size"] // q_heads,
            model.get("num_layers", 1),
            moba.get("block_size"),
            moba.get("topk"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks {error} of a model") from error


def report(layer: Layer, cluster: Cluster, calibration: Calibration, layers: int) -> list[str]:
    """Lines for people: the recommendation with its parts, the alternatives, and what block sizes cost."""
    found = options(layer, cluster, calibration)
    best = found[0]
    heads = f"{layer.q_heads}/{layer.kv_heads} heads, D = {layer.head_dim}"
    lines = [
        f"{layer.tokens:,} tokens, {heads}, block size {layer.block_size}, topk {layer.topk}, on {cluster.gpus} GPUs "
        f"({cluster.node} per node, {cluster.link:g} GB/s inside, {cluster.fabric:g} GB/s between nodes)",
        f"calibrated on {calibration.device}: {', '.join(calibration.sources)}",
    ]
    if not best.fits:
        lines.append(f"No split fits {cluster.memory:g} GiB; the least time would be:")
    lines += [
        "",
        *recommended(best, layer, cluster, layers),
        "",
        *parts(best),
        "",
        "alternatives, forward+backward ms, GiB:",
    ]
    lines += [
        f"  {label(option.split):24} {option.milliseconds:10.1f} {option.memory.peak:8.1f}"
        + "  does not fit" * (not option.fits)
        for option in found[1:8]
    ]
    lines += ["", "block sizes, each with its fastest split: forward / forward+backward ms, GiB:"]
    for block_size, topk, option in block_sizes(layer, cluster, calibration):
        mark = "*" if (block_size, topk) == (layer.block_size, layer.topk) else " "
        prediction = option.prediction
        lines.append(
            f" {mark}({block_size}, {topk})".ljust(14)
            + f"{label(option.split):24} {prediction.forward_ms:9.1f} / {prediction.forward_backward_ms:9.1f} "
            + f"{option.memory.peak:8.1f}"
        )
    lines += [
        "",
        f"Sending queries to blocks would begin to pay above {visiting_pays_from(layer):.0f} sequence ranks (uniform routing); "
        f"here there are {best.split.sequence_ranks}.",
    ]
    return lines


def recommended(best: Option, layer: Layer, cluster: Cluster, layers: int) -> list[str]:
    """What to set."""
    split = best.split
    arguments = f'comm="{split.comm}"' if split.ranks > 1 else "one GPU"
    if 1 < split.head_parallel < split.ranks:
        arguments += f", head_parallel={split.head_parallel}"
    fast = {
        option.split.layout: option
        for option in options(layer, cluster, Calibration.default(), ("zigzag", "balanced"))[::-1]
    }
    layout = "any (each rank computes whole sequences of its heads)"
    if split.sequence_ranks > 1:
        zigzag, balanced = fast["zigzag"].milliseconds, fast["balanced"].milliseconds
        layout = f"balanced ({1 - balanced / zigzag:.0%} less time)" if balanced < 0.98 * zigzag else "zigzag"
    return [
        f"recommended: {arguments}: heads over U = {split.head_parallel}, sequence over S = {split.sequence_ranks}",
        f"  layout: {layout}",
        f"  recomputation: {recomputation(best, layers, cluster)}",
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
