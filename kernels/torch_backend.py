"""The primitives in plain torch, for fp64, fp32, bf16 and fp16 on any device; `backend.Backend` describes them.

Readable, and what the Triton kernels are compared with. Partial results have the accumulation dtype (fp64 for fp64 inputs, else
fp32). Log-sum-exps are natural. Loops over blocks read routing lists on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .types import (
    COUNT_TILE,
    DqPartials,
    KVPart,
    Partials,
    QueryRows,
    RoutingLists,
    decode_rows,
    list_shape,
    selection_dtype,
)

NAME = "torch"
_GATE_ROWS = 1024
"""Query rows that `select_blocks` scores at once, so that no `tokens x blocks` tensor exists."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_sizes(*, dim: int, dim_v: int, block_size: int) -> None:
    """See `backend.Backend.check_sizes`: this backend serves all sizes."""


def bytes_per_slot(dim: int, dtype: torch.dtype) -> int:
    """See `backend.Backend.bytes_per_slot`."""
    return accumulate_dtype(dtype).itemsize * (dim + 1)


def dq_bytes(q: Tensor, v: Tensor, block_size: int, n_blocks: int) -> tuple[int, int]:
    """See `backend.Backend.dq_bytes`."""
    return accumulate_dtype(q.dtype).itemsize * q.shape[2], 0


def kept_ds_bytes(q: Tensor, v: Tensor, *, rows: int, kv_heads: int, slots: int, n_blocks: int, block_size: int) -> int:
    """See `backend.Backend.kept_ds_bytes`: this backend keeps none."""
    return 0


def new_partials(selected: Tensor, dim_v: int, dtype: torch.dtype) -> Partials:
    """See `backend.Backend.new_partials`; in the accumulation dtype."""
    acc = accumulate_dtype(dtype)
    out = torch.empty(*selected.shape, dim_v, dtype=acc, device=selected.device)
    return Partials(out, torch.empty(selected.shape, dtype=acc, device=selected.device))


def new_dq_partials(
    selected: Tensor, lists: RoutingLists, q: Tensor, v: Tensor, *, keeps_ds: bool = False
) -> DqPartials:
    """See `backend.Backend.new_dq_partials`; in the accumulation dtype.

    Raises:
        ValueError: gradients of scores are to be kept.
    """
    if keeps_ds:
        raise ValueError("the torch backend keeps no gradients of scores")
    return DqPartials(torch.empty(*selected.shape, q.shape[2], dtype=accumulate_dtype(q.dtype), device=selected.device))


def centroids(k: Tensor, *, start: Tensor, block_size: int) -> Tensor:
    """See `backend.Backend.centroids`."""
    rows = start.long()[:, None] + torch.arange(block_size, device=k.device)
    return ordered_mean(k[rows].to(accumulate_dtype(k.dtype))).to(k.dtype)


def ordered_mean(x: Tensor) -> Tensor:
    """`x.mean(1)` with sums in order: the same bits whatever the strides and sizes of `x`."""
    total = x[:, 0].clone()
    for i in range(1, x.shape[1]):
        total += x[:, i]
    return total / x.shape[1]


def ordered_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with sums in order, one rounded product after the other.

    A BLAS may choose the order of a sum by the size of the matrix or the position in it. Then equal centroids would get
    different scores, and two layouts could select different blocks.
    """
    total = a[..., 0, None] * b[..., 0, None, :]
    for i in range(1, a.shape[-1]):
        total += a[..., i, None] * b[..., i, None, :]
    return total


def select_blocks(q: Tensor, *, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
    """See `backend.Backend.select_blocks`."""
    tokens, q_heads, _ = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    acc = accumulate_dtype(q.dtype)
    selected = torch.full((q_heads, tokens, topk), -1, dtype=selection_dtype(n_blocks), device=q.device)
    selected[:, :, -1] = rows.block
    if topk == 1 or tokens == 0:
        return selected
    for begin in range(0, tokens, _GATE_ROWS):
        end = min(begin + _GATE_ROWS, tokens)
        # Only blocks that are some row's candidate: with many documents, few of all.
        low, high = int(rows.first_block[begin:end].min()), int(rows.block[begin:end].max())
        wanted = min(topk - 1, high - low)
        if wanted == 0:
            continue
        queries = q[begin:end].to(acc).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, t, D]
        keys = centroids[low:high].to(acc).movedim(0, 2)  # [Hkv, D, blocks]
        scores = ordered_matmul(queries, keys[:, None]).flatten(0, 1)  # [Hq, t, blocks]
        number = torch.arange(low, high, device=q.device)
        candidate = (number >= rows.first_block[begin:end, None]) & (number < rows.block[begin:end, None])
        # A stable descending sort over reversed block numbers: of equals the later comes first; torch sorts NaN as greatest.
        # The second sort puts candidates before the rest, whatever their score: a candidate may score -inf.
        order = torch.sort(scores.flip(2), dim=2, descending=True, stable=True).indices
        order = high - low - 1 - order
        allowed = candidate.expand_as(scores).gather(2, order)
        allowed, by_candidate = torch.sort(allowed.to(torch.uint8), dim=2, descending=True, stable=True)
        best = low + order.gather(2, by_candidate)[:, :, :wanted]
        best = best.masked_fill(allowed[:, :, :wanted] == 0, -1).sort(2).values
        selected[:, begin:end, topk - 1 - wanted : topk - 1] = best.to(selected.dtype)
    return selected


def place_selection(listed: Tensor, *, rows: QueryRows, n_blocks: int, slots: int) -> tuple[Tensor, Tensor]:
    """See `backend.Backend.place_selection`."""
    heads, tokens, _ = listed.shape
    last = (rows.block - rows.first_block)[:, None]
    wrong = ((listed < -1) | (listed > last)).any(2) | ((listed == last).sum(2) > 1)
    earlier = listed.masked_fill((listed < 0) | (listed >= last), -1).sort(2).values
    again = torch.zeros_like(earlier, dtype=torch.bool)
    again[:, :, 1:] = (earlier[:, :, 1:] == earlier[:, :, :-1]) & (earlier[:, :, 1:] >= 0)
    earlier = earlier.masked_fill(again, -1).sort(2).values
    wrong |= again.any(2) | ((earlier >= 0).sum(2) > slots - 1)
    selected = torch.full((heads, tokens, slots), -1, dtype=selection_dtype(n_blocks), device=listed.device)
    kept = min(slots - 1, earlier.shape[2])
    chosen = torch.where(earlier >= 0, earlier + rows.first_block[:, None], -1)[:, :, earlier.shape[2] - kept :]
    selected[:, :, slots - 1 - kept : slots - 1] = chosen.to(selected.dtype)
    selected[:, :, -1] = rows.block
    return selected, wrong.sum(dtype=torch.int32)[None]


def wanted_pairs(selected: Tensor, *, n_blocks: int, kv_heads: int) -> Tensor:
    """See `backend.Backend.wanted_pairs`."""
    mask = torch.zeros(kv_heads, n_blocks + 1, dtype=torch.bool, device=selected.device)
    for row, chosen in zip(mask, selected.unflatten(0, (kv_heads, -1)), strict=True):
        row.index_fill_(0, chosen.flatten().long() + 1, True)
    return mask[:, 1:].contiguous()


def route(selected: Tensor, *, n_blocks: int, kv_heads: int, block_size: int) -> RoutingLists:
    """See `backend.Backend.route`; int64 entries and no work items."""
    shape = list_shape(selected, n_blocks, kv_heads, block_size, 0)
    head, token, slot = torch.nonzero(selected >= 0, as_tuple=True)
    bins, order = torch.sort(head // shape.group_size * n_blocks + selected[head, token, slot].long(), stable=True)
    pointer = torch.searchsorted(bins, torch.arange(shape.n_bins + 1, device=bins.device), out_int32=True)
    entry = (token << shape.head_bits | head % shape.group_size) << shape.slot_bits | slot
    return RoutingLists(shape, pointer, entry[order], *pointer.new_empty(3, 0))


def listed_bins(lists: RoutingLists) -> Iterator[tuple[int, int, tuple[Tensor, Tensor, Tensor]]]:
    """Non-empty bins as `(kv head, block, (q head, token, slot))`, the last three int64 `[entries of the bin]`."""
    shape, pointer = lists.shape, lists.pointer.tolist()
    for bin_, (start, end) in enumerate(zip(pointer[:-1], pointer[1:], strict=True)):
        if end > start:
            kv_head, block = divmod(bin_, shape.n_blocks)
            entry = lists.entry[start:end].long()
            slot = entry & ((1 << shape.slot_bits) - 1)
            in_group = (entry >> shape.slot_bits) & ((1 << shape.head_bits) - 1)
            head = kv_head * shape.group_size + in_group
            yield kv_head, block, (head, entry >> (shape.head_bits + shape.slot_bits), slot)


def _held_bins(part: KVPart, lists: RoutingLists) -> Iterator[tuple[tuple[slice, int], tuple[Tensor, Tensor, Tensor]]]:
    """Non-empty bins that the part holds: the index of their keys in `part.k` and `part.v`, and their entries."""
    starts, lengths = part.start.tolist(), part.length.tolist()
    for kv_head, block, entries in listed_bins(lists):
        start = starts[kv_head][block]
        if start >= 0:
            yield (slice(start, start + lengths[block]), kv_head if part.k.shape[1] > 1 else 0), entries


def _visible(rows: QueryRows, token: Tensor, own: Tensor, length: int) -> Tensor:
    """bool `[rows, length]`: keys of a block that each row sees, up to its own position where the block is its `own`."""
    limit = torch.where(own, rows.position[token], length)
    return torch.arange(length, device=token.device) <= limit[:, None]


def attend(q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, scale: float, partials: Partials) -> None:
    """See `backend.Backend.attend`."""
    acc = accumulate_dtype(q.dtype)
    for index, (head, token, slot) in _held_bins(part, lists):
        keys, values = part.k[index].to(acc), part.v[index].to(acc)
        scores = (q[token, head].to(acc) @ keys.T) * scale
        scores = scores.masked_fill(~_visible(rows, token, slot == lists.shape.topk - 1, len(keys)), float("-inf"))
        # A row that scores -inf on the whole block gives it no weight: its partial is 0 and not exp(-inf + inf).
        most = scores.amax(1)
        weightless = most.isneginf()
        weight = torch.exp(scores - most.masked_fill(weightless, 0)[:, None])
        norm = weight.sum(1)
        partials.out[head, token, slot] = (weight @ values) / norm.masked_fill(weightless, 1)[:, None]
        partials.lse[head, token, slot] = most + torch.log(norm)


def merge(partials: Partials, *, selected: Tensor, out: Tensor, lse: Tensor) -> None:
    """See `backend.Backend.merge`."""
    slot_lse = partials.lse.masked_fill(selected < 0, float("-inf"))
    most = slot_lse.amax(2)
    # Divided by their sum: exp(slot_lse - lse) would sum to 1 only within the rounding of lse, which grows with the scores.
    weight = torch.exp(slot_lse - most[:, :, None])
    norm = weight.sum(2)
    lse.copy_(most + torch.log(norm))
    weight /= norm[:, :, None]
    merged = torch.zeros_like(partials.out[:, :, 0])
    for slot in range(selected.shape[2]):
        used = (selected[:, :, slot] >= 0)[:, :, None]
        merged += torch.where(used, weight[:, :, slot, None] * partials.out[:, :, slot], 0)
    out.copy_(merged.transpose(0, 1))


def block_weights(partials: Partials, *, selected: Tensor) -> Tensor:
    """See `backend.Backend.block_weights`."""
    return shares(partials.lse, selected)


def shares(lse: Tensor, selected: Tensor) -> Tensor:
    """`exp(lse)` of the slots of `[Hq, T, slots]` that hold a block, divided by their sum; 0 for the others.

    `exp(lse - row_lse)` would not sum to 1: rounding the log-sum-exp per row adds an error that grows with its magnitude.
    """
    return torch.softmax(lse.masked_fill(selected < 0, -torch.inf), 2).masked_fill(selected < 0, 0.0)


def new_lse(q: Tensor) -> Tensor:
    """See `backend.Backend.new_lse`; natural, in the accumulation dtype."""
    return torch.empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype), device=q.device)


def delta(*, out: Tensor, dout: Tensor) -> Tensor:
    """See `backend.Backend.delta`."""
    acc = accumulate_dtype(out.dtype)
    return (out.to(acc) * dout.to(acc)).sum(-1).T.contiguous()


def attend_backward(
    part: KVPart, lists: RoutingLists, rows: QueryRows, *, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor,
    scale: float, dk: Tensor, dv: Tensor, dq_partials: DqPartials, accumulate: bool,
) -> None:  # fmt: skip
    """See `backend.Backend.attend_backward`."""
    acc = accumulate_dtype(q.dtype)
    if not accumulate:
        dk.zero_()
        dv.zero_()
    for index, (head, token, slot) in _held_bins(part, lists):
        keys, values = part.k[index].to(acc), part.v[index].to(acc)
        queries, gradient = q[token, head].to(acc), dout[token, head].to(acc)
        visible = _visible(rows, token, slot == lists.shape.topk - 1, len(keys))
        scores = (queries @ keys.T) * scale
        weight = torch.exp(scores - lse[head, token, None]).masked_fill(~visible, 0)
        dscore = (weight * (gradient @ values.T - delta[head, token, None])).masked_fill(~visible, 0) * scale
        dv[index] += (weight.T @ gradient).to(dv.dtype)
        dk[index] += (dscore.T @ queries).to(dk.dtype)
        dq_partials.dq[head, token, slot] = dscore @ keys


def add_gradients(*, own_dk: Tensor, own_dv: Tensor, arrived: list[Tensor], dk: Tensor, dv: Tensor) -> None:
    """See `backend.Backend.add_gradients`."""
    dim = own_dk.shape[2]
    for packed in arrived:
        own_dk += packed[..., :dim]
        own_dv += packed[..., dim:]
    dk.copy_(own_dk)
    dv.copy_(own_dv)


def merge_dq(dq_partials: DqPartials, *, selected: Tensor, dq: Tensor) -> None:
    """See `backend.Backend.merge_dq`."""
    total = torch.zeros_like(dq_partials.dq[:, :, 0])
    for slot in range(selected.shape[2]):
        total += torch.where((selected[:, :, slot] >= 0)[:, :, None], dq_partials.dq[:, :, slot], 0)
    dq.copy_(total.transpose(0, 1))


def update_centroids(
    k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, count: Tensor, centroids: Tensor, block_size: int,
    at_most: int,
) -> None:  # fmt: skip
    """See `backend.Backend.update_centroids`."""
    first = torch.arange(count.shape[2], dtype=torch.int32, device=count.device) * COUNT_TILE
    in_tiles = lambda x: (x[:, None] // block_size - first).clamp(0, COUNT_TILE)  # noqa: E731
    known = torch.minimum(count[:, 0], in_tiles(before)).sum(1).tolist()
    complete = (lengths // block_size).tolist()
    for sample, (begin, end) in enumerate(zip(known, complete, strict=True)):
        if end > begin:
            slot = slots[sample, begin * block_size : end * block_size].long().unflatten(0, (-1, block_size))
            centroids[sample, begin:end] = ordered_mean(k[sample, slot].to(accumulate_dtype(k.dtype))).to(k.dtype)
    count.copy_(in_tiles(lengths)[:, None].expand_as(count))


def select_for_decoding(
    q: Tensor, k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor, count: Tensor,
    arrived: Tensor | None, centroids: Tensor, block_size: int, topk: int,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.select_for_decoding`."""
    update_centroids(
        k, slots=slots, before=before, lengths=lengths, count=count, centroids=centroids, block_size=block_size,
        at_most=1,
    )  # fmt: skip
    rows = decode_rows(position, centroids.shape[1], block_size)
    return select_blocks(q, centroids=centroids.flatten(0, 1), rows=rows, topk=topk)


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor,
    count: Tensor, arrived: Tensor | None, centroids: Tensor, block_size: int, topk: int, scale: float,
) -> None:  # fmt: skip
    """See `backend.Backend.decode_step`."""


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, position: Tensor, selected: Tensor, arrived: Tensor | None,
    blocks: int, block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.attend_selected`."""
    acc = accumulate_dtype(q.dtype)
    samples, q_heads, _ = q.shape
    group = q_heads // k.shape[2]
    out = q.new_zeros(samples, q_heads, v.shape[3])
    offset = torch.arange(block_size, device=q.device)
    for sample, last in enumerate(position.tolist()):
        for head in range(q_heads if last >= 0 else 0):
            chosen = selected[head, sample].long()
            at = ((chosen[chosen >= 0] - sample * blocks) * block_size)[:, None] + offset
            slot = slots[sample, at[at <= last]].long()
            keys, values = k[sample, slot, head // group].to(acc), v[sample, slot, head // group].to(acc)
            weight = torch.softmax((keys @ q[sample, head].to(acc)) * scale, 0)
            out[sample, head] = (weight @ values).to(q.dtype)
    return out
