"""Start a program of examples/megatron_gpt, through torchrun or not, and read what it logged: for scripts that compare runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from .records import REPOSITORY


def torchrun(processes: int) -> list[str]:
    """Beginning of a command line that starts processes on this machine; a program and its arguments follow."""
    # By number: the host's own name need not resolve where there is no network.
    local = ["--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, "-m", "torch.distributed.run", *local, "--nproc-per-node", str(processes)]


def hosted_store(ranks: int, timeout: float) -> tuple[TCPStore, dict[str, str]]:
    """A store that ranks meet at, held by this process as by torchrun's agent: no port is chosen that another process takes
    before a rank does. And the variables, the same on all ranks, with which ``init_process_group`` finds it. For one group:
    ranks that meet again need another store.
    """
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=timeout), wait_for_workers=False)
    variables = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    return store, variables


def command(
    config: Path, overrides: list[str], processes: int, device: str, script: str = "train"
) -> tuple[list[str], dict[str, str]]:
    """Command line and environment that train with a YAML file and overrides over processes of this machine.

    Args:
        device: ``"cpu"`` hides the GPUs; ``"cuda"`` takes one GPU per process.
        script: its name in examples/megatron_gpt.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    training = [
        str(REPOSITORY / "examples" / "megatron_gpt" / f"{script}.py"),
        str(config),
        f"run.device={device}",
        *overrides,
    ]
    return [*torchrun(processes), *training], environment


def train(
    config: str, overrides: list[str], processes: int, device: str, quiet: bool = False, script: str = "train"
) -> None:
    """Train with ``configs/<config>.yaml``; arguments as for `command`.

    Args:
        quiet: print the run's output only if it fails.

    Raises:
        SystemExit: the run failed; the message holds the command.
    """
    line, environment = command(REPOSITORY / "configs" / f"{config}.yaml", overrides, processes, device, script)
    done = subprocess.run(line, env=environment, capture_output=quiet, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout or ''}{done.stderr or ''}training failed; the command was\n{' '.join(line)}")


def metrics(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """What a run logged, in the order written: one entry per step (``train``), evaluation (``eval``) or start (``model``,
    ``moba``), or per layer (``routing``)."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]
