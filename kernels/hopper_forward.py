"""Forward block attention for Hopper (compute capability 9.0) in Gluon, for blocks of more than 128 keys; `forward.py`
has the rest.

Triton waits for each product before it uses the result. Here the next tile's scores and this tile's share of the output
are started together, and the softmax runs beside the latter; one program works through many items, and the next item's
rows arrive while the last is computed. Own rows are entries like any other: their position masks what they may not see.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import configs, hopper_backward

if TYPE_CHECKING:
    from .lists import RoutingLists
    from .torch_backend import Partials
    from .types import KVPart, QueryRows


def supported(q: Tensor, part: KVPart, lists: RoutingLists) -> bool:
    """Whether this kernel serves: where the Hopper backward does, blocks of more than 128 keys, lists of int32 entries."""
    return (
        lists.block_size > configs.SMALL_BLOCK
        and lists.entry.dtype == torch.int32
        and hopper_backward.supported(q, part, lists.block_size)
    )


def constants(dim: int, block_size: int) -> dict[str, int]:
    """R rows stay, BN keys at a time stream by, AHEAD tiles early; rows of the next item come in CHUNKs, one a tile.

    The chunks must have arrived AHEAD tiles before the item's last, or the next item starts late.
    """
    tiles = block_size // 64
    return {"D": dim, "R": 128, "BN": 64, "CHUNK": 64 if tiles > 4 else 128, "AHEAD": 2, "NW": 8}


def attend(
    q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, selected: Tensor, factor: float, negative: bool,
    partials: Partials, chosen: dict[str, int] | None = None,
) -> None:  # fmt: skip
    """Every listed entry of the part, own rows too; `factor` is the scale in base 2, positive, and `negative` its sign."""
    from . import hopper_backward_kernels, hopper_forward_kernels

    (tokens, _, dim), items = q.shape, lists.item_bin.numel()
    chosen = chosen or constants(dim, lists.block_size)
    if lists.rows_per_item > chosen["R"]:
        raise ValueError(f"items of at most {chosen['R']} rows are needed, got {lists.rows_per_item}")
    if not items:
        return
    heads = [x.stride(1) if x.shape[1] > 1 else 0 for x in (part.k, part.v)]
    hopper_forward_kernels.attend_kernel[(min(items, configs.multiprocessors(q.device)),)](
        q, part.k, part.v, rows.position, lists.pointer, lists.entry, lists.item_bin, lists.item_start, part.start,
        part.length, partials.out, partials.lse,
        *q.stride()[:2], part.k.stride(0), heads[0], part.v.stride(0), heads[1], part.start.stride(0), tokens,
        lists.n_blocks, lists.group_size, items, factor,
        HEAD_BITS=lists.head_bits, SLOT_BITS=lists.slot_bits, TOPK=selected.shape[2], ITEM=lists.rows_per_item, **chosen,
        T=hopper_backward_kernels.element(q.dtype), NEGATIVE=negative, num_warps=chosen["NW"],
    )  # fmt: skip
