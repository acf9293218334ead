"""Which (kv head, block) pairs any row selected: what a rank requests from the others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch_kernel
from .sizes import cdiv

ENTRIES = 1024
"""Selected slots per program."""


@triton.jit(do_not_specialize=["tokens", "n_blocks", "group", "selected_head", "selected_token"])
def wanted_kernel(
    selected, wanted, tokens, n_blocks, group, selected_head, selected_token, selected_slot,
    TOPK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """One program: ENTRIES (row, slot) pairs of one q head.

    Reads 2 or 4 bytes per pair and writes a 1, one byte, per selected block. Programs that find the same block write the
    same byte.
    """
    head = tl.program_id(1)
    index = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    token = index // TOPK
    block = tl.load(
        selected + head.to(tl.int64) * selected_head + token * selected_token + index % TOPK * selected_slot,
        mask=token < tokens,
        other=-1,
    )
    tl.store(wanted + (head // group).to(tl.int64) * n_blocks + block, tl.full([ENTRIES], 1, tl.uint8), mask=block >= 0)


def wanted_pairs(selected: Tensor, *, n_blocks: int, kv_heads: int) -> Tensor:
    """See `backend.Backend.wanted_pairs`."""
    q_heads, tokens, topk = selected.shape
    wanted = torch.zeros(kv_heads, n_blocks, dtype=torch.uint8, device=selected.device)
    if selected.numel():
        grid = (cdiv(tokens * topk, ENTRIES), q_heads)
        launch_kernel(
            wanted_kernel, grid, selected, wanted, tokens, n_blocks, q_heads // kv_heads, *selected.stride(),
            TOPK=topk, ENTRIES=ENTRIES,
        )  # fmt: skip
    return wanted.view(torch.bool)
