"""The primitives in Triton, for bf16 and fp16 on CUDA devices; `backend.Backend` describes them.

Partial results have the inputs' dtype and are normalised; log-sum-exps are fp32, in base 2. No primitive reads device data on
the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import sizes, torch_backend
from .backward import attend_backward, delta
from .centroids import centroids
from .decode import attend_selected, decode_step, select_for_decoding, update_centroids
from .dispatch import sm90_serves
from .forward import attend
from .gate import select_blocks
from .gradients import add_gradients
from .lists import route
from .merge import merge, merge_dq
from .selection import place_selection
from .types import DqPartials, Partials, RoutingLists
from .wanted import wanted_pairs

__all__ = [
    "NAME",
    "add_gradients",
    "attend",
    "attend_backward",
    "attend_selected",
    "block_weights",
    "bytes_per_slot",
    "centroids",
    "check_sizes",
    "decode_step",
    "delta",
    "dq_bytes",
    "kept_ds_bytes",
    "merge",
    "merge_dq",
    "new_dq_partials",
    "new_lse",
    "new_partials",
    "place_selection",
    "route",
    "select_blocks",
    "select_for_decoding",
    "update_centroids",
    "wanted_pairs",
]

NAME = "triton"


def check_sizes(*, dim: int, dim_v: int, block_size: int) -> None:
    """See `backend.Backend.check_sizes`."""
    if max(dim, dim_v) > sizes.MOST_DIM or block_size < sizes.LEAST_BLOCK:
        raise ValueError(
            f"bf16 and fp16 on CUDA need head sizes of at most {sizes.MOST_DIM} and blocks of at least {sizes.LEAST_BLOCK} "
            f"tokens; got D {dim}, Dv {dim_v}, block_size {block_size}. fp32 and fp64 take any"
        )


def bytes_per_slot(dim: int, dtype: torch.dtype) -> int:
    """See `backend.Backend.bytes_per_slot`."""
    return dtype.itemsize * dim + 4


def new_partials(selected: Tensor, dim_v: int, dtype: torch.dtype) -> Partials:
    """See `backend.Backend.new_partials`; outputs in `dtype`, log-sum-exps in fp32."""
    out = torch.empty(*selected.shape, dim_v, dtype=dtype, device=selected.device)
    return Partials(out, torch.empty(selected.shape, dtype=torch.float32, device=selected.device))


def dq_bytes(q: Tensor, v: Tensor, block_size: int, n_blocks: int) -> tuple[int, int]:
    """See `backend.Backend.dq_bytes`: of fp32 sums and their places, or of partial dq in the dtype of `q`."""
    if q.shape[2] == v.shape[2] and sizes.sums_dq(block_size, q.shape[2], n_blocks):
        return 4 * q.shape[2] + 4, sizes.SUM_TILE_BYTES
    return q.dtype.itemsize * q.shape[2], 0


def kept_ds_bytes(q: Tensor, v: Tensor, *, rows: int, kv_heads: int, slots: int, n_blocks: int, block_size: int) -> int:
    """See `backend.Backend.kept_ds_bytes`: the Hopper kernels keep them, for blocks of a few tiles."""
    if not sm90_serves(q.device, q.dtype, q.shape[2], v.shape[2], block_size):
        return 0
    entries = rows * slots * (q.shape[1] // kv_heads)
    return sizes.kept_ds_bytes(entries=entries, n_blocks=n_blocks, block_size=block_size, dim=q.shape[2])


def new_dq_partials(
    selected: Tensor, lists: RoutingLists, q: Tensor, v: Tensor, *, keeps_ds: bool = False
) -> DqPartials:
    """See `backend.Backend.new_dq_partials`; sums in fp32, the others in the dtype of `q`."""
    shape, device = lists.shape, selected.device
    if keeps_ds:
        items = (lists.item_bin.numel(), shape.block_size, shape.rows_per_item)
        place = torch.empty(selected.shape, dtype=torch.int32, device=device)
        return DqPartials(torch.empty(items, dtype=q.dtype, device=device), place)
    summed = sizes.sums_dq(shape.block_size, q.shape[2], shape.n_blocks) and lists.entry.dtype == torch.int32
    if summed and sm90_serves(q.device, q.dtype, q.shape[2], v.shape[2], shape.block_size):
        tiles = (sizes.tiles_of_sums(selected.numel(), shape.n_bins), sizes.SUM_ROWS * q.shape[2])
        place = torch.empty(selected.shape, dtype=torch.int32, device=device)
        return DqPartials(torch.empty(tiles, dtype=torch.float32, device=device), place, sums=True)
    return DqPartials(torch.empty(*selected.shape, q.shape[2], dtype=q.dtype, device=device))


def new_lse(q: Tensor) -> Tensor:
    """See `backend.Backend.new_lse`; fp32, in base 2."""
    return torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


def block_weights(partials: Partials, *, selected: Tensor) -> Tensor:
    """See `backend.Backend.block_weights`."""
    largest = partials.lse.masked_fill(selected < 0, -torch.inf).amax(2, keepdim=True)
    # From base 2 after the subtraction, which is exact where it matters: large numbers would be rounded by the factor.
    return torch_backend.shares((partials.lse - largest) * math.log(2), selected)
