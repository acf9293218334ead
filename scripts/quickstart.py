"""Train the same small GPT with its sequences on one process and sharded over two, and compare the losses.

bash scripts/quickstart.sh             # sets up first
python -m scripts.quickstart           # in an environment with the extra `train`
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from .harness import training
from .harness.records import REPOSITORY
from .tables.text import pyplot

TOLERANCE = 1e-5
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
OURS = ("run.name", "run.directory", "run.device", "parallel.context")
"""Keys that `train` sets for each run."""
console = Console()


@dataclass(frozen=True)
class Run:
    """One training run: where, and over how many context-parallel ranks."""

    label: str
    name: str
    context: int
    device: str  # cpu or cuda


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="keys of configs/quickstart.yaml to change")] = None,
    output: Annotated[Path, typer.Option(help="folder for the runs (replaced if there) and pictures")] = Path(
        "runs/quickstart"
    ),
) -> None:
    """Train the same small GPT twice on the Python standard library's sources, with MoBA attention over one rank (CP=1)
    and over two (CP=2: each holds two zigzag chunks of every sequence), and compare.

    Takes about two minutes on two CPU cores. Uses two GPUs if there are two. Exits with an error if the losses of any
    step differ by more than 1e-5.
    """
    check(overrides or [])
    runs = plan_runs(torch.cuda.device_count())
    for run in runs:
        shutil.rmtree(output / run.name, ignore_errors=True)
    losses = {run.label: train(run, output, overrides or []) for run in runs}
    difference = compare(losses, runs[:2])
    plot(losses, output / "loss.png")
    console.print(f"loss curves      {output / 'loss.png'}")
    drawn = output / runs[1].name / "routing.png"
    if drawn.exists():
        shutil.copy(drawn, output / "routing.png")
        console.print(f"selected blocks  {output / 'routing.png'}")
    console.print(f"TensorBoard      tensorboard --logdir {output}")
    if difference > TOLERANCE:
        sys.exit(f"the losses differ by {difference:.2e}, more than {TOLERANCE:.0e}")


def check(overrides: list[str]) -> None:
    """Refuse keys and values of which the first run would die, before folders of earlier runs are removed.

    Raises:
        BadParameter: the configuration does not take them, over two ranks; or they are what these runs differ in.
    """
    from examples.megatron_gpt.config import load_config

    for override in overrides:
        if (key := override.partition("=")[0]) in OURS:
            raise typer.BadParameter(f"{override}: the runs differ in {key}, so it cannot be given")
    try:
        config = load_config(CONFIG, [*overrides, "parallel.context=2"])
    except ValueError as error:
        raise typer.BadParameter(f"{CONFIG}: {error}") from None
    for name in ("tensor", "pipeline"):
        if (size := getattr(config.parallel, name)) > 1:
            raise typer.BadParameter(f"parallel.{name}={size}: a run has as many processes as context-parallel ranks")


def plan_runs(gpus: int) -> list[Run]:
    """The two runs to compare come first. Comparing needs two ranks on the same kind of device."""
    if gpus >= 2:
        console.print(f"{gpus} GPUs: both runs use them, over NCCL.")
        return [Run("CP=1", "cp1", 1, "cuda"), Run("CP=2", "cp2", 2, "cuda")]
    runs = [Run("CP=1", "cp1", 1, "cpu"), Run("CP=2", "cp2", 2, "cpu")]
    if gpus == 1:
        console.print(
            "1 GPU: CP=2 would need two. The comparison runs on CPU, over gloo; a third run, with CP=1, uses the GPU "
            "and is shown but not judged, since a GPU rounds differently."
        )
        return [*runs, Run("CP=1 on the GPU", "cp1_gpu", 1, "cuda")]
    console.print("No GPU: both runs use the CPU, over gloo.")
    return runs


def train(run: Run, output: Path, overrides: list[str]) -> dict[int, float]:
    """Train through torchrun and return the loss of every logged step."""
    console.rule(f"{run.label}: {run.context} process(es), {run.device}")
    ours = [f"run.name={run.name}", f"run.directory={output}", f"parallel.context={run.context}"]
    training.train("quickstart", [*overrides, *ours], run.context, run.device)
    return {entry["step"]: entry["loss"] for entry in training.metrics(output / run.name)}


def compare(losses: dict[str, dict[int, float]], pair: list[Run]) -> float:
    """Print all losses side by side; the largest difference between the two runs of ``pair``."""
    one, two = (losses[run.label] for run in pair)
    differences = {step: abs(one[step] - two[step]) for step in one}
    table = Table("step", *losses, f"|{pair[0].label} - {pair[1].label}|", title="Loss of each step")
    for step, difference in differences.items():
        table.add_row(str(step), *(f"{column[step]:.7f}" for column in losses.values()), f"{difference:.1e}")
    console.print(table)
    largest = max(differences.values())
    verdict = "[green]equal[/green]" if largest <= TOLERANCE else "[red]not equal[/red]"
    console.print(f"largest difference {largest:.2e}: {verdict} to the tolerance of {TOLERANCE:.0e}")
    return largest


def plot(losses: dict[str, dict[int, float]], path: Path) -> None:
    """Loss curves of all runs."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for (label, values), style in zip(losses.items(), ("-", "--", ":")):
        axes.plot(list(values), list(values.values()), style, linewidth=2, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="MoBA attention, one rank and two")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
