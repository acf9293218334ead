"""The Triton kernel of `parallel/rows.py`: bound by the link between two GPUs, so a few programs, each with much in flight."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 64
"""Programs of a launch: together they have 2 MiB under way. With half as many, NVLink (NV18) was not full beside attention."""
_TILE_BYTES = 32 << 10
"""What a program has under way."""


@triton.jit(do_not_specialize=["units", "n_blocks", "wanted_h"], do_not_specialize_on_alignment=["wanted", "start"])
def _rows_kernel(
    source, target, wanted, start, length, units, n_blocks, wanted_h, source_n, source_h, target_n, target_h,
    W: tl.constexpr, W_PADDED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, ADDS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """One program: tiles of ROWS rows of every so many-th (kv head, block), TILES of them a block.

    Reads a wanted tile once from `source`, which may be another GPU's memory, and writes it to `target`; with ADDS adds
    to what is there, or to 0 with FIRST, when it writes every tile.
    """
    column = tl.arange(0, W_PADDED)
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        pair = unit // TILES
        head = pair // n_blocks
        block = pair - head * n_blocks
        begin = tl.load(start + block)
        taken = tl.load(wanted + head.to(tl.int64) * wanted_h + block) != 0
        offset = (unit - pair * TILES) * ROWS
        rows = tl.load(length + block).to(tl.int32) - offset
        if (begin >= 0) & (rows > 0) & (taken | FIRST):
            place = tl.arange(0, ROWS)
            row = (begin + offset + place).to(tl.int64)[:, None]
            inside = (place < rows)[:, None] & (column < W)[None, :]
            x = tl.load(source + row * source_n + head * source_h + column[None, :], mask=inside & taken, other=0.0)
            at = target + row * target_n + head * target_h + column[None, :]
            if ADDS and not FIRST:
                x += tl.load(at, mask=inside, other=0.0)
            tl.store(at, x, mask=inside)


def launch(
    source: Tensor,
    target: Tensor,
    wanted: Tensor,
    start: Tensor,
    length: Tensor,
    block_size: int,
    adds: bool,
    first: bool,
) -> None:
    """As `rows.copy_wanted`, or with `adds` `rows.add_wanted`."""
    heads, n_blocks = wanted.shape
    width = source.shape[2]
    padded = triton.next_power_of_2(width)
    rows = max(_TILE_BYTES // (padded * source.itemsize), 1)
    tiles = triton.cdiv(block_size, rows)
    units = heads * n_blocks * tiles
    if not units or not target.numel():
        return
    _rows_kernel[(min(PROGRAMS, units),)](
        source, target, wanted, start, length, units, n_blocks, wanted.stride(0), source.stride(0), source.stride(1),
        target.stride(0), target.stride(1), W=width, W_PADDED=padded, ROWS=rows, TILES=tiles, ADDS=adds,
        FIRST=first, num_warps=8,
    )  # fmt: skip
