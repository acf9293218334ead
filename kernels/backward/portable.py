"""Launches of the portable backward kernels."""

from __future__ import annotations

from .. import configs
from ..configs import TileConfig
from ..gpu import gpu_of
from ..launch import launch_kernel
from ..sizes import cdiv
from .call import Call
from .portable_kernels import dkdv_kernel, dq_kernel
from .segments import segment_rows, sum_segments


def launch(call: Call) -> None:
    """dK, dV and partial dq."""
    part = call.part
    config = configs.backward(
        part.k.shape[2], part.v.shape[2], call.lists.shape.block_size, gpu_of(call.q.device)
    )  # fmt: skip
    launch_dkdv(call, config.dkdv, fused=config.dq is None)
    if config.dq is not None:
        launch_dq(call, config.dq)


def launch_dkdv(call: Call, config: TileConfig, *, fused: bool) -> None:
    """dK and dV, and with `fused`, where one tile of keys holds a block, partial dq."""
    shape = call.lists.shape
    tiles = cdiv(shape.block_size, config.keys)
    sums = call.segment_sums(tiles * config.keys)
    launch_kernel(dkdv_kernel, ((shape.n_bins + call.n_segments) * tiles,),
        *call.dkdv_arguments(sums), **call.dims(), **call.bits(), KEYS=config.keys, ROWS=config.rows, TILES=tiles,
        STAGES=config.num_stages, SEGMENT=segment_rows(shape.block_size), FUSED=fused, ACCUMULATE=call.accumulate,
        num_warps=config.num_warps,
    )  # fmt: skip
    sum_segments(call, sums, config.keys, tiles)


def launch_dq(call: Call, config: TileConfig) -> None:
    """Partial dq by work items, for blocks of more than one tile of keys."""
    n_items = call.lists.item_bin.numel()
    if n_items:
        launch_kernel(dq_kernel, (n_items,),
            *call.dq_arguments(), **call.dims(), **call.bits(), ROWS=config.rows, KEYS=config.keys,
            STAGES=config.num_stages, num_warps=config.num_warps,
        )  # fmt: skip
