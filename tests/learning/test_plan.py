"""Which run of a plan starts when, and where."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from examples.learning import run as plans
from examples.learning.corpus import build
from examples.learning.run import Options, Plan, shared_start
from examples.learning.task import Task

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]


class Finished:
    """A process that ends at once."""

    def poll(self) -> int:
        return 0

    def wait(self) -> int:
        return 0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Environments of the processes that a plan starts; nothing runs."""
    found: list[dict[str, str]] = []

    def start(command: list[str], env: dict[str, str]) -> Finished:
        found.append(env | {"TASK": Path(command[-1]).stem})
        return Finished()

    monkeypatch.setattr(subprocess, "Popen", start)
    return found


def make_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, int]], gpus: int = 2, **changes: object
) -> Plan:
    monkeypatch.chdir(ROOT)
    build(yaml.safe_load((ROOT / "configs/learning/corpus_tiny.yaml").read_text()), tmp_path)
    plan = yaml.safe_load((ROOT / "configs/learning/tiny.yaml").read_text()) | changes
    plan["runs"] = [{"arm": arm, "seed": seed} for arm, seed in runs]
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    monkeypatch.setattr(plans.torch.cuda, "device_count", lambda: gpus)
    return Plan(Options(path, tmp_path, tmp_path / "out", tmp_path / "work", None, 1000.0, None, None, "none"))


def test_a_run_waits_for_the_short_windows_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, str]]
) -> None:
    made = make_plan(tmp_path, monkeypatch, [("full", 0), ("moba_32_3", 0), ("full", 1), ("window_96", 0)])
    while made.start_one():
        pass
    assert [env["TASK"] for env in started] == ["full_s0", "full_s1"]
    first = made.running[0]
    common = shared_start(first.task)
    assert common is not None
    common.parent.mkdir(parents=True, exist_ok=True)
    common.touch()
    made.watch(first)
    assert made.start_one()
    assert started[-1]["TASK"] == "moba_32_3_s0"


def test_a_plan_takes_only_the_gpus_it_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, str]]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    made = make_plan(tmp_path, monkeypatch, [("full", 0), ("full", 1)])
    while made.start_one():
        pass
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["5", "3"]


@pytest.mark.parametrize(("gpus", "visible", "hosts"), [(2, "0,1", [None, None]), (1, "0", ["rank 0", "rank 1"])])
def test_ranks_share_a_gpu_where_there_are_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, str]], gpus: int, visible: str,
    hosts: list[str | None],
) -> None:  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = make_plan(tmp_path, monkeypatch, [("moba_32_3_cp2", 0)], gpus=gpus)
    assert made.start_one()
    assert made.free == []
    assert [env["RANK"] for env in started] == ["0", "1"]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == [visible] * 2
    assert [env.get("NCCL_HOSTID") for env in started] == hosts
    alone = made.plan["expected_s"]
    assert made.running[0].expected == (alone if gpus == 2 else alone * plans.SHARED_SLOWDOWN)


def test_time_expected_of_a_run_knows_the_short_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, str]]
) -> None:
    usual = {"short_windows": 30, "full": 60, "moba_32_3": 50}
    made = make_plan(tmp_path, monkeypatch, [("full", 0), ("moba_32_3", 0)], expected_s=usual)
    assert made.start_one()
    first = made.running[0]
    assert first.expected == 90
    common = shared_start(first.task)
    assert common is not None
    common.parent.mkdir(parents=True, exist_ok=True)
    common.touch()
    other = Task(**{**vars(first.task), "arm": "moba_32_3", "spec": made.plan["arms"]["moba_32_3"]})
    assert made.expected(other) == 50
    assert made.expected(Task(**{**vars(other), "seed": 1})) == 80
    first.began = time.time() - 180  # twice as long as expected
    result = Path(first.task.work) / "results" / "full_s0.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"complete": True}))
    made.watch(first)
    assert made.expected(other) == pytest.approx(100, rel=0.01)


def test_a_run_that_measures_lets_the_next_one_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, str]]
) -> None:
    made = make_plan(tmp_path, monkeypatch, [("full", 0), ("full", 1), ("full", 2), ("full", 3)])
    while made.start_one():
        pass
    first = made.running[0]
    monkeypatch.setattr(Finished, "poll", lambda self: None)
    made.watch(first)
    assert made.free == []
    result = Path(first.task.work) / "results" / "full_s0.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"complete": True}))
    made.watch(first)
    assert (made.free, made.results) == ([0], [])
    assert made.start_one()
    assert made.free == []
    monkeypatch.setattr(Finished, "poll", lambda self: 0)
    made.watch(first)
    assert made.free == []  # its GPU belongs to the third run now
    assert [r["seed"] for r in made.results] == [0]


def test_a_repeated_run_replaces_what_lacks_a_measure_only_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[dict[str, str]]
) -> None:
    made = make_plan(tmp_path, monkeypatch, [("full", 0), ("full", 0)])
    earlier = {"arm": "full", "seed": 0, "complete": True, "eval_loss": 2.0, "lacks": ["retrieval"], "commit": "old"}
    made.results = [earlier]
    assert made.start_one()
    made.watch(made.running[0])  # it left no result
    assert made.results == [earlier]
    assert made.start_one()
    result = Path(made.running[0].task.work) / "results" / "full_s0.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"complete": True, "eval_loss": 2.1}))
    made.watch(made.running[0])
    (now,) = made.results
    assert (now["eval_loss"], now["commit"], now["machine_gpus"]) == (2.1, "none", 2)
    assert "lacks" not in now
