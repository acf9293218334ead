"""Speed of training with MoBA and with full attention, in one run of the trainer of examples/megatron_gpt.

    torchrun --nproc-per-node 1 -m scripts.training_speed configs/gpt_300m_128k.yaml --attention moba:512:8 --attention full:1 \\
        --out docs/results/training_speed.json -- parallel.context=1

For each attention the model is built anew from the same seed, trained on the same text for a few steps, and its last step
is profiled. An attention is `moba:BLOCK_SIZE:TOPK` or `full`; `:N` behind it is its number of timed steps, and `:N:M` also its
number of steps before them. A single timed step after no other is not followed by a profiled one: it is too long. Words after a
space change keys of the configuration for this attention only, outside `parallel`: `"moba:512:8:1 moba.comm=a2a"`; `label=NAME`
is its label. Rank 0 writes one entry of `runs` per attention: `gpus`, `tokens_per_step`, `attention`, `step_seconds`,
`tokens_per_second` (all GPUs together), `mfu` (one GPU, operations as in moba_cp/megatron/flops.py), `peak_memory_gib` (largest
over ranks), `loss` (every step), `profile` (milliseconds by category, of rank 0), and `about` (device, versions, commit).
`--keep` adds to the runs that OUT has; `--label` names those without a label of their own.

A run that will not fit is refused before it starts. Where a rank runs out of memory nevertheless, the entry holds the error,
which also says what was held and what to change; with several ranks the program ends then, since the others are in the middle
of a step.
"""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # apex and Transformer Engine are optional
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # new names for old collectives

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import typer  # noqa: E402

from examples.megatron_gpt import distributed, fit, profiling  # noqa: E402
from examples.megatron_gpt.batches import Sharding, micro_batches, sequence_lengths  # noqa: E402
from examples.megatron_gpt.config import TrainConfig, load_config  # noqa: E402
from examples.megatron_gpt.data import PADDED_VOCAB_SIZE, Corpus, PackedText  # noqa: E402
from examples.megatron_gpt.model import build, count_parameters, moba_settings  # noqa: E402
from examples.megatron_gpt.step import train_step  # noqa: E402
from moba_cp.megatron.flops import peak_flops, step_flops  # noqa: E402
from moba_cp.training_memory import GIB, training_peak  # noqa: E402
from scripts.harness.records import about, megatron_core_version, write_json  # noqa: E402


def main(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    attention: Annotated[
        list[str], typer.Option(help="moba:BLOCK_SIZE:TOPK[:STEPS[:WARMUP]] or full[:STEPS[:WARMUP]] [KEY=VALUE ...]")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="keys of the configuration to change")] = None,
    out: Annotated[Path, typer.Option(help="JSON file")] = Path("runs/training_speed.json"),
    warmup: Annotated[int, typer.Option(help="steps before the timed ones")] = 3,
    steps: Annotated[int, typer.Option(help="timed steps")] = 5,
    label: Annotated[str, typer.Option(help="name of these runs")] = "",
    keep: Annotated[bool, typer.Option(help="add to the runs that OUT has")] = False,
    profile: Annotated[bool, typer.Option(help="profile one more step")] = True,
    host_profile: Annotated[Path | None, typer.Option(help="file for Python's profile of one more step")] = None,
    commit: Annotated[str, typer.Option(help="git commit to note, where the checkout has no .git")] = "",
) -> None:
    """Train with each attention in turn, and write speed, memory, loss and profile."""
    runs = [(name, _asked_for(name)) for name in attention]
    plain = ["run.steps=1000", "run.resume=false", *(overrides or [])]
    ranks = distributed.start(load_config(config, plain))
    here = about(commit) | {"megatron_core": megatron_core_version()}
    content: dict[str, Any] = {"about": here, "config": config.name, "runs": []}
    if keep and out.exists():
        earlier = json.loads(out.read_text())
        content = earlier | {"runs": [{"about": earlier["about"]} | run for run in earlier["runs"]]}
    for name, asked in runs:
        settings = load_config(config, [*plain, *asked.changes, *asked.own])
        entry: dict[str, Any] = {
            "label": asked.label or label,
            "attention": name.split()[0],
            "gpus": dist.get_world_size(),
            "overrides": [*(overrides or []), *asked.own],
            "about": here,
        }
        timed = asked.steps or steps
        before = asked.warmup if asked.warmup is not None else warmup if asked.steps is None else min(warmup, timed)
        failed = False
        try:
            entry |= _measure(settings, ranks, before, timed, profile and before + timed > 1, host_profile)
        except distributed.TrainingError as error:  # on every rank
            entry["error"] = str(error)
        except fit.OutOfMemoryError as error:
            entry["error"], failed = fit.explain(error, settings, ranks), True
        gc.collect()
        torch.cuda.empty_cache()
        if dist.get_rank() == 0 or failed:
            content["runs"].append(entry)
            write_json(out if dist.get_rank() == 0 else out.with_suffix(f".rank{dist.get_rank()}.json"), content)
            _show(entry)
        if failed and dist.get_world_size() > 1:
            raise typer.Exit(1)
    distributed.stop()


@dataclass(frozen=True)
class Asked:
    """What a value of `--attention` asks for.

    Attributes:
        changes: overrides for its kind of attention.
        own: its own overrides.
        steps, warmup: timed steps and steps before them; None where it does not say.
        label: empty where it has none.
    """

    changes: tuple[str, ...]
    own: tuple[str, ...]
    steps: int | None
    warmup: int | None
    label: str


def _asked_for(attention: str) -> Asked:
    name, *words = attention.split() or [""]
    kind, *numbers = name.split(":")
    labels = [word.removeprefix("label=").replace("_", " ") for word in words if word.startswith("label=")]
    own = tuple(word for word in words if not word.startswith("label="))
    if any(change.startswith("parallel.") for change in own):
        raise typer.BadParameter(
            f"--attention {attention!r}: ranks join once, so keys of parallel are the same for all"
        )
    sizes = {"full": 0, "moba": 2}.get(kind, 0)
    counts = numbers[sizes:]
    if kind not in ("full", "moba") or len(numbers) < sizes or len(counts) > 2 or not all(map(str.isdecimal, numbers)):
        raise typer.BadParameter(
            f"--attention must be moba:BLOCK_SIZE:TOPK[:STEPS[:WARMUP]] or full[:STEPS[:WARMUP]], got {attention!r}"
        )
    if counts and int(counts[0]) < 1:
        raise typer.BadParameter(f"--attention {attention!r}: at least one step must be timed")
    if kind == "full":
        changes = ("moba.fraction=1", "moba.full_last_layers=-1")
    else:
        changes = (f"moba.block_size={numbers[0]}", f"moba.topk={numbers[1]}")
    steps, warmup = ([int(count) for count in counts] + [None, None])[:2]
    return Asked(changes, own, steps, warmup, labels[-1] if labels else "")


def _measure(
    config: TrainConfig, ranks: distributed.Ranks, warmup: int, steps: int, profile: bool, host_profile: Path | None
) -> dict[str, Any]:
    run, data = config.run, config.data
    if config.moba.full_last_layers < 0:
        config.moba.full_last_layers = config.model.num_layers
    corpus, _ = Corpus.find(data.paths).split(data.eval_fraction, run.seed)
    text = PackedText(corpus, data.seq_length, run.seed)
    sharding = Sharding(
        ranks.dp_rank,
        ranks.dp_size,
        ranks.cp_rank,
        config.parallel.context,
        ranks.device,
        config.parallel.tensor if config.parallel.sequence else 1,
    )
    distributed.seed(run.seed)
    cuda = ranks.device.type == "cuda"
    if warning := fit.check(config, ranks):
        _say(warning)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with fit.doing("building the model"):
        trainer = build(config, ranks)
    parameters = count_parameters(trainer, ranks)
    batches = micro_batches(text, run.micro_batch_size, 0, sharding, data.separate_documents, ahead=2)
    losses, seconds = [], []
    for number in range(warmup + steps):
        _wait(cuda)
        begin = time.perf_counter()
        losses.append(train_step(trainer, batches, config, ranks).loss)
        _wait(cuda)
        seconds.append(time.perf_counter() - begin)
        peak_gib = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
        _say(
            f"step {number + 1} of {warmup + steps}: {seconds[-1]:.2f} s, loss {losses[-1]:.4f}, peak {peak_gib:.2f} GiB"
        )
    timed = statistics.median(seconds[warmup:])
    settings = moba_settings(config)
    layers = config.model.num_layers
    moba_layers = sum(settings.computes_moba(n + 1, layers) for n in range(layers))
    lengths = sequence_lengths(text, 0, run.global_batch_size, data.separate_documents)
    flops = step_flops(trainer.transformer_config, settings.moba, lengths, PADDED_VOCAB_SIZE, moba_layers).total
    tokens = data.seq_length * run.global_batch_size
    peak = peak_flops(ranks.device, torch.bfloat16)
    result = {
        "parameters": parameters,
        "tokens_per_step": tokens,
        "step_seconds": round(timed, 4),
        "seconds": [round(s, 4) for s in seconds],
        "tokens_per_second": round(tokens / timed, 1),
        "mfu": round(flops / timed / dist.get_world_size() / peak, 4) if peak else None,
        "peak_memory_gib": round((distributed.peak_memory(ranks.device) or 0) / 2**30, 2) if cuda else None,
        "peak_memory_by_part": _memory_parts(config, ranks),
        "loss": losses,
    }
    if host_profile is not None:
        _profile_host(lambda: train_step(trainer, batches, config, ranks), host_profile)
    if profile and cuda:
        result["profile"] = _profiled(lambda: train_step(trainer, batches, config, ranks))
    return result


def _memory_parts(config: TrainConfig, ranks: distributed.Ranks) -> dict[str, float]:
    """The estimate of `moba_cp.training_memory`, in GiB, whose sum stands beside the measured peak."""
    peak = training_peak(fit.shape_of(config, ranks.dp_size))
    names = ("weights", "gradients", "optimizer", "kept", "working", "host")
    parts = {name: round(getattr(peak, name) / GIB, 2) for name in names}
    return parts | {"estimated_peak": round(peak.torch / GIB, 2)}


def _profiled(step: Callable[[], Any]) -> dict[str, Any]:
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    found = profiling.shares(profiling.spans_of(profiler))
    return {
        "step_ms": round(found.step_ms, 1),
        "busy": round(found.busy, 4),
        "by_category": {name: round(value, 1) for name, value in found.by_category.items()},
        "by_stage": {name: round(value, 1) for name, value in found.by_stage.items()},
        "top": found.top,
    }


def _profile_host(step: Callable[[], Any], path: Path) -> None:
    """Write where Python spends the time of a step; before Python 3.12 without autograd's thread, which runs backward on GPUs."""
    profiler = cProfile.Profile()
    profiler.enable()
    step()
    profiler.disable()
    with path.open("w") as file:
        pstats.Stats(profiler, stream=file).sort_stats("tottime").print_stats(60)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _show(entry: dict[str, Any]) -> None:
    named = {k: v for k, v in entry.items() if k not in ("profile", "loss", "seconds", "overrides", "about")}
    print(named, [round(x, 4) for x in entry.get("loss", [])], flush=True)
    if "profile" in entry:
        print({k: v for k, v in entry["profile"].items() if k != "top"}, flush=True)


if __name__ == "__main__":
    typer.run(main)
