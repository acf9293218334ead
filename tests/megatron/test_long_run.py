"""scripts/long_run.py: a run that is killed goes on from its checkpoint over two ranks, with the losses that it had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from examples.megatron_gpt.config import load_config
from scripts import long_run
from scripts.tables.training import NOT_RUN, long_run_plot, long_run_text

ROOT = Path(__file__).parents[2]


def step(number: int, loss: float) -> str:
    entry = {"kind": "train", "step": number, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 8.0}
    return json.dumps(entry | {"peak_memory_gib": 2.0 + number})


def test_steps_of_each_start_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert long_run.logged(path, 1) == []
    assert long_run.parameters(path) is None
    model = json.dumps({"kind": "model", "step": 0, "parameters": 7})
    path.write_text("\n".join([model, step(1, 5.0), step(2, 4.0), model, step(3, 3.0), step(4, 2.0)[:20]]))
    assert [entry["step"] for entry in long_run.logged(path, 1)] == [1, 2, 3]
    assert [entry["step"] for entry in long_run.logged(path, 2)] == [3]
    assert long_run.parameters(path) == 7


def test_curves_and_differences() -> None:
    entries = [json.loads(step(n, 10.0 - n)) for n in range(1, 9)]
    found = long_run.summary(entries, steps=7, shared=False)
    assert (found["steps"], found["loss"][-1], found["finite"]) == (7, 3.0, True)
    assert found["tokens_per_second"] == 8.0
    assert long_run.summary(entries, steps=7, shared=True)["tokens_per_second"] is None
    assert not long_run.summary([entries[0] | {"loss": float("nan")}], steps=7, shared=True)["finite"]
    resumed = long_run.compared(found["loss"], {6: 4.5, 7: 3.0, 8: 1.0}, save_at=5)
    assert resumed == {"first_step": 6, "loss": [4.5, 3.0], "difference": [0.5, 0.0], "largest_difference": 0.5}
    assert long_run.compared(found["loss"], {}, save_at=5)["largest_difference"] is None


def test_text_and_plot(tmp_path: Path) -> None:
    entries = [json.loads(step(n, 10.0 - n)) for n in range(1, 9)]
    content = long_run.summary(entries, steps=7, shared=True) | {
        "about": {"device": "GPU", "torch": "2", "megatron_core": "0", "commit": "c" * 40},
        "setup": {
            "moba": {"block_size": 512, "topk": 8}, "tokens_per_step": 1024, "precision": "bf16", "overrides": ["a=1"],
            "saved_after": 5,
        },
        "parameters": 7_000_000,
    }  # fmt: skip
    assert long_run_text([]) == NOT_RUN
    assert "resumed" not in long_run_text([content])
    content["resumed"] = long_run.compared(content["loss"], {6: 4.5, 7: 3.0}, save_at=5) | {"ranks": 2}
    text = long_run_text([content])
    assert "7 steps: loss 9.0000 to 3.0000" in text
    assert "9.00 GiB after 7 steps, 9.00 GiB after 7" in text
    assert "1,024 tokens a step over 1 GPU" in text
    content["setup"]["ranks"] = 2
    assert "1,024 tokens a step over 2 GPUs" in long_run_text([content])
    assert "steps 6 to 7 differ by at most 5.0e-01" in text
    long_run_plot(content, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 1000


def test_both_starts_have_a_configuration_that_works(tmp_path: Path) -> None:
    """The file's own ranks do not matter, and a graph of one process is left out over two."""
    path = ROOT / "configs" / "gpt_300m_128k.yaml"
    assert load_config(path, []).parallel.context == 2
    sizes = {"steps": 200, "save_at": 150}
    first, again = long_run.starts(["run.cuda_graphs=true"], tmp_path, **sizes, first_ranks=1, ranks=2)
    one, two = load_config(path, first), load_config(path, again)
    assert (one.parallel.context, one.run.cuda_graphs, one.run.save_interval) == (1, True, 150)
    assert (two.parallel.context, two.run.cuda_graphs, two.run.resume) == (2, False, True)
    assert one.run.steps == two.run.steps > 200  # one schedule of learning rates
    first, again = long_run.starts(["run.cuda_graphs=true"], tmp_path, **sizes, first_ranks=4, ranks=1)
    four, one = load_config(path, first), load_config(path, again)
    assert (four.parallel.context, four.run.cuda_graphs) == (4, False)
    assert (one.parallel.context, one.run.cuda_graphs) == (1, True)


@pytest.mark.heavy
@pytest.mark.parametrize(("first_ranks", "ranks"), [(1, 2), (2, 1)])
def test_a_killed_run_goes_on_over_other_ranks(tmp_path: Path, first_ranks: int, ranks: int) -> None:
    out = tmp_path / "run.json"
    line = [sys.executable, "-m", "scripts.long_run", "--config", "configs/quickstart.yaml", "--device", "cpu"]
    line += ["--first-ranks", str(first_ranks), "--ranks", str(ranks), "--steps", "5", "--save-at", "3"]
    line += ["--resumed-steps", "2", "--output", str(tmp_path / "run"), "--out", str(out)]
    # Whatever ranks the configuration has.
    line += ["--", "data.seq_length=192", "optimizer.warmup_steps=2", "run.global_batch_size=2", "parallel.context=2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert (content["steps"], content["finite"]) == (5, True)
    assert content["loss"][-1] < content["loss"][0]
    assert content["setup"]["ranks"] == first_ranks
    assert (content["resumed"]["ranks"], len(content["resumed"]["loss"])) == (ranks, 2)
    # fp32: two ranks add gradients in another order.
    assert content["resumed"]["largest_difference"] < 1e-5
