"""The whole experiment, small: corpus, three arms, all measures, one arm that fails, the page."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("yaml")

import typer
import yaml
from typer import testing

from examples.learning import report, run
from examples.learning.corpus import Corpus, build
from examples.learning.corpus import app as corpus_app
from examples.learning.run import Options, Plan
from examples.learning.sources import fetch, read_source
from tests.programs import run_program

ROOT = Path(__file__).parents[2]
report_app = typer.Typer()
report_app.command()(report.main)
run_app = typer.Typer()
run_app.command()(run.main)


@pytest.mark.slow
def test_plan_runs_from_text_to_page(tmp_path: Path, run_plan: Callable[..., str]) -> None:
    run_program("examples.learning.corpus", "build", "--config", "configs/learning/corpus_tiny.yaml", "--out", tmp_path)
    plan = ["--corpus", tmp_path, "--work", tmp_path / "work"]
    out = tmp_path / "out"
    arms = ["full", "broken", "moba_32_3", "window_96"]
    run_plan(*plan, "--out", out, *(word for arm in arms for word in ("--only", arm)))
    results = json.loads((out / "learning.json").read_text())
    runs = {r["arm"]: r for r in results["runs"]}
    (broken,) = results["unfinished"]
    assert broken["arm"] == "broken"
    assert "block_size must be at least 1, got 0" in broken["error"]  # and the arms after it ran
    assert set(runs) == {"full", "moba_32_3", "window_96"}
    for r in runs.values():
        assert r["complete"], r.get("error")
        assert not r["diverged"]
        assert "error" not in r
        assert r["tokens"] == 8 * 2 * 256 == r["steps"] * 512
        assert len(r["loss_curve"]) == 8
        assert r["loss_curve"][-1] < r["loss_curve"][0]
        assert {(e["length"], e["needles"]) for e in r["retrieval"]} == {(n, k) for n in (256, 512) for k in (0, 1, 4)}
        assert len(r["by_position"]) == 32
    assert len({json.dumps(r["hashes"]) for r in runs.values()}) == 1
    assert {(f["step"], f["layer"]) for f in runs["moba_32_3"]["routing"]} == {(s, i) for s in (4, 8) for i in (0, 1)}
    saved = np.load(out / "selections_moba_32_3.npz")
    assert saved["layer_0"].shape == (4, 256, 3)
    assert saved["layer_0"].dtype == np.int16
    assert saved["block_size"] == 32

    again = tmp_path / "again"
    shown = run_plan(*plan, "--out", again, "--only", "full", "--previous", out / "learning.json")
    assert "s left" not in shown  # nothing was started
    assert json.loads((again / "learning.json").read_text())["runs"] == results["runs"]

    pytest.importorskip("matplotlib")
    run_program("examples.learning.report", "--results", out / "learning.json", "--docs", tmp_path)
    page = (tmp_path / "learning.md").read_text()
    assert "{{" not in page
    assert "Not finished: `broken` seed 0: ValueError" in page
    assert "one order and one initialisation" in page
    for arm in runs:
        assert f"| {arm} |" in page
    assert (tmp_path / "learning_loss.png").stat().st_size > 5000


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    options = Options(
        ROOT / "configs/learning/tiny.yaml", tmp_path, tmp_path / "out", tmp_path / "work", None, 1e9, None, None, None
    )
    with pytest.raises(FileNotFoundError, match="holds no corpus: python -m examples.learning.corpus build"):
        Plan(options)
    with pytest.raises(ValueError, match=r"tiny\.yaml has no run of fulll, only of broken, full, "):
        Plan(replace(options, only=["fulll"]))
    with pytest.raises(
        FileNotFoundError, match=r"must hold one sympy-\*-\*\.whl, has 0: run the command `fetch` first"
    ):
        build({"sources": [{"wheel": "sympy", "licence": "", "megabytes": 1, "paths": []}]}, tmp_path / "new")


def test_another_corpus_is_not_taken_for_the_one_in_the_work_folder(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/learning/corpus_tiny.yaml").read_text())
    options = Options(
        ROOT / "configs/learning/tiny.yaml", tmp_path, tmp_path / "out", tmp_path / "work", None, 1e9, None, None, None
    )
    for tokens in (50_000, 100_000):
        facts = build(config | {"train_tokens": tokens}, tmp_path)
        Plan(options)
        assert Corpus(tmp_path / "work").facts["fingerprint"] == facts["fingerprint"]


def test_runs_that_the_time_does_not_hold_are_not_started(
    corpus_folder: Path, tmp_path: Path, run_plan: Callable[..., str]
) -> None:
    folders = ("--corpus", corpus_folder, "--work", tmp_path / "w", "--out", tmp_path)
    shown = run_plan(*folders, "--time-limit", 20, "--only", "full")
    assert "not started: full seed 0" in shown
    assert json.loads((tmp_path / "learning.json").read_text())["runs"] == []


@pytest.mark.parametrize(
    ("app", "words", "text"),
    [
        (report_app, ("--results", "none.json"), "'none.json' does not exist"),
        (
            report_app,
            ("--results", "docs/results/kernels.json"),
            "lacks plan, corpus, runs, which docs/results/learning",
        ),
        (report_app, ("--results", "README.md"), "README.md is not JSON: "),
        (corpus_app, ("build", "--config", "configs/learning/corpus.yaml", "--out", "OUT"), "run the command `fetch`"),
        (corpus_app, ("build", "--config", "configs/quickstart.yaml", "--out", "OUT"), "lacks sources, vocabulary, "),
        (
            run_app,
            ("--plan", "configs/quickstart.yaml"),
            "lacks measures, arms, runs, which configs/learning/tiny.yaml",
        ),
        (run_app, ("--plan", "README.md"), "README.md is not YAML: "),
        (corpus_app, ("pairs", "--corpus", "OUT"), "holds no corpus.json: the command `build` makes one"),
        (corpus_app, ("bigram", "--corpus", "OUT", "--length", "64", "--out", "x.json"), "holds no corpus: "),
    ],
)
def test_a_program_says_what_is_missing_in_a_sentence(
    app: typer.Typer, words: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    line = [str(tmp_path) if word == "OUT" else word for word in words]
    result = testing.CliRunner().invoke(app, line, terminal_width=400)
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.output.replace("│", " ").split())  # in a box, whose lines end where the path is long


def test_versions_of_packages_are_fetched_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("examples.learning.sources.subprocess.run", lambda line, **_: asked.extend(line))
    sources = [{"wheel": "mypy", "version": "2.4.1"}, {"wheel": "numpy"}, {"deb": "git-doc", "version": "1:2.39-0"}]
    fetch({"sources": sources}, tmp_path)
    assert {"mypy==2.4.1", "numpy", "git-doc=1:2.39-0"} <= set(asked)
    (tmp_path / "debs" / "git-doc_1%3a2.40-0_all.deb").touch()
    with pytest.raises(FileNotFoundError, match=r"must hold one git-doc_1%3a2\.39-0_\*\.deb, has 0"):
        next(read_source(sources[2], tmp_path))


def test_a_corpus_of_other_text_is_named(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/learning/corpus_tiny.yaml").read_text())
    path = tmp_path / "other.yaml"
    line = ["build", "--config", str(path), "--out", str(tmp_path)]
    path.write_text(yaml.safe_dump(config | {"train_tokens": 20_000, "fingerprint": "0" * 64}))
    result = testing.CliRunner().invoke(corpus_app, line)
    assert result.exit_code == 1
    fingerprint = json.loads((tmp_path / "corpus.json").read_text())["fingerprint"]
    assert f"the tokens' fingerprint is {fingerprint}, {path} says {'0' * 64}" in result.output
    path.write_text(yaml.safe_dump(config | {"train_tokens": 20_000, "fingerprint": fingerprint}))
    assert testing.CliRunner().invoke(corpus_app, line).exit_code == 0


def test_a_failed_download_takes_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("examples.learning.sources.subprocess.run", fails)
    line = ["fetch", "--config", "configs/learning/corpus.yaml", "--out", str(tmp_path)]
    result = testing.CliRunner().invoke(corpus_app, line)
    assert isinstance(result.exception, SystemExit)
    assert "exit status 100 of " in str(result.exception.code) + result.output
