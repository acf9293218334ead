"""One table: losses and gradient norms of the same training run under every way to split it over processes."""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import launch
import typer
from rich.console import Console
from rich.table import Table

TOLERANCE = 1e-5
SMALL = ["data.seq_length=384", "optimizer.warmup_steps=1", "run.global_batch_size=4", "run.eval_interval=0"]
console = Console()


@dataclass(frozen=True)
class Variant:
    """One way to run; sizes as in the section ``parallel`` of a configuration."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    micro_batch: int = 1

    @property
    def processes(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.context={self.context}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"run.recompute={self.recompute}",
            f"run.micro_batch_size={self.micro_batch}",
        ]

    @property
    def label(self) -> str:
        sizes = f"TP {self.tensor}  CP {self.context}  PP {self.pipeline}  DP {self.data}"
        extras = ["SP"] * self.sequence
        extras += [f"{self.recompute} recomputation"] * (self.recompute != "none")
        extras += [f"micro-batch {self.micro_batch}"] * (self.micro_batch > 1)
        return "  ".join([sizes, *extras])


@dataclass(frozen=True)
class Family:
    """Runs of one model, all compared with its run on one process."""

    name: str
    overrides: list[str] = field(default_factory=list)
    variants: tuple[Variant, ...] = (Variant(context=2),)


FAMILIES = (
    Family(
        "GQA",
        variants=(
            Variant(context=2),
            Variant(context=4),
            Variant(tensor=2),
            Variant(pipeline=2),
            Variant(data=2),
            Variant(context=2, tensor=2),
            Variant(context=2, pipeline=2),
            Variant(context=2, data=2),
            Variant(tensor=2, pipeline=2),
            Variant(context=2, tensor=2, sequence=True),
            Variant(context=2, recompute="selective"),
            Variant(context=2, recompute="full"),
            Variant(context=2, micro_batch=2),
        ),
    ),
    Family("MQA", ["model.num_query_groups=1"], (Variant(context=2), Variant(context=2, tensor=2))),
    Family(
        "documents apart",
        ["data.separate_documents=true", "data.paths=[{documents}]"],
        (Variant(context=2), Variant(context=2, tensor=2)),
    ),
    Family("full last layer", ["moba.full_last_layers=1"], (Variant(context=2), Variant(context=2, pipeline=2))),
)


def main(
    output: Annotated[Path, typer.Option(help="new folder for the runs")] = Path("runs/parallel_equality"),
    steps: Annotated[int, typer.Option(help="steps to compare")] = 4,
    processes: Annotated[int, typer.Option(help="leave out what needs more")] = 4,
) -> None:
    """Train the quickstart model in fp32 on CPU in every way of splitting it, from one checkpoint per model, and compare.

    A run on one process makes the checkpoint at its first step; the others start there, which also shows that
    checkpoints do not depend on the sizes. Exits with an error if a loss, or a gradient norm relative to its size,
    differs by more than 1e-5.
    """
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output} is not empty: name another folder with --output, or remove it")
    write_documents(output / "documents")
    table = Table("model", "split", "loss", "gradient norm", title="Largest difference from one process")
    markdown = ["| model | split | loss | gradient norm, relative |", "|---|---|---|---|"]
    worst = 0.0
    for family in FAMILIES:
        reference = run(family, Variant(), output, steps, source=None)
        for number, variant in enumerate(v for v in family.variants if v.processes <= processes):
            got = run(family, variant, output, steps, source=output / name(family, Variant()))
            loss, norm = differences(reference, got)
            worst = max(worst, loss, norm)
            table.add_row(family.name if number == 0 else "", variant.label, f"{loss:.1e}", f"{norm:.1e}")
            markdown.append(f"| {family.name} | {variant.label} | {loss:.1e} | {norm:.1e} |")
            console.print(f"{family.name}: {variant.label}: loss {loss:.1e}, gradient norm {norm:.1e}")
    console.print(table)
    (output / "table.md").write_text("\n".join(markdown) + "\n")
    if worst > TOLERANCE:
        sys.exit(f"largest difference {worst:.2e}, more than {TOLERANCE:.0e}")


def run(
    family: Family, variant: Variant, output: Path, steps: int, source: Path | None
) -> dict[int, tuple[float, float]]:
    """Train; loss and gradient norm by step. With ``source``, start from that run's checkpoint of step 1."""
    target = output / name(family, variant)
    overrides = [*SMALL, *family.overrides, *variant.overrides, f"run.directory={output}", f"run.name={target.name}"]
    overrides = [text.replace("{documents}", str(output / "documents")) for text in overrides]
    overrides += [f"run.steps={steps + 1}", "run.routing_picture=false", "run.save_last=false"]
    if source is None:
        overrides.append("run.save_interval=1")
    else:
        checkpoint = "step_00000001"
        shutil.copytree(source / "checkpoints" / checkpoint, target / "checkpoints" / checkpoint)
        (target / "checkpoints" / "latest").write_text(checkpoint + "\n")
    launch.train("quickstart", overrides, variant.processes, "cpu", quiet=True)
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in launch.metrics(target)}


def write_documents(folder: Path) -> None:
    """Short documents, several to a sequence: the paragraphs of a module of the standard library."""
    folder.mkdir(parents=True)
    for number, paragraph in enumerate(Path(argparse.__file__).read_text().split("\n\n")):
        (folder / f"{number:04}.txt").write_text(paragraph or "\n")


def name(family: Family, variant: Variant) -> str:
    """Folder of a run."""
    return f"{family.name} {variant.label}".replace("  ", " ").replace(" ", "_")


def differences(reference: dict[int, tuple[float, float]], got: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Largest difference of the losses, and of the gradient norms relative to their size, over the steps of ``got``."""
    loss = max(abs(got[step][0] - reference[step][0]) for step in got)
    norm = max(abs(got[step][1] / reference[step][1] - 1) for step in got)
    return loss, norm


if __name__ == "__main__":
    typer.run(main)
