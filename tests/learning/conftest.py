"""What several tests of the learning study need: the tiny corpus, made of this repository's text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.programs import Program

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    yaml = pytest.importorskip("yaml")
    from examples.learning.corpus import build

    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(yaml.safe_load((ROOT / "configs/learning/corpus_tiny.yaml").read_text()), folder)
    return folder


@pytest.fixture
def run_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`python -m examples.learning.run` of the tiny plan with more options, in this process; returns what it printed.

    Its runs are forked with torch imported. Only those of the arm `broken`, which end at once, start Python anew.
    """
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    from examples.learning import run

    def start(command: list[str], env: dict[str, str]) -> Program | subprocess.Popen[bytes]:
        if "broken" in command[-1]:
            return subprocess.Popen(command, env=env)
        assert command[:3] == [sys.executable, "-u", "-m"]
        return Program(command[3:], env, tmp_path / "printed")

    def invoke(*options: object) -> str:
        app = typer.Typer()
        app.command()(run.main)
        done = testing.CliRunner().invoke(app, ["--plan", "configs/learning/tiny.yaml", *map(str, options)])
        printed = tmp_path / "printed"
        assert done.exit_code == 0, (done.output, done.exception, printed.exists() and printed.read_text())
        return done.output

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=start, run=subprocess.run))
    return invoke
