"""The type checker guards the seam between pipeline and backends: misspelt primitives and swapped arguments do not type-check.

mypy reads the library with a stand-in for torch, whose own types take it half a minute, and without numpy and Triton.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moba_cp.kernels import Backend

pytest.importorskip("mypy")
REPO = Path(__file__).parents[2]
TORCH = """
from typing import Any
class Tensor:
    def __getattr__(self, name: str) -> Any: ...
class dtype: ...
class device: ...
def __getattr__(name: str) -> Any: ...
"""
# Backends with one wrong primitive: a parameter has another name, or another type.
RENAMED = "def merge(partials: Partials, *, chosen: Tensor, out: Tensor, lse: Tensor) -> None: ...\n"
RETYPED = "def centroids(k: Tensor, *, start: Tensor, block_size: Tensor) -> Tensor: ...\n"
CALLS = """
import torch
import renamed
import retyped
from torch import Tensor
from moba_cp.kernels import Backend, KVPart, QueryRows, RoutingLists, backend_for, torch_backend, triton_backend, wanted
from moba_cp.kernels.types import DqPartials, Partials

first: Backend = torch_backend
second: Backend = triton_backend
no_backend: Backend = wanted  # fails
other_name: Backend = renamed  # fails
other_type: Backend = retyped  # fails


def calls(
    q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows,
    selected: Tensor, out: Tensor, dk: Tensor, dv: Tensor, partials: Partials, dq_partials: DqPartials,
) -> None:
    backend = backend_for(q.device, q.dtype)
    backend.new_lse(q)
    backend.new_lses(q)  # fails
    backend.attend(q, part, lists, rows, 0.1, partials)
    backend.attend(part, q, lists, rows, 0.1, partials)  # fails
    backend.attend(q, part, rows, lists, 0.1, partials)  # fails
    backend.attend(q, part, lists, rows, selected, 0.1, partials)  # fails
    backend.attend(q, part, lists, rows, 0.1, dq_partials)  # fails
    backend.centroids(dk, start=lse, block_size=128)
    backend.centroids(dk, 128, lse)  # fails
    backend.select_blocks(q, centroids=dk, rows=rows, topk=8)
    backend.select_blocks(q, dk, rows, 8)  # fails
    backend.route(selected, n_blocks=8, kv_heads=2, block_size=128)
    backend.route(selected, 2, 8, 128)  # fails
    backend.merge(partials, selected=selected, out=out, lse=lse)
    backend.merge(partials, selected, lse, out)  # fails
    backend.merge(dq_partials, selected=selected, out=out, lse=lse)  # fails
    backend.merge_dq(dq_partials, selected=selected, dq=out)
    backend.merge_dq(dq_partials, out, selected)  # fails
    backend.delta(out=out, dout=dout)
    backend.delta(dout, out)  # fails
    backend.attend_backward(
        part, lists, rows, q=q, dout=dout, lse=lse, delta=delta, scale=0.1, dk=dk, dv=dv, dq_partials=dq_partials,
        accumulate=False,
    )
    backend.attend_backward(part, lists, rows, q, dout, delta, lse, 0.1, dk, dv, dq_partials, False)  # fails
    backend.add_gradients(own_dk=dk, own_dv=dv, arrived=[out], dk=dk, dv=dv)
    backend.add_gradients(dk, dv, [out], dv, dk)  # fails
"""


def test_misspelt_primitives_and_swapped_arguments_do_not_type_check(tmp_path: Path) -> None:
    for name, text in (
        ("torch/__init__.pyi", TORCH),
        ("renamed.py", backend_with("merge", RENAMED)),
        ("retyped.py", backend_with("centroids", RETYPED)),
        ("calls.py", CALLS),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = mypy(tmp_path)
    lines = CALLS.splitlines()
    expected = {number for number, line in enumerate(lines, 1) if line.endswith("# fails")}
    assert len(expected) > 10
    assert set(found) == expected, {lines[n - 1].strip(): found.get(n, "no error") for n in set(found) ^ expected}
    assert 'has no attribute "new_lses"' in found[lines.index("    backend.new_lses(q)  # fails") + 1]


def backend_with(primitive: str, definition: str) -> str:
    """A module with the torch backend's primitives, one of them replaced."""
    others = [name for name in (*vars(Backend), *Backend.__annotations__) if name[0] != "_" and name != primitive]
    imports = "from torch import Tensor\nfrom moba_cp.kernels.types import Partials\n"
    return imports + f"from moba_cp.kernels.torch_backend import {', '.join(others)}\n" + definition


def mypy(folder: Path) -> dict[int, str]:
    """Errors in `calls.py` by line. Other modules are read, but their errors are not reported."""
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(REPO / "pyproject.toml"),
        "--follow-imports",
        "silent",
    ]
    done = subprocess.run(
        [*command, "--no-site-packages", "--cache-dir", str(folder / "cache"), "calls.py"],
        cwd=folder, env=os.environ | {"MYPYPATH": f"{folder}{os.pathsep}{REPO}"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = re.findall(r"^calls\.py:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert done.stdout.count(": error:") == len(errors), done.stdout
    return {int(line): text for line, text in reversed(errors)}
