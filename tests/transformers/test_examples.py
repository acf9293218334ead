"""The examples for transformers run as they stand, the one for training with the same losses on one rank and on two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from scripts.harness.training import torchrun

ROOT = Path(__file__).resolve().parents[2]


def run(*line: str, **more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.heavy
def test_generation() -> None:
    printed = run(sys.executable, str(ROOT / "examples" / "hf_generate.py"))
    assert "same tokens: True" in printed
    difference = re.search(r"largest difference of logits (\S+)", printed)
    assert difference
    assert float(difference[1]) < 1e-4  # fp32 sums in another order, logits of order 1


@pytest.mark.heavy
def test_training() -> None:
    losses = []
    for ranks in (1, 2):
        printed = run(*torchrun(ranks), str(ROOT / "examples" / "hf_train.py"), STEPS="4")
        losses.append([float(x) for x in re.findall(r"loss (\S+)", printed)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)  # fp32 sums in another order, over four steps
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "text"),
    [
        (("hf_train.py",), "start this with torchrun: torchrun --nproc-per-node 2 examples/hf_train.py"),
        (("hf_generate.py", "/none/model"), "no model could be loaded from '/none/model': "),
    ],
)
def test_a_start_that_cannot_work_takes_one_line(line: tuple[str, ...], text: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / line[0]), *line[1:]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(text)
    assert "Traceback" not in done.stderr
