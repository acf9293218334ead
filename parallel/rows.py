"""Rows of keys and values put side by side, and rows of wanted blocks copied or added, from another rank's memory too.

On CUDA by kernels; which blocks are wanted is read on the device, so the host never waits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(k: Tensor, v: Tensor, packed: Tensor | None = None) -> Tensor:
    """`[N, H, D]` and `[N, H, Dv]` side by side, so that both travel in one message.

    Args:
        k, v: unit stride in the last dimension.
        packed: destination, `[N, H, D + Dv]`; a new tensor by default.
    """
    if packed is None:
        packed = k.new_empty(*k.shape[:2], k.shape[2] + v.shape[2])
    if k.is_cuda:
        from . import rows_kernel

        rows_kernel.pack(k, v, packed)
    else:
        torch.cat([k, v], dim=-1, out=packed)
    return packed


def copy_wanted(source: Tensor, target: Tensor, wanted: Tensor, start: Tensor, length: Tensor, block_size: int) -> None:
    """Copy the rows of wanted blocks; other rows of `target` stay as they are.

    Args:
        source, target: `[N, H, W]`, any strides of the first two dimensions, unit stride in the last.
        wanted: uint8 `[H, n_blocks]`, unit stride in the last dimension: 1 for the pairs to copy.
        start: int32 `[n_blocks]`, row of each block's first key in both; -1 for blocks that are not there.
        length: int64 `[n_blocks]`, rows of each block.
        block_size: most rows per block.
    """
    if source.is_cuda:
        from .rows_kernel import launch

        launch(source, target, wanted, start, length, block_size, adds=False, first=False)
        return
    taken = _taken(source, wanted, start, length)
    target[taken] = source[taken]


def add_wanted(
    source: Tensor, target: Tensor, wanted: Tensor, start: Tensor, length: Tensor, block_size: int, first: bool
) -> None:
    """Add the rows of wanted blocks to `target`. With `first`, `target` is uninitialized and its other rows become 0.

    Args:
        source, target, wanted, start, length, block_size: as for `copy_wanted`; every row of `target` is in a block.
        first: see above.
    """
    if source.is_cuda:
        from .rows_kernel import launch

        launch(source, target, wanted, start, length, block_size, adds=True, first=first)
        return
    taken = _taken(source, wanted, start, length)
    if first:
        target.zero_()
    target[taken] += source[taken]


def _taken(source: Tensor, wanted: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """bool `[N, H]`: rows of wanted blocks. Blocks at home on a rank lie in order of their numbers, without gaps."""
    here = (start >= 0).nonzero()[:, 0]
    block = torch.repeat_interleave(here, length[here])
    assert block.numel() == source.shape[0], "every row is in a block"
    return wanted[:, block].T != 0


def add_rows(values: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
    """Add rows of packed gradients to sums.

    Args:
        values: `[n, D + Dv]`.
        rows: int64 `[n]`, `token * H + head`, each at most once, so that the order of additions changes no bit.
        k, v: contiguous `[N, H, D]`, `[N, H, Dv]`, added to in place.
    """
    width = k.shape[-1]
    k.view(-1, width).index_add_(0, rows, values[:, :width])
    v.view(-1, v.shape[-1]).index_add_(0, rows, values[:, width:])
