"""Run a program of this repository as `python -m` or torchrun would, in processes forked from the server of `tests.ranks`.

    printed = run_program("scripts.bench_kernels", "--device", "cpu")
    printed = run_program("scripts.soak", "--device", "cpu", ranks=2)

A small program spends most of its time importing torch: about three seconds in each process, and as many in torchrun itself. A
process of the server has torch imported; the program's own modules it imports from the root of the checkout, as it would there.
`test_readme.py` and others start torchrun itself.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch

from scripts.harness.training import hosted_store
from tests.ranks import _server

ROOT = Path(__file__).resolve().parents[1]


class Program:
    """A program that runs: `poll`, `wait` and `kill` are those of `subprocess.Popen`.

    Args:
        words: the module, or the path of a file whose name ends with `.py`; and its arguments.
        environment: all of the process's environment variables.
        output: file for what it prints.
        errors: file for standard error; by default the same.
    """

    def __init__(self, words: list[str], environment: dict[str, str], output: Path, errors: Path | None = None) -> None:
        arguments = (words, environment, str(output), str(errors or output))
        self._process: BaseProcess = _server.Process(target=_main, args=arguments)
        self._process.start()
        self.sentinel = self._process.sentinel

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def run_program(*words: object, ranks: int = 0, timeout: float = 240.0, **environment: str) -> str:
    """What the program printed; its ranks' output one after the other. Fails if a rank does.

    Args:
        words: the module or file, and its arguments.
        ranks: processes of a group, with the variables that torchrun sets; 0 for one process without a group.
        timeout: in seconds.
        environment: more variables.
    """
    common = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    common |= {"OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryDirectory() as folder:
        if ranks:
            store, variables = hosted_store(ranks, timeout)  # noqa: RUF059 # lives while its name does
            common |= variables
        files = [Path(folder, str(rank)) for rank in range(max(1, ranks))]
        errors = [file.with_suffix(".errors") for file in files]
        running = [
            Program([*map(str, words)], common | ({"RANK": str(r), "LOCAL_RANK": str(r)} if ranks else {}), *both)
            for r, both in enumerate(zip(files, errors))
        ]
        deadline, failed = time.monotonic() + timeout, False
        try:
            while not failed and (left := [program for program in running if program.poll() is None]):
                ready = wait([program.sentinel for program in left], max(0.0, deadline - time.monotonic()))
                for program in left:
                    if program.sentinel in ready:
                        program.wait()
                failed = not ready or any(program.poll() for program in running)
        finally:
            for program in running:
                program.kill()
                program.wait()
        printed, wrong = (
            "".join(file.read_text(errors="replace") for file in each if file.exists()) for each in (files, errors)
        )
        codes = [program.poll() for program in running]
        said = f"{' '.join(map(str, words))}: exit codes {codes}, within {timeout:g} s"
        assert not failed, f"{said}\n{printed[-10000:]}{wrong[-10000:]}"
        return printed


def _main(words: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY), (2, errors, os.O_WRONLY)):
        opened = os.open(path, flags | (os.O_CREAT | os.O_APPEND if number else 0))
        os.dup2(opened, number)
        os.close(opened)
    np.random.seed()  # noqa: NPY002  # as in a new process; forks would share the server's numbers
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", 1)))
    sys.path[:] = [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.argv[:] = words
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
