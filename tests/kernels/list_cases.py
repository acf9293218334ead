"""Routing lists in the Triton form, made by torch operations and host reads."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_cp.kernels.types import RoutingLists, list_shape


def make_lists(selected: Tensor, n_blocks: int, kv_heads: int, block_size: int) -> RoutingLists:
    """Lists of `selected` `[Hq, T, topk]`: int32 entries, -1 beyond the last one, and some unused items at the end."""
    shape = list_shape(selected, n_blocks, kv_heads, block_size, 2048 if block_size <= 128 else 128)
    head, token, slot = torch.nonzero(selected >= 0, as_tuple=True)
    key = head // shape.group_size * n_blocks + selected[head, token, slot].long()
    key, order = torch.sort(key, stable=True)
    pointer = torch.searchsorted(key, torch.arange(shape.n_bins + 1, device=key.device)).to(torch.int32)
    code = (token << (shape.head_bits + shape.slot_bits)) | (head % shape.group_size << shape.slot_bits) | slot
    entry = torch.full((selected.numel(),), -1, dtype=torch.int32, device=key.device)
    entry[: order.numel()] = code[order].to(torch.int32)
    ends = pointer.tolist()
    per_item = shape.rows_per_item
    items = [(-1, 0, 0)] * (selected.numel() // per_item + shape.n_bins + 3)
    for bin_, (begin, end) in enumerate(zip(ends, ends[1:])):
        for number, at in enumerate(range(begin, end, per_item)):
            items[begin // per_item + bin_ + number] = (bin_, at, min(at + per_item, end))
    return RoutingLists(
        shape, pointer, entry, *torch.tensor(items, dtype=torch.int32, device=key.device).T.contiguous()
    )
