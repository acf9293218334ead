"""The final sum of dK and dV: the Triton kernel has the bits of torch's sum in the same order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moba_cp.kernels import torch_backend
from tests.kernels import interpreter

CASES = [(5, 2, 8, 8, 1), (3, 1, 16, 8, 2), (0, 2, 8, 8, 1), (67, 3, 24, 40, 3), (130, 2, 128, 128, 1)]


def check(tokens: int, heads: int, dim: int, dim_v: int, others: int, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    own = [normal(tokens, heads, size) for size in (dim, dim_v)]
    arrived = [normal(tokens, heads, dim + dim_v) for _ in range(others)]

    def outputs() -> list[Tensor]:  # views of the middle heads of NaN tensors
        wide = [torch.full((tokens, heads + 2, n), float("nan"), dtype=dtype, device=device) for n in (dim, dim_v)]
        return [x[:, 1 : heads + 1] for x in wide]

    expected, got = outputs(), outputs()
    add_by(torch_backend.add_gradients, own, arrived, expected)
    from moba_cp.kernels.gradients import add_gradients

    add_by(add_gradients, own, arrived, got)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)  # the same fp32 sums in the same order, rounded once
        assert not a.isnan().any()


def add_by(add_gradients, own: list[Tensor], arrived: list[Tensor], sums: list[Tensor]) -> None:
    """Call a backend's `add_gradients`, which may overwrite `own`."""
    own_dk, own_dv = (x.clone() for x in own)
    add_gradients(own_dk=own_dk, own_dv=own_dv, arrived=arrived, dk=sums[0], dv=sums[1])


@interpreter.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: tuple[int, ...]) -> None:
    check(*case, "cpu", torch.float16)


def test_in_interpreter() -> None:
    interpreter.run_module(__file__)


class TestOnGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", [*CASES, (5000, 8, 128, 64, 2)], ids=str)
    def test_kernel(self, case: tuple[int, ...], dtype: torch.dtype) -> None:
        check(*case, "cuda", dtype)
