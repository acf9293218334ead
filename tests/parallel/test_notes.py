"""Threads that talk to a group's store."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import time
import torch.distributed as dist
from moba_cp.parallel import notes

dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
notes._FIRST_POLL_S = notes._LONGEST_POLL_S = 0.0
notes._LONGEST_REFUSING_POLL_S = 0.0, 0.0
group = dist.group.WORLD
{start}
time.sleep(0.3)
"""
STARTS = {
    "reader": 'notes.NoteReader(group, "prefix").start()',
    "refusal": 'notes.Refusal(group, "prefix", "0|no", lambda: None, lambda: lambda: None).start()',
    "sweep": 'notes.sweep(group, ["prefix"] * 1_000_000)',
}


@pytest.mark.parametrize("name", STARTS)
def test_threads_end_before_python_does(name: str, tmp_path: Path) -> None:
    """Inside torch when the interpreter ends, a thread aborts the process. Each of these is there at nearly any time."""
    program = PROGRAM.format(file=tmp_path / "store", start=STARTS[name])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
