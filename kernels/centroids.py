"""Centroids of whole blocks: one pass over the keys, fp32 sums in one fixed order, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import next_power_of_2

CHUNK_BYTES = 8192
"""Bytes of keys added in one step of a program: 8 KiB keep four 16-byte loads of each of 128 threads in flight."""


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["start_ptr"])
def _centroids_kernel(
    k_ptr,
    start_ptr,
    out_ptr,
    stride_row,
    stride_head,
    blocks,
    heads,
    BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: the mean of one block's keys of one kv head.

    Reads BLOCK_SIZE x D keys once, writes D numbers. The order of the additions depends on BLOCK_SIZE and D alone: sums
    over the rows r, r + CHUNK, r + 2 CHUNK, ... of the block for each r < CHUNK, then one tree over the CHUNK sums.
    """
    # Neighbouring programs take neighbouring heads of the same rows, so that DRAM pages are read whole.
    program = tl.program_id(0)
    block = program // heads
    head = program % heads
    row = tl.arange(0, CHUNK)
    column = tl.arange(0, PADDED_D)
    start = tl.load(start_ptr + block).to(tl.int64)
    base = k_ptr + start * stride_row + head.to(tl.int64) * stride_head
    total = tl.zeros([CHUNK, PADDED_D], tl.float32)
    for first in tl.range(0, BLOCK_SIZE, CHUNK, num_stages=3):
        pointer = base + (first + row).to(tl.int64)[:, None] * stride_row + column[None, :]
        inside = (column < D)[None, :] & (first + row < BLOCK_SIZE)[:, None]
        total += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    mean = tl.math.div_rn(tl.sum(total, 0), tl.full([PADDED_D], BLOCK_SIZE, tl.float32))
    out = out_ptr + program.to(tl.int64) * D + column
    tl.store(out, mean.to(out_ptr.dtype.element_ty), mask=column < D)


def centroids(k: Tensor, start: Tensor, block_size: int) -> Tensor:
    """Means of whole blocks: accumulated in fp32, rounded once to the dtype of `k`.

    Args:
        k: `[N, H, D]` keys, bf16 or fp16, any token and head stride, unit stride in the last dimension.
        start: int32 `[n]`, row of each block's first key; every block has `block_size` consecutive rows.
        block_size: keys a block.

    Returns:
        `[n, H, D]` in the dtype of `k`.
    """
    _, heads, dim = k.shape
    blocks = start.numel()
    out = torch.empty(blocks, heads, dim, dtype=k.dtype, device=k.device)
    if out.numel() == 0:
        return out
    padded = next_power_of_2(dim)
    chunk = max(min(CHUNK_BYTES // (padded * k.element_size()), next_power_of_2(block_size)), 1)
    _centroids_kernel[(blocks * heads,)](
        k,
        start,
        out,
        k.stride(0),
        k.stride(1),
        blocks,
        heads,
        BLOCK_SIZE=block_size,
        D=dim,
        PADDED_D=padded,
        CHUNK=chunk,
        num_warps=4,
    )
    return out
