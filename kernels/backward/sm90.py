"""Launches of the backward kernels for Hopper, in Gluon.

Triton waits for each product of a warpgroup before it uses the result, so exponentials and products do not overlap inside a
program. Here S^T and dP^T are issued together, exponentials overlap with dP^T, and the products into dK and dV with the next
tile's S^T. Rows are gathered by `cp.async` one or two tiles ahead. Their log-sum-exps, deltas and list entries are kept in
shared memory; in registers they would spill.
"""

from __future__ import annotations

import torch

from .. import configs
from ..configs import GluonConfig
from ..descriptors import gluon_dtype
from ..gpu import gpu_of
from ..launch import launch_kernel
from ..sizes import MOST_ITEMS_PER_PROGRAM, MOST_REACH, cdiv, heads_at_once, programs_for, reach, units_at_once
from .call import Call
from .dkdv_dq_sm90 import dkdv_dq_kernel
from .dkdv_dq_tiles_sm90 import dkdv_dq_tiles_kernel
from .dkdv_sm90 import dkdv_kernel
from .dq_of_ds_sm90 import dq_of_ds_kernel
from .dq_sm90 import dq_kernel
from .segments import segment_rows, sum_segments


def launch(call: Call) -> None:
    """dK, dV and partial dq."""
    block_size = call.lists.shape.block_size
    if call.sums_dq:
        launch_dkdv_dq_tiles(call, configs.SM90_DKDV_DQ_TILES)
        return
    config = configs.sm90_dkdv(call.q.shape[2], block_size)
    launch_dkdv(call, config)
    if call.place is not None:
        launch_dq_of_ds(call, configs.SM90_DQ_OF_DS)
    elif config.keys < block_size:
        launch_dq(call, configs.SM90_DQ)


def launch_dkdv(call: Call, config: GluonConfig) -> None:
    """dK and dV, and partial dq where one tile of keys holds a block."""
    shape = call.lists.shape
    tiles = shape.block_size // config.keys
    sums = call.segment_sums(shape.block_size)
    if tiles == 1 and (call.dq.stride(2) % 16 or reach(call.dq) >= MOST_REACH):
        raise ValueError(
            f"slots of partial dq must be multiples of 16 elements apart and rows less than {MOST_REACH} elements, "
            f"got strides {call.dq.stride()} and shape {tuple(call.dq.shape)}"
        )
    kernel, more = (
        (dkdv_dq_kernel, {}) if tiles == 1 else (dkdv_kernel, {"LAST": config.last, "KEEPS": call.place is not None})
    )
    launch_kernel(kernel, ((shape.n_bins + call.n_segments) * tiles,),
        *call.dkdv_arguments(sums), **call.bits(), **_constants(call, config), AHEAD=config.ahead, TILES=tiles, **more,
        HEADS=_heads(call), SEGMENT=segment_rows(shape.block_size), ACCUMULATE=call.accumulate, num_warps=config.num_warps,
    )  # fmt: skip
    sum_segments(call, sums, config.keys, tiles)


def launch_dkdv_dq_tiles(call: Call, config: GluonConfig) -> None:
    """dK, dV and sums of dq, for blocks of several tiles of keys."""
    shape = call.lists.shape
    tiles = shape.block_size // config.keys
    programs = (shape.n_bins + call.n_segments) * tiles
    sums = call.segment_sums(shape.block_size)
    progress = torch.zeros(1 + programs, dtype=torch.int32, device=call.q.device)
    units = units_at_once(call.lists.entry.numel(), shape.n_bins)
    launch_kernel(dkdv_dq_tiles_kernel, (programs,),
        *call.dkdv_dq_tiles_arguments(sums, progress), units, **call.bits(), **_constants(call, config), AHEAD=config.ahead,
        TILES=tiles, HEADS=_heads(call), SEGMENT=segment_rows(shape.block_size), ACCUMULATE=call.accumulate,
        num_warps=config.num_warps,
    )  # fmt: skip
    sum_segments(call, sums, config.keys, tiles)


def launch_dq(call: Call, config: GluonConfig) -> None:
    """Partial dq by work items, for blocks of more than one tile of keys where dq is not summed."""
    shape, n_items = call.lists.shape, call.lists.item_bin.numel()
    if shape.rows_per_item > config.rows:
        raise ValueError(f"work items must have at most {config.rows} rows, got {shape.rows_per_item}")
    if n_items and call.q.shape[0]:
        resident = gpu_of(call.q.device).multiprocessors
        programs = programs_for(n_items, resident)
        per_program = cdiv(n_items, programs)
        if per_program > MOST_ITEMS_PER_PROGRAM:
            raise ValueError(f"programs must have at most {MOST_ITEMS_PER_PROGRAM} work items, got {per_program}")
        launch_kernel(dq_kernel, (programs,),
            *call.dq_arguments(), n_items, min(resident, programs), per_program, **call.bits(),
            **_constants(call, config), num_warps=config.num_warps,
        )  # fmt: skip


def launch_dq_of_ds(call: Call, config: GluonConfig) -> None:
    """Partial dq by work items, from the gradients of scores that `launch_dkdv` kept."""
    shape, n_items = call.lists.shape, call.lists.item_bin.numel()
    if n_items and call.q.shape[0]:
        constants = _constants(call, config) | {"BLOCK": shape.block_size, "STAGES": config.ahead + 1}
        bits = {"HEAD_BITS": shape.head_bits, "SLOT_BITS": shape.slot_bits}
        launch_kernel(dq_of_ds_kernel, (n_items,),
            *call.dq_of_ds_arguments(), **bits, **constants, num_warps=config.num_warps
        )  # fmt: skip


def _heads(call: Call) -> int:
    """Kv heads whose bins take turns."""
    tokens, _, dim = call.q.shape
    shape = call.lists.shape
    return heads_at_once(shape.kv_heads, shape.group_size, tokens * dim * call.q.element_size())


def _constants(call: Call, config: GluonConfig) -> dict:
    return {
        "D": call.q.shape[2], "ROWS": config.rows, "KEYS": config.keys, "WARPS": config.num_warps,
        "DTYPE": gluon_dtype(call.q.dtype),
    }  # fmt: skip
