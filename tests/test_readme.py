"""The README's example runs as it stands, on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_example_runs_on_two_ranks(tmp_path: Path) -> None:
    found = re.search(r"```python\n(# torchrun.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    example = tmp_path / "example.py"
    example.write_text(found[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 ranks" in done.stdout
