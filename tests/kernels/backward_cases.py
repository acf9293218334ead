"""Inputs of the backward kernels, and the results of plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moba_cp.kernels import torch_backend
from moba_cp.kernels.types import DqPartials, KVPart, QueryRows, RoutingLists, query_rows
from tests.kernels.list_cases import make_lists


@dataclass
class Case:
    """Inputs of one call of `attend_backward`; `lse` in base 2."""

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor
    part: KVPart
    lists: RoutingLists
    rows: QueryRows
    selected: Tensor
    scale: float
    block_size: int
    kv_heads: int


def document_rows(lengths: list[int], block_size: int, device) -> tuple[QueryRows, Tensor, Tensor]:
    """Query rows of complete documents in order, and the first token and length of each block."""
    block, first_block, position, start, length = [], [], [], [], []
    token = 0
    for tokens in lengths:
        first = len(start)
        for t in range(0, tokens, block_size):
            start.append(token + t)
            length.append(min(block_size, tokens - t))
        at = np.arange(tokens)
        block.append(first + at // block_size)
        first_block.append(np.full(tokens, first))
        position.append(at % block_size)
        token += tokens
    join = lambda parts: np.concatenate(parts) if parts else np.zeros(0)  # noqa: E731
    rows = query_rows(join(block), join(first_block), join(position), device)
    ints = lambda x: torch.tensor(x, dtype=torch.int32, device=device)  # noqa: E731
    return rows, ints(start), ints(length)


def random_selection(rows: QueryRows, n_blocks: int, q_heads: int, topk: int, *, hot: bool, cold: bool) -> Tensor:
    """int32 `[Hq, T, topk]` as of `select_blocks`. `hot`: every row selects block 0; `cold`: none selects the middle one."""
    device = rows.block.device
    number = torch.arange(n_blocks, device=device)
    chosen = []
    for _ in range(q_heads):
        score = torch.rand(len(rows), n_blocks, device=device)
        score[:, 0] += 10 * hot
        candidate = (number >= rows.first_block[:, None]) & (number < rows.block[:, None])
        if cold:
            candidate[:, n_blocks // 2] = False
        score = score.masked_fill(~candidate, -1)
        best = score.topk(min(topk - 1, n_blocks), dim=1)
        best = best.indices.masked_fill(best.values < 0, -1).sort(1).values
        pad = torch.full((len(rows), topk - 1 - best.shape[1]), -1, device=device)
        chosen.append(torch.cat([pad, best, rows.block[:, None].long()], 1))
    return torch.stack(chosen).to(torch.int32)


def make_case(
    lengths: list[int], block_size: int, topk: int, *, q_heads=2, kv_heads=1, dim=64, value_dim=None, device="cpu",
    dtype=torch.float32, seed=0, hot=False, cold=False, absent=False, fetched=False, strided=False, scale=None,
) -> Case:  # fmt: skip
    """Random inputs over packed documents.

    `absent`: the part lacks some (kv head, block) pairs. `fetched`: every pair has rows of its own (H = 1). `strided`:
    tensors are views with larger strides.
    """
    torch.manual_seed(seed)
    value_dim = value_dim or dim
    tokens = sum(lengths)
    rows, start, length = document_rows(lengths, block_size, device)
    n_blocks = start.numel()
    selected = random_selection(rows, n_blocks, q_heads, topk, hot=hot, cold=cold)

    def tensor(n, heads, size):
        if strided:
            return torch.randn(n, heads + 1, size + 16, device=device).to(dtype)[:, :heads, :size]
        return torch.randn(n, heads, size, device=device).to(dtype)

    q, dout = tensor(tokens, q_heads, dim), tensor(tokens, q_heads, value_dim)
    k, v = tensor(tokens, kv_heads, dim), tensor(tokens, kv_heads, value_dim)
    whole = KVPart(k, v, start.expand(kv_heads, n_blocks), length)
    scale = scale or dim**-0.5
    lists = torch_backend.route(selected, n_blocks=n_blocks, kv_heads=kv_heads, block_size=block_size)
    partials = torch_backend.new_partials(selected, value_dim, dtype)
    torch_backend.attend(q, whole, lists, rows, scale, partials)
    out, lse = torch.empty_like(dout), torch_backend.new_lse(q)
    torch_backend.merge(partials, selected=selected, out=out, lse=lse)
    part = whole
    if fetched:
        part = per_pair(whole)
    if absent:
        kept = part.start.clone()
        kept.view(-1)[1::3] = -1
        part = KVPart(part.k, part.v, kept, length)
    return Case(
        q, dout, out, lse * math.log2(math.e), torch_backend.delta(out=out, dout=dout), part,
        make_lists(selected, n_blocks, kv_heads, block_size), rows, selected, scale,
        block_size, kv_heads,
    )  # fmt: skip


def per_pair(part: KVPart) -> KVPart:
    """The same part in the form of fetched blocks: one kv head per row, pairs in order with a gap after each."""
    kv_heads, n_blocks = part.start.shape
    start = torch.zeros(kv_heads, n_blocks, dtype=torch.int32)
    source, head, at = [], [], 0
    for h in range(kv_heads):
        for b in range(n_blocks):
            first, count = int(part.start[h, b]), int(part.length[b])
            start[h, b] = at
            source += [*range(first, first + count), 0]
            head += [h] * (count + 1)
            at += count + 1
    device = part.k.device
    index = torch.tensor(source, device=device), torch.tensor(head, device=device)
    return KVPart(part.k[index][:, None], part.v[index][:, None], start.to(device), part.length)


def held_rows(case: Case) -> Tensor:
    """bool `[N, H]`: rows of `part.k` that belong to a pair of the part."""
    held = torch.zeros(case.part.k.shape[:2], dtype=torch.bool)
    for h, starts in enumerate(case.part.start.tolist()):
        for start, length in zip(starts, case.part.length.tolist()):
            if start >= 0:
                held[start : start + length, h if held.shape[1] > 1 else 0] = True
    return held.to(case.q.device)


def written_slots(case: Case) -> Tensor:
    """bool `[Hq, T, topk]`: slots whose block the part holds."""
    group = case.q.shape[1] // case.kv_heads
    start = case.part.start.repeat_interleave(group, 0)
    selected = case.selected.long()
    at = torch.gather(start[:, None].expand(-1, selected.shape[1], -1), 2, selected.clamp(min=0))
    return (selected >= 0) & (at >= 0)


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and partial dq of plain torch, in fp32."""
    dk, dv = (torch.empty(x.shape, device=x.device) for x in (case.part.k, case.part.v))
    dq = torch.full((*case.selected.shape, case.q.shape[2]), float("nan"), device=dk.device)
    n_blocks = case.lists.shape.n_blocks
    lists = torch_backend.route(case.selected, n_blocks=n_blocks, kv_heads=case.kv_heads, block_size=case.block_size)
    torch_backend.attend_backward(
        case.part, lists, case.rows, q=case.q, dout=case.dout, lse=case.lse / math.log2(math.e), delta=case.delta,
        scale=case.scale, dk=dk, dv=dv, dq_partials=DqPartials(dq), accumulate=False,
    )  # fmt: skip
    return dk, dv, dq


def relative(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of the reference, or over 0.1 per element if that is larger."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=0.1 * b.numel() ** 0.5))
