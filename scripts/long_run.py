"""A long training run that is killed, and resumed from its checkpoint over another number of GPUs.

    python -m scripts.long_run --out docs/results/long_run.json
    python -m scripts.long_run --config configs/quickstart.yaml --device cpu --steps 6 --save-at 4 --resumed-steps 2 \\
        --out t.json -- data.seq_length=192 optimizer.warmup_steps=2

The run is `examples/megatron_gpt/train.py` over `--first-ranks` GPUs, without evaluation. SIGKILL ends it when step `--steps` is
logged. Then it goes on from its checkpoint after step `--save-at`, over `--ranks` GPUs, for `--resumed-steps` steps. The killed
run made these steps as well: their losses are compared, and the program fails where they differ by more than
`RESUMED_DIFFERENCE`. A million tokens, over two GPUs of 141 GB:

    python -m scripts.long_run --config configs/gpt_1b_1m.yaml --first-ranks 2 --steps 4 --save-at 2 --resumed-steps 2 \\
        --out docs/results/long_run_1m.json -- moba.block_size=512 moba.topk=8 moba.comm=pull run.offload_inputs=true

OUT holds `loss`, `grad_norm`, `peak_memory_gib` (so far, by step), `finite`, and `resumed` with its losses and their differences.
Where other work shares the GPU, `--shared` leaves speed out. Results are written after both parts; a part that is stopped
at the time limit keeps its steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .harness import limits, options, training
from .harness.records import REPOSITORY, about, check_writable, megatron_core_version, write_json

PLAIN = ["run.eval_interval=0", "run.routing_interval=0", "run.save_last=false", "run.routing_picture=false"]
PLAIN += ["run.log_interval=1", "run.name=run"]
WARMUP_STEPS = 5
"""First steps that speed leaves out: they compile."""
RESUMED_DIFFERENCE = 2.0**-5
"""Largest relative difference of a loss after resuming, over another number of ranks, from the killed run's. bf16 rounds to 2^-9,
and optimizer steps make differences grow: in the first 60 steps, runs that only round in other places differ by up to 4 %, later
by less than 1 % (docs/results/context_parallel_training.json)."""


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="keys of the configuration to change")] = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = REPOSITORY / "configs" / "gpt_300m_128k.yaml",
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)] = Path("runs/long_run/long_run.json"),
    output: Annotated[Path, typer.Option(help="folder for the run (replaced if there)")] = Path("runs/long_run"),
    steps: Annotated[int, typer.Option(help="steps before the run is killed")] = 200,
    save_at: Annotated[int, typer.Option(help="step after which the checkpoint is written")] = 150,
    first_ranks: Annotated[int, typer.Option(help="GPUs of the run that is killed", min=1)] = 1,
    ranks: Annotated[int, typer.Option(help="GPUs that resume", min=1)] = 2,
    resumed_steps: Annotated[int, typer.Option(help="steps after the checkpoint, at most steps - save_at")] = 12,
    seconds: Annotated[float, typer.Option(help="time limit of the run that is killed")] = 900,
    resume_seconds: Annotated[float, typer.Option(help="time limit of the resumed run")] = 300,
    shared: Annotated[bool, typer.Option(help="other work runs on the GPU: leave speed out")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    commit: options.Commit = "",
) -> None:
    """Train, kill, resume, compare."""
    options.device(device)
    if not 0 < resumed_steps <= steps - save_at or save_at < 1:
        raise typer.BadParameter(
            f"need 0 < resumed-steps <= steps - save-at, got steps {steps}, save-at {save_at}, resumed-steps {resumed_steps}"
        )
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # apex, Transformer Engine: optional

    from examples.megatron_gpt.config import load_config

    own = {change.partition("=")[0] for start in starts([], output, steps, save_at, 1, 1) for change in start}
    if taken := [change for change in overrides or [] if change.partition("=")[0] in own]:
        raise typer.BadParameter(f"this program sets {', '.join(sorted(own))} itself; got {', '.join(taken)}")
    changes, again = starts(overrides or [], output, steps, save_at, first_ranks, ranks)
    try:
        settings = load_config(config, changes)
        load_config(config, again)  # refused now, if at all
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{config}: {error}") from None
    visible = _visible(device)
    for option, wanted in (("first-ranks", first_ranks), ("ranks", ranks)):
        if len(visible) < wanted:
            raise typer.BadParameter(f"{option} is {wanted}, and {len(visible)} GPUs are visible")
    check_writable(out)
    content: dict[str, Any] = {
        "about": about(commit) | {"megatron_core": megatron_core_version()},
        "setup": {
            "config": config.name,
            "overrides": overrides or [],
            "moba": {"block_size": settings.moba.block_size, "topk": settings.moba.topk},
            "precision": settings.run.precision,
            "recompute": settings.run.recompute,
            "tokens_per_step": settings.data.seq_length * settings.run.global_batch_size,
            "saved_after": save_at,
            "ranks": first_ranks,
            "shared": shared,
        },
    }
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    start = partial(_train, config, device=device, output=output)
    found = start(changes, visible[:first_ranks], steps, seconds, number=1)
    content |= summary(found, steps, shared) | {"parameters": parameters(output / "run" / "metrics.jsonl")}
    write_json(out, content)
    print(_described(content), flush=True)
    killed = content["loss"]
    if len(killed) > save_at:
        _drop_checkpoints(output / "run" / "checkpoints", save_at)
        found = start(again, visible[:ranks], save_at + resumed_steps, resume_seconds, number=2)
        content["resumed"] = compared(killed, {entry["step"]: entry["loss"] for entry in found}, save_at) | {
            "ranks": ranks
        }
        write_json(out, content)
        print(json.dumps(content["resumed"]), flush=True)
    if len(killed) < steps or len(content.get("resumed", {}).get("loss", [])) < resumed_steps:
        sys.exit(f"steps are missing; logs are {output}/*.log")
    limits.end(wrong(content))


def wrong(content: dict[str, Any]) -> list[str]:
    """What is wrong with a result: a loss or gradient norm that is no number, a loss after resuming that is too far off."""
    lines = [] if content["finite"] else ["a loss or a gradient norm is not finite"]
    resumed = content.get("resumed", {"loss": [], "difference": []})
    apart = [
        {"step": resumed["first_step"] + number, "relative_difference": away / abs(loss)}
        for number, (loss, away) in enumerate(zip(resumed["loss"], resumed["difference"], strict=True))
    ]
    return lines + limits.broken(apart, {"relative_difference": RESUMED_DIFFERENCE})


def starts(
    overrides: list[str], output: Path, steps: int, save_at: int, first_ranks: int, ranks: int
) -> tuple[list[str], list[str]]:
    """Changes of the configuration for the run that is killed, over `first_ranks`, and for the one that goes on over `ranks`."""
    # The run would go on: it is killed in the middle, not at its end.
    changes = [*overrides, *PLAIN, f"run.steps={10 * steps}", f"run.directory={output}"]
    first = [*changes, f"run.save_interval={save_at}", *_over(first_ranks), "run.resume=false"]
    again = [*changes, "run.save_interval=0", *_over(ranks), "run.resume=true"]
    return first, again


def _over(ranks: int) -> list[str]:
    graphs = ["run.cuda_graphs=false"] if ranks > 1 else []  # graphs are for one process
    return [f"parallel.context={ranks}", *graphs]


def _visible(device: str) -> list[str]:
    """GPUs by the name that CUDA_VISIBLE_DEVICES takes; on CPU as many places as anybody wants."""
    if device == "cpu":
        return [""] * 64
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(n) for n in range(torch.cuda.device_count())]


def _train(
    config: Path,
    changes: list[str],
    gpus: list[str],
    steps: int,
    seconds: float,
    *,
    device: str,
    output: Path,
    number: int,
) -> list[dict[str, Any]]:
    """Train over `gpus` until step `steps` is logged, or for so long; then kill every process of the run.

    Args:
        number: how many times the run has been started, this time included.

    Returns:
        The logged steps of this start.
    """
    line, environment = training.command(config, changes, len(gpus), device)
    # Without torchrun, whose processes outlive it when it is killed.
    line = [sys.executable, *line[len(training.torchrun(len(gpus))) :]]
    store, variables = training.hosted_store(len(gpus), seconds)  # noqa: RUF059 # lives while its name does
    environment |= variables
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    path, end = output / "run" / "metrics.jsonl", time.monotonic() + seconds
    with (output / f"start{number}.log").open("wb") as log:
        processes: list[subprocess.Popen[bytes]] = []
        found: list[dict[str, Any]] = []
        try:
            for rank in map(str, range(len(gpus))):
                of_rank = environment | {"RANK": rank, "LOCAL_RANK": rank}
                processes.append(subprocess.Popen(line, env=of_rank, stdout=log, stderr=log))
            while time.monotonic() < end and not (found and found[-1]["step"] >= steps):
                if any(process.poll() is not None for process in processes):
                    break
                time.sleep(0.1)
                found = logged(path, number)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return logged(path, number)


def logged(path: Path, number: int) -> list[dict[str, Any]]:
    """Steps in the log of a run since it was started for the `number`-th time; each start logs the model first."""
    found, starts = list[dict[str, Any]](), 0
    for text in path.read_text().splitlines() if path.exists() else []:
        if not text.endswith("}"):
            break  # is being written
        entry = json.loads(text)
        starts += entry["kind"] == "model"
        if entry["kind"] == "train" and starts >= number:
            found.append(entry)
    return found


def parameters(path: Path) -> int | None:
    """Of the model, as the run logged them."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((entry["parameters"] for entry in map(json.loads, lines) if entry["kind"] == "model"), None)


def _drop_checkpoints(folder: Path, save_at: int) -> None:
    """Remove those after step `save_at`, which are complete only if there was time."""
    for path in folder.glob("step_*"):
        if int(path.name.removeprefix("step_").split(".")[0]) > save_at:
            shutil.rmtree(path)


def summary(entries: list[dict[str, Any]], steps: int, shared: bool) -> dict[str, Any]:
    """Curves of the killed run, and its speed unless the GPU was shared."""
    entries = entries[:steps]
    found: dict[str, Any] = {
        "steps": len(entries),
        "loss": [entry["loss"] for entry in entries],
        "grad_norm": [entry["grad_norm"] for entry in entries],
        "finite": all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in entries),
        "peak_memory_gib": [round(e["peak_memory_gib"], 3) for e in entries if "peak_memory_gib" in e],
        "tokens_per_second": None,
    }
    if not shared and len(entries) > WARMUP_STEPS:
        found["tokens_per_second"] = statistics.median(e["tokens_per_second"] for e in entries[WARMUP_STEPS:])
    return found


def compared(killed: list[float], resumed: dict[int, float], save_at: int) -> dict[str, Any]:
    """Losses of the resumed run by step after the checkpoint, and how far they are from those of the killed run."""
    numbers = [step for step in sorted(resumed) if save_at < step <= len(killed)]
    differences = [abs(resumed[step] - killed[step - 1]) for step in numbers]
    return {
        "first_step": save_at + 1,
        "loss": [resumed[step] for step in numbers],
        "difference": differences,
        "largest_difference": max(differences, default=None),
    }


def _described(content: dict[str, Any]) -> str:
    loss, peak = content["loss"], content["peak_memory_gib"]
    if not loss:
        return "no step was logged"
    memory = f", peak {peak[min(WARMUP_STEPS, len(peak)) - 1]:.2f} to {peak[-1]:.2f} GiB" if peak else ""
    return f"{len(loss)} steps, loss {loss[0]:.4f} to {loss[-1]:.4f}, finite {content['finite']}{memory}"


if __name__ == "__main__":
    typer.run(main)
