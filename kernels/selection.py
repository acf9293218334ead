"""A caller's own selection, brought into the form that lists, kernels and merge read; see `types` for that form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, torch_backend
from .launch import launch_kernel
from .sizes import cdiv, next_power_of_2
from .types import QueryRows, selection_dtype

MOST_LISTED = 128
"""Most blocks per row that `place_kernel` sorts in registers; longer rows are sorted by torch."""


@triton.jit(
    do_not_specialize=["tokens", "listed_head", "listed_token"],
    do_not_specialize_on_alignment=["listed", "own_block", "first_block"],
)
def place_kernel(
    listed, own_block, first_block, selected, faults, tokens, listed_head, listed_token, listed_slot,
    K: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one head of the caller's selection, K block numbers each.

    Reads K numbers and 8 bytes per row, writes SLOTS block numbers per row, and adds the number of rows that break a rule to
    `faults`. What breaks a rule is left out, so that every number written is a block that the row may read.
    """
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < tokens
    column = tl.arange(0, WIDTH)
    own = tl.load(own_block + row, mask=valid, other=0)
    first = tl.load(first_block + row, mask=valid, other=0)
    last = (own - first)[:, None]
    pointer = listed + head * listed_head + row[:, None] * listed_token + column[None, :] * listed_slot
    number = tl.load(pointer, mask=valid[:, None] & (column < K)[None, :], other=-1)
    wrong = tl.max(((number < -1) | (number > last)).to(tl.int32), 1)
    wrong += (tl.sum((number == last).to(tl.int32), 1) > 1).to(tl.int32)
    earlier = tl.sort(tl.where((number >= 0) & (number < last), number, -1).to(tl.int32))
    before = tl.gather(earlier, tl.maximum(column - 1, 0)[None, :] + tl.zeros([ROWS, WIDTH], tl.int32), 1)
    again = (earlier >= 0) & (earlier == before) & (column > 0)[None, :]
    wrong += tl.max(again.to(tl.int32), 1)
    earlier = tl.sort(tl.where(again, -1, earlier))
    wrong += (tl.sum((earlier >= 0).to(tl.int32), 1) > SLOTS - 1).to(tl.int32)
    slot = column - (WIDTH - SLOTS + 1)
    chosen = tl.where(earlier >= 0, earlier + first[:, None], -1).to(selected.dtype.element_ty)
    row_selected = selected + (head * tokens + row) * SLOTS
    tl.store(row_selected[:, None] + slot[None, :], chosen, mask=valid[:, None] & (slot >= 0)[None, :])
    tl.store(row_selected + SLOTS - 1, own.to(selected.dtype.element_ty), mask=valid)
    found = tl.sum(((wrong > 0) & valid).to(tl.int32), 0)
    if found > 0:
        tl.atomic_add(faults, found, sem="relaxed")


def place_selection(listed: Tensor, *, rows: QueryRows, n_blocks: int, slots: int) -> tuple[Tensor, Tensor]:
    """See `backend.Backend.place_selection`."""
    heads, tokens, count = listed.shape
    if count > MOST_LISTED or slots > MOST_LISTED:
        return torch_backend.place_selection(listed, rows=rows, n_blocks=n_blocks, slots=slots)
    selected = torch.empty(heads, tokens, slots, dtype=selection_dtype(n_blocks), device=listed.device)
    faults = torch.zeros(1, dtype=torch.int32, device=listed.device)
    if selected.numel():
        width = max(next_power_of_2(count), next_power_of_2(slots), 2)
        tile = max(1, configs.PLACED_ENTRIES // width)
        launch_kernel(place_kernel, (cdiv(tokens, tile), heads),
            listed, rows.block, rows.first_block, selected, faults, tokens, *listed.stride(), K=count, SLOTS=slots,
            WIDTH=width, ROWS=tile,
        )  # fmt: skip
    return selected, faults
