"""`tests.programs`: a program that fails, on one rank alone or by taking too long, fails its test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import run_program

PROGRAM = """
import os, sys, time
import numpy as np
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), sys.argv[1:], np.random.randint(1 << 60), flush=True)
if os.environ.get("RANK", "0") == sys.argv[1]:
    sys.exit("it fails") if sys.argv[2] == "fails" else time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def test_every_rank_is_told_what_torchrun_tells_it(program: str) -> None:
    lines = run_program(program, "none", "fails", ranks=2).splitlines()
    assert [line.rpartition(" ")[0] for line in lines] == [f"rank {r} of 2 ['none', 'fails']" for r in (0, 1)]
    assert len({line.rpartition(" ")[2] for line in lines}) == 2, "what is drawn without a seed differs"
    assert run_program(program, "none", "fails").startswith("rank None of None")


@pytest.mark.parametrize(("ranks", "bad"), [(0, 0), (2, 0), (2, 1)])
def test_a_failure_is_seen_with_what_was_printed(program: str, ranks: int, bad: int) -> None:
    with pytest.raises(AssertionError, match=r"exit codes [\s\S]*it fails"):
        run_program(program, bad, "fails", ranks=ranks)


def test_a_program_that_does_not_end_is_killed(program: str) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[.*-9\], within 3 s"):
        run_program(program, 1, "hangs", ranks=2, timeout=3.0)
