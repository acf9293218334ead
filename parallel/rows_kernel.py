"""The Triton kernels of `parallel/rows.py`.

`_wanted_kernel` is bound by the link between two GPUs, so it takes a few programs, each with much under way; `_pack_kernel` is
bound by memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 64
"""Programs per launch, with 2 MiB in flight in total. Half as many did not saturate NVLink (NV18) beside attention."""
_TILE_BYTES = 32 << 10
"""Bytes that one program of `_wanted_kernel` has in flight."""
WANTED_WARPS, PACK_WARPS = 8, 4
_PACK_TILE = 8192
"""Elements per tile of keys or values."""


@triton.jit(do_not_specialize=["units", "n_blocks", "wanted_h"], do_not_specialize_on_alignment=["wanted", "start"])
def _wanted_kernel(
    source, target, wanted, start, length, units, n_blocks, wanted_h, source_n, source_h, target_n, target_h,
    W: tl.constexpr, W_PADDED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, ADDS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """One program: a grid-stride loop over the tiles of (kv head, block) pairs, ROWS rows per tile and TILES tiles per block.

    Reads each wanted tile once from `source`, which may be another GPU's memory, and writes it to `target`. With ADDS it adds to
    `target`. With ADDS and FIRST it adds to 0 and writes every tile, wanted or not.
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


@triton.jit
def _copy_row(source_at, packed_at, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Copy rows of WIDTH elements, given the addresses of their first elements."""
    column = tl.arange(0, PADDED)[None, :]
    mask = inside[:, None] & (column < WIDTH)
    tl.store(packed_at[:, None] + column, tl.load(source_at[:, None] + column, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _pack_kernel(
    k, v, packed, rows, heads, k_n, k_h, v_n, v_h, packed_n, packed_h,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS (token, head) pairs. Reads each key and value once and writes them side by side."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    head = row - token * heads
    inside = row < rows
    at = packed + packed_n * token + packed_h * head
    _copy_row(k + k_n * token + k_h * head, at, inside, D, D_PADDED)
    _copy_row(v + v_n * token + v_h * head, at + D, inside, DV, DV_PADDED)


def pack_constants(dim: int, dim_v: int) -> dict[str, int]:
    """Sizes of `_pack_kernel`'s tiles."""
    padded, padded_v = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    tile = max(1, _PACK_TILE // max(padded, padded_v))
    return {"D": dim, "DV": dim_v, "D_PADDED": padded, "DV_PADDED": padded_v, "ROWS": tile}


def wanted_constants(width: int, itemsize: int, block_size: int) -> dict[str, int]:
    """Sizes of `_wanted_kernel`'s tiles."""
    padded = triton.next_power_of_2(width)
    rows = max(_TILE_BYTES // (padded * itemsize), 1)
    return {"W": width, "W_PADDED": padded, "ROWS": rows, "TILES": triton.cdiv(block_size, rows)}


def pack(k: Tensor, v: Tensor, packed: Tensor) -> None:
    """As `rows.pack`."""
    tokens, heads, dim = k.shape
    rows, dim_v = tokens * heads, v.shape[2]
    if rows == 0:
        return
    constants = pack_constants(dim, dim_v)
    _pack_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
        k, v, packed, rows, heads, *k.stride()[:2], *v.stride()[:2], *packed.stride()[:2], **constants,
        num_warps=PACK_WARPS,
    )  # fmt: skip


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
    constants = wanted_constants(source.shape[2], source.itemsize, block_size)
    units = heads * n_blocks * constants["TILES"]
    if not units or not target.numel():
        return
    _wanted_kernel[(min(PROGRAMS, units),)](
        source, target, wanted, start, length, units, n_blocks, wanted.stride(0), source.stride(0), source.stride(1),
        target.stride(0), target.stride(1), **constants, ADDS=adds, FIRST=first, num_warps=WANTED_WARPS,
    )  # fmt: skip
