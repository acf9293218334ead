"""Arithmetic in the dtypes that the formulas name."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def as_given(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Keeps autocast out: inputs are computed with in their own dtype, and sums stay in fp32 or fp64."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
