"""Centroids: block means are summed in fp32 and rounded once, in an order that does not depend on the number of blocks."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import interpreter

module = pytest.importorskip("moba_cp.kernels.centroids")
from moba_cp.kernels import torch_backend  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"


def test_in_interpreter():
    interpreter.run_module(__file__)


def check(tokens, heads, dim, block_size, dtype, starts, integers=True, pad=8):
    """Sums of small integers are exact. Only the final rounding is left, so bits are equal."""
    generator = torch.Generator().manual_seed(0)
    if integers:
        k = torch.randint(-8, 9, (tokens, heads + 1, dim + pad), generator=generator).float()
    else:
        k = torch.randn(tokens, heads + 1, dim + pad, generator=generator)
    k = k.to(DEVICE, dtype)[:, :heads, :dim]
    start = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    actual = module.centroids(k, start=start, block_size=block_size)
    expected = torch_backend.centroids(k, start=start, block_size=block_size)
    assert actual.dtype == dtype
    if integers and block_size & (block_size - 1) == 0:
        assert torch.equal(actual, expected)
    else:
        # Another order of summation moves the mean by far less than half an ulp, which may still change the rounding.
        step = 2**-7 if dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(actual, expected, rtol=step, atol=1e-6)
    for index in range(min(len(starts), 3)):
        assert torch.equal(module.centroids(k, start=start[index : index + 1], block_size=block_size)[0], actual[index])


@interpreter.interpreted
@pytest.mark.parametrize(
    ("dim", "block_size", "dtype"),
    [(16, 16, torch.bfloat16), (24, 48, torch.float16), (64, 100, torch.bfloat16), (96, 128, torch.bfloat16)],
)
def test_small(dim, block_size, dtype):
    check(3 * block_size + 5, 2, dim, block_size, dtype, [0, block_size + 3, 5, 2 * block_size])


def test_no_blocks():
    k = torch.zeros(5, 2, 16, dtype=torch.bfloat16, device=DEVICE)
    assert module.centroids(k, start=torch.zeros(0, dtype=torch.int32, device=DEVICE), block_size=16).shape == (
        0,
        2,
        16,
    )


class TestGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("block_size", [16, 48, 100, 128, 512, 4096])
    @pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
    @pytest.mark.parametrize("integers", [True, False])
    def test_equals_torch(self, dim, block_size, dtype, integers):
        starts = [block_size * i + i for i in (3, 0, 1, 2)]
        check(4 * block_size + 7, 3, dim, block_size, dtype, starts, integers)

    def test_rows_past_two_to_the_31(self):
        """The last rows' offsets need 64 bits."""
        k = torch.zeros((1 << 20) + 128, 16, 128, dtype=torch.bfloat16, device=DEVICE)
        k[1 << 20 :] = 3
        start = torch.tensor([0, 1 << 20], dtype=torch.int32, device=DEVICE)
        means = module.centroids(k, start=start, block_size=128)
        assert means.float().mean((1, 2)).tolist() == [0, 3]
