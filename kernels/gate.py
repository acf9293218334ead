"""The gate: scores and top-k fused, exact, and never a `tokens x blocks` tensor.

Order of scores: no candidate < -inf < ... < -0 = +0 < ... < +inf < NaN; of equal scores the later block is greater.

Rows whose candidates are all selected are not scored. For the others `gate_kernel` keeps a few best scores per lane and proves
for nearly every row that they contain the selection. Rows without a proof are listed on the device and computed again: first by
`gate_kernel` with longer lists where that may help, and what is left by `gate_exact.py`. All compute the same products in the
same order, so a row's result does not depend on which of them made it. The host reads nothing.

`counts` and `unproved` hold, for each pass of `gate_kernel` and each q head, how many rows have no proof, and which. `counts` is
int32 `[2 * Hq + Hkv]`: after those numbers come, for each kv head, the bits of the largest squared norm of a centroid.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .descriptors import tile_descriptor
from .gate_exact import gate_exact_kernel, load_tile, select_sorted, store_selection
from .gpu import gpu_of
from .launch import launch_kernel
from .sizes import cdiv, next_power_of_2, padded
from .types import QueryRows, selection_dtype

FAST_TOPK = 16
"""Largest topk of `gate_kernel`, whose rounds are unrolled."""
LIST_TOPK = 64
"""Largest topk of `gate_exact_kernel`, which keeps a list in registers. Beyond it scores are sorted in bounded portions."""
AGAIN_PROGRAMS_PER_MULTIPROCESSOR = 8
"""Of the kernels that compute unproved rows again, and of `gate_exact_kernel` where it computes all."""

_EMPTY = tl.constexpr(0)
"""Key of an empty list entry, before its lane is added. Keys of scores are greater, see `gate_kernel`."""
_GONE = tl.constexpr(-1)
"""Key behind the last one of a list, from which others were taken."""
_MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23: the sum with a number of less than 2^22 is rounded to an integer, which its low bits hold."""
_MAGIC_BITS = tl.constexpr(0x4B400000)
"""The bits of _MAGIC."""


@triton.jit
def _key(score, scale, unit, offset, ASM: tl.constexpr):
    """int32 `(round(score * scale) + grid) * unit + label`, where `offset` is the label and `(grid - _MAGIC_BITS) * unit`.

    Two fused multiply-adds, which run beside the minima and maxima on other units. The interpreter has no assembler.
    """
    bits = tl.fma(score, scale, _MAGIC).to(tl.int32, bitcast=True)
    if ASM:
        return tl.inline_asm_elementwise(
            "mad.lo.s32 $0, $1, $2, $3;", "=r,r,r,r", [bits, unit, offset], tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.add(tl.mul(bits, unit, sanitize_overflow=False), offset, sanitize_overflow=False)


@triton.jit
def _block_of(tile, lane, BLOCKS: tl.constexpr):
    """The block in a lane of a tile of BLOCKS: the tile's blocks, exchanged by a hash of its number.

    Blocks at any fixed distance should share a lane as rarely as random blocks. Multiples of the tile's number fail at some
    distances (the golden ratio's at 31 and 33), multiples of its square at hardly any. This factor is one of the best of 4500
    that were tried.
    """
    tl.static_assert(BLOCKS <= 64)  # bits of the hash
    square = tl.mul(tile, tile, sanitize_overflow=False)
    swizzle = (tl.mul(square, 0x063DB153, sanitize_overflow=False) >> 26) & (BLOCKS - 1)
    return tile * BLOCKS + (lane ^ swizzle)


@triton.jit
def _load_pair(arranged, kv_head, first, arranged_rows, D_PADDED: tl.constexpr, PAIR: tl.constexpr, TMA: tl.constexpr):
    """Two tiles of a kv head's centroids as `arrange_kernel` arranged them, from row `first` on, `[PAIR, D_PADDED]`."""
    if TMA:
        return tl.reshape(arranged.load([kv_head, first, 0]), [PAIR, D_PADDED])
    else:
        row = kv_head.to(tl.int64) * arranged_rows + first + tl.arange(0, PAIR)
        return tl.load(arranged + row[:, None] * D_PADDED + tl.arange(0, D_PADDED)[None, :])


@triton.jit
def _keys_of_pair(q_tile, c_tile, scale, unit, offset, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ASM: tl.constexpr):
    """Keys of two tiles of BLOCKS centroids, `[ROWS, BLOCKS]` each, from one product."""
    score = tl.dot(q_tile, tl.trans(c_tile))
    a, b = tl.split(tl.permute(tl.reshape(score, [ROWS, 2, BLOCKS]), (0, 2, 1)))
    return _key(a, scale, unit, offset, ASM), _key(b, scale, unit, offset + BLOCKS, ASM)


@triton.jit
def _is_candidate(block, first, own):
    return (block[None, :] >= first[:, None]) & (block[None, :] < own[:, None])


@triton.jit
def _greatest(a, b, c, ASM: tl.constexpr):
    """The greatest of three, one instruction on Hopper."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .s32 t; max.s32 t, $1, $2; max.s32 $0, t, $3; }",
            "=r,r,r,r",
            [a, b, c],
            tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def _insert_two(m1, m2, m3, m4, a, b, DEPTH: tl.constexpr, ASM: tl.constexpr):
    """Insert two keys into each lane's descending list of DEPTH keys: into a list of three in eight instructions, not ten."""
    high = tl.maximum(a, b)
    low = tl.minimum(a, b)
    if DEPTH >= 4:
        m4 = _greatest(tl.minimum(m3, high), tl.minimum(m2, low), m4, ASM)
    if DEPTH >= 3:
        m3 = _greatest(tl.minimum(m2, high), tl.minimum(m1, low), m3, ASM)
    if DEPTH >= 2:
        m2 = _greatest(tl.minimum(m1, high), low, m2, ASM)
    m1 = tl.maximum(m1, high)
    return m1, m2, m3, m4


@triton.jit
def _kth_of_two(a, b, K: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr):
    """The key at K of two descending lists together. Of the K + 1 greatest keys, FIRST to LAST can be keys of `a`.

    The least of i keys of `a` and K + 1 - i of `b` is at most that key, and is that key for at least one i.
    """
    greatest = b[K] if FIRST == 0 else tl.minimum(a[FIRST - 1], b[K - FIRST])
    for i in tl.static_range(FIRST + 1, LAST + 1):
        greatest = tl.maximum(greatest, a[K] if i == K + 1 else tl.minimum(a[i - 1], b[K - i]))
    return greatest


@triton.jit
def _merge_lanes(
    lists, LENGTH: tl.constexpr, KEPT: tl.constexpr, NEIGHBOURS: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """The KEPT greatest of two lanes' descending lists of LENGTH each, descending: a tuple of `[ROWS, LANES // 2]`.

    Lanes 2i and 2i + 1 (NEIGHBOURS), or i and i + LANES // 2. In the layout of products a thread has them all, so nothing moves.
    """
    a = lists[:0]
    b = lists[:0]
    for i in tl.static_range(LENGTH):
        if NEIGHBOURS:
            x, y = tl.split(tl.reshape(lists[i], [ROWS, LANES // 2, 2]))
        else:
            x, y = tl.split(tl.permute(tl.reshape(lists[i], [ROWS, 2, LANES // 2]), (0, 2, 1)))
        a += (x,)
        b += (y,)
    merged = lists[:0]
    for k in tl.static_range(KEPT):
        merged += (_kth_of_two(a, b, k, max(k + 1 - LENGTH, 0), min(k + 1, LENGTH)),)
    return merged


@triton.jit
def _without_first(lists, hit, LENGTH: tl.constexpr, KEPT: tl.constexpr):
    """The first KEPT keys of lists of LENGTH, after their very first one has left where `hit`."""
    moved = lists[:0]
    for i in tl.static_range(KEPT):
        moved += (tl.where(hit, lists[i + 1] if i + 1 < LENGTH else _GONE, lists[i]),)
    return moved


@triton.jit(do_not_specialize=["n_blocks", "arranged_rows", "q_heads"])
def arrange_kernel(
    centroids, arranged, counts, n_blocks, c_block, c_head, arranged_rows, q_heads, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """One program: PAIR centroids of a kv head into `arranged [Hkv, n, D_PADDED]`, and their largest squared norm into `counts`.

    A row is a tile's lane and holds the block that is there. Reads and writes 2 * D bytes per centroid; zeros past the last one.
    Bits of numbers that are not negative have the numbers' order, and NaN above infinity.
    """
    row = tl.program_id(0) * PAIR + tl.arange(0, PAIR)
    head = tl.program_id(1)
    block = _block_of(row // BLOCKS, row % BLOCKS, BLOCKS)
    tile = load_tile(centroids + head.to(tl.int64) * c_head, block, c_block, block < n_blocks, D, D_PADDED)
    place = head.to(tl.int64) * arranged_rows + row
    tl.store(arranged + place[:, None] * D_PADDED + tl.arange(0, D_PADDED)[None, :], tile)
    wide = tile.to(tl.float32)
    bits = tl.sum(wide * wide, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(counts + 2 * q_heads + head, tl.max(bits, 0), sem="relaxed")


@triton.jit
def _select_tile(
    q, arranged, own_block, first_block, selected, counts, unproved, row, valid, head,
    tokens, q_heads, group, q_token, q_head, arranged_rows,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, DEPTH: tl.constexpr, COMPLETE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    LISTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    own = tl.load(own_block + row, mask=valid, other=0)
    first = tl.load(first_block + row, mask=valid, other=0)
    slot = tl.arange(0, SLOTS)
    scored = own - first >= TOPK
    whole = own[:, None] + (slot - (SLOTS - 1))[None, :]
    whole = tl.where(whole >= first[:, None], whole, -1)
    if not LISTED:
        if tl.max(scored.to(tl.int32), 0) == 0:
            store_selection(selected, whole, row, head, tokens, valid, TOPK, SLOTS)
            return

    BIG: tl.constexpr = 1 << 30
    PAIR: tl.constexpr = 2 * BLOCKS
    low = tl.min(tl.where(scored, first, BIG), 0) // PAIR
    high = tl.cdiv(tl.max(tl.where(scored, own, 0), 0), PAIR)
    # Pairs of tiles of which every block is a candidate of every scored row.
    full = tl.cdiv(tl.max(tl.where(scored, first, 0), 0), PAIR)
    full_end = tl.maximum(tl.min(tl.where(scored, own, BIG), 0) // PAIR, full)
    # The bit length of the number of tiles, from a float's exponent.
    label_bits = ((2 * (high - low)).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    unit = BLOCKS << label_bits
    grid = tl.minimum(1 << 22, (1 << 30) // unit)
    before = 2 * low - 1  # tiles are counted from 1
    offset = tl.mul(grid - _MAGIC_BITS, unit, sanitize_overflow=False)
    offset = tl.sub(offset, before * BLOCKS, sanitize_overflow=False)

    q_tile = load_tile(q + head.to(tl.int64) * q_head, row, q_token, valid, D, D_PADDED)
    kv_head = head // group
    # The square of a bound of a row's scores, by Cauchy and Schwarz; 1 % for rounding. Products of rows with themselves come in
    # the layout of scores.
    line = tl.arange(0, ROWS)
    squares = tl.where(line[:, None] == line[None, :], tl.dot(q_tile, tl.trans(q_tile)), 0.0)
    square = tl.sum(squares, 1)
    largest = tl.load(counts + 2 * q_heads + kv_head).to(tl.float32, bitcast=True)
    bound = 1.02 * square * largest
    # 0 where there is no grid: then the row is computed again. Squares of small numbers lose bits, and the smallest are 0.
    has_grid = (bound < float("inf")) & (bound > 1e-30) & (tl.minimum(square, largest) > 1e-30)
    scale = tl.where(has_grid, (grid - 2).to(tl.float32) * tl.rsqrt(bound), 0.0)[:, None]
    factor = tl.where(valid, unit, 0)[:, None]  # in a register: with two uniform operands every key would take a copy
    lane = tl.arange(0, BLOCKS)
    m1 = tl.full([ROWS, BLOCKS], _EMPTY, tl.int32)
    m2 = tl.full([ROWS, BLOCKS], _EMPTY, tl.int32)
    m3 = tl.full([ROWS, BLOCKS], _EMPTY, tl.int32)
    m4 = tl.full([ROWS, BLOCKS], _EMPTY, tl.int32)
    for pair in tl.range(full, full_end, num_stages=STAGES):
        c_tile = _load_pair(arranged, kv_head, pair * PAIR, arranged_rows, D_PADDED, PAIR, TMA)
        a, b = _keys_of_pair(q_tile, c_tile, scale, factor, offset + pair * PAIR, ROWS, BLOCKS, ASM)
        m1, m2, m3, m4 = _insert_two(m1, m2, m3, m4, a, b, DEPTH, ASM)
    head_pairs = tl.minimum(full, high) - low
    for number in tl.range(0, high - low - (full_end - full), num_stages=1):
        pair = low + number
        pair += tl.where(number < head_pairs, 0, full_end - full)
        c_tile = _load_pair(arranged, kv_head, pair * PAIR, arranged_rows, D_PADDED, PAIR, TMA)
        a, b = _keys_of_pair(q_tile, c_tile, scale, factor, offset + pair * PAIR, ROWS, BLOCKS, ASM)
        a = tl.where(_is_candidate(_block_of(2 * pair, lane, BLOCKS), first, own), a, _EMPTY)
        b = tl.where(_is_candidate(_block_of(2 * pair + 1, lane, BLOCKS), first, own), b, _EMPTY)
        m1, m2, m3, m4 = _insert_two(m1, m2, m3, m4, a, b, DEPTH, ASM)

    m1 |= lane[None, :]
    m2 |= lane[None, :]
    m3 |= lane[None, :]
    m4 |= lane[None, :]
    # Without COMPLETE a lane's last key only bounds those that it dropped, and is not taken.
    tl.static_assert(COMPLETE or DEPTH > 1)
    USED: tl.constexpr = DEPTH if COMPLETE else DEPTH - 1
    keys = (m1, m2, m3, m4)
    dropped = tl.max(keys[DEPTH - 1], 1)
    lists = _merge_lanes(keys, USED, min(2 * USED, TOPK), True, ROWS, BLOCKS)
    LENGTH: tl.constexpr = min(4 * USED, TOPK)
    lists = _merge_lanes(lists, min(2 * USED, TOPK), LENGTH, False, ROWS, BLOCKS // 2)
    chosen = tl.zeros([ROWS, SLOTS], tl.int32)
    for taken in tl.static_range(TOPK - 1):
        best = tl.max(lists[0], 1)
        chosen = tl.where((slot == SLOTS - 2 - taken)[None, :], best[:, None], chosen)
        lists = _without_first(
            lists, lists[0] == best[:, None], min(LENGTH, TOPK - taken), min(LENGTH, TOPK - 1 - taken)
        )
    left = tl.max(lists[0], 1)
    if not COMPLETE:
        left = tl.maximum(left, dropped)
    doubtful = (left | (unit - 1)) >= (best | (unit - 1))  # `best` is the last one taken
    again = scored & ((tl.max(scale, 1) == 0.0) | doubtful)  # `scale` is here already, in this layout
    chosen &= unit - 1
    chosen = _block_of(before + chosen // BLOCKS, chosen % BLOCKS, BLOCKS)
    chosen = tl.where((slot >= SLOTS - TOPK)[None, :], chosen, -1)
    chosen = tl.where((slot == SLOTS - 1)[None, :], own[:, None], chosen)
    selection = tl.where(scored[:, None], tl.sort(chosen), whole)
    store_selection(selected, selection, row, head, tokens, valid, TOPK, SLOTS)
    # The order of the unproved rows varies from run to run; their results do not depend on it.
    again_int = again.to(tl.int32)
    rows_again = tl.sum(again_int, 0)
    if rows_again > 0:
        entry = head + q_heads if LISTED else head
        begin = tl.atomic_add(counts + entry, rows_again)
        index = begin + tl.cumsum(again_int, 0) - again_int
        tl.store(unproved + entry.to(tl.int64) * tokens + index, row, mask=again)


@triton.jit(
    do_not_specialize=["tokens", "q_heads", "group", "arranged_rows"],
    do_not_specialize_on_alignment=["own_block", "first_block"],
)
def gate_kernel(
    q, arranged, own_block, first_block, selected, counts, unproved,
    tokens, q_heads, group, q_token, q_head, arranged_rows,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, DEPTH: tl.constexpr, COMPLETE: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
    LISTED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: the selection of ROWS rows of one q head; with LISTED, of some tiles of ROWS unproved rows.

    Reads 2 * D + 8 bytes per row once, and 2 * D bytes per centroid from the rows' first to their last candidate (from L2: all
    programs share them), in whole pairs of tiles; writes TOPK block numbers per row, and the numbers of rows without a proof.

    A block's lane is its index in its tile of BLOCKS, exchanged per tile: otherwise preferred blocks at regular distances would
    share few lanes. Each (row, lane) keeps its DEPTH best keys in order; an insertion is minima and maxima of full tiles.
    A key is the score, rounded to a grid, with the tile's number, counted from 1, and the lane in the low bits, in no more bits
    than this program needs. The grid divides the range that |q| and the largest norm of a centroid leave to scores, so a key is
    positive. At the end the lists of four lanes that one thread holds are merged, without each lane's last key, and the best key
    of a row is taken TOPK - 1 times. That is the selection unless
    - a lane's last key is not below the last key taken: then the lane may have dropped others. With COMPLETE no lane dropped a
      key, since there are at most DEPTH tiles of candidates, and the last keys are merged too,
    - the last key taken and the best key left are one number of the grid, or
    - there is no grid, since the range of scores is not finite, or since squares are too small to bound it. A centroid that is
      not finite does this to all rows of its kv head.
    """
    program = tl.program_id(0)
    head = program % q_heads
    if LISTED:
        todo = tl.load(counts + head)
        row_tiles = tl.cdiv(todo, ROWS)
        for tile in tl.range(program // q_heads, row_tiles, tl.num_programs(0) // q_heads):
            index = (row_tiles - 1 - tile) * ROWS + tl.arange(0, ROWS)
            valid = index < todo
            row = tl.load(unproved + head.to(tl.int64) * tokens + index, mask=valid, other=0)
            _select_tile(
                q, arranged, own_block, first_block, selected, counts, unproved, row, valid, head,
                tokens, q_heads, group, q_token, q_head, arranged_rows,
                TOPK, SLOTS, D, D_PADDED, ROWS, BLOCKS, DEPTH, COMPLETE, ASM, STAGES, LISTED, TMA,
            )  # fmt: skip
    else:
        # Later rows usually have more candidates: the longest programs start first. Heads share rows of q in DRAM.
        tile = tl.num_programs(0) // q_heads - 1 - program // q_heads
        row = tile * ROWS + tl.arange(0, ROWS)
        _select_tile(
            q, arranged, own_block, first_block, selected, counts, unproved, row, row < tokens, head,
            tokens, q_heads, group, q_token, q_head, arranged_rows,
            TOPK, SLOTS, D, D_PADDED, ROWS, BLOCKS, DEPTH, COMPLETE, ASM, STAGES, LISTED, TMA,
        )  # fmt: skip


def _select_whole(rows: QueryRows, q_heads: int, topk: int, dtype: torch.dtype) -> Tensor:
    """The selection where every row's candidates are all selected."""
    number = rows.block[:, None] + torch.arange(1 - topk, 1, dtype=torch.int32, device=rows.block.device)
    number = torch.where(number >= rows.first_block[:, None], number, -1).to(dtype)
    return number.expand(q_heads, -1, -1).contiguous()


def select_blocks(q: Tensor, *, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
    """See `backend.Backend.select_blocks`. Scores are fp32; rows may come in any order."""
    tokens, q_heads, dim = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    if tokens * q_heads == 0 or topk == 1 or topk >= n_blocks:
        return _select_whole(rows, q_heads, topk, selection_dtype(n_blocks))
    out = torch.empty(q_heads, tokens, topk, dtype=selection_dtype(n_blocks), device=q.device)
    gpu = gpu_of(q.device)
    config = configs.gate(dim, n_blocks, topk, gpu)
    if topk > LIST_TOPK:
        select_sorted(q, centroids, rows, topk, config, out)
        return out
    fast = topk <= FAST_TOPK
    counts = torch.zeros(2 * q_heads + kv_heads if fast else 0, dtype=torch.int32, device=q.device)
    first_list = q_heads if config.retry_depth else 0  # of `gate_exact_kernel`
    unproved = torch.empty(first_list + q_heads, tokens if fast else 0, dtype=torch.int32, device=q.device)
    per_row = (rows.block, rows.first_block, out, counts, unproved)
    sizes = (tokens, q_heads, q_heads // kv_heads, q.stride(0), q.stride(1))
    width = {"D": dim, "D_PADDED": padded(dim)}
    constants = {"TOPK": topk, "SLOTS": next_power_of_2(topk), **width, "ROWS": config.rows}
    row_tiles = cdiv(tokens, config.rows)
    again_programs = min(row_tiles, cdiv(AGAIN_PROGRAMS_PER_MULTIPROCESSOR * gpu.multiprocessors, q_heads)) * q_heads
    if fast:
        pair = 2 * config.blocks
        arranged_rows = cdiv(n_blocks, pair) * pair
        shape = (arranged_rows, kv_heads, padded(dim))
        arranged = torch.empty_strided(shape, (shape[2], arranged_rows * shape[2], 1), dtype=q.dtype, device=q.device)
        launch_kernel(arrange_kernel, (arranged_rows // pair, kv_heads),
            centroids, arranged, counts, n_blocks, centroids.stride(0), centroids.stride(1), arranged_rows, q_heads, **width,
            BLOCKS=config.blocks, PAIR=pair, num_warps=4,
        )  # fmt: skip
        proving = constants | {
            "BLOCKS": config.blocks, "ASM": q.is_cuda, "STAGES": config.num_stages, "TMA": config.tma,
            "num_warps": config.num_warps,
        }  # fmt: skip
        tiles = tile_descriptor(arranged, pair) if config.tma else arranged
        launch_kernel(gate_kernel, (row_tiles * q_heads,),
            q, tiles, *per_row, *sizes, arranged_rows, **proving, DEPTH=config.depth, COMPLETE=config.is_complete(config.depth),
            LISTED=False, maxnreg=config.most_registers,
        )  # fmt: skip
        if config.retry_depth:
            launch_kernel(gate_kernel, (again_programs,),
                q, tiles, *per_row, *sizes, arranged_rows, **proving, DEPTH=config.retry_depth,
                COMPLETE=config.is_complete(config.retry_depth), LISTED=True, maxnreg=None,
            )  # fmt: skip
    launch_kernel(gate_exact_kernel, (again_programs,),
        q, centroids, *per_row, *sizes, centroids.stride(0), centroids.stride(1), first_list, **constants,
        BLOCKS=config.exact_blocks, LISTED=fast, num_warps=config.num_warps,
    )  # fmt: skip
    return out
