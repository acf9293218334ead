"""Ranges of kv heads and chunks of query rows whose partial results fit the workspace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from torch import Tensor

from .config import DEFAULT_WORKSPACE_BYTES
from .kernels.sizes import cdiv, kept_ds_bytes

ROW_MULTIPLE = 128
"""Chunks of query rows end at multiples of this."""
LONG_ROWS = 100_000
"""Rows whose keys, 128 per program, are work for a GPU: six programs for each of 132 multiprocessors."""
SUM_BYTES = 4
"""Of a number of dK or dV while it is summed."""
LEAST_CHUNK_BYTES = 5 << 27
"""Of gradients of scores that a chunk of rows keeps: half of the default workspace, which two chunks of a head always take. With
0.5 GiB nothing is gained, and the host is busy for as long as the GPU."""
MOST_KEPT_BYTES = (1 << 38) - 1
"""Most bytes of gradients of scores kept at once: the place of a partial dq, in units of 256 bytes, is an int32."""


@dataclass(frozen=True)
class Chunk:
    """Query rows and kv heads whose partial results are in memory together.

    Attributes:
        heads, q_heads, rows: ranges of kv heads, of their q heads and of local rows.
        whole: the chunk has all heads and all rows. No views are taken then: each costs the host microseconds.
        keeps_ds: backward keeps gradients of scores.
    """

    heads: slice
    q_heads: slice
    rows: slice
    whole: bool
    keeps_ds: bool = False

    def of_rows(self, x: Tensor) -> Tensor:
        """The chunk's part of `[T, Hq, ...]`."""
        return x if self.whole else x[self.rows, self.q_heads]

    def of_heads(self, x: Tensor) -> Tensor:
        """The chunk's part of `[Hq, T, ...]`."""
        return x if self.whole else x[self.q_heads, self.rows]


Ranges: TypeAlias = tuple[tuple[slice, tuple[Chunk, ...]], ...]
"""Ranges of kv heads, each with its chunks."""


@lru_cache(maxsize=64)
def ranges_of(
    tokens: int, most: int, q_heads: int, kv_heads: int, per_range: int, per_chunk: int, keeps_ds: bool = False
) -> Ranges:
    """Ranges and chunks of `tokens` local rows; no rank has more than `most` rows.

    Counts depend on `most` only, so ranks issue equal numbers of collectives.

    Args:
        per_range, per_chunk: kv heads of a range, and rows of a chunk.
        keeps_ds: of the chunks.
    """
    group = q_heads // kv_heads
    begins = range(0, max(most, 1), per_chunk)
    whole = per_range == kv_heads and len(begins) == 1
    ranges = []
    for first in range(0, kv_heads, per_range):
        heads = slice(first, min(first + per_range, kv_heads))
        q_heads_here = slice(heads.start * group, heads.stop * group)
        rows = [slice(min(b, tokens), min(b + per_chunk, tokens)) for b in begins]
        ranges.append((heads, tuple(Chunk(heads, q_heads_here, r, whole, keeps_ds) for r in rows)))
    return tuple(ranges)


def least_chunk_of_ds(rows: int, width: int) -> int:
    """Bytes of gradients of scores with which a chunk of rows saves more than it costs.

    Each chunk reads and writes again the sums of dK and dV of the keys that its rows may see, on average half of all. A chunk
    also costs launches. All of this was measured (docs/kernels.md).

    Args:
        rows: rows of keys and values.
        width: D + Dv.
    """
    return max(LEAST_CHUNK_BYTES, 2 * rows * width * SUM_BYTES)


def most_keeping_ds(
    of_head: Callable[[int], int], together: int, least_chunk: int, kv_heads: int, rows: int, workspace_bytes: int
) -> tuple[int, int]:
    """Kv heads per range and rows per chunk where backward keeps gradients of scores; `(0, 0)`: it keeps none.

    Where all partial results together fit the workspace, it takes no more memory than they would, or with `LONG_ROWS` or more
    twice as much. A workspace above the default may be used whole. Where not all heads fit, and those that do have fewer rows
    together than `LONG_ROWS`, a GPU would be idle, so then it keeps none. Where not even one head fits, its rows come in as few
    chunks as fit, of equal size but for the last.

    Args:
        of_head: bytes of so many rows of one kv head with their gradients of scores; 0 where they cannot be kept.
        together: bytes of all partial results without gradients of scores.
        least_chunk: bytes with which a chunk of rows pays.
        rows: query rows.
    """
    most = min(workspace_bytes, MOST_KEPT_BYTES)
    if together <= workspace_bytes <= DEFAULT_WORKSPACE_BYTES:
        most = min(most, 2 * together if rows >= LONG_ROWS else together)
    whole = of_head(rows)
    if whole and whole <= most:
        heads = min(kv_heads, most // whole)
        if heads < kv_heads and heads * rows < LONG_ROWS:
            return 0, 0
        return cdiv(kv_heads, cdiv(kv_heads, heads)), rows  # in ranges of nearly equal size
    partly = of_head(0)  # bytes of work items that are not full: of any chunk
    if not whole or most <= partly or rows < LONG_ROWS:
        return 0, 0
    count = cdiv(whole - partly, most - partly)
    for chunk in (_chunk_rows(rows, count), _chunk_rows(rows, count + 1)):  # rounding up may be too much
        if least_chunk <= of_head(chunk) <= most:
            return 1, chunk
    return 0, 0


def _chunk_rows(rows: int, count: int) -> int:
    return cdiv(cdiv(rows, count), ROW_MULTIPLE) * ROW_MULTIPLE


def slots_per_row(topk: int, blocks: int) -> int:
    """Partial results per row: `topk`, but no more than the blocks of the longest document, rounded up to a power of two so that
    packing that differs from step to step compiles few kernels."""
    return min(topk, 1 << (blocks - 1).bit_length())


def most_at_once(
    most: int, q_heads: int, kv_heads: int, head_bytes: int, workspace_bytes: int, kv_head_bytes: int = 0
) -> tuple[int, int]:
    """kv heads per range and rows per chunk whose partial results fit the workspace: at least one head and 128 rows.

    Args:
        most: rows of the rank with most.
        head_bytes: workspace per row and q head.
        kv_head_bytes: workspace per kv head, however many rows a chunk has. At most half of the workspace is set aside for it,
            as smaller chunks would not reduce it.
    """
    row_bytes = max(1, q_heads // kv_heads * head_bytes)  # of one kv head
    per_range = min(kv_heads, max(1, workspace_bytes // max(1, most * row_bytes + kv_head_bytes)))
    rows = max(workspace_bytes - per_range * kv_head_bytes, workspace_bytes // 2) // (per_range * row_bytes)
    return per_range, max(ROW_MULTIPLE, rows if rows >= most else rows // ROW_MULTIPLE * ROW_MULTIPLE)


def estimated_workspace(
    *, rows: int, slots: int, q_heads: int, kv_heads: int, dim: int, block_size: int, blocks: int, slot_bytes: int,
    block_bytes: int, workspace_bytes: int, keeps_ds: bool,
) -> int:  # fmt: skip
    """Bytes of partial results, with gradients of scores where backward keeps them, and of sums of dK and dV where rows come in
    chunks: of one rank on a Hopper GPU.

    Args:
        rows, slots, q_heads, kv_heads, dim, block_size, blocks, workspace_bytes: of the call.
        slot_bytes, block_bytes: of a partial result, and of each (kv head, block).
        keeps_ds: whether backward may keep gradients of scores, as `Backend.kept_ds_bytes` decides: for 16-bit inputs.
    """

    def of_head(rows_together: int) -> int:
        entries = rows_together * slots * (q_heads // kv_heads)
        return kept_ds_bytes(entries=entries, n_blocks=blocks, block_size=block_size, dim=dim) if keeps_ds else 0

    together = rows * q_heads * slots * slot_bytes + kv_heads * blocks * block_bytes
    least = least_chunk_of_ds(rows, 2 * dim)
    heads, chunk = most_keeping_ds(of_head, together, least, kv_heads, rows, workspace_bytes)
    kept = heads * of_head(chunk)
    if not heads:
        heads, chunk = most_at_once(rows, q_heads, kv_heads, slots * slot_bytes, workspace_bytes, blocks * block_bytes)
    sums = heads * rows * 2 * dim * SUM_BYTES if chunk < rows else 0
    return max(kept, min(together, workspace_bytes), blocks * block_bytes) + sums
