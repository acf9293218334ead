"""Launch configurations of routing lists: the counting sort in registers, and the one in shared memory. Lists are the same with
any of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .gpu import Gpu
from .sizes import ITEM_ROWS, next_power_of_2


@dataclass(frozen=True)
class ListConfig:
    """The counting sort that makes routing lists.

    Attributes:
        item_rows_small: most entries per work item for blocks of at most `configs.SMALL_BLOCK` keys: rows stream past the keys.
        item_rows_large: most entries per work item for larger blocks: keys stream past the rows.
        register_bins: at most this many blocks, a program counts in registers; more are counted by atomic adds.
        entries, warps: entries that a program sorts at once, and its warps. Within one warp nothing waits for a barrier.
        count_entries, count_warps: entries that a program counts at once, and its warps.
        few_blocks, few_slots: at most this many blocks and slots, a program keeps a cursor per block in registers and
            sorts nothing.
        few_tokens, few_warps: tokens that such a program processes at once, and its warps.
        item_bins, items_at_once: bins for which one program makes the work items, and items per bin that it writes at once.
        entry_bits: entries with more bits are int64.
        programs, most_programs: approximate number of programs per pass, at least and at most.
        program_batches, table_entries: beyond `programs`, each program has at least this many batches, and the table of
            counts at most this many entries (`n_blocks` per program).
        shared_memory: sort in shared memory where `shared_lists` serves. All else here is about sorting in registers, but for
            items.
    """

    item_rows_small: int = 2048
    item_rows_large: int = ITEM_ROWS
    register_bins: int = 512
    entries: int = 512
    warps: int = 1
    count_entries: int = 2048
    count_warps: int = 4
    few_blocks: int = 64
    few_slots: int = 32
    few_tokens: int = 32
    few_warps: int = 4
    item_bins: int = 32
    items_at_once: int = 32
    entry_bits: int = 31
    programs: int = 1024
    most_programs: int = 4096
    program_batches: int = 4
    table_entries: int = 1 << 23
    shared_memory: bool = True


LISTS = ListConfig()


@dataclass(frozen=True)
class SharedListConfig:
    """The counting sort in shared memory, on Hopper.

    Attributes:
        bins: words for blocks, a power of two.
        width: slots per row, rounded up to a power of two.
        tiles: tiles of 32 tokens whose entries find their places at once.
        entries: entries (`width` per row) of a program's share, at most.
        warps: of the program that sorts a share.
        count_tokens: tokens that a program counts at a time.
        count_warps: warps of a program that counts.
    """

    bins: int
    width: int
    tiles: int
    entries: int
    warps: int
    count_tokens: int
    count_warps: int = 8


MOST_SHARED_BLOCKS = 8192
"""Most blocks whose routing lists are made in shared memory: with more, shares are too small to sort."""
MOST_SHARED_SLOTS = 64
SHARES_PER_MULTIPROCESSOR = 2
"""Where there are fewer entries than that of whole shares, shares are smaller."""


@lru_cache(maxsize=64)
def shared_lists(n_blocks: int, slots: int, gpu: Gpu) -> SharedListConfig | None:
    """How routing lists are made in shared memory. None where that does not serve.

    A share of 16 entries per block is written in runs that fill sectors. It has no more, so that a multiprocessor has several
    programs, as far as the words of all blocks let it.
    """
    if n_blocks > MOST_SHARED_BLOCKS or slots > MOST_SHARED_SLOTS or not gpu.is_hopper:
        return None
    bins, width = max(next_power_of_2(n_blocks), 32), next_power_of_2(slots)
    entries = min(max(16 * bins, 1 << 13), 1 << 15)
    tiles = 2 if width <= 32 and 4 * (5 * bins + entries) <= gpu.shared_memory else 1
    return SharedListConfig(bins, width, tiles, entries, 16 if entries >= 1 << 14 else 8, max(2048 // width, 32))
