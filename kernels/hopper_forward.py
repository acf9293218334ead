"""Forward block attention for Hopper (compute capability 9.0) in Gluon, where it pays; `forward.py` has the rest.

Triton asks for the next tile when the last one's products are done, and then waits for it. Here it is asked for two tiles
ahead: rows where K and V of the block stay (at most 128 keys), and the next tile's scores run beside the stores of this one;
keys where rows stay. The bits are the portable kernels': the same products in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import configs, hopper_backward
from .descriptors import gluon_tile_descriptor, heads_step, tma_can_read
from .types import OWN_TILE, heads_stride

if TYPE_CHECKING:
    from .lists import RoutingLists
    from .torch_backend import Partials
    from .types import KVPart, QueryRows

WARPS = 4
"""One warpgroup, so that a multiprocessor holds two programs."""
STREAMED_ROWS = 64
"""Rows a tile that streams past a block of at most 128 keys."""
HELD_ROWS, KEYS = 128, 64
"""Rows that stay, and keys a tile that streams past them."""


def supported(q: Tensor, part: KVPart, lists: RoutingLists) -> bool:
    """Whether these kernels serve: where the Hopper backward does, lists of int32 entries, keys that TMA can read."""
    return (
        lists.entry.dtype == torch.int32
        and hopper_backward.supported(q, part, lists.block_size)
        and (lists.block_size <= configs.SMALL_BLOCK or (tma_can_read(part.k) and tma_can_read(part.v)))
    )


def attend(
    q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, topk: int, factor: float, negative: bool,
    partials: Partials,
) -> None:  # fmt: skip
    """See `forward.attend`; `factor` is the scale in base 2, positive, and `negative` whether its sign is changed."""
    from . import hopper_backward_kernels, hopper_forward_kernels, hopper_forward_large

    (tokens, q_heads, dim), items, own_tiles = q.shape, lists.item_bin.numel(), rows.own_tiles.shape[0]
    constants = {
        "D": dim, "TOPK": topk, "NW": WARPS, "T": hopper_backward_kernels.element(q.dtype), "NEGATIVE": negative,
        "num_warps": WARPS,
    }  # fmt: skip
    bits = {"HEAD_BITS": lists.head_bits, "SLOT_BITS": lists.slot_bits}
    listed = (lists.entry, lists.item_bin, lists.item_start, lists.item_end, partials.out, partials.lse)
    sizes = (lists.group_size, factor, part.start.stride(0), q.stride(0), q.stride(1))
    strides = (part.k.stride(0), heads_stride(part.k), part.v.stride(0), heads_stride(part.v))
    if lists.block_size <= configs.SMALL_BLOCK:
        if items:
            hopper_forward_kernels.stream_rows_kernel[(items,)](
                q, part.k, part.v, part.start, part.length, rows.position, *listed, tokens, lists.n_blocks, *sizes,
                *strides, BK=lists.block_size, R=STREAMED_ROWS, **bits, **constants,
            )  # fmt: skip
        return
    if lists.rows_per_item > HELD_ROWS:
        raise ValueError(f"items of at most {HELD_ROWS} rows are needed, got {lists.rows_per_item}")
    tiles = gluon_tile_descriptor(part.k, KEYS), gluon_tile_descriptor(part.v, KEYS)
    if items:
        hopper_forward_large.hold_rows_kernel[(items,)](
            q, *tiles, part.start, *listed, tokens, lists.n_blocks, *sizes, heads_step(part.k), heads_step(part.v),
            TILES=lists.block_size // KEYS, R=HELD_ROWS, BN=KEYS, **bits, **constants,
        )  # fmt: skip
    if own_tiles:
        hopper_forward_large.own_blocks_kernel[(own_tiles * q_heads,)](
            q, part.k, part.v, *tiles, part.start, part.length, rows.own_tiles, partials.out, partials.lse, rows.offset,
            tokens, own_tiles, q_heads, *sizes, *strides, R=OWN_TILE, BN=KEYS, **constants,
        )  # fmt: skip
