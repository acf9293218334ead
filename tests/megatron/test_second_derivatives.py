"""Layer parts have no second derivatives: `create_graph=True` is refused, where it would give wrong numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")
pytest.importorskip("triton")

from moba_cp.megatron import direct, fused
from moba_cp.megatron.recompute import InChunks
from tests.kernels import interpreter

WIDTH = 16
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: fused.rms_norm(x, torch.ones(WIDTH), 1e-5),
    "add_rms_norm": lambda x: fused.add_rms_norm(x, x, torch.ones(WIDTH), 1e-5)[1],
    "swiglu": fused.swiglu,
    "cross_entropy": lambda x: fused.cross_entropy(x, torch.zeros(x.shape[:-1], dtype=torch.int64)),
}


def check_refused(part: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, 1, WIDTH, requires_grad=True)
    y = part(x)
    with pytest.raises(RuntimeError, match="no second derivatives, got create_graph=True"):
        torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (gradient,) = torch.autograd.grad(part(x).pow(3).sum(), x)
    assert not gradient.requires_grad


@interpreter.interpreted
@pytest.mark.parametrize("part", PARTS)
def test_kernels(part: str) -> None:
    check_refused(PARTS[part])


@pytest.mark.parametrize("chunk", [0, 2])
def test_chunks(chunk: int) -> None:
    check_refused(lambda x: InChunks(lambda rows: rows.sin(), chunk)([x], []))


@interpreter.interpreted
def test_segments() -> None:
    projection = direct.Projection(torch.ones(WIDTH), 1e-5, torch.rand(3 * 8, WIDTH), 1, 8, None)
    check_refused(lambda x: direct.project(projection, x)[0])


def test_in_interpreter() -> None:
    interpreter.run_module(__file__)
