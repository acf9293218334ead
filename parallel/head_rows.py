"""Heads of `[T, H, W]` put together by the member they belong to, and back: one pass over each byte."""

from __future__ import annotations

import torch
from torch import Tensor


def take_heads(
    x: Tensor,
    size: int,
    first: int,
    count: int,
    per_member: int,
    copies: int = 1,
    packed: Tensor | None = None,
    skip: int | None = None,
) -> Tensor:
    """`[size, T, count, W]`: heads `first` to `first + count` of each member.

    Args:
        x: `[T, H, W]`, unit stride in the last dimension; `size * per_member == H * copies`.
        size: members.
        first, count: range of a member's heads.
        per_member: heads of a member.
        copies: members' head `e` is head `e // copies` of `x`.
        packed: destination, contiguous; by default a new tensor.
        skip: a member that is left out: the result is `[size - 1, T, count, W]`, of the others in order.

    Raises:
        ValueError: `packed` is not contiguous.
    """
    members = size - (skip is not None)
    if packed is None:
        packed = x.new_empty(members, x.shape[0], count, x.shape[2])
    _check_contiguous(packed)
    if x.is_cuda:
        from . import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, copies, skip, puts=False)
        return packed
    member = _others(size, skip)[:, None] * per_member + torch.arange(first, first + count)
    heads = member.flatten() // copies
    packed.copy_(x[:, heads].unflatten(1, (members, count)).transpose(0, 1))
    return packed


def put_heads(packed: Tensor, x: Tensor, first: int, per_member: int, skip: int | None = None) -> None:
    """The inverse, without copies: put `packed` where it belongs in `x` `[T, H, W]`.

    Args:
        packed: `[size, T, count, W]`, contiguous; `[size - 1, T, count, W]` where a member is left out.
        x: destination, unit stride in the last dimension.
        first, per_member, skip: as for `take_heads`.

    Raises:
        ValueError: `packed` is not contiguous.
    """
    _check_contiguous(packed)
    if x.is_cuda:
        from . import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, 1, skip, puts=True)
        return
    members, _, count, _ = packed.shape
    by_member = x.unflatten(1, (members + (skip is not None), per_member))
    by_member[:, _others(by_member.shape[1], skip), first : first + count] = packed.transpose(0, 1)


def _check_contiguous(packed: Tensor) -> None:
    """On the CPU too, where nothing depends on it: the kernel reads and writes rows one behind another."""
    if not packed.is_contiguous():
        raise ValueError(f"packed must be contiguous, got shape {tuple(packed.shape)} with strides {packed.stride()}")


def _others(size: int, skip: int | None) -> Tensor:
    """Numbers of the members but for `skip`."""
    return torch.tensor([member for member in range(size) if member != skip], dtype=torch.int64)
