"""Long layers under tensor, sequence and context parallelism with packed documents: the losses of Megatron's own layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

ROOT = Path(__file__).parents[2]
SIZES = (
    "data.seq_length=192 data.separate_documents=true optimizer.warmup_steps=1 run.global_batch_size=1 parallel.context=2 "
    "parallel.tensor=2 parallel.sequence=true model.num_layers=2"
)
EVERYTHING = "run.recompute=all_but_attention run.chunk_tokens=20 run.loss_chunk=13 run.offload_inputs=true"


def losses(out: Path, overrides: str) -> list[float]:
    """Losses of three steps on four processes, as `scripts.training_speed` writes them."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    line += ["--nproc-per-node", "4", "-m", "scripts.training_speed", "configs/quickstart.yaml", "--out", str(out)]
    line += ["--attention", "moba:48:3", "--warmup", "1", "--steps", "2", *SIZES.split(), *overrides.split()]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(out.read_text())["runs"]
    assert {"gpus", "tokens_per_step", "attention", "tokens_per_second", "mfu", "peak_memory_gib", "loss"} <= run.keys()
    return run["loss"]


@pytest.mark.heavy
def test_losses_are_those_of_megatrons_layers(tmp_path: Path) -> None:
    theirs = losses(tmp_path / "megatron.json", "run.layers=megatron")
    ours = losses(tmp_path / "long.json", EVERYTHING)
    # fp32: sums of another order, three steps long.
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert theirs[0] != pytest.approx(theirs[2], rel=1e-3)
