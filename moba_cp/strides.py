"""Tensors whose strides kernels can read: copies only where they cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.sizes import aligned


def readable(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not dense, or where its rows are not aligned as those of a new tensor.

    Which variant of a kernel runs depends on alignment (`kernels.sizes.aligned`), and variants of the backward agree to rounding
    only. Parts that come from other ranks are aligned, so the local part has to be: dq must not depend on the layout.
    """
    x = unit_stride(x)
    as_if_new = x.is_contiguous() and x.data_ptr() % 16 == 0  # a copy would be no better
    if x.shape[-1] % 16 or aligned(x) or as_if_new:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not dense (an expanded gradient, a transposed input)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
