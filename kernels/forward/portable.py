"""Launches of the portable forward kernels."""

from __future__ import annotations

from torch import Tensor

from .. import configs
from ..configs import TileConfig
from ..descriptors import head_step, tile_descriptor, tma_can_read
from ..gpu import gpu_of
from ..launch import launch_kernel
from ..sizes import head_stride, padded
from ..types import OWN_TILE, KVPart, Partials, QueryRows, RoutingLists
from .portable_kernels import hold_rows_kernel, own_blocks_kernel, stream_rows_kernel
from .scale import base_2


def attend(q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, scale: float, partials: Partials) -> None:
    """All listed entries, by the kernels that fit the block size; see `forward.attend`."""
    gpu, block_size = gpu_of(q.device), lists.shape.block_size
    dim, dim_v = q.shape[2], part.v.shape[2]
    hold = configs.hold_rows(dim, dim_v, block_size, gpu)
    stream = configs.stream_rows(dim, dim_v, block_size, gpu)
    # TMA pays off on Hopper, where two programs share a multiprocessor. Consumer Blackwell has it too; untested.
    shared, tma = (q, part, lists, rows, scale, partials), gpu.is_hopper
    attend_listed(*shared, stream or hold, stream=stream is not None, tma=tma)
    if block_size > configs.SMALL_BLOCK:
        attend_own(*shared, configs.own_blocks(dim, dim_v, gpu), tma=tma)


def attend_listed(
    q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, scale: float, partials: Partials,
    config: TileConfig, *, stream: bool, tma: bool,
) -> None:  # fmt: skip
    """Listed entries, by `stream_rows_kernel` (`stream`) or `hold_rows_kernel`.

    `hold_rows_kernel` leaves the own rows of blocks of more than 128 keys to `attend_own`. `tma` allows descriptors, which
    change no bit.
    """
    shape, n_items = lists.shape, lists.item_bin.numel()
    if n_items == 0 or part.k.shape[0] == 0:
        return
    (tokens, _, dim), dim_v = q.shape, part.v.shape[2]
    scale, negative = base_2(scale)
    k, v, k_head, v_head = part.k, part.v, head_stride(part.k), head_stride(part.v)
    options = {}
    kernel, programs = stream_rows_kernel, n_items
    if not stream:
        # TMA reads whole tiles: at the ragged end of a block it would read another block's rows.
        with_own = shape.block_size <= configs.SMALL_BLOCK
        tma = tma and not with_own and shape.block_size % config.keys == 0 and tma_can_read(k) and tma_can_read(v)
        if tma:
            k_head, v_head = head_step(k), head_step(v)
            k, v = tile_descriptor(k, config.keys), tile_descriptor(v, config.keys)
        kernel, programs = hold_rows_kernel, n_items * (shape.rows_per_item // config.rows)
        options = {"ITEM": shape.rows_per_item, "WITH_OWN": with_own, "TMA": tma}
    launch_kernel(kernel, (programs,),
        q, k, v, part.start, part.length, rows.position, lists.entry, lists.item_bin, lists.item_start, lists.item_end,
        partials.out, partials.lse, tokens, shape.n_blocks, scale, part.start.stride(0),
        q.stride(0), q.stride(1), part.k.stride(0), k_head, part.v.stride(0), v_head,
        GROUP=shape.group_size, TOPK=shape.topk, HEAD_BITS=shape.head_bits, SLOT_BITS=shape.slot_bits,
        BLOCK=shape.block_size, D=dim, D_PADDED=padded(dim), DV=dim_v, DV_PADDED=padded(dim_v), NEGATIVE=negative,
        ROWS=config.rows, KEYS=config.keys, STAGES=config.num_stages, STORE=config.store, num_warps=config.num_warps,
        **options,
    )  # fmt: skip


def attend_own(
    q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, scale: float, partials: Partials,
    config: TileConfig, *, tma: bool,
) -> None:  # fmt: skip
    """The causal own blocks, by `rows.own_tiles`, into the last slot. `tma` allows descriptors, which change no bit."""
    shape, tiles = lists.shape, rows.own_tiles.shape[0]
    if tiles == 0 or part.k.shape[0] == 0:
        return
    (tokens, q_heads, dim), dim_v = q.shape, part.v.shape[2]
    scale, negative = base_2(scale)
    tma = tma and tma_can_read(part.k) and tma_can_read(part.v)
    k_tiles, v_tiles = (tile_descriptor(x, config.keys) if tma else x for x in (part.k, part.v))
    launch_kernel(own_blocks_kernel, (tiles * (OWN_TILE // config.rows) * q_heads,),
        q, part.k, part.v, k_tiles, v_tiles, part.start, part.length, rows.own_tiles, partials.out, partials.lse,
        rows.offset, tokens, tiles, q_heads, scale, part.start.stride(0), q.stride(0), q.stride(1),
        part.k.stride(0), head_stride(part.k), part.v.stride(0), head_stride(part.v),
        GROUP=shape.group_size, TOPK=shape.topk, TILE=OWN_TILE, D=dim, D_PADDED=padded(dim), DV=dim_v,
        DV_PADDED=padded(dim_v), NEGATIVE=negative, ROWS=config.rows, KEYS=config.keys,
        STAGES=config.num_stages, STORE=config.store, TMA=tma, num_warps=config.num_warps,
    )  # fmt: skip
