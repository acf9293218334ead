"""Megatron-LM's own pretrain_gpt.py, unmodified, with MoBA: on CPU, on one process and over context-parallel ranks.

python -m scripts.pretrain_gpt_stock /path/to/Megatron-LM
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .harness.records import REPOSITORY, about, git, megatron_core_version, write_json
from .harness.training import torchrun

TOLERANCE = 1e-5
console = Console(soft_wrap=True)

# Ten blocks of the ready spec's 512 tokens, of which a query attends to eight.
MODEL = (
    "--num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 5120 --max-position-embeddings 5120 --position-embedding-type rope "
    "--init-method-std 0.1"
)
TRAINING = (
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 1 --log-interval 1 "
    "--eval-iters 1 --calculate-per-token-loss"
)
DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 --num-workers 0"
# What MoBA asks for in any run, and what a machine without Transformer Engine, apex and GPUs asks for.
MOBA = "--attention-dropout 0 --no-create-attention-mask-in-dataloader"
PLAIN_TORCH = (
    "--transformer-impl local --hidden-dropout 0 --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-rope-fusion --no-bias-dropout-fusion --no-bias-gelu-fusion"
)
CPU = "--distributed-backend gloo --use-cpu-initialization"


@dataclass(frozen=True)
class Family:
    """Runs of one model. ``module`` runs the script on CPU; the script and its own arguments follow."""

    name: str
    module: str
    arguments: str
    variants: dict[str, tuple[int, str]] = field(default_factory=dict)  # processes and further arguments
    callable_spec: bool = False


CP2 = "--context-parallel-size 2"
FAMILIES = (
    Family(
        "--spec moba_cp.megatron moba_layer_spec",
        "moba_cp.megatron.cpu",
        "--spec moba_cp.megatron moba_layer_spec",
        {
            "CP 2": (2, CP2),
            "CP 2, --cp-comm-type moba_fetch": (2, f"{CP2} --cp-comm-type moba_fetch"),
            "CP 2, --cp-comm-type moba_fetch moba_ring": (2, f"{CP2} --cp-comm-type moba_fetch moba_ring"),
            "CP 2, TP 2": (4, f"{CP2} --tensor-model-parallel-size 2"),
        },
    ),
    Family(
        "--spec moba_cp.megatron moba_spec, experts in the second layer",
        "moba_cp.megatron.cpu",
        "--spec moba_cp.megatron moba_spec --num-experts 4 --moe-layer-freq [0,1] --moe-token-dispatcher-type alltoall "
        "--moe-router-load-balancing-type none --disable-bias-linear",
        {"CP 2": (2, CP2)},
        callable_spec=True,
    ),
    Family(
        "python -m moba_cp.megatron.pretrain, full attention in the last layer",
        "moba_cp.megatron.pretrain",
        "--moba-cpu --moba-block-size 192 --moba-topk 4 --moba-full-attention-last-n-layers 1",
        {"CP 2": (2, CP2)},
    ),
)


def main(
    megatron_lm: Annotated[Path, typer.Argument(help="a checkout of Megatron-LM", exists=True, file_okay=False)],
    results: Annotated[Path | None, typer.Option(help="write the figures here", dir_okay=False)] = None,
    steps: Annotated[int, typer.Option(help="steps of each run", min=1)] = 5,
) -> None:
    """Train a small GPT on mock data with MEGATRON_LM/pretrain_gpt.py as it is, with one process and with several.

    Megatron-LM compiles its dataset helpers the first time; what that needs is checked first.
    Exits with an error if a loss differs from that of one process by more than 1e-5 of its size.
    """
    megatron_lm = megatron_lm.resolve()
    if missing := what_is_missing(megatron_lm):
        sys.exit(missing)
    runs: list[dict[str, Any]] = []
    worst = 0.0
    for family in FAMILIES:
        if family.callable_spec and not (megatron_lm / "megatron" / "training" / "models" / "gpt.py").exists():
            console.print(f"{family.name}: left out, this Megatron-LM takes no callable")
            continue
        reference = None
        for name, (processes, extra) in {"CP 1": (1, ""), **family.variants}.items():
            line = command(megatron_lm, family, processes, f"{extra} --train-iters {steps} --eval-interval {steps}")
            curve = run(line, megatron_lm)
            reference = reference or curve
            difference = max(abs(a / b - 1) for a, b in zip(losses(curve), losses(reference), strict=True))
            worst = max(worst, difference)
            shown = shlex.join(line[1:]).replace(str(megatron_lm), "/path/to/Megatron-LM")
            runs.append({"how": family.name, "split": name, "processes": processes, "command": shown} | curve)
            runs[-1]["relative_difference"] = difference
            console.print(f"{family.name}; {name}: {' '.join(map(str, losses(curve)))} ({difference:.0e})")
    if results:
        found = {"about": facts(megatron_lm), "tolerance": TOLERANCE, "largest_relative_difference": worst}
        write_json(results, found | {"runs": runs})
        console.print(f"written to {results}")
    if worst > TOLERANCE:
        sys.exit(f"largest relative difference {worst:.2e}, more than {TOLERANCE:.0e}")


def what_is_missing(megatron_lm: Path) -> str | None:
    """What the runs need and this machine lacks, in one line; None if nothing."""
    if not (megatron_lm / "pretrain_gpt.py").is_file():
        return f"{megatron_lm} has no pretrain_gpt.py: it is no checkout of Megatron-LM"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    datasets = megatron_lm / "megatron" / "core" / "datasets"
    if (datasets / f"helpers_cpp{suffix}").is_file():
        return None
    purpose = f"to compile Megatron-LM's dataset helpers in {datasets}"
    for tool in ("make", os.environ.get("CXX", "g++").split()[0]):
        if shutil.which(tool) is None:
            return f"{tool} is missing, which is needed {purpose}: install it with the system's package manager"
    if _output("python3", "-m", "pybind11", "--includes") is None:
        return f"pybind11 is missing, which is needed {purpose}: {sys.executable} -m pip install pybind11"
    found = _output("python3-config", "--extension-suffix")
    if found is None:
        return f"python3-config is missing, which is needed {purpose}: install Python's development files (python3-dev)"
    if found != suffix:
        return (
            f"python3-config belongs to another Python (its modules end in {found}, those of {sys.executable} in {suffix}) "
            f"and is needed {purpose}: put the matching one first on PATH"
        )
    return None


def _output(*line: str) -> str | None:
    """Of a program as the runs will find it; None if it fails or is not there."""
    environment = environment_of_runs()
    program = shutil.which(line[0], path=environment["PATH"])
    if program is None:
        return None
    done = subprocess.run([program, *line[1:]], env=environment, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def environment_of_runs() -> dict[str, str]:
    """No GPU, one thread per process, and this Python's own ``python3`` first, which Megatron-LM's Makefile calls."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": path}


def command(megatron_lm: Path, family: Family, processes: int, extra: str) -> list[str]:
    """Command line of a run, the Python interpreter first."""
    arguments = " ".join([family.arguments, MODEL, TRAINING, DATA, MOBA, PLAIN_TORCH, CPU, extra])
    script = str(megatron_lm / "pretrain_gpt.py")
    return [*torchrun(processes), "-m", family.module, script, *arguments.split()]


def losses(curve: dict[str, Any]) -> list[float]:
    """Those of the steps, then that of the validation."""
    return [*curve["loss"], curve["validation_loss"]]


def run(line: list[str], megatron_lm: Path) -> dict[str, Any]:
    """Losses and gradient norms of the steps, and the validation loss, as the script prints them.

    Raises:
        SystemExit: the run failed; the message holds its output.
    """
    environment = environment_of_runs()
    path = [str(megatron_lm), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    steps = re.findall(r"iteration +\d+/.*\blm loss: (\S+) .*\bgrad norm: (\S+)", done.stdout)
    validation = re.findall(r"validation loss at iteration \d+ \| lm loss value: (\S+)", done.stdout)
    if done.returncode or not steps or not validation:
        sys.exit(f"{done.stdout}\nfailed; the command was\n{shlex.join(line)}")
    return {
        "loss": [float(loss) for loss, _ in steps],
        "grad_norm": [float(norm) for _, norm in steps],
        "validation_loss": float(validation[-1]),
    }


def facts(megatron_lm: Path) -> dict[str, Any]:
    """What the runs were made with."""
    return about(device="CPU, gloo, fp32") | {
        "megatron_lm": megatron_core_version(megatron_lm / "megatron" / "core"),
        "megatron_lm_commit": git(megatron_lm, "rev-parse", "HEAD") or "unknown",
        "megatron_lm_unmodified": git(megatron_lm, "status", "--porcelain", "--untracked-files=no") == "",
    }


if __name__ == "__main__":
    typer.run(main)
