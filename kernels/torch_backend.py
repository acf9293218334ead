"""The primitives in plain torch: fp64, fp32, bf16 or fp16 on any device; readable, and what the Triton kernels must equal.

Arithmetic is fp64 for fp64 inputs and fp32 for all others. Partial results are kept in that precision. Log-sum-exps are
natural here; they never leave the backend except to come back in its own backward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .types import KVPart, QueryRows, selection_dtype

NAME = "torch"
_GATE_ROWS = 1024
"""Query rows scored at once by `select_blocks`, so that it never holds a `tokens x blocks` tensor."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of sums over inputs of `dtype`: fp64 for fp64, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_sizes(dim: int, value_dim: int, block_size: int) -> None:
    """Raise ValueError for sizes that this backend does not serve: there are none."""


@dataclass(frozen=True)
class RoutingLists:
    """CSR by (kv head, block): which query rows visit which block.

    Attributes:
        pointer: host list of `kv_heads * n_blocks + 1` offsets into the entries, bins in (kv head, block) order.
        token, head, slot: int64 `[entries]`, the row's token, its q head (inside the heads at work) and its slot in
            `selected`; inside a bin sorted by (head, token).
        n_blocks: blocks a head.
    """

    pointer: list[int]
    token: Tensor
    head: Tensor
    slot: Tensor
    n_blocks: int

    def bins(self):
        """Non-empty bins as `(kv head, block, slice of the entries)`."""
        for bin_ in range(len(self.pointer) - 1):
            start, end = self.pointer[bin_], self.pointer[bin_ + 1]
            if end > start:
                yield bin_ // self.n_blocks, bin_ % self.n_blocks, slice(start, end)


@dataclass(frozen=True)
class Partials:
    """One partial result for each (q head, row, slot).

    Attributes:
        out: `[Hq, T, topk, Dv]` normalised partial outputs (forward), or `[Hq, T, topk, D]` partial dq (backward).
        lse: `[Hq, T, topk]` log-sum-exps of the partial's scaled scores; empty in backward.
    """

    out: Tensor
    lse: Tensor


def bytes_per_slot(dim: int, dtype: torch.dtype) -> int:
    """Workspace bytes that one (q head, row, slot) takes for partials of last size `dim`."""
    return accumulate_dtype(dtype).itemsize * (dim + 1)


def new_partials(selected: Tensor, dim: int, dtype: torch.dtype, *, backward: bool = False) -> Partials:
    """Room for the partials of `selected` `[Hq, T, topk]`; `dtype` is the inputs'."""
    acc = accumulate_dtype(dtype)
    out = torch.empty(*selected.shape, dim, dtype=acc, device=selected.device)
    lse = torch.empty(selected.shape if not backward else (0,), dtype=acc, device=selected.device)
    return Partials(out, lse)


def centroids(k: Tensor, start: Tensor, block_size: int) -> Tensor:
    """Means of whole blocks: accumulated in fp32 (fp64 for fp64), rounded once to the dtype of `k`.

    Args:
        k: `[N, H, D]` keys.
        start: int32 `[n]`, row of each block's first key; every block has `block_size` consecutive rows.
        block_size: keys a block.

    Returns:
        `[n, H, D]` in the dtype of `k`.
    """
    rows = start.long()[:, None] + torch.arange(block_size, device=k.device)
    return ordered_mean(k[rows].to(accumulate_dtype(k.dtype))).to(k.dtype)


def ordered_mean(x: Tensor) -> Tensor:
    """`x.mean(1)` with every sum taken in order: the same bits whatever the strides and sizes of `x`."""
    total = x[:, 0].clone()
    for i in range(1, x.shape[1]):
        total += x[:, i]
    return total / x.shape[1]


def ordered_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with every sum taken in order, one rounded product after the other.

    A BLAS may add in another order with the size of a matrix or the place in it. Then equal centroids would not score
    alike, and two layouts could select different blocks.
    """
    total = a[..., 0, None] * b[..., 0, None, :]
    for i in range(1, a.shape[-1]):
        total += a[..., i, None] * b[..., i, None, :]
    return total


def select_blocks(q: Tensor, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
    """For each q head and row: its own block and the `topk - 1` best-scored blocks before it in its document.

    Scores are `<q, centroid>`, unscaled. Equal scores: the later block wins; NaN ranks above every number.

    Args:
        q: `[T, Hq, D]`.
        centroids: `[n_blocks, Hkv, D]`; the rows of blocks that no query may choose are never looked at.
        rows: where the `T` rows stand.
        topk: blocks a row attends to at most, own block counted.

    Returns:
        int16 `[Hq, T, topk]`, or int32 where int16 cannot count the blocks: block numbers ascending, so the own block is
        last; -1 first where there are fewer.
    """
    tokens, q_heads, _ = q.shape
    n_blocks, kv_heads, _ = centroids.shape
    acc = accumulate_dtype(q.dtype)
    selected = torch.full((q_heads, tokens, topk), -1, dtype=selection_dtype(n_blocks), device=q.device)
    selected[:, :, -1] = rows.block
    if topk == 1 or tokens == 0:
        return selected
    for begin in range(0, tokens, _GATE_ROWS):
        end = min(begin + _GATE_ROWS, tokens)
        # Only blocks that some row here may choose: with many documents, a small part of all.
        low, high = int(rows.first_block[begin:end].min()), int(rows.block[begin:end].max())
        wanted = min(topk - 1, high - low)
        if wanted == 0:
            continue
        queries = q[begin:end].to(acc).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [Hkv, G, t, D]
        keys = centroids[low:high].to(acc).movedim(0, 2)  # [Hkv, D, blocks]
        scores = ordered_matmul(queries, keys[:, None]).flatten(0, 1)  # [Hq, t, blocks]
        number = torch.arange(low, high, device=q.device)
        candidate = (number >= rows.first_block[begin:end, None]) & (number < rows.block[begin:end, None])
        # Descending and stable over reversed block numbers: the later of equals comes first; torch sorts NaN as greatest.
        # Candidates before the rest, whatever their score: a candidate may score -inf.
        order = torch.sort(scores.flip(2), dim=2, descending=True, stable=True).indices
        order = high - low - 1 - order
        allowed = candidate.expand_as(scores).gather(2, order)
        allowed, by_candidate = torch.sort(allowed.to(torch.uint8), dim=2, descending=True, stable=True)
        best = low + order.gather(2, by_candidate)[:, :, :wanted]
        best = best.masked_fill(allowed[:, :, :wanted] == 0, -1).sort(2).values
        selected[:, begin:end, topk - 1 - wanted : topk - 1] = best.to(selected.dtype)
    return selected


def wanted_pairs(selected: Tensor, n_blocks: int, kv_heads: int) -> Tensor:
    """bool `[Hkv, n_blocks]`: (kv head, block) pairs that any row of `selected` `[Hq, T, topk]` selected."""
    mask = torch.zeros(kv_heads, n_blocks + 1, dtype=torch.bool, device=selected.device)
    for row, chosen in zip(mask, selected.unflatten(0, (kv_heads, -1)), strict=True):
        row.index_fill_(0, chosen.flatten().long() + 1, True)
    return mask[:, 1:].contiguous()


def route(selected: Tensor, n_blocks: int, kv_heads: int, block_size: int) -> RoutingLists:
    """Routing lists of `selected` `[Hq, T, topk]` (the q heads of `kv_heads` kv heads), for `attend` and its backward."""
    q_heads = selected.shape[0]
    head, token, slot = torch.nonzero(selected >= 0, as_tuple=True)
    kv_head = head // (q_heads // kv_heads)
    bins, order = torch.sort(kv_head * n_blocks + selected[head, token, slot].long(), stable=True)
    pointer = torch.searchsorted(bins, torch.arange(kv_heads * n_blocks + 1, device=bins.device))
    return RoutingLists(pointer.tolist(), token[order], head[order], slot[order], n_blocks)


def _tile(part: KVPart, kv_head: int, block: int, starts: list[list[int]], lengths: list[int]):
    """Index of a (kv head, block) pair's keys in `part.k` and `part.v`, or None where the part lacks it."""
    start = starts[kv_head][block]
    if start < 0:
        return None
    return slice(start, start + lengths[block]), kv_head if part.k.shape[1] > 1 else 0


def _visible(rows: QueryRows, token: Tensor, block: int, length: int) -> Tensor:
    """bool `[rows, length]`: keys of the block at or before each row's token (all of them in an earlier block)."""
    limit = torch.where(rows.block[token] == block, rows.position[token], length)
    return torch.arange(length, device=token.device) <= limit[:, None]


def attend(
    q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, selected: Tensor, scale: float, partials: Partials
) -> None:
    """Attention of every routed row to every block of the part: one normalised partial and log-sum-exp a (row, block).

    Args:
        q: `[T, Hq, D]`, the heads at work.
        part: keys and values; pairs it does not hold are left for another part.
        lists: `route(selected, ...)`.
        rows: where the rows stand.
        selected: `[Hq, T, topk]` of `select_blocks`.
        scale: factor on the scores.
        partials: `new_partials(selected, Dv, q.dtype)`; written at the slots of this part's blocks.
    """
    acc = accumulate_dtype(q.dtype)
    starts, lengths = part.start.tolist(), part.length.tolist()
    for kv_head, block, entries in lists.bins():
        index = _tile(part, kv_head, block, starts, lengths)
        if index is None:
            continue
        token, head, slot = lists.token[entries], lists.head[entries], lists.slot[entries]
        keys, values = part.k[index].to(acc), part.v[index].to(acc)
        scores = (q[token, head].to(acc) @ keys.T) * scale
        scores = scores.masked_fill(~_visible(rows, token, block, lengths[block]), float("-inf"))
        # A block that only scores -inf weighs nothing: its partial is 0 and not exp(-inf + inf).
        most = scores.amax(1)
        weightless = most.isneginf()
        weight = torch.exp(scores - most.masked_fill(weightless, 0)[:, None])
        norm = weight.sum(1)
        partials.out[head, token, slot] = (weight @ values) / norm.masked_fill(weightless, 1)[:, None]
        partials.lse[head, token, slot] = most + torch.log(norm)


def merge(partials: Partials, selected: Tensor, out: Tensor, lse: Tensor) -> None:
    """Weighted sum of the partials in block order.

    Args:
        partials: of `attend`, every slot with `selected >= 0` written.
        selected: `[Hq, T, topk]` of `select_blocks`.
        out: `[T, Hq, Dv]`, written.
        lse: `[Hq, T]`, written: log-sum-exp over all keys of the row.
    """
    slot_lse = partials.lse.masked_fill(selected < 0, float("-inf"))
    most = slot_lse.amax(2)
    # Divided by their sum: exp(slot_lse - lse) sums to 1 only to the rounding of lse, which is that of large scores.
    weight = torch.exp(slot_lse - most[:, :, None])
    norm = weight.sum(2)
    lse.copy_(most + torch.log(norm))
    weight /= norm[:, :, None]
    merged = torch.zeros_like(partials.out[:, :, 0])
    for slot in range(selected.shape[2]):
        used = (selected[:, :, slot] >= 0)[:, :, None]
        merged += torch.where(used, weight[:, :, slot, None] * partials.out[:, :, slot], 0)
    out.copy_(merged.transpose(0, 1))


def new_lse(q: Tensor) -> Tensor:
    """Room for the log-sum-exps of `q` `[T, Hq, D]`: `[Hq, T]`."""
    return torch.empty(q.shape[1], q.shape[0], dtype=accumulate_dtype(q.dtype), device=q.device)


def delta(out: Tensor, dout: Tensor) -> Tensor:
    """`sum(out * dout)` over the last dimension: `[T, Hq, Dv]` twice -> `[Hq, T]`."""
    acc = accumulate_dtype(out.dtype)
    return (out.to(acc) * dout.to(acc)).sum(-1).T.contiguous()


def attend_backward(
    q: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    part: KVPart,
    lists: RoutingLists,
    rows: QueryRows,
    selected: Tensor,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    dq_partials: Partials,
    accumulate: bool,
) -> None:
    """Gradients of `attend` followed by `merge`, one part at a time.

    Args:
        q, dout: `[T, Hq, D]`, `[T, Hq, Dv]`.
        lse, delta: `[Hq, T]`, of `merge` and `delta`.
        part, lists, rows, selected, scale: as in `attend`.
        dk, dv: of the shapes of `part.k`, `part.v`; every row of a pair in the part is written (zeros where no row
            wants it), or added to with `accumulate`. Their dtype may be the accumulation dtype or the keys'.
        dq_partials: `new_partials(selected, D, q.dtype, backward=True)`, written at the slots of this part's blocks.
        accumulate: add to `dk` and `dv` instead of writing them.
    """
    acc = accumulate_dtype(q.dtype)
    starts, lengths = part.start.tolist(), part.length.tolist()
    if not accumulate:
        dk.zero_()
        dv.zero_()
    for kv_head, block, entries in lists.bins():
        index = _tile(part, kv_head, block, starts, lengths)
        if index is None:
            continue
        token, head, slot = lists.token[entries], lists.head[entries], lists.slot[entries]
        keys, values = part.k[index].to(acc), part.v[index].to(acc)
        queries, gradient = q[token, head].to(acc), dout[token, head].to(acc)
        visible = _visible(rows, token, block, lengths[block])
        scores = (queries @ keys.T) * scale
        weight = torch.exp(scores - lse[head, token, None]).masked_fill(~visible, 0)
        dscore = (weight * (gradient @ values.T - delta[head, token, None])).masked_fill(~visible, 0) * scale
        dv[index] += (weight.T @ gradient).to(dv.dtype)
        dk[index] += (dscore.T @ queries).to(dk.dtype)
        dq_partials.out[head, token, slot] = dscore @ keys


def add_gradients(own_dk: Tensor, own_dv: Tensor, arrived: list[Tensor], dk: Tensor, dv: Tensor) -> None:
    """dK and dV of this rank's blocks: its own share and those of other ranks, added in order and rounded once.

    Args:
        own_dk, own_dv: `[N, H, D]`, `[N, H, Dv]` in the accumulation dtype; their contents are lost.
        arrived: `[N, H, D + Dv]` each, of the same dtype.
        dk, dv: where the sums go, in the dtype of the keys and values; any strides of the first two dimensions.
    """
    dim = own_dk.shape[2]
    for packed in arrived:
        own_dk += packed[..., :dim]
        own_dv += packed[..., dim:]
    dk.copy_(own_dk)
    dv.copy_(own_dv)


def merge_dq(dq_partials: Partials, selected: Tensor, dq: Tensor) -> None:
    """Sum of the partial dq in block order into `dq` `[T, Hq, D]`."""
    total = torch.zeros_like(dq_partials.out[:, :, 0])
    for slot in range(selected.shape[2]):
        total += torch.where((selected[:, :, slot] >= 0)[:, :, None], dq_partials.out[:, :, slot], 0)
    dq.copy_(total.transpose(0, 1))
