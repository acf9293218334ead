"""Routing lists: a deterministic counting sort of (q head, token, slot) by (kv head, block), and work items over it.

Three passes, all on the device:

1. `count_kernel`: each program counts its share of the selection by block.
2. One cumulative sum over [kv head, block, share] turns the counts into the position of each share's first entry per block.
3. `scatter_kernel`: each program puts its entries there, in order.

Inside a bin, entries have the order of the selection, (head, token), whatever the sizes of the shares. On Hopper, with not too
many blocks and slots (`list_configs.shared_lists`), a program sorts its share in shared memory (`lists_sm90.py`); elsewhere it
sorts batches in registers (`lists_kernels.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import configs, list_configs
from .dispatch import gluon_serves
from .gpu import Gpu, gpu_of
from .launch import launch_kernel
from .list_configs import ListConfig, SharedListConfig
from .lists_kernels import count_kernel, item_kernel, scatter_few_kernel, scatter_kernel
from .sizes import cdiv, next_power_of_2
from .types import ListShape, RoutingLists, list_shape

MOST_ENTRIES = (1 << 31) - (1 << 20)
"""A token past the end of a program's share is still less than 2^31."""


def batch_constants(slots: int, entries: int) -> dict[str, int]:
    """Constants of the counting passes for rows of `slots` slots: a batch is `entries` entries, in rows of WIDTH slots."""
    chunks = cdiv(slots, entries)
    return {"SLOTS": slots, "WIDTH": cdiv(slots, chunks), "CHUNKS": chunks, "ENTRIES": entries}


def register_bins(n_blocks: int, config: ListConfig) -> int:
    """Counts that a program of `count_kernel` keeps in registers; 0 where there are too many blocks for that."""
    bins = max(next_power_of_2(n_blocks), 32)
    return bins if bins <= config.register_bins else 0


def programs_of(batches: int, n_blocks: int, config: ListConfig) -> int:
    """Programs per pass over `batches` batches.

    More programs hide latency. Each costs a count per block in the table, and in short calls its start.
    """
    most = min(config.most_programs, batches // config.program_batches, config.table_entries // max(n_blocks, 1))
    return max(config.programs, most)


def _counting_sort(
    selected: Tensor, shape: ListShape, entry: Tensor, config: ListConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill `entry`; return `pointer`, `item_bin`, `item_start`, `item_end`."""
    shared = None
    if config.shared_memory and gluon_serves(selected.device):
        shared = list_configs.shared_lists(shape.n_blocks, selected.shape[2], gpu_of(selected.device))
    if shared is not None:
        return _sort_in_shared_memory(selected, shape, entry, config, shared)
    return _sort_in_registers(selected, shape, entry, config)


def share_entries(entries: int, config: SharedListConfig, gpu: Gpu) -> int:
    """Entries of a program's share, of `entries` in all: fewer than `config` allows where multiprocessors would be idle.

    Both count `config.width` entries per row. A share has no fewer than counts (one per block), nor than are sorted at once.
    """
    wanted = next_power_of_2(cdiv(entries, list_configs.SHARES_PER_MULTIPROCESSOR * gpu.multiprocessors))
    least = max(config.bins, 1 << 10, 32 * config.tiles * config.width)
    return min(max(wanted, least), config.entries)


def _sort_in_shared_memory(
    selected: Tensor, shape: ListShape, entry: Tensor, config: ListConfig, shared: SharedListConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .lists_sm90 import count_kernel, scatter_kernel  # Gluon is experimental: imported only where it runs

    q_heads, tokens, slots = selected.shape
    entries = share_entries(q_heads * tokens * shared.width, shared, gpu_of(selected.device))
    share_tokens = entries // shared.width
    shares_per_head = cdiv(tokens, share_tokens)
    grid = (shares_per_head * shape.group_size, shape.kv_heads)
    sizes = (tokens, shape.n_blocks, shape.group_size, shares_per_head, share_tokens, *selected.stride())
    constants = {"SLOTS": slots, "WIDTH": shared.width, "BINS": shared.bins}
    # A zero before the counts makes their inclusive sum the exclusive one, with the total at its end.
    count = torch.empty(1 + shape.n_bins * grid[0], dtype=torch.int32, device=selected.device)
    launch_kernel(
        count_kernel, grid, selected, count, *sizes,
        **constants, TOKENS=shared.count_tokens, WARPS=shared.count_warps, num_warps=shared.count_warps,
    )  # fmt: skip
    begin = torch.cumsum(count, 0, dtype=torch.int32)
    result = _items(begin, shape, grid[0], entry.numel(), config)
    launch_kernel(
        scatter_kernel, grid, selected, begin, entry, *sizes, shape.head_bits, shape.slot_bits,
        **constants, TILES=shared.tiles, PLACE_BITS=entries.bit_length() - 1, WARPS=shared.warps, num_warps=shared.warps,
    )  # fmt: skip
    return result


def _sort_in_registers(
    selected: Tensor, shape: ListShape, entry: Tensor, config: ListConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_heads, tokens, slots = selected.shape
    n_blocks, group = shape.n_blocks, shape.group_size
    batch = batch_constants(slots, config.entries)
    batch_rows = config.entries // batch["WIDTH"]
    batches_per_head = cdiv(tokens * batch["CHUNKS"], batch_rows)
    programs = programs_of(batches_per_head * q_heads, n_blocks, config)
    batches = max(1, min(batches_per_head, batches_per_head * q_heads // programs))
    shares_per_head = cdiv(batches_per_head, batches)
    grid = (shares_per_head * group, shape.kv_heads)
    sizes = (tokens, n_blocks, group, shares_per_head, batches * batch_rows, *selected.stride())
    bins = register_bins(n_blocks, config)
    # A zero before the counts makes their inclusive sum the exclusive one, with the total at its end.
    allocate = torch.empty if bins else torch.zeros
    count = allocate(1 + shape.n_bins * grid[0], dtype=torch.int32, device=selected.device)
    counted = batch | {"ENTRIES": config.count_entries, "BINS": bins}
    launch_kernel(count_kernel, grid, selected, count, *sizes, **counted, num_warps=config.count_warps)
    begin = torch.cumsum(count, 0, dtype=torch.int32)
    result = _items(begin, shape, grid[0], entry.numel(), config)
    bits = (shape.head_bits, shape.slot_bits)
    if n_blocks <= config.few_blocks and slots <= config.few_slots and batch["CHUNKS"] == 1:
        few = {"SLOTS": slots, "BINS": max(next_power_of_2(n_blocks), 16), "TOKENS": config.few_tokens}
        launch_kernel(
            scatter_few_kernel, grid, selected, begin, entry, *sizes, *bits, **few, num_warps=config.few_warps
        )
    else:
        index_bits = config.entries.bit_length() - 1
        launch_kernel(
            scatter_kernel, grid, selected, begin, entry, *sizes, *bits, **batch, INDEX_BITS=index_bits,
            num_warps=config.warps,
        )  # fmt: skip
    return result


def _items(
    begin: Tensor, shape: ListShape, shares: int, capacity: int, config: ListConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`pointer` and the work items, from the positions of the bins' shares `[n_bins * shares + 1]`."""
    n_bins = shape.n_bins
    items = capacity // shape.rows_per_item + n_bins
    pointer, item_bin, item_start, item_end = (
        torch.empty(size, dtype=torch.int32, device=begin.device) for size in (n_bins + 1, items, items, items)
    )
    launch_kernel(
        item_kernel, (cdiv(n_bins + 1, config.item_bins),),
        begin, pointer, item_bin, item_start, item_end, n_bins, shares, items, shape.rows_per_item,
        BINS=config.item_bins, ITEMS=config.items_at_once,
    )  # fmt: skip
    return pointer, item_bin, item_start, item_end


def route(
    selected: Tensor, *, n_blocks: int, kv_heads: int, block_size: int, config: ListConfig | None = None
) -> RoutingLists:
    """See `backend.Backend.route`; `selected` may have any strides.

    Raises:
        ValueError: more entries than `MOST_ENTRIES`.
    """
    config = config or list_configs.LISTS
    capacity, device = selected.numel(), selected.device
    if capacity > MOST_ENTRIES:
        raise ValueError(
            f"routing lists hold at most {MOST_ENTRIES} entries, got {tuple(selected.shape)}; split the heads"
        )
    small = block_size <= configs.SMALL_BLOCK
    shape = list_shape(
        selected, n_blocks, kv_heads, block_size, config.item_rows_small if small else config.item_rows_large
    )
    token_bits = max(selected.shape[1] - 1, 0).bit_length()
    narrow = token_bits + shape.head_bits + shape.slot_bits <= config.entry_bits
    entry = torch.empty(capacity, dtype=torch.int32 if narrow else torch.int64, device=device)
    if capacity:
        pointer, *items = _counting_sort(selected, shape, entry, config)
        return RoutingLists(shape, pointer, entry, *items)
    pointer = torch.zeros(shape.n_bins + 1, dtype=torch.int32, device=device)
    return RoutingLists(shape, pointer, entry, *torch.empty(3, 0, dtype=torch.int32, device=device))
