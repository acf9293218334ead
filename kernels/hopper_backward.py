"""Backward of block attention for Hopper (compute capability 9.0) in Gluon, where it pays; `backward.py` has the rest.

Triton waits for each product of a warpgroup before it uses the result, so exponentials and products do not overlap inside
a program. Here S^T and dP^T are started together, exponentials run beside dP^T, and the sums into dK and dV run beside the
next tile's S^T. Rows are gathered by `cp.async` one or two tiles ahead, with their log-sum-exp, delta and list entry in
shared memory (in registers they spill).

Results equal the portable kernels' to the rounding of the inputs' dtype: the same products, summed in another order.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton

from . import backward, configs

if TYPE_CHECKING:
    from torch import Tensor

    from .types import KVPart

TRITON_VERSIONS = ("3.6.", "3.7.")
"""Gluon is experimental and changes between versions; with any other one the portable kernels serve."""
_DIMS = (64, 128)


def supported(q: Tensor, part: KVPart, block_size: int) -> bool:
    """Whether these kernels serve: Hopper, a known Triton, bf16 or fp16, D == Dv in {64, 128}, whole tiles of 64 keys.

    Depends on nothing that changes with the number of rows, so that one model always takes one path.
    """
    serves = _serves(q.device, q.dtype, q.shape[2], part.v.shape[2], block_size)
    return serves and aligned(q) and aligned(part.k) and aligned(part.v)


@lru_cache(maxsize=64)
def _serves(device: torch.device, dtype: torch.dtype, dim: int, value_dim: int, block_size: int) -> bool:
    return (
        device.type == "cuda"
        and configs.capability(device) == (9, 0)
        and triton.__version__.startswith(TRITON_VERSIONS)
        and dtype in (torch.bfloat16, torch.float16)
        and dim in _DIMS
        and value_dim == dim
        and block_size % 64 == 0
        and block_size >= dim  # one warpgroup holds too little for blocks of 64 keys at D = 128
    )


def aligned(x: Tensor) -> bool:
    """Whether `x` starts at a multiple of 16 bytes and its strides are multiples of 16 elements.

    Asynchronous copies move 16 bytes; that strides allow it the compiler knows of multiples of 16 alone.
    """
    return x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.stride(1) % 16 == 0


def dkdv_constants(dim: int, block_size: int) -> dict[str, int]:
    """Tile sizes for dK and dV (and dq, where one tile holds a block): BK keys, R rows, NW warps, tiles copied AHEAD.

    LATE, where a block has several tiles: rows are copied after the tile's products have started, measured 4 % faster with
    blocks of 512 and 2 % slower with blocks of 4096.
    """
    keys = 128 if block_size % 128 == 0 else 64
    # One warpgroup that holds 64 x 128 sums has registers for 32 rows at a time; two of them, sharing 128 keys, for 64.
    rows = 32 if keys == 64 and dim == 128 else 64
    tiles = {"D": dim, "BK": keys, "R": rows, "NT": block_size // keys}
    late = {"LATE": block_size <= 1024} if tiles["NT"] > 1 else {}
    return tiles | {"AHEAD": 2, "NW": keys // 16} | late


def dq_constants(dim: int) -> dict[str, int]:
    """Tile sizes for dq: R rows stay, BN keys at a time stream by."""
    return {"D": dim, "R": 128, "BN": 64, "AHEAD": 1, "NW": 8}


def launch(call: backward.Call) -> None:
    """The Hopper kernels, for calls that are `supported`; what they cannot read goes to the portable ones."""
    dim, block_size = call.q.shape[2], call.lists.block_size
    if not aligned(call.dout) or call.lists.entry.dtype != torch.int32:
        backward.launch(call)
        return
    constants = dkdv_constants(dim, block_size)
    launch_dkdv(call, constants)
    if constants["NT"] > 1:
        launch_dq(call, dq_constants(dim))


def launch_dkdv(call: backward.Call, constants: dict[str, int]) -> None:
    """dK and dV, and dq where one tile of keys holds a block."""
    from . import hopper_backward_fused, hopper_backward_kernels

    part, lists = call.part, call.lists
    fused = constants["NT"] == 1
    kernel = hopper_backward_fused.dkdv_dq_kernel if fused else hopper_backward_kernels.dkdv_kernel
    pieces = call.pieces(lists.block_size)
    n_bins = lists.kv_heads * lists.n_blocks
    kernel[((n_bins + call.n_pieces) * constants["NT"],)](
        call.q, call.dout, part.k, part.v, call.lse, call.delta, call.rows.position, lists.pointer, lists.entry,
        part.start, part.length, call.piece_bin, call.dk, call.dv, call.dq, pieces,
        *call.row_strides(), *call.key_strides(part.k, part.v, call.dk, call.dv), *call.score_strides(),
        *call.dq_strides(), part.start.stride(0), n_bins, lists.n_blocks, lists.group_size, call.scale,
        **call.bits(), **constants, T=hopper_backward_kernels.element(call.q.dtype),
        PIECE=backward.piece_rows(lists.block_size), ACCUMULATE=call.accumulate, num_warps=constants["NW"],
    )  # fmt: skip
    backward.sum_pieces(call, pieces, constants["BK"], constants["NT"])


def launch_dq(call: backward.Call, constants: dict[str, int]) -> None:
    """Partial dq by work items."""
    from . import hopper_backward_dq, hopper_backward_kernels

    part, lists = call.part, call.lists
    if lists.rows_per_item > constants["R"]:
        raise ValueError(f"items of at most {constants['R']} rows are needed, got {lists.rows_per_item}")
    if not lists.item_bin.numel():
        return
    hopper_backward_dq.dq_kernel[(lists.item_bin.numel(),)](
        call.q, call.dout, part.k, part.v, call.lse, call.delta, call.rows.position, lists.entry, lists.item_bin,
        lists.item_start, lists.item_end, part.start, part.length, call.dq,
        *call.row_strides(), *call.key_strides(part.k, part.v), *call.score_strides(), *call.dq_strides(),
        part.start.stride(0), lists.n_blocks, lists.group_size, call.scale,
        **call.bits(), **constants, T=hopper_backward_kernels.element(call.q.dtype), num_warps=constants["NW"],
    )  # fmt: skip
