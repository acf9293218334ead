"""Centroids of whole blocks: one pass over the keys, fp32 sums in one fixed order, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import launch_kernel
from .sizes import next_power_of_2


@triton.jit(do_not_specialize_on_alignment=["start"])
def centroids_kernel(
    k, start, out, k_row, k_head, heads,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: the mean of one block's keys of one kv head, KEYS of them at a time.

    Reads 2 * BLOCK * D bytes once, writes 2 * D. The order of the additions depends on BLOCK and D only: for each r < KEYS the
    sum over the rows r, r + KEYS, r + 2 KEYS, ... of the block, then one tree over the KEYS sums.
    """
    # Neighbouring programs take neighbouring heads of the same rows, so that DRAM pages are read in full.
    program = tl.program_id(0)
    block = program // heads
    head = program % heads
    row = tl.arange(0, KEYS)
    column = tl.arange(0, D_PADDED)
    first_key = tl.load(start + block).to(tl.int64)
    base = k + first_key * k_row + head.to(tl.int64) * k_head
    total = tl.zeros([KEYS, D_PADDED], tl.float32)
    for first in tl.range(0, BLOCK, KEYS, num_stages=3):
        pointer = base + (first + row).to(tl.int64)[:, None] * k_row + column[None, :]
        inside = (column < D)[None, :] & (first + row < BLOCK)[:, None]
        total += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    mean = tl.math.div_rn(tl.sum(total, 0), tl.full([D_PADDED], BLOCK, tl.float32))
    out_at = out + program.to(tl.int64) * D + column
    tl.store(out_at, mean.to(out.dtype.element_ty), mask=column < D)


def centroids(k: Tensor, *, start: Tensor, block_size: int) -> Tensor:
    """See `backend.Backend.centroids`."""
    _, heads, dim = k.shape
    blocks = start.numel()
    out = torch.empty(blocks, heads, dim, dtype=k.dtype, device=k.device)
    if out.numel() == 0:
        return out
    config = configs.centroids(dim, block_size, k.element_size())
    launch_kernel(centroids_kernel, (blocks * heads,),
        k, start, out, k.stride(0), k.stride(1), heads, BLOCK=block_size, D=dim,
        D_PADDED=next_power_of_2(dim), KEYS=config.keys, num_warps=config.num_warps,
    )  # fmt: skip
    return out
