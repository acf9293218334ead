"""What the primitives of one device take and give: query rows, KV parts, routing lists.

Block numbers are global: blocks are counted over all documents in order, and every rank counts them alike. The kernels
know nothing of ranks; they see some query rows, and a *part* of the keys and values (local, gathered or fetched).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

OWN_TILE = 128
"""Most query rows in one entry of `QueryRows.own_tiles`."""


def selection_dtype(n_blocks: int) -> torch.dtype:
    """Dtype of selected blocks: int16 where every block number fits, else int32."""
    return torch.int16 if n_blocks <= torch.iinfo(torch.int16).max else torch.int32


def heads_stride(x: Tensor) -> int:
    """Stride between the heads' rows of `[N, H, D]`; 0 where there is one, or all pairs have rows of their own."""
    return x.stride(1) if x.shape[1] > 1 else 0


@dataclass(frozen=True)
class QueryRows:
    """Where each of `T` query rows stands among the blocks.

    Attributes:
        block: int32 `[T]`, number of the block that holds the row's token (its own block).
        first_block: int32 `[T]`, first block of the row's document; the row's candidates are
            `first_block <= j < block`.
        position: int32 `[T]`, the token's position inside its own block, from 0.
        own_tiles: int32 `[n, 4]`, stretches of at most `OWN_TILE` consecutive rows that share an own block and have
            consecutive positions: `(first row, number of rows, block, position of the first row)`. First rows count
            from the start of the whole row set, also in a slice: see `offset`.
        offset: number of the slice's first row in the whole row set.
    """

    block: Tensor
    first_block: Tensor
    position: Tensor
    own_tiles: Tensor
    offset: int = 0

    def __len__(self) -> int:
        return self.block.numel()

    def slice(self, start: int, end: int) -> QueryRows:
        """Rows `[start, end)`. `own_tiles` stays whole: kernels leave out what lies outside `[offset, offset + T)`."""
        if (start, end) == (0, len(self)):
            return self
        return replace(
            self,
            block=self.block[start:end],
            first_block=self.first_block[start:end],
            position=self.position[start:end],
            offset=self.offset + start,
        )


@dataclass(frozen=True)
class KVPart:
    """Keys and values of some (kv head, block) pairs.

    Attributes:
        k: `[N, H, D]`, any token and head stride, unit stride in the last dimension. `H` is the number of kv heads at
            work, or 1 where every (kv head, block) pair has rows of its own (fetched blocks).
        v: `[N, H, Dv]`, likewise.
        start: int32 `[kv heads at work, n_blocks]`, row of `k` and `v` that holds the block's first key; -1 where the
            part does not hold the pair. A block's keys are consecutive rows. Rows may be expanded (stride 0) over heads.
        length: int32 `[n_blocks]`, keys in each block: `block_size`, but for the last block of a document.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor


def query_rows(
    block: np.ndarray, first_block: np.ndarray, position: np.ndarray, device: torch.device | str
) -> QueryRows:
    """`QueryRows` from host arrays `[T]`; a pure function, made once per plan."""
    block, first_block, position = (np.ascontiguousarray(x, dtype=np.int32) for x in (block, first_block, position))
    row = np.arange(block.size)
    breaks = np.ones(block.size, dtype=bool)
    breaks[1:] = (block[1:] != block[:-1]) | (position[1:] != position[:-1] + 1)
    stretch = np.flatnonzero(breaks)
    start_of = stretch[np.cumsum(breaks) - 1] if block.size else row
    breaks |= (row - start_of) % OWN_TILE == 0
    first = np.flatnonzero(breaks)
    count = np.diff(np.append(first, block.size))
    tiles = np.stack([first, count, block[first], position[first]], axis=1).astype(np.int32)
    to = lambda x: torch.from_numpy(x).to(device, non_blocking=True)  # noqa: E731
    return QueryRows(to(block), to(first_block), to(position), to(tiles))
