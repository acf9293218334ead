"""What `scripts.pretrain_gpt_stock` needs is looked for before anything starts, and named in one line."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("typer")

from scripts import pretrain_gpt_stock
from scripts.pretrain_gpt_stock import what_is_missing

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose helpers are not compiled, on a machine that has everything."""
    (tmp_path / "pretrain_gpt.py").touch()
    (tmp_path / "megatron" / "core" / "datasets").mkdir(parents=True)
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/usr/bin/{name}")
    monkeypatch.setattr(pretrain_gpt_stock, "_output", lambda *line: SUFFIX if "config" in line[0] else "-I/include")
    return tmp_path


def test_a_machine_with_everything_misses_nothing(checkout: Path) -> None:
    assert what_is_missing(checkout) is None


@pytest.mark.parametrize("tool", ["make", "g++"])
def test_tools_are_named(checkout: Path, tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == tool else name)
    missing = what_is_missing(checkout)
    assert missing is not None
    assert missing.startswith(f"{tool} is missing")
    assert "\n" not in missing


@pytest.mark.parametrize(
    ("program", "answer", "text"),
    [
        ("python3", None, "pybind11 is missing"),
        ("python3-config", None, "python3-config is missing"),
        (
            "python3-config",
            ".cpython-39.so",
            "python3-config belongs to another Python (its modules end in .cpython-39.so",
        ),
    ],
)
def test_python_is_asked_for_what_compiles(
    checkout: Path, program: str, answer: str | None, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = pretrain_gpt_stock._output
    monkeypatch.setattr(pretrain_gpt_stock, "_output", lambda *line: answer if line[0] == program else there(*line))
    missing = what_is_missing(checkout)
    assert missing is not None
    assert missing.startswith(text)
    assert "\n" not in missing


def test_compiled_helpers_need_no_tools(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "megatron" / "core" / "datasets" / f"helpers_cpp{SUFFIX}").touch()
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert what_is_missing(checkout) is None


def test_another_folder_is_no_checkout(tmp_path: Path) -> None:
    missing = what_is_missing(tmp_path)
    assert missing is not None
    assert missing.endswith("it is no checkout of Megatron-LM")
