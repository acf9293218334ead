"""MoBA attention as it is defined: a reference to read and to compare with. O(T^2) memory, any device, no process group."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .config import MoBAConfig
from .kernels.torch_backend import accumulate_dtype, ordered_matmul, ordered_mean
from .parallel.layout import SequenceLayout
from .precision import as_given
from .validation import check_config, check_tensors, check_tokens


def moba_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Iterable[int] | Tensor, config: MoBAConfig) -> Tensor:
    """Mixture of Block Attention over packed documents (arXiv 2502.13189, section 2.2), differentiable.

    Args:
        q: `[T, Hq, D]`, fp64, fp32, bf16 or fp16.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]`; `Hq` is a multiple of `Hkv`.
        cu_seqlens: host ints `[documents + 1]`.
        config: block size, top-k, scale.

    Returns:
        `[T, Hq, Dv]` in the dtype of `q`; computed in fp64 for fp64 inputs, in fp32 otherwise. Here a NaN or infinity in `v`
        reaches every row of its document, since a weight of 0 times NaN is NaN.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    layout = SequenceLayout.contiguous(cu_seqlens, 1)
    check_config(config)
    check_tensors(q, k, v)
    check_tokens(q, layout, 0)
    with as_given(q):
        return _attention(q, k, v, layout.cu_seqlens, config)


def _attention(q: Tensor, k: Tensor, v: Tensor, boundaries: tuple[int, ...], config: MoBAConfig) -> Tensor:
    acc = accumulate_dtype(q.dtype)
    group = q.shape[1] // k.shape[1]
    documents = []
    for begin, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        mask = attention_mask(q[begin:end], k[begin:end], config)
        keys = k[begin:end].to(acc).repeat_interleave(group, 1)
        values = v[begin:end].to(acc).repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].to(acc), keys) * config.scale(q.shape[-1])
        weight = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
        documents.append(torch.einsum("hqk,khd->qhd", weight, values).to(q.dtype))
    if documents:
        return torch.cat(documents)
    return q.new_zeros(0, q.shape[1], v.shape[-1]) + (q.sum() + k.sum() + v.sum())  # has their gradients, of no tokens


def attention_mask(q: Tensor, k: Tensor, config: MoBAConfig) -> Tensor:
    """bool `[Hq, L, L]`: which keys each query of one document attends to."""
    tokens, block_size = q.shape[0], config.block_size
    position = torch.arange(tokens, device=q.device)
    chosen = select_blocks(q, k, config)  # [Hq, L, n_blocks]
    return chosen[:, :, position // block_size] & (position <= position[:, None])


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, config: MoBAConfig) -> Tensor:
    """bool `[Hq, L, n_blocks]`: the own block and the `topk - 1` best-scored blocks before it, of one document.

    Equal scores: the later block wins. NaN ranks above every number.
    """
    tokens, q_heads, _ = q.shape
    block_size, acc = config.block_size, accumulate_dtype(q.dtype)
    n_blocks = -(-tokens // block_size)
    own = torch.arange(tokens, device=q.device) // block_size
    chosen = (own[:, None] == torch.arange(n_blocks, device=q.device)).repeat(q_heads, 1, 1)
    complete = tokens // block_size
    whole = k[: complete * block_size].unflatten(0, (complete, block_size)) if complete else k[:0, None]
    centroids = ordered_mean(whole.to(acc)).to(k.dtype)  # rounded once
    centroids = centroids.to(acc).repeat_interleave(q_heads // k.shape[1], 1)
    scores = ordered_matmul(q.to(acc).transpose(0, 1), centroids.permute(1, 2, 0))  # [Hq, L, complete]
    for block in range(1, n_blocks):  # the queries of a block share their candidates: the blocks before it
        rows = slice(block * block_size, (block + 1) * block_size)
        candidates = scores[:, rows, :block].flip(2)  # later blocks first, so that a stable sort prefers them
        order = torch.sort(candidates, dim=2, descending=True, stable=True).indices  # NaN sorts as the greatest
        best = block - 1 - order[:, :, : config.topk - 1]
        chosen[:, rows].scatter_(2, best, True)
    return chosen
