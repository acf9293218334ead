"""The Triton kernel of `parallel/head_rows.py`, bound by memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
_TILE = 8192
"""Elements that a program moves."""


@triton.jit(do_not_specialize=["rows", "first", "per_member", "packed_m"])
def _heads_kernel(
    x, packed, rows, first, per_member, x_n, x_h, packed_m,
    COUNT: tl.constexpr, COPIES: tl.constexpr, W: tl.constexpr, W_PADDED: tl.constexpr, ROWS: tl.constexpr,
    PUTS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS (token, head) pairs of one member; reads and writes `W` elements of each once.

    Moves head `(member * per_member + first + j) // COPIES` of `x` to head j of the member in `packed`; with PUTS the other way.
    """
    member = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row // COUNT
    head = (member * per_member + first + row - token * COUNT) // COPIES
    column = tl.arange(0, W_PADDED)[None, :]
    inside = (row < rows)[:, None] & (column < W)
    at_x = x + (token.to(tl.int64) * x_n + head.to(tl.int64) * x_h)[:, None] + column
    at_packed = packed + (member.to(tl.int64) * packed_m + row.to(tl.int64) * W)[:, None] + column
    if PUTS:
        tl.store(at_x, tl.load(at_packed, mask=inside), mask=inside)
    else:
        tl.store(at_packed, tl.load(at_x, mask=inside), mask=inside)


def constants(width: int) -> dict[str, int]:
    """Sizes of a tile."""
    padded = triton.next_power_of_2(width)
    return {"W": width, "W_PADDED": padded, "ROWS": max(1, _TILE // padded)}


def launch(x: Tensor, packed: Tensor, first: int, per_member: int, copies: int, puts: bool) -> None:
    """As `head_rows.take_heads`, or with `puts` as `head_rows.put_heads`; `packed` is contiguous."""
    size, tokens, count, width = packed.shape
    rows = tokens * count
    if not rows:
        return
    sizes = constants(width)
    _heads_kernel[(triton.cdiv(rows, sizes["ROWS"]), size)](
        x, packed, rows, first, per_member, *x.stride()[:2], packed.stride(0), COUNT=count, COPIES=copies, **sizes,
        PUTS=puts, num_warps=WARPS,
    )  # fmt: skip
