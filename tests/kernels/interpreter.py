"""Triton kernels on the CPU: run a test module again, in a process where `triton.jit` means the interpreter.

Triton reads `TRITON_INTERPRET` when it is imported, and a process that has it set compiles no kernel. So nothing sets it here:
interpreter tests carry the mark `interpreted` and are skipped in the main process, where each module has one test

    def test_in_interpreter():
        interpreter.run_module(__file__)

that runs them in another process, forked from a server that has imported torch and Triton (`interpreter_server.py`). On a
machine with a GPU both are skipped: the same kernels run compiled there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests import ranks
from tests.programs import run_program

CUDA = torch.cuda.is_available()
ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[2]
ranks.preload("moba_cp.kernels.triton_backend")  # for what `run_without_interpreter` runs

interpreted = pytest.mark.skipif(not ACTIVE, reason="runs in the process that test_in_interpreter starts")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA or ACTIVE, reason="needs a CUDA device and compiled kernels")]


def run_module(path: str, timeout: float = 280) -> None:
    """Run the `interpreted` tests of the module `path` in a process with Triton's interpreter; fail if it fails."""
    if ACTIVE:
        pytest.skip("already in the interpreter")
    if CUDA:
        pytest.skip("the module's GPU tests run the same kernels")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        status = _ask(f"{path}\t{output}\n", timeout)
        text = output.read_text(errors="replace") if output.exists() else ""
    assert status == "0\n", f"status {status!r}: {text[-10000:]}"


def _ask(line: str, timeout: float) -> str:
    """The server's answer; empty if it ended, or was ended because it did not answer in time."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(line)
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout)[0]:
        _end_server()
        return f"none in {timeout:g} s"
    answer = server.stdout.readline()
    if not answer:
        _end_server()
    return answer


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process of interpreter_server.py."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreter_server"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True, start_new_session=True
    )
    atexit.register(_end, server)
    return server


def _end_server() -> None:
    _end(_server())
    _server.cache_clear()


def _end(server: subprocess.Popen[str]) -> None:
    """Kill the server and what it has forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def run_without_interpreter(path: str, *arguments: str, timeout: float = 280) -> str:
    """Run the Python file `path` in a process that compiles kernels, whatever this one does; return its standard output."""
    if not ACTIVE:
        return run_program(path, *arguments, timeout=timeout)  # forked with torch imported
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, path, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done.stdout


def _patch_dot() -> None:
    """Make `tl.dot` multiply the values of bf16, whose bits the interpreter keeps in uint16, and sum in fp64.

    A BLAS may choose the order of a sum by the size of the matrix. Sums in fp64, rounded once to fp32, hide that, so that a row's
    bits depend on the row alone, as they do on a GPU.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def value(handle):
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(value(a), value(b), dtype=np.float64)
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if ACTIVE:
    _patch_dot()
