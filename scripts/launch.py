"""Start scripts/train.py through torchrun, for the scripts beside it that compare runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]


def train(config: str, overrides: list[str], processes: int, device: str, quiet: bool = False) -> None:
    """Train with ``configs/<config>.yaml`` and overrides, over a number of processes of this machine.

    Args:
        device: ``"cpu"`` hides the GPUs and shares the cores out; ``"cuda"`` takes one GPU a process.
        quiet: print the run's output only if it fails.

    Raises:
        SystemExit: the run failed; the message holds the command.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [str(REPOSITORY / "scripts" / "train.py"), str(REPOSITORY / "configs" / f"{config}.yaml")]
    command = [*launch, *script, f"run.device={device}", *overrides]
    done = subprocess.run(command, env=environment, capture_output=quiet, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}training failed; the command was\n{' '.join(command)}")


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a run logged, one entry a step (``train``) or evaluation (``eval``)."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]
