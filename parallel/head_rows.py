"""Heads of `[T, H, W]` put together by the member they belong to, and back: one pass over each byte."""

from __future__ import annotations

import torch
from torch import Tensor


def take_heads(
    x: Tensor, size: int, first: int, count: int, per_member: int, copies: int = 1, packed: Tensor | None = None
) -> Tensor:
    """`[size, T, count, W]`: heads `first` to `first + count` of each member.

    Args:
        x: `[T, H, W]`, unit stride in the last dimension; `size * per_member == H * copies`.
        size: members.
        first, count: range of a member's heads.
        per_member: heads of a member.
        copies: members' head `e` is head `e // copies` of `x`.
        packed: where to, contiguous; by default a new tensor.

    Raises:
        ValueError: `packed` is not contiguous.
    """
    if packed is None:
        packed = x.new_empty(size, x.shape[0], count, x.shape[2])
    _check_contiguous(packed)
    if x.is_cuda:
        from . import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, copies, puts=False)
        return packed
    member = torch.arange(size, device=x.device)[:, None] * per_member
    member = member + torch.arange(first, first + count, device=x.device)
    heads = member.flatten() // copies
    packed.copy_(x[:, heads].unflatten(1, (size, count)).transpose(0, 1))
    return packed


def put_heads(packed: Tensor, x: Tensor, first: int, per_member: int) -> None:
    """The inverse, without copies: put `[size, T, count, W]`, contiguous, where it belongs in `x` `[T, H, W]`.

    Raises:
        ValueError: `packed` is not contiguous.
    """
    _check_contiguous(packed)
    if x.is_cuda:
        from . import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, 1, puts=True)
        return
    size, _, count, _ = packed.shape
    x.unflatten(1, (size, per_member))[:, :, first : first + count].copy_(packed.transpose(0, 1))


def _check_contiguous(packed: Tensor) -> None:
    """On the CPU too, where nothing depends on it: the kernel reads and writes rows one behind another."""
    if not packed.is_contiguous():
        raise ValueError(f"packed must be contiguous, got shape {tuple(packed.shape)} with strides {packed.stride()}")
