"""Errors of a finished call of `moba_attention` on one rank: of the tensors that were timed, not of a smaller case.

`check_run` compares with fp32, over one document: the selection of every row, output and dq of sampled rows, dk and dv of
sampled blocks. `harness.definition` is for any number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.kernels import backend_for
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.pipeline import device_rows

SAMPLED_ROWS = 24
SAMPLED_BLOCKS = 3
LN2 = 0.6931471805599453


@torch.no_grad()
def check_run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, gradients: tuple[Tensor, ...], lse: Tensor,
    selected: Tensor, config: MoBAConfig,
) -> dict[str, Any]:  # fmt: skip
    """Errors of one call over one document; `lse` and `selected` are what it saved for backward.

    Returns:
        centroid_error_ulp: largest difference from fp64 means, in units of the last place (0.5 is right rounding;
            below 2^-10, where fp32 sums cancel, in those of 2^-10).
        rows, wrong_rows: rows times heads, and how many of them selected blocks that fp32 scores do not allow.
        reordered_rows: rows whose selection differs from fp32 torch within rounding.
        out_error, dq_error, dk_error, dv_error: norm of the difference over the norm of the fp32 value, on samples.
    """
    selected = selected.int()
    if backend_for(q.device, q.dtype).NAME == "triton":
        lse = lse * LN2
    found = check_selection(q, k, selected, config)
    found |= check_rows(q, k, v, dout, out, gradients[0], selected, config)
    found |= check_blocks(q, k, v, dout, out, lse, gradients[1:], selected, config)
    return found


def check_routing(q: Tensor, k: Tensor, config: MoBAConfig) -> dict[str, Any]:
    """`check_selection` of what the kernels select for `q` and `k`, one document, without attention."""
    tokens, size = q.shape[0], config.block_size
    layout = SequenceLayout.contiguous([0, tokens], 1)
    rows = device_rows(rank_plan(home_plan(layout, size), 0), q.device)
    backend, whole, n_blocks = backend_for(q.device, q.dtype), tokens // size, -(-tokens // size)
    start = torch.arange(whole, device=q.device, dtype=torch.int32) * size
    centroids = k.new_zeros(n_blocks, *k.shape[1:])  # a partial block at the end is nobody's candidate
    centroids[:whole] = backend.centroids(k, start=start, block_size=size)
    selected = backend.select_blocks(q, centroids=centroids, rows=rows, topk=min(config.topk, n_blocks))
    return check_selection(q, k, selected.int(), config)


def check_selection(
    q: Tensor, k: Tensor, selected: Tensor, config: MoBAConfig, rows_at_once: int = 4096
) -> dict[str, Any]:
    """Every row's blocks against fp32 scores: the worst selected block may score below the best other one by rounding only."""
    tokens, q_heads, dim = q.shape
    group, size = q_heads // k.shape[1], config.block_size
    whole = tokens // size
    start = torch.arange(whole, device=q.device, dtype=torch.int32) * size
    centroids = backend_for(q.device, q.dtype).centroids(k, start=start, block_size=size)
    means = [x.double().mean(1) for x in k[: whole * size].unflatten(0, (whole, size)).split(max(1, 65536 // size))]
    exact = torch.cat(means) if whole else centroids.double()
    ulp = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2**-10))) + 1) * torch.finfo(k.dtype).eps / 2
    centroid_error = float(((centroids.double() - exact).abs() / ulp).max()) if whole else 0.0
    own, number = torch.arange(tokens, device=q.device) // size, torch.arange(whole, device=q.device)
    wrong, reordered = torch.zeros(2, dtype=torch.int64, device=q.device)
    for head in range(q_heads):
        keys = centroids[:, head // group].float()
        longest = keys.norm(dim=1).amax() if whole else None
        for begin in range(0, tokens, rows_at_once):
            rows = slice(begin, min(begin + rows_at_once, tokens))
            queries, blocks = q[rows, head].float(), own[rows]
            scores = queries @ keys.T
            candidate = number < blocks[:, None]
            chosen = torch.zeros(scores.shape[0], whole + 1, dtype=torch.bool, device=q.device)
            past = selected[head, rows, :-1].long()
            chosen.scatter_(1, torch.where(past < 0, whole, past), True)
            chosen = chosen[:, :whole]
            right = (chosen & ~candidate).sum(1) == 0
            right &= chosen.sum(1) == blocks.clamp(max=config.topk - 1)
            right &= selected[head, rows, -1] == blocks
            right &= (
                (selected[head, rows, 1:] > selected[head, rows, :-1]).logical_or(selected[head, rows, :-1] < 0).all(1)
            )
            if whole:
                lowest = scores.masked_fill(~chosen, float("inf")).amin(1)
                highest = scores.masked_fill(chosen | ~candidate, float("-inf")).amax(1)
                rounding = dim**0.5 * 2.0**-23 * queries.norm(dim=1) * longest
                right &= ~(lowest < highest - rounding)
                reordered += (right & (lowest < highest)).sum()
            wrong += (~right).sum()
    return {
        "centroid_error_ulp": round(centroid_error, 4),
        "rows": tokens * q_heads,
        "wrong_rows": int(wrong),
        "reordered_rows": int(reordered),
    }


def check_rows(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, dq: Tensor, selected: Tensor, config: MoBAConfig
) -> dict[str, float]:
    """Output and dq of sampled rows, all heads, from the keys of their selected blocks in fp32."""
    tokens, q_heads, _ = q.shape
    group, size = q_heads // k.shape[1], config.block_size
    scale = config.scale(q.shape[2])
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, tokens, (SAMPLED_ROWS,), generator=generator).tolist()
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"out_error": [], "dq_error": []}
    for row in sorted({0, tokens - 1, min(size, tokens - 1), *drawn}):
        for head in range(q_heads):
            weight, keys, values = attend_row(
                q[row, head], k[:, head // group], v[:, head // group], selected[head, row], row, size, scale
            )
            result, gradient = weight @ values, dout[row, head].float()
            dscore = weight * (values @ gradient - result @ gradient) * scale
            pairs["out_error"].append((out[row, head].float(), result))
            pairs["dq_error"].append((dq[row, head].float(), dscore @ keys))
    return {name: relative(pair) for name, pair in pairs.items()}


def attend_row(
    query: Tensor, k: Tensor, v: Tensor, blocks: Tensor, row: int, block_size: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition for one row and head of one document, in fp32.

    Args:
        query: `[D]`.
        k, v: `[tokens, D]` and `[tokens, Dv]` of the row's kv head.
        blocks: the row's blocks, in any order; -1 for none.
        row: its position in the document.

    Returns:
        Softmax weights `[n]`, and the `n` keys and values that they belong to.
    """
    within = torch.arange(block_size, device=query.device)
    index = (blocks[blocks >= 0].long()[:, None] * block_size + within).flatten()
    index = index[index <= row]
    keys, values = k[index].float(), v[index].float()
    return torch.softmax(keys @ query.float() * scale, 0), keys, values


def blocks_of_query(q: Tensor, keys: Tensor, position: int, config: MoBAConfig) -> Tensor:
    """bool `[Hq, blocks]`: what a query `[Hq, D]` at `position` of one document selects of its `keys` `[Hkv, tokens, D]`, by the
    definition in fp32."""
    own, group = position // config.block_size, len(q) // len(keys)
    chosen = torch.zeros(len(q), own + 1, dtype=torch.bool, device=q.device)
    chosen[:, own] = True
    if own and config.topk > 1:
        whole = keys[:, : own * config.block_size].unflatten(1, (own, config.block_size))
        means = whole.float().mean(2).to(keys.dtype).float().repeat_interleave(group, 0)  # [Hq, own, D]
        scores = torch.einsum("hd,hbd->hb", q.float(), means)
        chosen.scatter_(1, scores.topk(min(config.topk - 1, own), 1).indices, True)
    return chosen


def attend_query(q: Tensor, keys: Tensor, values: Tensor, position: int, config: MoBAConfig, scale: float) -> Tensor:
    """fp32 `[Hq, Dv]`: the output of that query, by the definition; `values` `[Hkv, tokens, Dv]`."""
    group = len(q) // len(keys)
    rows = []
    for head, chosen in enumerate(blocks_of_query(q, keys, position, config)):
        k, v = keys[head // group], values[head // group]
        weight, _, attended = attend_row(q[head], k, v, chosen.nonzero()[:, 0], position, config.block_size, scale)
        rows.append(weight @ attended)
    return torch.stack(rows)


def check_blocks(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, lse: Tensor, dkv: tuple[Tensor, ...], selected: Tensor,
    config: MoBAConfig,
) -> dict[str, float]:  # fmt: skip
    """dk and dv of sampled blocks, one kv head each, from every row that selected them, in fp32."""
    tokens, q_heads, _ = q.shape
    group, size = q_heads // k.shape[1], config.block_size
    scale, n_blocks = config.scale(q.shape[2]), -(-tokens // size)
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"dk_error": [], "dv_error": []}
    for sample in range(SAMPLED_BLOCKS):
        block = sample * (n_blocks - 1) // max(1, SAMPLED_BLOCKS - 1)
        kv_head = sample % k.shape[1]
        keys = slice(block * size, min((block + 1) * size, tokens))
        position = torch.arange(keys.start, keys.stop, device=q.device)
        key, value = k[keys, kv_head].float(), v[keys, kv_head].float()
        dk, dv = torch.zeros_like(key), torch.zeros_like(value)
        for head in range(kv_head * group, (kv_head + 1) * group):
            rows = (selected[head] == block).any(1).nonzero()[:, 0]
            for some in rows.split(8192):
                query, gradient = q[some, head].float(), dout[some, head].float()
                weight = torch.exp(query @ key.T * scale - lse[head, some, None].float())
                weight = weight.masked_fill(position > some[:, None], 0)
                delta = (out[some, head].float() * gradient).sum(1, keepdim=True)
                dv += weight.T @ gradient
                dk += (weight * (gradient @ value.T - delta)).T @ query * scale
        pairs["dk_error"].append((dkv[0][keys, kv_head].float(), dk))
        pairs["dv_error"].append((dkv[1][keys, kv_head].float(), dv))
    return {name: relative(pair) for name, pair in pairs.items()}


def relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Norm of all differences over the norm of all references."""
    difference = torch.stack([(a - b).norm() for a, b in pairs]).norm()
    return round(float(difference / torch.stack([b.norm() for _, b in pairs]).norm()), 6)
