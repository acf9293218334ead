"""Launch configurations of the forward kernels.

They depend on head sizes, block size and the kind of device, never on the number of rows: a (row, block) pair's partial
result then has the same bits in whatever company its row is computed. `scripts/bench_kernels.py --sweep` tries others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .sizes import next_power_of_2

SMALL_BLOCK = 128
"""Largest block whose keys and values one program holds whole."""

_OPT_IN_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
_LEAST_KIB = 99  # 8.6, 8.9, 12.0, and whatever is not listed


@dataclass(frozen=True)
class Launch:
    """Tile sizes and Triton options of one kernel.

    Attributes:
        rows: query rows a tile.
        keys: keys a tile.
        num_warps, num_stages: Triton's.
        store: cache modifier of the stores of partial results ("" or ".cs").
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int
    store: str = ""


def padded(size: int) -> int:
    """The power of two, at least 16, that tiles of `size` elements are padded to."""
    return max(16, next_power_of_2(size))


@lru_cache(maxsize=64)
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; CPU tensors, which only the interpreter sees, count as Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; CPU tensors count as having one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def shared_memory_kib(capability: tuple[int, int]) -> int:
    """Shared memory that one program may use."""
    return _OPT_IN_KIB.get(capability, _LEAST_KIB)


@lru_cache(maxsize=64)
def streaming(dim: int, dim_v: int, block_size: int, capability: tuple[int, int]) -> Launch | None:
    """For small blocks: K and V stay, rows stream. None where they do not fit and `stationary` serves instead.

    With 3 stages the next two tiles of rows are on their way while one is worked on; with 2, the next is asked for only
    after that, and other programs have to hide the wait.
    """
    dim, dim_v, keys = padded(dim), padded(dim_v), padded(block_size)
    room = 512 * shared_memory_kib(capability)  # in elements of 2 bytes
    if keys > SMALL_BLOCK or max(dim, dim_v) > 128:
        return None

    def held(rows: int, stages: int) -> int:
        return keys * (dim + dim_v) + rows * (stages * dim + dim_v)

    for programs, stages in ((2, 3), (2, 2), (1, 3), (1, 2)):  # two programs a multiprocessor hide each other's waits
        if programs * held(64, stages) <= room:
            return Launch(rows=64, keys=keys, num_warps=4, num_stages=stages, store=".cs")
    return None


@lru_cache(maxsize=64)
def stationary(dim: int, dim_v: int, block_size: int, capability: tuple[int, int]) -> Launch:
    """Rows stay, K and V stream: past blocks of more than 128 keys, and smaller ones that do not fit `streaming`."""
    launch = own_blocks(dim, dim_v, capability)
    if block_size % launch.keys == 0:
        return launch
    return _masked(dim, dim_v, capability)  # the wide tile with masks would spill


@lru_cache(maxsize=64)
def own_blocks(dim: int, dim_v: int, capability: tuple[int, int]) -> Launch:
    """Consecutive rows stay, the keys of their own block stream, masked where they pass the diagonal only."""
    if capability[0] >= 9 and max(padded(dim), padded(dim_v)) <= 128 and shared_memory_kib(capability) > _LEAST_KIB:
        # Two programs a multiprocessor hide each other's waits; 8 warps, 3 stages or 128 keys leave room for one only.
        return Launch(rows=128, keys=64, num_warps=4, num_stages=2)
    return _masked(dim, dim_v, capability)


def _masked(dim: int, dim_v: int, capability: tuple[int, int]) -> Launch:
    """Rows stay, K and V stream, with room for masks everywhere."""
    wide = max(padded(dim), padded(dim_v)) > 128
    if shared_memory_kib(capability) <= _LEAST_KIB:
        return Launch(rows=64, keys=32, num_warps=8 if wide else 4, num_stages=2)
    if wide and capability[0] < 9:
        return Launch(rows=64, keys=32, num_warps=8, num_stages=2)
    if wide:
        return Launch(rows=64, keys=64, num_warps=8, num_stages=2)
    return Launch(rows=64, keys=64, num_warps=4, num_stages=2)


@lru_cache(maxsize=64)
def merging(dim: int) -> Launch:
    """Merge of partials: memory-bound, a tile of 2048 elements a slot, no keys."""
    return Launch(rows=max(4, 2048 // padded(dim)), keys=0, num_warps=4, num_stages=3)
