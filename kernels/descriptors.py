"""Tiles of keys and values for the tensor memory accelerator (TMA): what it can read, and its descriptors.

A descriptor is over `[heads, rows, D]` of a tensor `[rows, heads, D]`, one tile of some rows of one head at a time. One head,
or the same rows for every head, is a descriptor of one head: TMA knows no stride of 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs
from .types import heads_stride


def tma_can_read(x: Tensor) -> bool:
    """Whether `x` `[rows, heads, D]` starts at a multiple of 16 bytes, as do its rows and heads."""
    strides = (x.stride(0), heads_stride(x))
    return x.data_ptr() % 16 == 0 and x.stride(0) > 0 and all(s * x.element_size() % 16 == 0 for s in strides)


def tile_descriptor(x: Tensor, keys: int) -> TensorDescriptor:
    """Triton's, of tiles `[1, keys, D]`."""
    return TensorDescriptor(x, *_view(x), [1, keys, configs.padded(x.shape[2])])


def gluon_tile_descriptor(x: Tensor, keys: int):
    """Gluon's, of tiles `[1, keys, D]` in the layout that products read."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    return GluonDescriptor(x, *_view(x), [1, keys, x.shape[2]], tile_layout(keys, x.shape[2], x.dtype))


@lru_cache(maxsize=64)
def tile_layout(keys: int, dim: int, dtype: torch.dtype):
    """Gluon's layout in shared memory of a tile `[1, keys, dim]` that TMA writes and products read."""
    from triton.experimental.gluon import language as gl

    from .hopper_backward_kernels import element

    return gl.NVMMASharedLayout.get_default_for([1, keys, dim], element(dtype))


def heads_step(x: Tensor) -> int:
    """What the next head adds to the first coordinate: 1, or 0 where the descriptor is of one head."""
    return int(heads_stride(x) > 0)


def _view(x: Tensor) -> tuple[list[int], list[int]]:
    rows, heads, dim = x.shape
    step = heads_step(x)
    return [heads if step else 1, rows, dim], [x.stride(1) if step else x.stride(0), x.stride(0), 1]
