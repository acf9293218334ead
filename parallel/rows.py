"""Rows of keys and values put side by side, and rows of wanted blocks copied or added, from another rank's memory too.

On CUDA by kernels; which blocks are wanted is read on the device, so the host never waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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


def copy_wanted(source: Tensor, target: Tensor, wanted: Tensor, start: Tensor, length: Tensor, most_rows: int) -> None:
    """Copy the rows of wanted blocks; other rows of `target` stay as they are.

    Args:
        source, target: `[N, H, W]`, any strides of the first two dimensions, unit stride in the last.
        wanted: uint8 `[H, n_blocks]`, unit stride in the last dimension: 1 for the pairs to copy.
        start: int32 `[n_blocks]`, row of each block's first key in both; -1 for blocks that are not there.
        length: int64 `[n_blocks]`, rows of each block.
        most_rows: at least the rows of every block.
    """
    if source.is_cuda:
        from .rows_kernel import launch

        launch(source, target, wanted, start, length, most_rows, adds=False, first=False)
        return
    taken = _taken(source, wanted, start, length)
    target[taken] = source[taken]


def add_wanted(
    source: Tensor, target: Tensor, wanted: Tensor, start: Tensor, length: Tensor, most_rows: int, first: bool
) -> None:
    """Add the rows of wanted blocks to `target`. With `first`, `target` is uninitialized and its other rows become 0.

    Args:
        source, target, wanted, start, length, most_rows: as for `copy_wanted`. Here every row of `target` belongs to a block.
        first: see above.
    """
    if source.is_cuda:
        from .rows_kernel import launch

        launch(source, target, wanted, start, length, most_rows, adds=True, first=first)
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


@dataclass(frozen=True)
class Pairs:
    """Where (kv head, block) pairs at home on this rank lie in a message to, or from, every rank of the group.

    Attributes:
        at: int64 `[P, H, n]`, unit stride in the last dimension: for each rank, row of the message at which a pair begins; -1
            where it is not in the message.
        begin, length: int64 `[n]`, home row of each block's first key, and its rows.
        most_rows: at least the rows of every block.
    """

    at: Tensor
    begin: Tensor
    length: Tensor
    most_rows: int


def pack_pairs(k: Tensor, v: Tensor, pairs: Pairs, rows: int) -> Tensor:
    """A message of `rows` rows with keys and values side by side: `[rows, D + Dv]`.

    Args:
        k, v: `[N, H, D]`, `[N, H, Dv]`, unit stride in the last dimension.
        pairs: of these heads; together they fill the message.
    """
    packed = k.new_empty(rows, k.shape[2] + v.shape[2])
    if not rows:
        return packed
    if k.is_cuda:
        from . import rows_kernel

        rows_kernel.pack_pairs(k, v, pairs, packed)
        return packed
    for row, token, head in _rows_of(pairs):
        packed[row] = torch.cat([k[token, head], v[token, head]], dim=-1)
    return packed


def add_pairs(values: Tensor, pairs: Pairs, k: Tensor, v: Tensor) -> None:
    """Add a message of packed gradients to sums, those of lower ranks first.

    Args:
        values: `[rows, D + Dv]`, contiguous.
        pairs: as for `pack_pairs`.
        k, v: contiguous `[N, H, D]`, `[N, H, Dv]` in the dtype of `values`, added to in place.
    """
    if not len(values):
        return
    if values.is_cuda:
        from . import rows_kernel

        rows_kernel.add_pairs(values, pairs, k, v)
        return
    for row, token, head in _rows_of(pairs):
        k[token, head] += values[row, : k.shape[2]]
        v[token, head] += values[row, k.shape[2] :]


def _rows_of(pairs: Pairs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per rank, int64: every row that the message has for it or from it, home row and kv head of each. No two are alike."""
    for at in pairs.at:
        head, block = (at >= 0).nonzero(as_tuple=True)
        length = pairs.length[block]
        pair = torch.repeat_interleave(length)
        inside = torch.arange(len(pair), device=at.device) - (torch.cumsum(length, 0) - length)[pair]
        yield at[head, block][pair] + inside, pairs.begin[block][pair] + inside, head[pair]
