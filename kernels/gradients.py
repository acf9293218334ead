"""The last step of dK and dV: this rank's own sums plus those that other ranks return, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import RowConfig
from .launch import launch_kernel
from .sizes import cdiv, padded


@triton.jit
def _add_rows(own_at, arrived_at, total_at, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of WIDTH sums that begin at the given addresses: `total = own + arrived`, rounded to the dtype of `total`."""
    column = tl.arange(0, PADDED)[None, :]
    mask = inside[:, None] & (column < WIDTH)
    x = tl.load(own_at[:, None] + column, mask=mask)
    x += tl.load(arrived_at[:, None] + column, mask=mask)
    tl.store(total_at[:, None] + column, x.to(total_at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def add_gradients_kernel(
    own_dk, own_dv, arrived, dk, dv, rows, heads, own_dk_row, own_dk_head, own_dv_row, own_dv_head, arrived_row,
    arrived_head, dk_row, dk_head, dv_row, dv_head,
    D: tl.constexpr, DV: tl.constexpr, D_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS (row, kv head) pairs. Reads 8 * (D + DV) bytes per pair and writes 2 * (D + DV) for bf16."""
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = pair // heads
    head = pair - row * heads
    inside = pair < rows
    at = arrived + arrived_row * row + arrived_head * head
    _add_rows(
        own_dk + own_dk_row * row + own_dk_head * head, at, dk + dk_row * row + dk_head * head, inside, D, D_PADDED
    )
    _add_rows(
        own_dv + own_dv_row * row + own_dv_head * head, at + D, dv + dv_row * row + dv_head * head, inside, DV, DV_PADDED
    )  # fmt: skip


def constants(dim: int, dim_v: int, config: RowConfig) -> dict[str, int]:
    """Constants of `add_gradients_kernel`."""
    return {"D": dim, "DV": dim_v, "D_PADDED": padded(dim), "DV_PADDED": padded(dim_v), "ROWS": config.rows}


def add_gradients(*, own_dk: Tensor, own_dv: Tensor, arrived: list[Tensor], dk: Tensor, dv: Tensor) -> None:
    """See `backend.Backend.add_gradients`."""
    if not arrived:
        dk.copy_(own_dk)
        dv.copy_(own_dv)
        return
    rows, heads, dim = dk.shape
    config = configs.sum_gradients(dim, dv.shape[2])
    sizes = constants(dim, dv.shape[2], config)
    for index, packed in enumerate(arrived):
        last = index == len(arrived) - 1
        total_dk, total_dv = (dk, dv) if last else (own_dk, own_dv)
        if rows * heads:
            launch_kernel(add_gradients_kernel, (cdiv(rows * heads, config.rows),),
                own_dk, own_dv, packed, total_dk, total_dv, rows * heads, heads,
                *own_dk.stride()[:2], *own_dv.stride()[:2], *packed.stride()[:2], *total_dk.stride()[:2],
                *total_dv.stride()[:2], **sizes, num_warps=config.num_warps,
            )  # fmt: skip
