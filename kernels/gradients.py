"""The last step of dK and dV: what this rank computed itself, plus what other ranks return, rounded once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .sizes import cdiv

_TILE = 4096
"""Elements of a tile of dK or dV."""
WARPS = 4


@triton.jit
def _add_rows(own_at, arrived_at, total_at, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of WIDTH sums from where they begin: `total = own + arrived`, rounded to the dtype of `total`."""
    column = tl.arange(0, PADDED)[None, :]
    mask = inside[:, None] & (column < WIDTH)
    x = tl.load(own_at[:, None] + column, mask=mask)
    x += tl.load(arrived_at[:, None] + column, mask=mask)
    tl.store(total_at[:, None] + column, x.to(total_at.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _add_gradients_kernel(
    own_dk, own_dv, arrived, dk, dv, rows, heads,
    own_dk_n, own_dk_h, own_dv_n, own_dv_h, arrived_n, arrived_h, dk_n, dk_h, dv_n, dv_h,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS (token, kv head) pairs. Reads `8 (D + DV)` bytes of each and writes `2 (D + DV)` for bf16."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // heads
    head = row - token * heads
    inside = row < rows
    at = arrived + arrived_n * token + arrived_h * head
    _add_rows(own_dk + own_dk_n * token + own_dk_h * head, at, dk + dk_n * token + dk_h * head, inside, D, DP)
    _add_rows(own_dv + own_dv_n * token + own_dv_h * head, at + D, dv + dv_n * token + dv_h * head, inside, DV, DVP)


def constants(dim: int, dim_v: int) -> dict[str, int]:
    """Sizes of the kernel's tiles."""
    padded, padded_v = configs.padded(dim), configs.padded(dim_v)
    return {"D": dim, "DV": dim_v, "DP": padded, "DVP": padded_v, "ROWS": max(1, _TILE // max(padded, padded_v))}


def add_gradients(own_dk: Tensor, own_dv: Tensor, arrived: list[Tensor], dk: Tensor, dv: Tensor) -> None:
    """dK and dV of home keys and values; see `torch_backend.add_gradients`."""
    if not arrived:
        dk.copy_(own_dk)
        dv.copy_(own_dv)
        return
    tokens, heads, dim = dk.shape
    sizes = constants(dim, dv.shape[2])
    for index, packed in enumerate(arrived):
        last = index == len(arrived) - 1
        total_dk, total_dv = (dk, dv) if last else (own_dk, own_dv)
        if tokens * heads:
            _add_gradients_kernel[(cdiv(tokens * heads, sizes["ROWS"]),)](
                own_dk, own_dv, packed, total_dk, total_dv, tokens * heads, heads,
                *own_dk.stride()[:2], *own_dv.stride()[:2], *packed.stride()[:2], *total_dk.stride()[:2],
                *total_dv.stride()[:2], **sizes, num_warps=WARPS,
            )  # fmt: skip
