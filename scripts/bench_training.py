"""The same training run with CP = 2 on two GPUs and CP = 1 on one: loss curves, tokens/s, MFU, peak memory.

    python -m scripts.bench_training --out docs/results/context_parallel_training.json
    python -m scripts.bench_training --config configs/quickstart.yaml --device cpu --steps 8 --out t.json \\
        -- data.seq_length=192 optimizer.warmup_steps=2

Every run is `examples/megatron_gpt/train.py` with the YAML file, the overrides after `--`, and no evaluation, checkpoint or
picture:

    cp2    two processes, parallel.context=2 (and cp2_ring, ... for more names in --comm)
    cp1    one process, parallel.context=1
    noise2, noise4, ...  cp1 with run.token_parts=2, 4, ...: every layer with weights processes its tokens in 2, 4, ... parts

How noise is measured: a weight's gradient is a sum over all tokens. With CP = 2, each rank sums its half and rounds it to bf16,
and the halves are added. With CP = 1 there is one sum, twice as long, rounded once. No implementation can avoid that difference.
(Tensor cores also truncate what they add to a sum, so that a longer sum comes out smaller.) A noise run is CP = 1 with sums in
parts: the same rounding, without communication.
Training amplifies rounding, so curves are compared: |loss of cp2 - loss of cp1| and, per noise run, |loss of noise - loss of
cp1| by step. `within_noise`: maximum and median of the first are at most 3 times the largest of the noise runs; 3, because each
curve is one random draw.

cp2 runs first; then the others two at a time, each on its own GPU, unless --alone. Results are written after every run;
a run that fails, or is stopped at the time limit, keeps the steps that it made.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from moba_cp.parallel.splits import COMMS

from .harness import limits, options, training
from .harness.records import REPOSITORY, about, megatron_core_version, write_json

if TYPE_CHECKING:
    from examples.megatron_gpt.config import TrainConfig

WARMUP_STEPS = 5
"""First steps that speed leaves out: they compile."""
NOISE = "noise"
"""Prefix of the names of noise runs; the number of parts follows."""
FACTOR = 3.0
"""Differences up to this many times the noise count as noise."""
TAIL_LINES = 40
PLAIN = ["run.eval_interval=0", "run.routing_interval=0", "run.save_interval=0", "run.save_last=false"]
PLAIN += ["run.routing_picture=false", "run.resume=false", "run.log_interval=1"]
# Tokens in parts are a matter of Megatron's own layers, and all runs have to compute alike.
PLAIN += ["run.layers=megatron", "run.recompute=full"]
console = Console(width=150)


@dataclass(frozen=True)
class Run:
    """One training run: its name, context-parallel ranks, first GPU, and what it changes."""

    name: str
    context: int
    first_gpu: int = 0
    changes: tuple[str, ...] = ()


@dataclass
class Started:
    """A run under way."""

    run: Run
    process: subprocess.Popen[bytes]
    log: Path
    begin: float = field(default_factory=time.monotonic)


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="keys of the configuration to change")] = None,
    config: Annotated[Path, typer.Option(help="YAML file")] = REPOSITORY / "configs" / "gpt_300m_128k.yaml",
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)] = Path(
        "runs/bench_training/context_parallel_training.json"
    ),
    output: Annotated[Path, typer.Option(help="folder for the runs (replaced if there)")] = Path("runs/bench_training"),
    steps: Annotated[int, typer.Option(help="optimizer steps of each run")] = 60,
    comm: Annotated[str, typer.Option(help="values of comm= for CP = 2, comma-separated")] = "auto",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    noise: Annotated[str, typer.Option(help="parts of the noise runs, comma-separated")] = "2,4,8",
    alone: Annotated[bool, typer.Option(help="runs of one process one after the other, not side by side")] = False,
    runs: Annotated[str, typer.Option(help="make these alone, and keep the others that OUT has; empty: all")] = "",
    seconds: Annotated[float, typer.Option(help="time for everything; what runs then is stopped")] = 540.0,
    commit: options.Commit = "",
) -> None:
    """Train with CP = 2, with CP = 1, and with CP = 1 and other roundings; compare."""
    deadline = time.monotonic() + seconds
    options.device(device)
    if device == "cuda" and torch.cuda.device_count() < 2:
        sys.exit(f"two GPUs are needed, {torch.cuda.device_count()} visible; --device cpu runs over gloo")
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # apex, Transformer Engine: optional
    from examples.megatron_gpt.config import load_config

    changes = [*(overrides or []), f"run.steps={steps}", *PLAIN]
    try:
        settings = load_config(config, changes)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{config}: {error}") from None
    parts = options.integers(noise)
    phases = plan(options.choices(comm, COMMS), parts, side_by_side=not alone, only=runs.split(",") if runs else None)
    described = setup(config, settings, overrides or [], side_by_side=not alone)
    content: dict[str, Any] = {
        "about": about(commit) | {"megatron_core": megatron_core_version(), "backend": backend(device)},
        "setup": described,
        "runs": kept(out, described) if runs else {},
        "comparison": {},
    }
    write_json(out, content)
    for number, phase in enumerate(phases):
        # A phase may take half of the remaining time, so that a hanging run leaves time for the next; the last phase, all of it.
        left = deadline - time.monotonic()
        until = deadline if number == len(phases) - 1 else time.monotonic() + left / 2
        started = [start(run, config, changes, output, device) for run in phase]
        try:
            wait(started, until, steps, output, content, out)
        finally:
            stop(started)
    show(content)
    bad = [f"{name}: {result['status']}" for name, result in content["runs"].items() if result["status"] != "finished"]
    if bad:
        sys.exit(f"{'; '.join(bad)}; logs are {output}/<run>.log")
    limits.end(too_far(content["comparison"]))


def too_far(comparison: dict[str, Any]) -> list[str]:
    """Runs whose losses are further from cp1's than `FACTOR` times the noise."""
    return [
        f"{name}: losses differ from cp1's by up to {found['max']:.3g}, more than {FACTOR:g} times the noise"
        for name, found in comparison.items()
        if found.get("within_noise") is False
    ]


def plan(comms: list[str], parts: list[int], side_by_side: bool, only: list[str] | None = None) -> list[list[Run]]:
    """Runs by phase, of those named in `only`; those of one phase run at the same time."""
    phases = [[Run("cp2" if c == "auto" else f"cp2_{c}", 2, changes=(f"moba.comm={c}",))] for c in comms]
    single = [("cp1", ()), *((f"{NOISE}{n}", (f"run.token_parts={n}",)) for n in parts)]
    at_once = 2 if side_by_side else 1
    phases += [
        [Run(name, 1, gpu, changes) for gpu, (name, changes) in enumerate(single[begin : begin + at_once])]
        for begin in range(0, len(single), at_once)
    ]
    if only is None:
        return phases
    known = {run.name for phase in phases for run in phase}
    if not set(only) <= known:
        sys.exit(f"--runs must be of {sorted(known)}, got {only}")
    return [chosen for phase in phases if (chosen := [run for run in phase if run.name in only])]


def kept(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs of an earlier call with the same settings."""
    if not out.exists():
        return {}
    earlier = json.loads(out.read_text())
    if earlier["setup"] != settings:
        sys.exit(f"{out} holds runs with other settings: {earlier['setup']}, not {settings}")
    return earlier["runs"]


def setup(config: Path, settings: TrainConfig, overrides: list[str], side_by_side: bool) -> dict[str, Any]:
    """What is trained, for the head of the results."""
    return {
        "config": config.name,
        "overrides": overrides,
        "model": vars(settings.model),
        "moba": {"block_size": settings.moba.block_size, "topk": settings.moba.topk},
        "optimizer": vars(settings.optimizer),
        "precision": settings.run.precision,
        "recompute": settings.run.recompute,
        "seq_length": settings.data.seq_length,
        "tokens_per_step": settings.data.seq_length * settings.run.global_batch_size,
        "steps": settings.run.steps,
        "warmup_steps": WARMUP_STEPS,
        "side_by_side": side_by_side,
        "factor": FACTOR,
    }


def backend(device: str) -> str:
    return "nccl" if device == "cuda" else "gloo"


def start(run: Run, config: Path, changes: list[str], output: Path, device: str) -> Started:
    """Start a run in the background; what it prints goes to `<output>/<run>.log`."""
    shutil.rmtree(output / run.name, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    ours = [f"run.directory={output}", f"run.name={run.name}", f"parallel.context={run.context}", *run.changes]
    line, environment = training.command(config, [*changes, *ours], run.context, device)
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[run.first_gpu : run.first_gpu + run.context])
    log = output / f"{run.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(line, env=environment | {"PYTHONUNBUFFERED": "1"}, stdout=file, stderr=file)
    console.print(f"{run.name}: started, CP {run.context}, {' '.join(run.changes)}")
    return Started(run, process, log)


def wait(started: list[Started], until: float, steps: int, output: Path, content: dict[str, Any], out: Path) -> None:
    """Wait for runs, say how far they are, and write the results after each one's end."""
    running, told = list(started), time.monotonic()
    while running:
        time.sleep(0.2)
        late = time.monotonic() > until
        for item in [s for s in running if late or s.process.poll() is not None]:
            running.remove(item)
            if late:
                stop([item])
            taken = time.monotonic() - item.begin
            content["runs"][item.run.name] = finished(
                item, steps, output / item.run.name, taken, late, content["about"]["commit"]
            )
            content["comparison"] = compare(content["runs"])
            write_json(out, content)
        if running and time.monotonic() - told > 15:
            told = time.monotonic()
            console.print(
                "; ".join(f"{s.run.name}: {(own_lines(s.log) or ['...'])[-1].strip()[:60]}" for s in running),
                highlight=False,
            )


def finished(item: Started, steps: int, folder: Path, taken: float, late: bool, commit: str) -> dict[str, Any]:
    """Results of a run that has ended, or was stopped."""
    entries, model = metrics(folder, "train"), metrics(folder, "model")
    code = item.process.returncode
    status = "finished" if code == 0 and len(entries) == steps else "stopped at the time limit" if late else "failed"
    result = {"context": item.run.context, "changes": list(item.run.changes), "status": status, "commit": commit}
    result |= {"parameters": model[-1]["parameters"] if model else None, "seconds_in_all": round(taken, 1)}
    console.print(f"{item.run.name}: {status} after {taken:.0f} s, {len(entries)} of {steps} steps")
    if status != "finished":
        tail = own_lines(item.log)[-TAIL_LINES:]
        console.print(f"exit status {code}; end of {item.log}:", *tail, sep="\n", markup=False, highlight=False)
        result["error"] = f"exit status {code}: {tail[-1] if tail else 'no output'}"
    return result | summary(entries)


def stop(started: Iterable[Started]) -> None:
    """End what still runs. torchrun passes the signal on to the processes that it started."""
    for item in started:
        if item.process.poll() is None:
            item.process.send_signal(signal.SIGTERM)
            try:
                item.process.wait(45)
            except subprocess.TimeoutExpired:
                item.process.kill()
                item.process.wait()


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """What a run logged; nothing if it did not get that far."""
    return training.metrics(folder, kind) if (folder / "metrics.jsonl").exists() else []


def own_lines(log: Path) -> list[str]:
    """Lines that the training printed, without torchrun's report of a failure behind them."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return list(itertools.takewhile(lambda line: "torch/distributed/elastic/" not in line, lines))


def summary(entries: list[dict[str, Any]], warmup: int = WARMUP_STEPS) -> dict[str, Any]:
    """Speed (medians over the steps after the first ones), peak memory, and the curves, of a run's `train` entries.

    `tokens_per_second` and `mfu` are of all GPUs together and of one GPU; `mfu` is there where the device's peak is known,
    `peak_memory_gib` (the largest over ranks) on GPUs.
    """
    if not entries:
        return {"steps": 0}
    timed = entries[warmup:] or entries
    result: dict[str, Any] = {"steps": len(entries)}
    for name in ("tokens_per_second", "tflops_per_device", "mfu"):
        if name in timed[0]:
            result[name] = statistics.median(entry[name] for entry in timed)
    if "peak_memory_gib" in entries[-1]:
        result["peak_memory_gib"] = max(entry["peak_memory_gib"] for entry in entries)
    return result | {name: [entry[name] for entry in entries] for name in ("loss", "grad_norm")}


def compare(runs: dict[str, dict[str, Any]], factor: float = FACTOR) -> dict[str, Any]:
    """Differences of the losses from cp1's, of every other run, and whether they are within `factor` times those of noise.

    Over the steps that the runs have in common. Losses are sums in fp32, so its last digit is noise in any case. Empty as
    long as there is no cp1; without a noise run there is no verdict. A loss that is not a number is within no noise.
    """
    losses = {name: run["loss"] for name, run in runs.items() if run.get("loss")}
    if "cp1" not in losses:
        return {}
    result = {name: difference(losses["cp1"], loss) for name, loss in losses.items() if name != "cp1"}
    noises = [name for name in result if name.startswith(NOISE)]
    for name, found in result.items():
        if name in noises or not noises:
            continue
        steps = min(result[other]["steps"] for other in [name, *noises])
        reference = losses["cp1"][:steps]
        ours, last_digit = difference(reference, losses[name]), reference[0] * 2.0**-23
        noise = [difference(reference, losses[other]) for other in noises]
        found["within_noise"] = all(
            ours[key] <= factor * max(last_digit, *(n[key] for n in noise)) for key in ("max", "median")
        )
    return result


def difference(reference: list[float], losses: list[float]) -> dict[str, Any]:
    """First, largest, median and last of `|loss - reference|` by step, and all of them."""
    values = [abs(a - b) for a, b in zip(reference, losses)]
    largest = math.nan if any(map(math.isnan, values)) else max(values)
    median = math.nan if math.isnan(largest) else statistics.median(values)
    return {
        "steps": len(values),
        "first": values[0],
        "max": largest,
        "median": median,
        "last": values[-1],
        "by_step": values,
    }


def show(content: dict[str, Any]) -> None:
    """Print the results as a table."""
    table = Table(
        "run", "status", "steps", "tokens/s", "MFU", "peak GiB", "first loss", "last loss", "max |d|", "median |d|"
    )
    for name, run in content["runs"].items():
        found = content["comparison"].get(name, {})
        cells = [f"{run[k]:{f}}" if k in run else "-" for k, f in (("tokens_per_second", ",.0f"), ("mfu", ".1%"))]
        cells.append(f"{run['peak_memory_gib']:.1f}" if "peak_memory_gib" in run else "-")
        cells += [f"{run['loss'][i]:.5f}" if run.get("loss") else "-" for i in (0, -1)]
        cells += [f"{found[k]:.2e}" if k in found else "-" for k in ("max", "median")]
        table.add_row(name, run["status"], str(run["steps"]), *cells)
    console.print(table)
    for name, found in content["comparison"].items():
        if "within_noise" in found:
            console.print(f"{name}: {'within' if found['within_noise'] else 'NOT within'} {FACTOR:g} times the noise")


if __name__ == "__main__":
    typer.run(main)
