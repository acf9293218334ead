"""scripts/bench_training.py: its arithmetic, which runs it makes, and the shape of its results and of the README's table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from scripts import bench_training as bench
from scripts.harness.records import write_json
from scripts.tables.training import training_plot, training_table


def entries(losses: list[float], speed: float = 100.0) -> list[dict[str, Any]]:
    """Lines of a run's metrics; the first step is slow."""
    return [
        {"kind": "train", "step": n + 1, "loss": loss, "grad_norm": 1.0, "tflops_per_device": 1.0, "mfu": 0.25}
        | {"tokens_per_second": speed if n else 1.0, "peak_memory_gib": 10.0 + n}
        for n, loss in enumerate(losses)
    ]


def run(context: int, losses: list[float], speed: float = 100.0) -> dict[str, Any]:
    head = {"context": context, "changes": [], "status": "finished", "parameters": 328_000_000, "seconds_in_all": 1.0}
    return head | bench.summary(entries(losses, speed), warmup=1)


def test_speed_leaves_the_first_steps_out_and_memory_is_the_largest() -> None:
    result = bench.summary(entries([3.0, 2.0, 1.0]), warmup=1)
    assert (result["steps"], result["tokens_per_second"], result["peak_memory_gib"]) == (3, 100.0, 12.0)
    assert result["loss"] == [3.0, 2.0, 1.0]
    assert bench.summary([]) == {"steps": 0}
    assert bench.summary(entries([3.0]), warmup=5)["tokens_per_second"] == 1.0  # cut off before the end of the warm-up


def test_differences_are_held_against_the_noise() -> None:
    reference = [6.0, 5.0, 4.0, 3.0]
    runs = {
        "cp2": run(2, [6.0, 5.0, 4.02, 3.01]),
        "cp1": run(1, reference),
        "noise2": run(1, [6.0, 5.0, 3.99, 3.01]),
        "noise4": run(1, [6.0, 5.0, 4.0, 3.0]),
        "cp2_ring": run(2, [6.0, 5.0, 4.1]),
        "cp2_fetch": run(2, [6.0, math.nan, 4.0, 3.0]),
    }
    found = bench.compare(runs, factor=3.0)
    assert set(found) == {"cp2", "noise2", "noise4", "cp2_ring", "cp2_fetch"}
    assert found["cp2"]["max"] == pytest.approx(0.02)
    assert found["cp2"]["median"] == pytest.approx(0.005)
    assert (found["cp2"]["first"], found["cp2"]["last"]) == (0.0, pytest.approx(0.01))
    assert found["cp2"]["within_noise"]
    assert (found["cp2_ring"]["steps"], found["cp2_ring"]["within_noise"]) == (3, False)
    assert not found["cp2_fetch"]["within_noise"]
    assert "within_noise" not in found["noise2"]


def test_runs_that_are_missing_leave_no_verdict() -> None:
    cp2 = run(2, [6.0, 5.0])
    assert bench.compare({"cp2": cp2}) == {}
    failed = {"context": 1, "changes": [], "status": "failed", "parameters": None, "steps": 0}
    found = bench.compare({"cp2": cp2, "cp1": run(1, [6.0, 5.0]), "noise": failed})
    assert set(found) == {"cp2"}
    assert "within_noise" not in found["cp2"]


def test_the_last_digit_of_fp32_is_noise() -> None:
    runs = {name: run(1, [6.0, 5.0]) for name in ("cp1", "noise2")}
    assert bench.compare(runs | {"cp2": run(2, [6.0 + 5e-7, 5.0])})["cp2"]["within_noise"]


def test_single_rank_runs_go_side_by_side_on_their_own_gpus() -> None:
    phases = bench.plan(["auto", "ring"], [2, 4], side_by_side=True)
    assert [[r.name for r in phase] for phase in phases] == [["cp2"], ["cp2_ring"], ["cp1", "noise2"], ["noise4"]]
    assert [r.first_gpu for r in phases[2]] == [0, 1]
    assert phases[2][1].changes == ("run.token_parts=2",)
    alone = bench.plan(["auto"], [2], side_by_side=False)
    assert [[r.first_gpu for r in phase] for phase in alone] == [[0], [0], [0]]
    some = bench.plan(["auto"], [2], side_by_side=True, only=["noise2"])
    assert [[r.name for r in phase] for phase in some] == [["noise2"]]
    with pytest.raises(SystemExit, match="nonsense"):
        bench.plan(["auto"], [2], side_by_side=True, only=["nonsense"])


def test_runs_of_the_same_settings_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    assert bench.kept(out, {"steps": 3}) == {}
    write_json(out, {"setup": {"steps": 3}, "runs": {"cp1": {"status": "finished"}}})
    assert bench.kept(out, {"steps": 3}) == {"cp1": {"status": "finished"}}
    with pytest.raises(SystemExit, match="other settings"):
        bench.kept(out, {"steps": 4})


def test_results_become_a_table_and_a_plot(tmp_path: Path) -> None:
    runs = {
        "cp2": run(2, [6.0, 5.0, 4.02], speed=190.0),
        "cp1": run(1, [6.0, 5.0, 4.0]),
        "noise4": run(1, [6.0, 5.0, 3.99]),
        "cp2_ring": {"context": 2, "status": "failed", "steps": 0},
    }
    content = {
        "about": {"device": "GPU", "torch": "2", "nccl": "2", "megatron_core": "0.16.1", "commit": "c" * 40},
        "setup": {"seq_length": 131072, "tokens_per_step": 131072, "precision": "bf16", "steps": 3, "warmup_steps": 1}
        | {"recompute": "full", "factor": 3.0, "side_by_side": True},
        "runs": runs,
        "comparison": bench.compare(runs),
    }
    write_json(tmp_path / "training.json", content)
    content = json.loads((tmp_path / "training.json").read_text())
    text = training_table(content)
    assert "328M parameters" in text
    assert "| CP 2 | 2 |" in text
    assert "1.90x" in text
    assert "cp2_ring" not in text
    assert "within 3 times the noise" in text
    assert "| CP 1, sums rounded in 4 parts | 1 |" in text
    training_plot(content, tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
