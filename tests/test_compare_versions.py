"""`scripts.compare_versions`: two checkouts in turns, and the bits of what they compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from scripts.compare_versions import Case, case_of, checkout, named, quartiles, slowest
from scripts.tables.versions import versions_tables
from tests.programs import ROOT, run_program


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A version whose forward pass scores with another scale, unless its caller names one."""
    folder = tmp_path / "other"
    for name in ("moba_cp", "parallel", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True) if (ROOT / name).exists() else None
    config = folder / "moba_cp" / "config.py"
    text = config.read_text()
    assert "head_dim**-0.5" in text
    config.write_text(text.replace("head_dim**-0.5", "head_dim**-0.4"))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_versions_are_told_apart_by_their_bits_and_timed_in_turns(other: Path, tmp_path: Path, ranks: int) -> None:
    out, every = tmp_path / "versions.json", dict.fromkeys(("out", "dq", "dk", "dv"), True)
    versions = [f"here={ROOT}", f"other={other}", *[f"again={ROOT}"] * (ranks == 1)]
    run_program(
        "scripts.compare_versions", *versions, "--out", out, "--ranks", ranks,
        "--cases", "128:4/2:32:2", "--turns", 2, "--seconds", 0.02, "--device", "cpu", "--commit", "abc",
    )  # fmt: skip
    content = json.loads(out.read_text())
    (entry,) = content["results"]
    wanted = {"here": every, "other": dict.fromkeys(every, False)} | ({"again": every} if ranks == 1 else {})
    assert entry["same_bits"] == wanted
    for times in entry["times"].values():
        for mode in ("forward", "forward_backward"):
            for kind in ("ms", "host_ms"):
                assert times[mode][kind]["median"] > 0
    assert entry["times"]["here"]["forward"]["ms"]["ratio"] == {"quartile_1": 1, "median": 1, "quartile_3": 1}
    table = versions_tables([content])
    assert table.splitlines()[-1].startswith("| 128 | 4/2 | (32, 2) | ")
    assert f"{ranks} x CPU" in table


def test_a_version_that_fails_is_named_with_what_it_printed(other: Path, tmp_path: Path) -> None:
    (other / "moba_cp" / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(AssertionError, match=r"(?s)other ended with 1:.*broken on purpose"):
        run_program(
            "scripts.compare_versions", f"here={ROOT}", f"other={other}", "--out", tmp_path / "versions.json",
            "--cases", "128:4/2:32:2", "--device", "cpu",
        )  # fmt: skip


def test_times_are_those_of_the_slowest_rank() -> None:
    fast = {mode: {"ms": 1.0, "host_ms": 2.0} for mode in ("forward", "forward_backward")}
    slow = {mode: {"ms": 3.0, "host_ms": 1.0} for mode in fast}
    assert slowest([fast, slow]) == {mode: {"ms": 3.0, "host_ms": 2.0} for mode in fast}
    assert quartiles([4.0]) == {"quartile_1": 4, "median": 4, "quartile_3": 4}


def test_arguments_are_read_or_refused_with_their_text(tmp_path: Path) -> None:
    assert case_of("8192:32/8:512:3", "auto") == Case(8192, 32, 8, 512, 3, "auto")
    assert named("old=/tmp/x=y") == ("old", "/tmp/x=y")
    for text in ("8192", "8192:32:512:3", "8192:32/8:512:x"):
        with pytest.raises(typer.BadParameter, match=text):
            case_of(text, "auto")
    with pytest.raises(typer.BadParameter, match="NAME=FOLDER"):
        named("old")
    with pytest.raises(typer.BadParameter, match="holds no moba_cp"):
        checkout(str(tmp_path))
