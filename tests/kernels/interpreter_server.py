"""A process with Triton's interpreter that has imported what kernel tests need, and forks a process for each module of tests.

`tests/kernels/interpreter.py` starts it, once per pytest process: importing torch and Triton takes longer than many modules.
Each line of its input is the path of a module and of a file for pytest's output. It answers with pytest's exit status.
"""

from __future__ import annotations

import os
import sys

import hypothesis  # noqa: F401
import pytest
import torch.fx.experimental.symbolic_shapes  # noqa: F401  (what the first backward pass imports)

from moba_cp.kernels import triton_backend  # noqa: F401


def run(path: str, output: str) -> int:
    """The exit status of pytest for this module, in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = int(pytest.main(["-q", "-m", "not gpu", "-p", "no:cacheprovider", path]))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(*line.rstrip("\n").split("\t")), flush=True)
