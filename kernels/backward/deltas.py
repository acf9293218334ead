"""delta, the sum of out * dout per row, which the gradient of the softmax subtracts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from ..launch import launch_kernel
from ..sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    out, dout, delta, tokens, out_token, out_head, dout_token, dout_head,
    DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS tokens of one head. Reads 4 * DV bytes per row (bf16 out and dout), writes 4."""
    head = tl.program_id(1)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DV_PADDED)
    mask = (t < tokens)[:, None] & (d < DV)[None, :]
    t64 = t.to(tl.int64)[:, None]
    x = tl.load(out + t64 * out_token + head.to(tl.int64) * out_head + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(dout + t64 * dout_token + head.to(tl.int64) * dout_head + d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    tl.store(delta + head.to(tl.int64) * tokens + t, tl.sum(x * y, 1), mask=t < tokens)


def delta(*, out: Tensor, dout: Tensor) -> Tensor:
    """See `backend.Backend.delta`; fp32.

    Raises:
        ValueError: the last dimension of `out` or `dout` has another stride than 1.
    """
    if out.shape[2] > 1 and (out.stride(2) != 1 or dout.stride(2) != 1):
        raise ValueError(
            f"out and dout must have unit stride in the last dimension, got {out.stride()} and {dout.stride()}"
        )
    tokens, heads, dim_v = out.shape
    result = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    if result.numel():
        config = configs.DELTA
        launch_kernel(delta_kernel, (cdiv(tokens, config.rows), heads),
            out, dout, result, tokens, *out.stride()[:2], *dout.stride()[:2],
            DV=dim_v, DV_PADDED=next_power_of_2(dim_v), ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip
    return result
