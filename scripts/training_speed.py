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

`check` judges what was timed: errors of sampled rows of attention's output and dq against the definition in fp64, from one more
step of the same model, which is not timed; and the relative difference of the loss of a short sequence from the one with
attention by definition in every layer (`harness.training_check`). A single timed step after no other is its own checked step.
Rows are not checked where documents are kept apart. `--against FILE` compares losses with those of the same training on other
GPUs in FILE, step by step from equal weights (`loss_against`). Beyond `harness.limits` the program ends with exit status 1.
dq_error is recorded and not judged: it grows where values are nearly alike (`limits.ROUNDED`); dq_rounding_error is judged.

A run that will not fit is refused before it starts. Where a rank runs out of memory nevertheless, the entry holds the error,
which also says what was held and what to change; with several ranks the program ends then, since the others are in the middle
of a step.
"""

from __future__ import annotations

import cProfile
import gc
import json
import os
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from examples.megatron_gpt.model import Trainer, build, count_parameters, moba_settings  # noqa: E402
from examples.megatron_gpt.step import evaluate, train_step  # noqa: E402
from moba_cp.megatron.flops import peak_flops, step_flops  # noqa: E402
from moba_cp.training_memory import GIB, training_peak  # noqa: E402
from scripts.harness import limits, options, training_check  # noqa: E402
from scripts.harness.records import about, megatron_core_version, write_json  # noqa: E402

LOSS_DIFFERENCES = {"loss_error": 2.0**-8, "first_loss_difference": 2.0**-8, "largest_loss_difference": 2.0**-5}
"""Largest relative differences of losses, which are means over thousands of tokens, where rounding to bf16 (2^-9) cancels. Later
losses are those of other weights: optimizer steps make rounding grow (`scripts.bench_training`)."""
COMPARED_STEPS = 10
"""First steps whose losses `--against` compares. In these, runs of a 300M model that round in other places differ by less than
1e-4; after 50 steps by 3.6 % (docs/results/context_parallel_training.json), which is more than `LOSS_DIFFERENCES` allows."""
SHORT = (2048, 8192)
"""Fewest and most tokens of the sequence whose loss is computed by definition."""


def main(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    attention: Annotated[
        list[str], typer.Option(help="moba:BLOCK_SIZE:TOPK[:STEPS[:WARMUP]] or full[:STEPS[:WARMUP]] [KEY=VALUE ...]")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="keys of the configuration to change")] = None,
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)] = Path("runs/training_speed.json"),
    warmup: Annotated[int, typer.Option(help="steps before the timed ones", min=0)] = 3,
    steps: Annotated[int, typer.Option(help="timed steps", min=1)] = 5,
    label: Annotated[str, typer.Option(help="name of these runs")] = "",
    keep: Annotated[bool, typer.Option(help="add to the runs that OUT has")] = False,
    profile: Annotated[bool, typer.Option(help="profile one more step")] = True,
    host_profile: Annotated[Path | None, typer.Option(help="file for Python's profile of one more step")] = None,
    check: Annotated[bool, typer.Option(help="check attention and the loss of the timed model")] = True,
    against: Annotated[
        Path | None, typer.Option(help="results of the same training on other GPUs", exists=True, dir_okay=False)
    ] = None,
    commit: options.Commit = "",
) -> None:
    """Train with each attention in turn, and write speed, memory, loss and profile."""
    plain = ["run.steps=1000", "run.resume=false", *(overrides or [])]
    asked_for = [(name, _asked_for(name)) for name in attention]
    if "LOCAL_RANK" not in os.environ:
        raise typer.BadParameter("start this with torchrun: torchrun --nproc-per-node N -m scripts.training_speed ...")
    try:
        runs = [(name, asked, _settings(config, plain, asked)) for name, asked in asked_for]
        ranks = distributed.start(load_config(config, plain))
    except (OSError, ValueError, RuntimeError) as error:
        raise typer.BadParameter(f"{config}: {error}") from None
    here = about(commit) | {"megatron_core": megatron_core_version()}
    content: dict[str, Any] = {"about": here, "config": config.name, "runs": []}
    others = json.loads(against.read_text())["runs"] if against is not None else []
    if keep and out.exists():
        earlier = json.loads(out.read_text())
        content = earlier | {"runs": [{"about": earlier["about"]} | run for run in earlier["runs"]]}
    for name, asked, settings in runs:
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
            more = before + timed > 1
            entry |= _measure(settings, ranks, before, timed, profile and more, host_profile, check)
            if against is not None:
                entry["loss_against"] = loss_against(entry, others)
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
    limits.end(wrong(content["runs"]))  # rank 0 holds them


def wrong(runs: list[dict[str, Any]]) -> list[str]:
    """Runs whose `check` or `loss_against` is beyond its limit."""
    names = ("label", "attention", "gpus", "tokens_per_step")
    entries = [
        {name: run[name] for name in names if name in run} | (run.get("check") or {}) | (run.get("loss_against") or {})
        for run in runs
    ]
    failed = [f"{run['attention']} was not checked: {run['check_failed']}" for run in runs if "check_failed" in run]
    return limits.broken(entries, limits.TRAINED | LOSS_DIFFERENCES) + failed


def loss_against(run: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    """How far a run's losses are from those of the same training on other GPUs: the first and the largest relative difference, of
    the first `COMPARED_STEPS` steps.

    The same: parameters, attention, tokens per step and settings but for ranks and exchange. None where `others` has no such run.
    """
    apart = ("parallel.context=", "moba.comm=")

    def training(entry: dict[str, Any]) -> tuple[Any, ...]:
        changes = sorted(change for change in entry.get("overrides", ()) if not change.startswith(apart))
        kind = ":".join(entry["attention"].split(":")[: 3 if entry["attention"].startswith("moba") else 1])
        return entry["parameters"], kind, entry["tokens_per_step"], changes

    found = [other for other in others if "error" not in other and training(other) == training(run)]
    if not found:
        return None
    other = found[-1]
    apart_by = [abs(a - b) / abs(b) for a, b in zip(run["loss"][:COMPARED_STEPS], other["loss"], strict=False)]
    return {
        "other_gpus": other["gpus"],
        "steps": len(apart_by),
        "first_loss_difference": float(f"{apart_by[0]:.3e}"),
        "largest_loss_difference": float(f"{max(apart_by):.3e}"),
    }


@dataclass(frozen=True)
class Asked:
    """What a value of `--attention` asks for.

    Attributes:
        full: whether it is full attention.
        changes: overrides for its kind of attention.
        own: its own overrides.
        steps, warmup: timed steps and steps before them; None where it does not say.
        label: empty where it has none.
    """

    full: bool
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
    if kind == "full" and any(change.startswith(("moba.full_last_layers", "moba.layer_pattern")) for change in own):
        raise typer.BadParameter(f"--attention {attention!r}: full attention is full in every layer")
    sizes = {"full": 0, "moba": 2}.get(kind, 0)
    counts = numbers[sizes:]
    if kind not in ("full", "moba") or len(numbers) < sizes or len(counts) > 2 or not all(map(str.isdecimal, numbers)):
        raise typer.BadParameter(
            f"--attention must be moba:BLOCK_SIZE:TOPK[:STEPS[:WARMUP]] or full[:STEPS[:WARMUP]], got {attention!r}"
        )
    if counts and int(counts[0]) < 1:
        raise typer.BadParameter(f"--attention {attention!r}: at least one step must be timed")
    changes: tuple[str, ...] = ("moba.fraction=1",)
    if kind == "moba":
        changes = (f"moba.block_size={numbers[0]}", f"moba.topk={numbers[1]}")
    steps, warmup = ([int(count) for count in counts] + [None, None])[:2]
    return Asked(kind == "full", changes, own, steps, warmup, labels[-1] if labels else "")


def _settings(config: Path, plain: list[str], asked: Asked) -> TrainConfig:
    """The trainer's configuration of a run; for full attention, with every layer full."""
    settings = load_config(config, [*plain, *asked.changes, *asked.own])
    if asked.full:
        settings.moba.full_last_layers, settings.moba.layer_pattern = settings.model.num_layers, []
    return settings


def _measure(
    config: TrainConfig,
    ranks: distributed.Ranks,
    warmup: int,
    steps: int,
    profile: bool,
    host_profile: Path | None,
    check: bool,
) -> dict[str, Any]:
    run, data = config.run, config.data
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
    checks_rows = check and not data.separate_documents
    alone = checks_rows and warmup + steps == 1
    with training_check.watching(trainer.model if alone else []) as watched:
        for number in range(warmup + steps):
            _wait(cuda)
            begin = time.perf_counter()
            losses.append(train_step(trainer, batches, config, ranks).loss)
            _wait(cuda)
            seconds.append(time.perf_counter() - begin)
            peak_gib = torch.cuda.max_memory_allocated() / GIB if cuda else 0.0
            done = f"step {number + 1} of {warmup + steps}"
            _say(f"{done}: {seconds[-1]:.2f} s, loss {losses[-1]:.4f}, peak {peak_gib:.2f} GiB")
    timed = statistics.median(seconds[warmup:])
    settings = moba_settings(config)
    layers = config.model.num_layers
    moba_layers = sum(settings.computes_moba(n + 1, layers) for n in range(layers))
    lengths = sequence_lengths(text, 0, run.global_batch_size, data.separate_documents)
    flops = step_flops(trainer.transformer_config, settings.moba, lengths, PADDED_VOCAB_SIZE, moba_layers).total
    tokens = data.seq_length * run.global_batch_size
    peak = peak_flops(ranks.device, torch.bfloat16 if run.precision == "bf16" else torch.float32)
    result: dict[str, Any] = {
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
    try:
        if checks_rows and not alone:
            with training_check.watching(trainer.model) as watched:  # hooks do not run in a graph
                train_step(replace(trainer, graph=None), batches, config, ranks)
        if check:
            result["check"] = training_check.errors(watched, ranks.device) if checks_rows else {}
            result["check"] |= _loss_check(trainer, corpus, config, sharding, ranks)
    except RuntimeError as error:  # the times are kept, and the program fails
        result["check_failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    if host_profile is not None:
        _profile_host(lambda: train_step(trainer, batches, config, ranks), host_profile)
    if profile and cuda:
        result["profile"] = _profiled(lambda: train_step(trainer, batches, config, ranks))
    batches.close()
    return result


def _loss_check(
    trainer: Trainer, corpus: Corpus, config: TrainConfig, sharding: Sharding, ranks: distributed.Ranks
) -> dict[str, Any]:
    """Relative difference of the loss of a short sequence from the one with attention by definition, and that sequence's tokens.

    It is long enough for routing to leave blocks out, where the definition, which takes memory for all pairs, allows that.
    """
    whole = min(SHORT[1], max(SHORT[0], 2 * config.moba.topk * config.moba.block_size))
    tokens = min(config.data.seq_length, whole)
    text = PackedText(corpus, tokens, config.run.seed)
    sizes = replace(config.run, micro_batch_size=1, global_batch_size=ranks.dp_size, eval_batches=1)
    short = replace(config, run=sizes, data=replace(config.data, seq_length=tokens, separate_documents=False))

    def loss() -> float:
        return evaluate(trainer, micro_batches(text, 1, 0, sharding), short, ranks)

    return {
        "loss_error": training_check.loss_difference(loss, trainer.model, ranks.device),
        "loss_tokens": tokens,
    }


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
