"""What the pipeline does to tensors before kernels see them."""

from __future__ import annotations

import pytest
import torch

from moba_cp.kernels.dispatch import aligned
from moba_cp.pipeline import readable

BASE = torch.zeros(10, 4, 3 * 64 + 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(10, 4, 64), False),
        (torch.zeros(10, 4, 128)[:, :, :64], False),  # strided, but every row is aligned
        (torch.zeros(10, 4, 72), False),  # no new tensor would be aligned either
        (BASE[:, :, 64:128], True),  # rows of 200 elements
        (torch.zeros(10 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(10, 4, 64), True),  # begins 2 bytes late
        (torch.zeros(64, 4, 10).transpose(0, 2), True),
        (torch.zeros(10, 4, 1).expand(10, 4, 64), True),
    ],
)
def test_variants_of_kernels_do_not_depend_on_strides(x: torch.Tensor, copied: bool) -> None:
    """Every tensor whose copy would be aligned is aligned, so all parts of a call take the same variant."""
    y = readable(x)
    assert torch.equal(x, y)
    assert (y.data_ptr() != x.data_ptr()) == copied
    assert y.stride(2) == 1
    assert aligned(y) or x.shape[2] % 16
