"""Tiles of keys and values for the tensor memory accelerator (TMA): which tensors it can read, and their descriptors.

A descriptor covers `[heads, rows, D]` of a tensor `[rows, heads, D]`, in tiles of some rows of one head. A tensor with one
head, or with the same rows for every head, gets a descriptor of one head: TMA has no stride of 0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .sizes import head_stride, padded


def tma_can_read(x: Tensor) -> bool:
    """Whether the start, the rows and the heads of `x` `[rows, heads, D]` are multiples of 16 bytes."""
    strides = (x.stride(0), head_stride(x))
    return x.data_ptr() % 16 == 0 and x.stride(0) > 0 and all(s * x.element_size() % 16 == 0 for s in strides)


def tile_descriptor(x: Tensor, keys: int) -> TensorDescriptor:
    """Triton's descriptor of tiles `[1, keys, D]`."""
    return TensorDescriptor(x, *_view(x), [1, keys, padded(x.shape[2])])


def gluon_tile_descriptor(x: Tensor, keys: int) -> Any:
    """Gluon's descriptor of tiles `[1, keys, D]`, in the shared-memory layout that products read."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor(x, *_view(x), [1, keys, x.shape[2]], tile_layout(keys, x.shape[2], x.dtype))


@lru_cache(maxsize=64)
def tile_layout(keys: int, dim: int, dtype: torch.dtype) -> Any:
    """Gluon's shared-memory layout of a tile `[1, keys, dim]` that TMA writes and products read."""
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for([1, keys, dim], gluon_dtype(dtype))


@lru_cache(maxsize=8)
def gluon_dtype(dtype: torch.dtype) -> Any:
    """Gluon's name for bf16 or fp16."""
    from triton.experimental.gluon import language as gl

    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[dtype]


def head_step(x: Tensor) -> int:
    """What the next head adds to a descriptor's first coordinate: 1, or 0 where the descriptor is of one head."""
    return int(head_stride(x) > 0)


def _view(x: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of the descriptor."""
    rows, heads, dim = x.shape
    step = head_step(x)
    return [heads if step else 1, rows, dim], [x.stride(1) if step else x.stride(0), x.stride(0), 1]
