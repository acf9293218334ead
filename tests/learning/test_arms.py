"""Every arm of every plan comes to its end, and a run that fails while it is measured says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("yaml")

import yaml

from examples.learning import train
from examples.learning.run import Options, Plan
from examples.learning.task import Task

ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "configs/learning/tiny.yaml").read_text())
SMALL = {"block_size": 32, "window": 96, "chunk": 32}


def small(spec: dict[str, Any]) -> dict[str, Any]:
    """The arm with blocks and windows of the tiny plan, and full attention in one of its two layers at most."""
    made = spec | {"attention": {key: SMALL.get(key, value) for key, value in spec["attention"].items()}}
    if "full_layers" in made:
        made["full_layers"] = 1
    if "switch" in made:
        made["switch"] = made["switch"] | {"attention": small(made["switch"])["attention"]}
    return made


def arms_of_plans() -> dict[str, dict[str, Any]]:
    """Arms on one rank, small, each under the name of the first that it is like; `broken` of the tiny plan is meant to fail."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "configs/learning").glob("*.yaml")):
        for name, spec in yaml.safe_load(path.read_text()).get("arms", {}).items():
            made = small(spec)
            if name != "broken" and spec.get("cp", 1) == 1 and made not in found.values():
                found[name] = made
    return found


ARMS = arms_of_plans()


def make_task(arm: str, corpus: Path, work: Path, seed: int = 0) -> Task:
    config = json.loads(json.dumps({key: TINY[key] for key in ("model", "data", "optimizer", "measures")}))
    config["measures"] |= {"eval_windows": 2, "retrieval_lengths": [256], "retrieval_trials": 1}
    return Task(f"{arm}_s{seed}", arm, ARMS[arm], seed, config, str(corpus), str(work), deadline=1e12)


def result_of(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(task.work) / "results" / f"{task.name}.json").read_text())
    return found


def test_plans_have_arms_that_switch_both_ways() -> None:
    switches = {(a["attention"]["kind"], a["switch"]["attention"]["kind"]) for a in ARMS.values() if "switch" in a}
    assert switches == {("moba", "full"), ("full", "moba")}
    assert any("full_layers" in a for a in ARMS.values())


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_is_trained_and_measured(arm: str, corpus_folder: Path, tmp_path: Path) -> None:
    task = make_task(arm, corpus_folder, tmp_path)
    train.execute(task)
    result = result_of(task)
    assert result["complete"]
    assert not {"error", "lacks"} & result.keys(), result.get("error")
    assert {"eval_loss", "retrieval", "wall_seconds"} <= result.keys()
    steps = {fact["step"] for fact in result["routing"]}
    selections = tmp_path / "results" / f"{task.name}.npz"
    assert selections.exists() == bool(steps)
    if steps:
        saved = np.load(selections)
        assert saved["block_size"] == 32
        assert saved["step"] == max(steps)  # of the phase that has MoBA: not the last step of a hybrid
        assert saved["layer_0"].dtype == np.int16


def test_a_run_that_fails_while_it_is_measured_says_what_it_lacks_and_is_repeated(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: train.Run) -> None:
        raise RuntimeError("no memory")

    task = make_task("full", corpus_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "retrieval", fail)
        train.execute(task)
    partial = result_of(task)
    assert (partial["complete"], partial["error"], partial["lacks"]) == (True, "RuntimeError: no memory", ["retrieval"])
    assert "eval_loss" in partial

    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({**TINY, **task.config, "runs": [{"arm": "full", "seed": 0}]}))
    before = tmp_path / "before.json"
    options = Options(path, corpus_folder, tmp_path / "out", tmp_path / "work", before, 1e9, None, None, "none")
    before.write_text(json.dumps({"runs": [partial]}))
    assert Plan(options).waiting == [{"arm": "full", "seed": 0}]
    whole = {key: value for key, value in partial.items() if key not in ("error", "lacks")}
    before.write_text(json.dumps({"runs": [whole]}))
    assert Plan(options).waiting == []
