"""What the primitives of a backend take and return: query rows, KV parts, routing lists, partial results.

Block numbers are global: blocks are counted over all documents in order, and every rank counts them alike. Kernels know no
ranks; they see some query rows and one *part* of the keys and values (local, gathered or fetched).

**Selection.** `selected` `[Hq, T, topk]` holds the block numbers of each row, ascending, padded with -1 at the front. The
last slot of every row is its own block, and no other slot is. Lists, kernels and merge identify the own block by its slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

COUNT_TILE = 64
"""Blocks of a cache whose known centroids are counted together; see `Backend.update_centroids`."""
OWN_TILE = 128
"""Most query rows per entry of `QueryRows.own_tiles`."""


def selection_dtype(n_blocks: int) -> torch.dtype:
    """Dtype of selected block numbers: int16 where all of them fit, else int32."""
    return torch.int16 if n_blocks <= torch.iinfo(torch.int16).max else torch.int32


@dataclass(frozen=True)
class QueryRows:
    """Position of each of `T` query rows among the blocks.

    Attributes:
        block: int32 `[T]`, the row's own block: the block that holds its token.
        first_block: int32 `[T]`, first block of the row's document. The row's candidates are
            `first_block <= j < block`.
        position: int32 `[T]`, position of the token inside its own block, from 0.
        own_tiles: int32 `[n, 4]`, runs of at most `OWN_TILE` consecutive rows with the same own block and consecutive
            positions: `(first row, number of rows, block, position of the first row)`. First rows count from the start
            of the full row set, also in a slice; see `offset`.
        offset: first row of this slice in the full row set.
    """

    block: Tensor
    first_block: Tensor
    position: Tensor
    own_tiles: Tensor
    offset: int = 0

    def __len__(self) -> int:
        return self.block.numel()

    def slice(self, start: int, end: int) -> QueryRows:
        """Rows `[start, end)`. `own_tiles` stays as it is: kernels skip rows outside of `[offset, offset + T)`."""
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
        k: `[N, H, D]`, unit stride in the last dimension, any other strides. `H` is the number of kv heads being
            processed, or 1 where each (kv head, block) pair has rows of its own (fetched blocks).
        v: `[N, H, Dv]`, likewise.
        start: int32 `[kv heads, n_blocks]`, row of `k` and `v` with the block's first key; -1 where the part does not
            hold the pair. A block's keys are consecutive rows. May be expanded (stride 0) over heads.
        length: int32 `[n_blocks]`, keys per block: `block_size`, or less for the last block of a document.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    length: Tensor


@dataclass(frozen=True)
class ListShape:
    """What the host knows about routing lists: sizes and the layout of an entry.

    Attributes:
        kv_heads, group_size: kv heads being processed, and q heads per kv head.
        n_blocks, block_size: blocks per kv head, and keys per block.
        topk: slots per row; slot `topk - 1` is the own block.
        head_bits, slot_bits: widths of the fields of an entry.
        rows_per_item: most entries per work item.
    """

    kv_heads: int
    group_size: int
    n_blocks: int
    block_size: int
    topk: int
    head_bits: int
    slot_bits: int
    rows_per_item: int

    @property
    def n_bins(self) -> int:
        """(kv head, block) pairs."""
        return self.kv_heads * self.n_blocks


def list_shape(selected: Tensor, n_blocks: int, kv_heads: int, block_size: int, rows_per_item: int) -> ListShape:
    """The shape of the lists of `selected` `[Hq, T, topk]`."""
    q_heads, _, topk = selected.shape
    group = q_heads // kv_heads
    return ListShape(
        kv_heads,
        group,
        n_blocks,
        block_size,
        topk,
        (group - 1).bit_length(),
        max(topk - 1, 0).bit_length(),
        rows_per_item,
    )


@dataclass(frozen=True)
class RoutingLists:
    """Which query rows visit which block: CSR by (kv head, block), and work items over it. Own blocks are listed too.

    Attributes:
        shape: sizes.
        pointer: int32 `[n_bins + 1]`, first entry of each bin; bins are in (kv head, block) order.
        entry: int32 or int64 `[capacity]`, valid up to `pointer[-1]`:
            `token << (head_bits + slot_bits) | head in the kv head's group << slot_bits | slot`. Ascending by
            (head, token) inside a bin.
        item_bin, item_start, item_end: int32 `[items]`: item i covers entries `[item_start, item_end)` of bin
            `item_bin`. Items are in order of bins, those of bin b from item `pointer[b] // rows_per_item + b` on; unused
            items, between bins and at the end, have bin -1. The torch backend makes no items.
    """

    shape: ListShape
    pointer: Tensor
    entry: Tensor
    item_bin: Tensor
    item_start: Tensor
    item_end: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order that `from_tensors` takes: for autograd to save, and for streams to wait for."""
        return self.pointer, self.entry, self.item_bin, self.item_start, self.item_end

    @classmethod
    def from_tensors(cls, shape: ListShape, tensors: Sequence[Tensor]) -> RoutingLists:
        """The lists with this `shape` and these `tensors()`.

        Raises:
            ValueError: the number of tensors is wrong.
        """
        if len(tensors) != 5:
            raise ValueError(f"routing lists have 5 tensors, got {len(tensors)}")
        return cls(shape, *tensors)


@dataclass(frozen=True)
class Partials:
    """One partial output per (q head, row, slot).

    Attributes:
        out: `[Hq, T, topk, Dv]`, normalised partial outputs.
        lse: `[Hq, T, topk]`, log-sum-exps of each partial's scaled scores.
    """

    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class DqPartials:
    """One partial dq per (q head, row, slot), of one of three kinds.

    Attributes:
        dq: in slots, `[Hq, T, topk, D]`. With `place`, `[items, block_size, rows_per_item]`: an item's dS, the gradients of its
            scores, are kept there, transposed, and then its rows' partial dq, `[rows_per_item, D]`, in the same memory. With
            `sums`, fp32 `[tiles, SUM_ROWS * D]`: sums over tiles of keys, in an order of `dkdv_dq_tiles_sm90.py`.
        place: None, or int32 `[Hq, T, topk]`: where each partial dq is in `dq`, counted in D elements, or which row of the sums
            it is; of used slots only.
        sums: whether `dq` are sums; then there are places.
    """

    dq: Tensor
    place: Tensor | None = None
    sums: bool = False


def query_rows(
    block: np.ndarray, first_block: np.ndarray, position: np.ndarray, device: torch.device | str
) -> QueryRows:
    """`QueryRows` on `device` from host arrays `[T]`: own block, first block of the document, position in the own block."""
    block, first_block, position = (np.ascontiguousarray(x, dtype=np.int32) for x in (block, first_block, position))
    row = np.arange(block.size)
    opens = np.ones(block.size, dtype=bool)  # rows that open a run
    opens[1:] = (block[1:] != block[:-1]) | (position[1:] != position[:-1] + 1)
    run = np.flatnonzero(opens)
    start_of = run[np.cumsum(opens) - 1] if block.size else row
    opens |= (row - start_of) % OWN_TILE == 0
    first = np.flatnonzero(opens)
    count = np.diff(np.append(first, block.size))
    tiles = np.stack([first, count, block[first], position[first]], axis=1).astype(np.int32)
    to = lambda x: torch.from_numpy(x).to(device, non_blocking=True)  # noqa: E731
    return QueryRows(to(block), to(first_block), to(position), to(tiles))


def decode_rows(position: Tensor, blocks: int, block_size: int) -> QueryRows:
    """`QueryRows` of one query per sample, among `blocks` blocks per sample; the host reads nothing.

    Args:
        position: int32 `[samples]`, position of the query in the sample's content; -1 where there is none.
    """
    first = torch.arange(position.numel(), device=position.device, dtype=torch.int32) * blocks
    position = position.clamp(min=0)
    tiles = torch.empty(0, 4, dtype=torch.int32, device=position.device)  # for the attention of a forward pass only
    return QueryRows(first + position // block_size, first, position % block_size, tiles)
