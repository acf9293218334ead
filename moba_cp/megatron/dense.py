"""Full causal attention over a context-parallel group, for layers that do not use MoBA; no Transformer Engine needed.

Each rank gathers the keys and values of the group once, unexpanded, and runs torch's own fused attention for each run of
consecutive tokens that it holds against everything before it in the same document::

    rank 0 of 2, zigzag        keys   0 1 2 3 4 5 6 7
      run 0 1                         # #
      run 6 7                         # # # # # # # #

so no ``tokens x tokens`` mask exists on a GPU, and a zigzag layout keeps the ranks equally busy. Gathered keys and values
take ``2 * tokens * kv heads * d`` elements; in backward their gradients are summed at home, in order of rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from moba_cp import SequenceLayout
from moba_cp.parallel.comm import CommGroup


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Full causal attention within each document of the layout.

    Args:
        q: ``[T, Hq, D]``, this rank's queries in the order of ``layout.local_indices(rank)``.
        k, v: ``[T, Hkv, D]``, its keys and values; ``Hq`` must be a multiple of ``Hkv``.
        softmax_scale: scale of the logits; None for ``D ** -0.5``.
        layout: who holds which token.
        group: the ranks of the layout; None if it has one.

    Returns:
        ``[T, Hq, D]``; differentiable in q, k and v, with gradients summed over the group.

    Raises:
        ValueError: tensors that are not this rank's share of the layout.
    """
    comm = CommGroup(group, layout.cp_size)
    tokens = layout.local_tokens(comm.rank)
    if q.size(0) != tokens or k.shape[:2] != v.shape[:2] or k.size(0) != tokens or q.size(1) % k.size(1):
        raise ValueError(
            f"rank {comm.rank} holds {tokens} tokens, got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    # One collective for both: two could come in another order in the backward pass of another rank.
    gathered = _GatherTokens.apply(torch.cat([k, v], 2), layout, comm)
    k_all, v_all = gathered.split([k.size(2), v.size(2)], 2)
    out = [
        _attend(q[first : first + end - start], k_all[document:end], v_all[document:end], softmax_scale)
        for first, start, end, document in _runs(layout, comm.rank)
    ]
    if out:
        return torch.cat(out)
    # A rank without tokens still takes part in the backward pass of the others.
    return q.new_zeros(0, q.size(1), v.size(2)) + (q.sum() + gathered[:0].sum())


def _runs(layout: SequenceLayout, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of consecutive tokens of one document that ``rank`` holds: first row, first token, end, document's start."""
    indices = layout.local_indices(rank)
    starts = torch.tensor(layout.cu_seqlens[:-1])
    documents = torch.searchsorted(starts, indices, right=True) - 1
    breaks = (indices.diff() != 1) | (documents.diff() != 0)
    cuts = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(indices)]
    for first, last in pairwise(cuts):
        if first < last:
            start = int(indices[first])
            yield first, start, start + last - first, int(starts[documents[first]])


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Tensor:
    """The last queries of ``k``'s tokens against all of them: ``[n, Hq, D]``, ``[m, Hkv, D]`` with ``n <= m``."""
    repeats = q.size(1) // k.size(1)
    if repeats > 1:  # not every kernel behind the call below reads grouped heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    q_htd, k_htd, v_htd = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = causal_lower_right(q.size(0), k.size(0))
    return F.scaled_dot_product_attention(q_htd, k_htd, v_htd, attn_mask=mask, scale=softmax_scale)[0].transpose(0, 1)


class _GatherTokens(torch.autograd.Function):
    """``[T, ...]`` of each rank to ``[all tokens, ...]`` in order of token number; gradients are summed at home."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, comm: CommGroup) -> Tensor:
        ctx.layout, ctx.comm = layout, comm
        if layout.cp_size == 1:
            return layout.unshard([x])
        padded = x.new_zeros(layout.most_local_tokens, *x.shape[1:])
        padded[: x.size(0)] = x
        gathered = comm.all_gather(padded, "dense keys and values").wait()
        return layout.unshard([part[: layout.local_tokens(rank)] for rank, part in enumerate(gathered)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        layout, comm = ctx.layout, ctx.comm
        (gradient,) = gradients
        if layout.cp_size == 1:
            return layout.shard(gradient, 0), None, None
        held = [layout.local_tokens(rank) for rank in range(layout.cp_size)]
        outgoing = torch.cat([layout.shard(gradient, rank) for rank in range(layout.cp_size)])
        mine = held[comm.rank]
        incoming = comm.all_to_all(outgoing, held, [mine] * layout.cp_size, "dense gradients").wait()
        accumulate = torch.promote_types(gradient.dtype, torch.float32)
        total = incoming.unflatten(0, (layout.cp_size, mine)).to(accumulate).sum(0)
        return total.to(gradient.dtype), None, None
