"""Which kernels run block attention, forward and backward: decided here and nowhere else.

========  =============================================================================================================
variant   serves
========  =============================================================================================================
sm90      Gluon kernels. Hopper, a known version of Triton, bf16 or fp16, D = Dv in {64, 128}, blocks of whole tiles of 64
          keys, tensors aligned for asynchronous copies, int32 entries
portable  Triton kernels, for everything else on sm_80 and newer
========  =============================================================================================================

In forward both variants give the same bits. In backward they agree to the rounding of the inputs' dtype: the same products,
summed in another order. Nothing here depends on the number of rows, so one model always takes one variant, with two
exceptions, which are portable: lists with int64 entries (more than 2^31 values of (token, head, slot)), and rows that lie
128 GiB apart.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from .configs import SMALL_BLOCK
from .descriptors import tma_can_read
from .gpu import gpu_of
from .sizes import aligned
from .types import KVPart, RoutingLists

PORTABLE, SM90 = "portable", "sm90"
TRITON_VERSIONS = ("3.6.", "3.7.", "3.8.")
"""Gluon is experimental and changes between versions. Compile tests pass with these; with any other version the portable kernels
serve."""
_SM90_DIMS = (64, 128)


def choose_variant(
    q: Tensor, part: KVPart, lists: RoutingLists, dout: Tensor | None = None, requested: str | None = None
) -> str:
    """`SM90` or `PORTABLE`.

    Args:
        q: `[T, Hq, D]`.
        part: keys and values.
        lists: routing lists of the rows.
        dout: `[T, Hq, Dv]` in backward; None in forward.
        requested: return this variant instead of the fastest one.

    Raises:
        ValueError: `requested` is no variant, or does not serve these inputs.
    """
    shape = lists.shape
    serves = (
        sm90_serves(q.device, q.dtype, q.shape[2], part.v.shape[2], shape.block_size)
        and lists.entry.dtype == torch.int32
        and aligned(q)
        and aligned(part.k)
        and aligned(part.v)
    )
    if dout is not None:
        serves = serves and aligned(dout)
    elif shape.block_size > SMALL_BLOCK:  # forward reads large blocks by TMA
        serves = serves and tma_can_read(part.k) and tma_can_read(part.v)
    variant = SM90 if serves else PORTABLE
    if requested is None or requested == variant or requested == PORTABLE:
        return requested or variant
    raise ValueError(f"variant must be one that serves these inputs ({variant!r}) or None, got {requested!r}")


@lru_cache(maxsize=64)
def gluon_serves(device: torch.device) -> bool:
    """Whether Gluon kernels run on a device: a Hopper, with a version of Triton that they were compiled with."""
    return device.type == "cuda" and gpu_of(device).is_hopper and triton.__version__.startswith(TRITON_VERSIONS)


@lru_cache(maxsize=64)
def sm90_serves(device: torch.device, dtype: torch.dtype, dim: int, dim_v: int, block_size: int) -> bool:
    """Whether the Hopper kernels serve aligned tensors of these sizes with int32 entries."""
    return (
        gluon_serves(device)
        and dtype in (torch.bfloat16, torch.float16)
        and dim in _SM90_DIMS
        and dim_v == dim
        and block_size % 64 == 0
        and block_size >= dim  # one warpgroup has too few registers for blocks of 64 keys at D = 128
    )
