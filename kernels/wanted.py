"""Which (kv head, block) pairs any row selected: what a rank asks the others for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sizes import cdiv

ENTRIES = 1024


@triton.jit(do_not_specialize=["tokens", "n_blocks", "group", "stride_h", "stride_t"])
def _wanted_kernel(
    selected, wanted, tokens, n_blocks, group, stride_h, stride_t, stride_s, TOPK: tl.constexpr, ENTRIES: tl.constexpr
):
    """One program: ENTRIES (row, slot) of one q head. Reads each entry once and stores a one for each block it finds;
    programs that find the same block store the same byte."""
    head = tl.program_id(1)
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    token = place // TOPK
    block = tl.load(
        selected + head.to(tl.int64) * stride_h + token * stride_t + place % TOPK * stride_s,
        mask=token < tokens,
        other=-1,
    )
    tl.store(wanted + (head // group).to(tl.int64) * n_blocks + block, tl.full([ENTRIES], 1, tl.uint8), mask=block >= 0)


def wanted_pairs(selected: Tensor, n_blocks: int, kv_heads: int) -> Tensor:
    """bool `[Hkv, n_blocks]`: pairs that any row of `selected` `[Hq, T, topk]` selected."""
    q_heads, tokens, topk = selected.shape
    wanted = torch.zeros(kv_heads, n_blocks, dtype=torch.uint8, device=selected.device)
    if selected.numel():
        grid = (cdiv(tokens * topk, ENTRIES), q_heads)
        _wanted_kernel[grid](
            selected, wanted, tokens, n_blocks, q_heads // kv_heads, *selected.stride(), TOPK=topk, ENTRIES=ENTRIES
        )
    return wanted.view(torch.bool)
