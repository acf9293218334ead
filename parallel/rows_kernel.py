"""The Triton kernels of `parallel/rows.py`.

`_wanted_kernel` is bound by the link between two GPUs, so it takes a few programs, each with much under way; the others are bound
by memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from .rows import Pairs

PROGRAMS = 64
"""Programs per launch, with 2 MiB in flight in total. Half as many did not saturate NVLink (NV18) beside attention."""
_TILE_BYTES = 32 << 10
"""Bytes that one program of `_wanted_kernel` has in flight."""
WANTED_WARPS, PACK_WARPS = 8, 4
PAIR_PROGRAMS = 1024
"""Most programs of a launch over pairs: some for each multiprocessor, each of which takes many pairs, as most may be absent."""
_PACK_TILE, _SUM_TILE = 8192, 4096
"""Elements per tile of keys or of values: where they are copied, and where they are summed."""


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


@triton.jit(do_not_specialize=["units", "heads", "n_blocks", "at_p", "at_h"], do_not_specialize_on_alignment=["at"])
def _pack_pairs_kernel(
    k, v, packed, at, begin, length, units, heads, n_blocks, at_p, at_h, k_n, k_h, v_n, v_h,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """One program: a grid-stride loop over the tiles of (rank, kv head, home block), ROWS rows per tile and TILES tiles per
    block. Reads each key and value that the message has, and writes them side by side."""
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        pair = unit // TILES
        of_rank = pair // n_blocks
        block = pair - of_rank * n_blocks
        rank = of_rank // heads
        head = (of_rank - rank * heads).to(tl.int64)  # heads may be the outermost dimension of keys and values
        first = tl.load(at + rank.to(tl.int64) * at_p + head * at_h + block)
        place = (unit - pair * TILES) * ROWS + tl.arange(0, ROWS)
        inside = (place < tl.load(length + block)) & (first >= 0)
        here = tl.load(begin + block) + place
        there = packed + (first + place) * (D + DV)
        _copy_row(k + here * k_n + head * k_h, there, inside, D, D_PADDED)
        _copy_row(v + here * v_n + head * v_h, there + D, inside, DV, DV_PADDED)


@triton.jit(do_not_specialize=["units", "ranks", "n_blocks", "at_p", "at_h"], do_not_specialize_on_alignment=["at"])
def _add_pairs_kernel(
    values, k, v, at, begin, length, units, ranks, n_blocks, at_p, at_h, k_n, v_n,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """One program: a grid-stride loop over the tiles of (kv head, home block), ROWS rows per tile and TILES tiles per block. Adds
    what each rank has for the tile, in order of rank, and reads and writes the sums once."""
    column, column_v = tl.arange(0, D_PADDED)[None, :], tl.arange(0, DV_PADDED)[None, :]
    for unit in tl.range(tl.program_id(0), units, tl.num_programs(0)):
        pair = unit // TILES
        head = pair // n_blocks
        block = pair - head * n_blocks
        place = (unit - pair * TILES) * ROWS + tl.arange(0, ROWS)
        here = tl.load(begin + block) + place
        inside = (place < tl.load(length + block))[:, None]
        inside_k, inside_v = inside & (column < D), inside & (column_v < DV)
        at_k = k + here[:, None] * k_n + head * D + column
        at_v = v + here[:, None] * v_n + head * DV + column_v
        sum_k = tl.load(at_k, mask=inside_k, other=0.0)
        sum_v = tl.load(at_v, mask=inside_v, other=0.0)
        of_rank = at + head.to(tl.int64) * at_h + block
        for _ in tl.range(ranks):
            first = tl.load(of_rank)
            of_rank += at_p
            if first >= 0:
                there = values + (first + place)[:, None] * (D + DV)
                sum_k += tl.load(there + column, mask=inside_k, other=0.0)
                sum_v += tl.load(there + D + column_v, mask=inside_v, other=0.0)
        tl.store(at_k, sum_k, mask=inside_k)
        tl.store(at_v, sum_v, mask=inside_v)


def pack_constants(dim: int, dim_v: int, elements: int = _PACK_TILE) -> dict[str, int]:
    """Sizes of the tiles of `_pack_kernel`; or of any with at most `elements` keys, and as many values."""
    padded, padded_v = triton.next_power_of_2(dim), triton.next_power_of_2(dim_v)
    tile = max(1, elements // max(padded, padded_v))
    return {"D": dim, "DV": dim_v, "D_PADDED": padded, "DV_PADDED": padded_v, "ROWS": tile}


def pair_constants(dim: int, dim_v: int, most_rows: int, *, adds: bool) -> dict[str, int]:
    """Sizes of the tiles of `_add_pairs_kernel` or `_pack_pairs_kernel`."""
    tile = pack_constants(dim, dim_v, _SUM_TILE if adds else _PACK_TILE)
    return tile | {"TILES": triton.cdiv(most_rows, tile["ROWS"])}


def wanted_constants(width: int, itemsize: int, most_rows: int) -> dict[str, int]:
    """Sizes of `_wanted_kernel`'s tiles."""
    padded = triton.next_power_of_2(width)
    rows = max(_TILE_BYTES // (padded * itemsize), 1)
    return {"W": width, "W_PADDED": padded, "ROWS": rows, "TILES": triton.cdiv(most_rows, rows)}


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


def pack_pairs(k: Tensor, v: Tensor, pairs: Pairs, packed: Tensor) -> None:
    """As `rows.pack_pairs`, into `packed`."""
    ranks, heads, n_blocks = pairs.at.shape
    constants = pair_constants(k.shape[2], v.shape[2], pairs.most_rows, adds=False)
    units = ranks * heads * n_blocks * constants["TILES"]
    _pack_pairs_kernel[(min(PAIR_PROGRAMS, units),)](
        k, v, packed, pairs.at, pairs.begin, pairs.length, units, heads, n_blocks, *pairs.at.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], **constants, num_warps=PACK_WARPS,
    )  # fmt: skip


def add_pairs(values: Tensor, pairs: Pairs, k: Tensor, v: Tensor) -> None:
    """As `rows.add_pairs`."""
    ranks, heads, n_blocks = pairs.at.shape
    constants = pair_constants(k.shape[2], v.shape[2], pairs.most_rows, adds=True)
    units = heads * n_blocks * constants["TILES"]
    _add_pairs_kernel[(min(PAIR_PROGRAMS, units),)](
        values, k, v, pairs.at, pairs.begin, pairs.length, units, ranks, n_blocks, *pairs.at.stride()[:2],
        k.stride(0), v.stride(0), **constants, num_warps=PACK_WARPS,
    )  # fmt: skip


def launch(
    source: Tensor,
    target: Tensor,
    wanted: Tensor,
    start: Tensor,
    length: Tensor,
    most_rows: int,
    adds: bool,
    first: bool,
) -> None:
    """As `rows.copy_wanted`, or with `adds` `rows.add_wanted`."""
    heads, n_blocks = wanted.shape
    constants = wanted_constants(source.shape[2], source.itemsize, most_rows)
    units = heads * n_blocks * constants["TILES"]
    if not units or not target.numel():
        return
    _wanted_kernel[(min(PROGRAMS, units),)](
        source, target, wanted, start, length, units, n_blocks, wanted.stride(0), source.stride(0), source.stride(1),
        target.stride(0), target.stride(1), **constants, ADDS=adds, FIRST=first, num_warps=WANTED_WARPS,
    )  # fmt: skip
