"""One table: losses and gradient norms of the same training run under every way to split it over processes.

python -m scripts.parallel_equality --results docs/results/parallel_equality.json
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .harness import training
from .harness.records import about, megatron_core_version, write_json

TOLERANCE = 1e-5
FIGURES = ("loss", "grad_norm", "evaluation_loss")
# Blocks of 48 tokens straddle ranks, whose shares are cut into chunks of 112 or 56.
SMALL = [
    "data.seq_length=448",
    "optimizer.warmup_steps=1",
    "run.global_batch_size=4",
    "run.eval_batches=1",
    "run.routing_picture=false",
    "run.save_last=false",
]
console = Console()


@dataclass(frozen=True)
class Variant:
    """One way to run; sizes as in the section ``parallel`` of a configuration."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    micro_batch: int = 1
    plain: bool = False  # torch alone, around moba_cp.reference

    @property
    def processes(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.context={self.context}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.virtual_pipeline={self.virtual_pipeline}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"run.recompute={self.recompute}",
            f"run.micro_batch_size={self.micro_batch}",
        ]

    @property
    def label(self) -> str:
        if self.plain:
            return "plain torch, moba_cp.reference"
        sizes = f"TP {self.tensor}  CP {self.context}  PP {self.pipeline}  DP {self.data}"
        extras = [f"VPP {self.virtual_pipeline}"] * (self.virtual_pipeline > 1) + ["SP"] * self.sequence
        extras += [f"{self.recompute} recomputation"] * (self.recompute != "none")
        extras += [f"micro-batch {self.micro_batch}"] * (self.micro_batch > 1)
        return "  ".join([sizes, *extras])


@dataclass(frozen=True)
class Family:
    """Runs of one model, all compared with its run on one process."""

    name: str
    overrides: list[str] = field(default_factory=list)
    variants: tuple[Variant, ...] = ()


PLAIN = Variant(plain=True)
GRID = tuple(
    Variant(tensor, context, pipeline)
    for pipeline, tensor, context in product((1, 2), (1, 2), (1, 2, 4))
    if tensor * context * pipeline > 1
)

# No two blocks' scores are so close here that rounding orders them differently: one query that selects another block
# changes a gradient norm by 1e-5.
FAMILIES = (
    Family(
        "GQA",
        variants=(
            *GRID,
            Variant(data=2),
            Variant(context=2, data=2),
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
        (
            Variant(context=2),
            Variant(context=2, micro_batch=2),
            Variant(context=2, tensor=2),
            Variant(context=2, tensor=2, sequence=True),
            Variant(context=2, pipeline=2),
            Variant(tensor=2, pipeline=2, sequence=True),
            Variant(context=2, recompute="full"),
        ),
    ),
    Family("full last layer", ["moba.full_last_layers=1"], (Variant(context=2), Variant(context=2, pipeline=2))),
    Family(
        "4 layers",
        ["model.num_layers=4"],
        (
            Variant(pipeline=2, virtual_pipeline=2),
            Variant(context=2, pipeline=2, virtual_pipeline=2),
            Variant(context=2, pipeline=2, virtual_pipeline=2, recompute="selective"),
            Variant(context=2, tensor=2, pipeline=2, virtual_pipeline=2, sequence=True),
        ),
    ),
    Family(
        "4 layers, full last layer",
        ["model.num_layers=4", "moba.full_last_layers=1"],
        (Variant(pipeline=2, virtual_pipeline=2), Variant(context=2, pipeline=2, virtual_pipeline=2)),
    ),
    Family(
        "4 layers, full and MoBA in turn, documents apart",
        [
            "model.num_layers=4",
            "moba.layer_pattern=[1,0,1,0]",
            "data.separate_documents=true",
            "data.paths=[{documents}]",
        ],
        (Variant(context=2, pipeline=2, virtual_pipeline=2),),
    ),
)


@dataclass(frozen=True)
class Curve:
    """What a run logged: loss and gradient norm of each step, and the evaluation loss after the last."""

    steps: dict[int, tuple[float, float]]
    evaluation: float

    def relative_differences(self, reference: Curve) -> dict[str, float]:
        """Largest difference of each figure from that of ``reference``, relative to its size."""
        pairs = [(self.steps[step], reference.steps[step]) for step in self.steps]
        return {
            "loss": max(abs(ours[0] / theirs[0] - 1) for ours, theirs in pairs),
            "grad_norm": max(abs(ours[1] / theirs[1] - 1) for ours, theirs in pairs),
            "evaluation_loss": abs(self.evaluation / reference.evaluation - 1),
        }


def main(
    output: Annotated[Path, typer.Option(help="new folder for the runs")] = Path("runs/parallel_equality"),
    results: Annotated[
        Path | None, typer.Option(help="file for the figures; parallel_equality.json in OUTPUT", dir_okay=False)
    ] = None,
    steps: Annotated[int, typer.Option(help="steps to compare", min=1)] = 4,
    processes: Annotated[int, typer.Option(help="leave out what needs more", min=1)] = 8,
    only: Annotated[str, typer.Option(help="leave out models whose name does not contain this")] = "",
) -> None:
    """Train the quickstart model in fp32 on CPU in every way of splitting it, from one checkpoint per model, and compare.

    A run on one process makes the checkpoint at its first step; the others start there, which also shows that
    checkpoints do not depend on the sizes. The same GPT in plain torch around moba_cp.reference, with the same weights at
    the start, is compared too. Exits with an error if a loss or a gradient norm differs by more than 1e-5 of its size.
    """
    families = [family for family in FAMILIES if only in family.name]
    if not families:
        names = "; ".join(family.name for family in FAMILIES)
        raise typer.BadParameter(f"--only must be part of the name of a model ({names}), got {only!r}")
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output} is not empty: name another folder with --output, or remove it")
    write_documents(output / "documents")
    table = Table("model", "split", *FIGURES, title="Largest relative difference from one process")
    runs: list[dict[str, Any]] = []
    worst = 0.0
    for family in families:
        reference = run(family, Variant(), output, steps, source=None)
        runs.append({"model": family.name, "split": asdict(Variant()), "processes": 1} | asdict(reference))
        for number, variant in enumerate(v for v in (PLAIN, *family.variants) if v.processes <= processes):
            got = run(family, variant, output, steps, source=output / name(family, Variant()))
            differences = got.relative_differences(reference)
            worst = max(worst, *differences.values())
            runs.append(
                {"model": family.name, "split": asdict(variant), "processes": variant.processes}
                | asdict(got)
                | {"relative_differences": differences}
            )
            cells = [f"{differences[figure]:.1e}" for figure in FIGURES]
            table.add_row(family.name if number == 0 else "", variant.label, *cells)
            console.print(f"{family.name}: {variant.label}: {', '.join(cells)}")
    console.print(table)
    facts = about(device="CPU, gloo, fp32") | {"megatron_core": megatron_core_version()}
    found = {"about": facts, "tolerance": TOLERANCE, "largest_relative_difference": worst, "runs": runs}
    results = results or output / "parallel_equality.json"
    write_json(results, found)
    console.print(f"written to {results}")
    if worst > TOLERANCE:
        sys.exit(f"largest relative difference {worst:.2e}, more than {TOLERANCE:.0e}")


def run(family: Family, variant: Variant, output: Path, steps: int, source: Path | None) -> Curve:
    """Train. With ``source``, start from that run's checkpoint of step 1."""
    target = output / name(family, variant)
    overrides = [*SMALL, *family.overrides, *variant.overrides, f"run.directory={output}", f"run.name={target.name}"]
    overrides = [text.replace("{documents}", str(output / "documents")) for text in overrides]
    overrides += [f"run.steps={steps + 1}", f"run.eval_interval={steps + 1}"]
    if source is None:
        overrides.append("run.save_interval=1")
    elif not variant.plain:
        checkpoint = "step_00000001"
        shutil.copytree(source / "checkpoints" / checkpoint, target / "checkpoints" / checkpoint)
        (target / "checkpoints" / "latest").write_text(checkpoint + "\n")
    script = "train_plain" if variant.plain else "train"
    training.train("quickstart", overrides, variant.processes, "cpu", quiet=True, script=script)
    logged = {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in training.metrics(target)}
    return Curve(logged, training.metrics(target, "eval")[-1]["loss"])


def write_documents(folder: Path) -> None:
    """Short documents, several to a sequence: the paragraphs of a module of the standard library (it parses nothing here)."""
    folder.mkdir(parents=True)
    for number, paragraph in enumerate(Path(argparse.__file__).read_text().split("\n\n")):
        (folder / f"{number:04}.txt").write_text(paragraph or "\n")


def name(family: Family, variant: Variant) -> str:
    """Folder of a run."""
    return f"{family.name} {variant.label}".replace("  ", " ").replace(" ", "_")


if __name__ == "__main__":
    typer.run(main)
