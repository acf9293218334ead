"""Forward block attention for Hopper (compute capability 9.0) in Gluon, blocks of at most 128 keys; `forward.py` has the rest.

Triton asks for the next tile of rows when the last one's products are done, and then waits for it. Here a tile's rows are
asked for two tiles ahead, and the next tile's scores run beside the stores of this one. The bits are the portable kernel's:
the same products in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import configs, hopper_backward
from .types import heads_stride

if TYPE_CHECKING:
    from .lists import RoutingLists
    from .torch_backend import Partials
    from .types import KVPart, QueryRows

ROWS, WARPS = 64, 4
"""Rows a tile, and warps: one warpgroup, so that a multiprocessor holds two programs."""


def supported(q: Tensor, part: KVPart, lists: RoutingLists) -> bool:
    """Whether this kernel serves: where the Hopper backward does, blocks of at most 128 keys, lists of int32 entries."""
    return (
        lists.block_size <= configs.SMALL_BLOCK
        and lists.entry.dtype == torch.int32
        and hopper_backward.supported(q, part, lists.block_size)
    )


def attend(
    q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, topk: int, factor: float, negative: bool,
    partials: Partials,
) -> None:  # fmt: skip
    """Every listed entry of the part; `factor` is the scale in base 2, positive, and `negative` its sign."""
    from . import hopper_backward_kernels, hopper_forward_kernels

    (tokens, _, dim), items = q.shape, lists.item_bin.numel()
    if not items:
        return
    hopper_forward_kernels.stream_rows_kernel[(items,)](
        q, part.k, part.v, part.start, part.length, rows.position, lists.entry, lists.item_bin, lists.item_start,
        lists.item_end, partials.out, partials.lse, tokens, lists.n_blocks, lists.group_size, factor,
        part.start.stride(0), q.stride(0), q.stride(1), part.k.stride(0), heads_stride(part.k), part.v.stride(0),
        heads_stride(part.v),
        D=dim, HEAD_BITS=lists.head_bits, SLOT_BITS=lists.slot_bits, TOPK=topk, BK=lists.block_size, R=ROWS, NW=WARPS,
        T=hopper_backward_kernels.element(q.dtype), NEGATIVE=negative, num_warps=WARPS,
    )  # fmt: skip
