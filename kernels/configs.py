"""Launch configurations: one frozen dataclass per kernel family, and the functions that choose them.

A configuration depends on head sizes, block size, topk, the number of blocks and the kind of GPU, never on the number of rows:
a (row, block) pair's partial result then has the same bits whichever rows are processed with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb

import triton

from .gpu import LEAST_SHARED, Gpu
from .sizes import SUM_ROWS, cdiv, next_power_of_2, padded
from .types import OWN_TILE

SMALL_BLOCK = 128
"""Largest block whose keys and values one program keeps on chip while rows stream past them."""


@dataclass(frozen=True)
class TileConfig:
    """Block attention in portable Triton, forward and backward.

    Attributes:
        rows: query rows per tile.
        keys: keys per tile.
        num_warps, num_stages: Triton's.
        store: cache modifier of the stores of partial results ("" or ".cs").
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    store: str = ""


@dataclass(frozen=True)
class BackwardConfig:
    """Backward of block attention in portable Triton.

    Attributes:
        dkdv: of the kernel for dK and dV.
        dq: of the kernel for dq; None where one tile of keys holds a block, so that `dkdv` writes dq as well.
    """

    dkdv: TileConfig
    dq: TileConfig | None


@dataclass(frozen=True)
class GluonConfig:
    """Block attention in Gluon on Hopper, forward and backward.

    Attributes:
        rows: query rows per tile.
        keys: keys per tile.
        num_warps: warps per program.
        ahead: tiles whose copies are in flight ahead of the one being computed; 0 where the kernel fixes the number.
        last: start copies after the tile's last product instead of after its first ones.
    """

    rows: int
    keys: int
    num_warps: int
    ahead: int = 0
    last: bool = False


@dataclass(frozen=True)
class RowConfig:
    """Kernels that read rows once and write rows: merge, delta, sum of gradients.

    Attributes:
        rows: rows per tile.
        num_warps, num_stages: Triton's; the stages count where the kernel loops over slots.
    """

    rows: int
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class CentroidConfig:
    """Centroids.

    Attributes:
        keys: keys added per step of a program. The order of the additions depends on it.
        num_warps: Triton's.
    """

    keys: int
    num_warps: int = 4


@dataclass(frozen=True)
class DecodeSelectConfig:
    """Selection for one query per sample.

    Attributes:
        keys: keys that are added at once for a missing centroid.
        heads: q heads that the last program of a kv head selects for at once.
    """

    keys: int
    heads: int


@dataclass(frozen=True)
class DecodeAttendConfig:
    """Attention of one query per sample to its selected blocks.

    Attributes:
        split, splits: most keys per program, and programs per block.
        keys: keys per tile.
        heads, at_once: q heads and parts that the last program of a kv head merges at once.
        num_warps, num_stages: Triton's.
    """

    split: int
    splits: int
    keys: int
    heads: int
    at_once: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GateConfig:
    """The gate.

    Attributes:
        rows: query rows per tile.
        blocks: centroids per tile.
        tiles: tiles that hold all blocks that may be candidates: all but the last one.
        depth: best keys kept per (row, lane).
        retry_depth: the same where rows that it did not prove are tried again; 0: they are not.
        exact_blocks: centroids per tile of the kernel that needs no proof.
        tma: centroids come by descriptor.
        most_registers: of a thread that keeps `depth` keys, not `retry_depth`; None: no limit.
        num_warps, num_stages: Triton's.
    """

    rows: int
    blocks: int
    tiles: int
    depth: int
    retry_depth: int
    exact_blocks: int
    tma: bool
    most_registers: int | None
    num_warps: int
    num_stages: int

    def is_complete(self, depth: int) -> bool:
        """Whether no lane drops a key if it keeps `depth` of them."""
        return depth >= self.tiles


# ---- forward


@lru_cache(maxsize=64)
def stream_rows(dim: int, dim_v: int, block_size: int, gpu: Gpu) -> TileConfig | None:
    """Small blocks: K and V stay on chip, rows stream. None where they do not fit, and `hold_rows` serves instead.

    With 3 stages the next two tiles of rows are in flight while one is computed. With 2 stages the next tile is requested
    only after that, and other programs have to hide the latency.
    """
    dim, dim_v, keys = padded(dim), padded(dim_v), padded(block_size)
    capacity = gpu.shared_memory // 2  # in elements
    if keys > SMALL_BLOCK or max(dim, dim_v) > 128:
        return None

    def held(rows: int, stages: int) -> int:
        return keys * (dim + dim_v) + rows * (stages * dim + dim_v)

    for programs, stages in ((2, 3), (2, 2), (1, 3), (1, 2)):  # two programs per multiprocessor hide each other's waits
        if programs * held(64, stages) <= capacity:
            return TileConfig(rows=64, keys=keys, num_warps=4, num_stages=stages, store=".cs")
    return None


@lru_cache(maxsize=64)
def hold_rows(dim: int, dim_v: int, block_size: int, gpu: Gpu) -> TileConfig:
    """Rows stay on chip, K and V stream: blocks of more than 128 keys, and smaller ones that do not fit `stream_rows`."""
    config = own_blocks(dim, dim_v, gpu)
    if block_size % config.keys == 0:
        return config
    return _masked(dim, dim_v, gpu)  # the wide tile would spill with masks


@lru_cache(maxsize=64)
def own_blocks(dim: int, dim_v: int, gpu: Gpu) -> TileConfig:
    """Consecutive rows stay on chip, the keys of their own block stream; only tiles on the diagonal are masked."""
    if gpu.is_hopper_or_newer and max(padded(dim), padded(dim_v)) <= 128 and gpu.shared_memory > LEAST_SHARED:
        # Two programs per multiprocessor hide each other's waits. 8 warps, 3 stages or 128 keys leave space for one only.
        return TileConfig(rows=128, keys=64, num_warps=4, num_stages=2)
    return _masked(dim, dim_v, gpu)


def _masked(dim: int, dim_v: int, gpu: Gpu) -> TileConfig:
    """Rows stay on chip, K and V stream, with registers left for masks on every tile."""
    wide = max(padded(dim), padded(dim_v)) > 128
    if gpu.shared_memory <= LEAST_SHARED:
        return TileConfig(rows=64, keys=32, num_warps=8 if wide else 4, num_stages=2)
    if wide and not gpu.is_hopper_or_newer:
        return TileConfig(rows=64, keys=32, num_warps=8, num_stages=2)
    if wide:
        return TileConfig(rows=64, keys=64, num_warps=8, num_stages=2)
    return TileConfig(rows=64, keys=64, num_warps=4, num_stages=2)


SM90_STREAM_ROWS = GluonConfig(rows=64, keys=0, num_warps=4)
"""Rows stream past a block of at most 128 keys, all of them in one tile. One warpgroup: two programs per multiprocessor."""
SM90_HOLD_ROWS = GluonConfig(rows=OWN_TILE, keys=64, num_warps=4)
"""Rows stay on chip, the keys of a larger block stream; own rows come in tiles of `OWN_TILE`. One warpgroup, as above."""


@lru_cache(maxsize=64)
def merge(dim: int) -> RowConfig:
    """Merge of partials: bound by memory. One warp, which waits for no other, and 1024 elements per slot (more if D > 256)."""
    return RowConfig(rows=max(4, 1024 // padded(dim)), num_warps=1, num_stages=3)


@lru_cache(maxsize=64)
def merge_dq(dim: int) -> RowConfig:
    """Merge of partial dq: as fast with any size, since it computes no weights."""
    return RowConfig(rows=max(4, 2048 // padded(dim)), num_warps=4, num_stages=3)


@lru_cache(maxsize=64)
def decode_select(dim: int, block_size: int, itemsize: int, group: int, most: int) -> DecodeSelectConfig:
    """Selection for `group` q heads per kv head among at most `most` blocks, a power of two: 4096 order keys at once."""
    heads = max(min(next_power_of_2(group), 4096 // most), 1)
    return DecodeSelectConfig(centroids(dim, block_size, itemsize).keys, heads)


@lru_cache(maxsize=64)
def decode_attend(dim: int, dim_v: int, block_size: int, group: int) -> DecodeAttendConfig:
    """Attention of one query per sample, at most four programs per block of 1024 keys or more.

    At (512, 8) with 32 q heads a sample makes 512 programs. At D = 128 one uses 128 registers per thread and 40 KiB of shared
    memory, so that all of them run at once on 132 multiprocessors: most of a program's time is latency before its first key.
    """
    split = max(min(256, padded(block_size)), padded(block_size) // 4)
    heads = min(next_power_of_2(group), max(4096 // padded(dim_v), 1))
    return DecodeAttendConfig(
        split=split,
        splits=cdiv(block_size, split),
        keys=min(32, split),
        heads=heads,
        at_once=max(min(4096 // (heads * padded(dim_v)), 8), 1),
        num_warps=4,
        num_stages=3,
    )


# ---- backward


@lru_cache(maxsize=64)
def backward(dim: int, dim_v: int, block_size: int, gpu: Gpu) -> BackwardConfig:
    """Portable backward. Larger tiles of rows spill; tests compile each of these."""
    wide = max(next_power_of_2(dim), next_power_of_2(dim_v))
    block = padded(block_size)

    def config(rows: int, keys: int, warps: int, stages: int, fused: bool, dq: tuple[int, int, int, int]):
        return BackwardConfig(TileConfig(rows, keys, warps, stages), None if fused else TileConfig(*dq))

    if gpu.shared_memory < 160 << 10:  # consumer GPUs: sm_86, sm_89, sm_120
        keys = min(block, 64 if wide <= 128 else 32)
        return config(32, keys, 4, 1, block <= keys, (64 if wide <= 128 else 32, min(block, 32), 4, 1))
    if gpu.shared_memory < 200 << 10:  # sm_80: sums and products share the registers
        keys, fused = min(block, 64), block <= 64 and wide <= 128
        rows = 16 if wide > 128 or (fused and wide > 64) else 32 if fused else 64
        dq = (128 if wide <= 128 else 64, min(block, 32), 8, 2)
        return config(rows, keys, 8 if keys >= 64 else 4, 2, fused, dq)
    if wide <= 128:
        keys = min(block, 128)
        rows = 32 if wide == 128 else 64
        return config(rows, keys, 8 if keys >= 64 else 4, 2, block <= keys, (128, min(block, 64), 8, 2))
    keys = min(block, 64)
    rows = 64 if triton.__version__.startswith(("3.6.", "3.7.")) else 32  # 3.8 spills with 64
    return config(32, keys, 8 if keys >= 64 else 4, 2, block <= keys, (rows, min(block, 32), 8, 2))


@lru_cache(maxsize=64)
def sm90_dkdv(dim: int, block_size: int) -> GluonConfig:
    """dK and dV on Hopper, and dq where one tile of keys holds a block.

    Copies last: 4 % faster with blocks of 4096, 4 % slower with blocks of 512.
    """
    keys = 128 if block_size % 128 == 0 else 64
    # One warpgroup that holds 64 x 128 sums has registers for 32 rows at a time; two that share 128 keys, for 64.
    rows = 32 if keys == 64 and dim == 128 else 64
    return GluonConfig(rows, keys, num_warps=keys // 16, ahead=2, last=block_size > 1024)


SM90_DKDV_DQ_TILES = GluonConfig(rows=SUM_ROWS, keys=128, num_warps=8, ahead=1)
"""dK, dV and sums of dq on Hopper, for blocks of several tiles of keys."""
SM90_DQ = GluonConfig(rows=128, keys=64, num_warps=8)
"""Partial dq on Hopper: rows stay on chip, keys stream."""
SM90_DQ_OF_DS = GluonConfig(rows=128, keys=64, num_warps=4, ahead=1)
"""The same from kept gradients of scores. Bound by memory: three programs per multiprocessor."""
DELTA = RowConfig(rows=32)


@lru_cache(maxsize=64)
def sum_gradients(dim: int, dim_v: int) -> RowConfig:
    """Final sum of dK and dV: a tile of 4096 elements of either."""
    return RowConfig(rows=max(1, 4096 // max(padded(dim), padded(dim_v))))


# ---- centroids and gate

CENTROID_BYTES = 8192
"""Bytes of keys added per step of a program: 8 KiB keep four 16-byte loads per thread in flight, of 128 threads."""


@lru_cache(maxsize=64)
def centroids(dim: int, block_size: int, itemsize: int) -> CentroidConfig:
    """A step of `CENTROID_BYTES`, no longer than a block."""
    return CentroidConfig(max(min(CENTROID_BYTES // (next_power_of_2(dim) * itemsize), next_power_of_2(block_size)), 1))


PLACED_ENTRIES = 1024
"""Entries of a caller's selection per program that brings it into order."""

GATE_ROWS = 64
"""Query rows per program: the smallest tile of Hopper's matrix instruction."""
GATE_BLOCKS = 32
"""Centroids per tile, and lanes: with 64, lists and scores of two programs would take all registers of a multiprocessor."""
LONG_BLOCKS = 2048
"""With more blocks than this, a third stage of copies pays."""
RETRY_DEPTH = 4
"""The longest lists that `gate_kernel` has."""
REDONE_ROWS = 0.035
"""Largest share of rows that a list of this depth may fail to prove, for independent scores."""


@lru_cache(maxsize=64)
def gate(dim: int, n_blocks: int, topk: int, gpu: Gpu) -> GateConfig:
    """The gate for heads of `dim` and `n_blocks` blocks in all.

    The depth bounds how many rows are not proved, since one lane has `depth` of their `topk - 1` best keys: with independent
    scores `comb(topk - 1, depth) / blocks^(depth - 1)`, and, as blocks of a tile are exchanged, about as many where preferred
    blocks are regularly spaced. With as many keys as there are tiles no lane drops one.
    """
    dim_padded, blocks = padded(dim), GATE_BLOCKS
    depth = 1
    while depth < RETRY_DEPTH and comb(topk - 1, depth) > REDONE_ROWS * blocks ** (depth - 1):
        depth += 1
    tiles = cdiv(n_blocks - 1, blocks)
    # As many keys as tiles, or one more than are taken, prove every row. Before Hopper the longest lists would spill.
    retried = depth < min(RETRY_DEPTH, tiles, topk) and gpu.is_hopper_or_newer
    small = dim_padded <= 128
    return GateConfig(
        rows=GATE_ROWS,
        blocks=blocks,
        tiles=tiles,
        depth=min(depth, tiles),
        retry_depth=RETRY_DEPTH if retried else 0,
        exact_blocks=64 if small else blocks,
        tma=gpu.is_hopper_or_newer,
        # Four programs per multiprocessor. With more keys taken or wider heads it would spill.
        most_registers=128 if gpu.is_hopper_or_newer and small and depth <= 3 else None,
        num_warps=4 if small or gpu.is_hopper_or_newer else 8,  # with 4 that would spill
        num_stages=3 if n_blocks > LONG_BLOCKS and dim_padded == 128 else 2,
    )
