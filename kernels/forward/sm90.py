"""Launches of the forward kernels for Hopper, in Gluon.

Triton requests the next tile when the products of the last one are done, and then waits for it. These kernels request it two
tiles ahead: rows where a block of at most 128 keys stays on chip (the next tile's scores overlap with the stores of this one),
keys where rows stay. The products and their order are those of the portable kernels, so the bits are the same.
"""

from __future__ import annotations

from torch import Tensor

from .. import configs
from ..descriptors import gluon_dtype, gluon_tile_descriptor, head_step
from ..launch import launch_kernel
from ..sizes import cdiv, head_stride, heads_at_once
from ..types import KVPart, ListShape, Partials, QueryRows, RoutingLists
from .hold_rows_sm90 import hold_rows_kernel, own_blocks_kernel
from .scale import base_2
from .stream_rows_sm90 import stream_rows_kernel


def attend(q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, scale: float, partials: Partials) -> None:
    """See `forward.attend`."""
    shape, block_size = lists.shape, lists.shape.block_size
    small = block_size <= configs.SMALL_BLOCK
    config = configs.SM90_STREAM_ROWS if small else configs.SM90_HOLD_ROWS
    (tokens, q_heads, dim), n_items, own_tiles = q.shape, lists.item_bin.numel(), rows.own_tiles.shape[0]
    factor, negative = base_2(scale)
    constants = {
        "D": dim, "TOPK": shape.topk, "ROWS": config.rows, "WARPS": config.num_warps, "DTYPE": gluon_dtype(q.dtype),
        "NEGATIVE": negative, "num_warps": config.num_warps,
    }  # fmt: skip
    bits = {"HEAD_BITS": shape.head_bits, "SLOT_BITS": shape.slot_bits}
    listed = (lists.entry, lists.item_bin, lists.item_start, lists.item_end, partials.out, partials.lse)
    sizes = (shape.group_size, factor, part.start.stride(0), q.stride(0), q.stride(1))
    strides = (part.k.stride(0), head_stride(part.k), part.v.stride(0), head_stride(part.v))
    if small:
        heads = heads_at_once(shape.kv_heads, shape.group_size, tokens * dim * q.element_size())
        per_head = programs_per_head(shape, tokens)
        programs = n_items if heads == 1 else shape.kv_heads * per_head
        if n_items:
            launch_kernel(stream_rows_kernel, (programs,),
                q, part.k, part.v, part.start, part.length, rows.position, *listed, tokens, shape.n_blocks, *sizes,
                *strides, lists.pointer, per_head, n_items, KEYS=block_size, HEADS=heads,
                ITEM=shape.rows_per_item, **bits, **constants,
            )  # fmt: skip
        return
    if shape.rows_per_item > config.rows:
        raise ValueError(f"work items must have at most {config.rows} rows, got {shape.rows_per_item}")
    tiles = gluon_tile_descriptor(part.k, config.keys), gluon_tile_descriptor(part.v, config.keys)
    if n_items:
        launch_kernel(hold_rows_kernel, (n_items,),
            q, *tiles, part.start, *listed, tokens, shape.n_blocks, *sizes, head_step(part.k), head_step(part.v),
            TILES=block_size // config.keys, KEYS=config.keys, **bits, **constants,
        )  # fmt: skip
    if own_tiles:
        launch_kernel(own_blocks_kernel, (own_tiles * q_heads,),
            q, part.k, part.v, *tiles, part.start, part.length, rows.own_tiles, partials.out, partials.lse, rows.offset,
            tokens, own_tiles, q_heads, *sizes, *strides, KEYS=config.keys, **constants,
        )  # fmt: skip


def programs_per_head(shape: ListShape, tokens: int) -> int:
    """Programs of `stream_rows_kernel` per kv head where heads take turns.

    No head has more work items for `tokens` rows, those that stay unused between its bins included.
    """
    return cdiv(tokens * shape.group_size * shape.topk, shape.rows_per_item) + shape.n_blocks
