"""Inputs of `attend`, and the results of plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moba_cp.kernels import torch_backend
from moba_cp.kernels.types import KVPart, Partials, QueryRows, RoutingLists, query_rows
from tests.kernels.list_cases import make_lists

NAN = float("nan")


@dataclass
class Case:
    """Inputs of one call of `attend`."""

    q: Tensor
    part: KVPart
    rows: QueryRows
    selected: Tensor
    scale: float
    block_size: int
    kv_heads: int

    def lists(self) -> RoutingLists:
        return make_lists(self.selected, self.part.length.numel(), self.kv_heads, self.block_size)

    def poisoned_partials(self) -> Partials:
        """Partials filled with NaN, which show the slots that the kernels do not write."""
        shape, dim_v, device = self.selected.shape, self.part.v.shape[2], self.q.device
        out = torch.full((*shape, dim_v), NAN, dtype=self.q.dtype, device=device)
        return Partials(out, torch.full(shape, NAN, device=device))

    def expected(self, part: KVPart | None = None) -> Partials:
        """Partials of plain torch in fp32, log-sum-exp in base 2; NaN where the part does not hold the block."""
        partials = torch_backend.new_partials(self.selected, self.part.v.shape[2], self.q.dtype)
        partials.out.fill_(NAN)
        partials.lse.fill_(NAN)
        blocks = self.part.length.numel()
        lists = torch_backend.route(self.selected, n_blocks=blocks, kv_heads=self.kv_heads, block_size=self.block_size)
        torch_backend.attend(self.q, part or self.part, lists, self.rows, self.scale, partials)
        partials.lse.mul_(math.log2(math.e))
        return partials

    def slice(self, begin: int, end: int) -> Case:
        rows = self.rows.slice(begin, end)
        return replace(self, q=self.q[begin:end], rows=rows, selected=self.selected[:, begin:end])


def make_case(
    lengths, block_size, topk, *, q_heads=2, kv_heads=1, dim=16, dim_v=None, device="cpu", dtype=torch.float32, seed=0,
    order="in order", hot=False, cold=False, strided=False, scale=None,
) -> Case:  # fmt: skip
    """Random inputs over packed documents.

    `order` of the rows: "in order", "reversed", "shuffled" or "zigzag" (the middle quarters swapped). `hot`: every row
    selects its document's first block. `cold`: nobody selects block 1. `strided`: tensors are views with larger strides.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    table = [
        (b, d0, p)
        for d0, n in zip(_first_blocks(lengths, block_size), lengths)
        for b, p in ((d0 + t // block_size, t % block_size) for t in range(n))
    ]
    block, first, position = np.array(table, dtype=np.int64).reshape(-1, 3).T
    tokens = block.size
    index = {
        "in order": np.arange(tokens),
        "reversed": np.arange(tokens)[::-1],
        "shuffled": np.random.default_rng(seed).permutation(tokens),
        "zigzag": np.concatenate(
            np.array_split(np.arange(tokens), 4)[::2] + np.array_split(np.arange(tokens), 4)[1::2]
        ),
    }[order]
    starts, counts = [], []
    at = 0
    for n in lengths:
        for t in range(0, n, block_size):
            starts.append(at + t)
            counts.append(min(block_size, n - t))
        at += n
    n_blocks = len(starts)
    rows = query_rows(block[index], first[index], position[index], device)
    selected = _select(rows, n_blocks, q_heads, topk, hot, cold, generator)

    def tensor(heads, size):
        more = 16 if strided else 0
        x = torch.randn(tokens, heads + (more > 0), size + more, device=device, generator=generator).to(dtype)
        return x[:, :heads, :size]

    start = torch.tensor(starts, dtype=torch.int32, device=device).expand(kv_heads, n_blocks)
    length = torch.tensor(counts, dtype=torch.int32, device=device)
    q, k, v = tensor(q_heads, dim), tensor(kv_heads, dim), tensor(kv_heads, dim_v or dim)
    part = KVPart(k, v, start, length)
    return Case(q, part, rows, selected, dim**-0.5 if scale is None else scale, block_size, kv_heads)


def _first_blocks(lengths, block_size):
    blocks = np.cumsum([0] + [-(-n // block_size) for n in lengths])
    return blocks[:-1].tolist()


def _select(rows, n_blocks, q_heads, topk, hot, cold, generator) -> Tensor:
    device, number = rows.block.device, torch.arange(n_blocks, device=rows.block.device)
    selected = torch.full((q_heads, len(rows), topk), -1, dtype=torch.int32, device=device)
    wanted = min(topk - 1, n_blocks)
    candidate = (number >= rows.first_block[:, None]) & (number < rows.block[:, None])
    if cold:
        candidate &= number != 1
    for head in range(q_heads):
        score = torch.rand(len(rows), n_blocks, device=device, generator=generator)
        score += hot * (number == rows.first_block[:, None])
        best = score.masked_fill(~candidate, -1).topk(wanted, dim=1)
        best = best.indices.masked_fill(best.values < 0, -1).sort(1).values
        selected[head, :, topk - 1 - wanted : topk - 1] = best.to(torch.int32)
        selected[head, :, -1] = rows.block
    return selected


def without(part: KVPart, pairs: slice) -> KVPart:
    """The part without some of its (kv head, block) pairs, which are numbered in order."""
    start = part.start.clone()
    start.view(-1)[pairs] = -1
    return KVPart(part.k, part.v, start, part.length)


def fetched(part: KVPart) -> KVPart:
    """The same pairs in the form of fetched blocks: rows `[N, 1, D]` per pair, last pair first, NaN between pairs."""
    kv_heads, n_blocks = part.start.shape
    start = torch.empty(kv_heads, n_blocks, dtype=torch.int32)
    rows, at = {"k": [], "v": []}, 0
    for pair in reversed(range(kv_heads * n_blocks)):
        head, block = divmod(pair, n_blocks)
        first, count = int(part.start[head, block]), int(part.length[block])
        start[head, block] = at
        for name, x in (("k", part.k), ("v", part.v)):
            rows[name] += [x[first : first + count, head], x.new_full((3, x.shape[2]), NAN)]
        at += count + 3
    k, v = (torch.cat(rows[name])[:, None] for name in ("k", "v"))
    return KVPart(k, v, start.to(k.device), part.length)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference; inf unless both have NaN at the same positions."""
    nan = torch.isnan(expected)
    if not torch.equal(torch.isnan(actual), nan):
        return float("inf")
    actual, expected = actual.double().masked_fill(nan, 0), expected.double().masked_fill(nan, 0)
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
