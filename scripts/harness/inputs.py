"""Random inputs of the layer: q, k, v and the gradient of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout

HEAD_DIM = 128
"""Head size of all benchmarks: D = Dv."""


_DRAWN_TOGETHER = 4096
"""Tokens that one generator of `draw_global` draws."""


def draw_inputs(
    tokens: int, q_heads: int, kv_heads: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout: bf16 N(0, 1), `[tokens, heads, HEAD_DIM]`, drawn in this order from one generator."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16, generator=generator)

    return draw(q_heads), draw(kv_heads), draw(kv_heads), draw(q_heads)


def draw_global(
    layout: SequenceLayout, rank: int, q_heads: int, kv_heads: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout of a rank's tokens: bf16 N(0, 1), `[tokens, heads, HEAD_DIM]`.

    A token's numbers depend on its number alone, so that every layout and rank count holds the same global tensors.
    """
    number = layout.local_indices(rank)
    order = torch.argsort(number)
    ascending = number[order]
    tokens = len(number)
    tensors = [
        torch.empty(tokens, n, HEAD_DIM, device=device, dtype=torch.bfloat16)
        for n in (q_heads, kv_heads, kv_heads, q_heads)
    ]
    chunks, counts = torch.unique_consecutive(ascending // _DRAWN_TOGETHER, return_counts=True)
    begin = 0
    for chunk, count in zip(chunks.tolist(), counts.tolist(), strict=True):
        rows, inside = (
            order[begin : begin + count].to(device),
            (ascending[begin : begin + count] % _DRAWN_TOGETHER).to(device),
        )
        generator = torch.Generator(device).manual_seed(chunk)
        for x in tensors:
            drawn = torch.randn(_DRAWN_TOGETHER, *x.shape[1:], device=device, dtype=torch.bfloat16, generator=generator)
            x[rows] = drawn[inside]
        begin += count
    return tensors[0], tensors[1], tensors[2], tensors[3]


def correlate(q: Tensor, k: Tensor, layout: SequenceLayout, rank: int, config: MoBAConfig) -> None:
    """Make routing like that of trained models, in place: queries near each other select the same few blocks.

    The keys of a block share a direction. The queries of a block share the directions of block 0, of the block before them
    and of `topk` earlier blocks, which come from a sixteenth of all blocks. One document; the same for every head.
    """
    shared = torch.Generator(q.device).manual_seed(0)
    n_blocks = -(-layout.total_tokens // config.block_size)
    direction = torch.randn(n_blocks, q.shape[2], device=q.device, generator=shared) * 0.5
    picked = torch.rand(n_blocks, config.topk, device=q.device, generator=shared)
    block = torch.arange(n_blocks, device=q.device)
    popular = (picked * block[:, None]).long() // 16 * 16
    popular = torch.cat([popular, (block - 1).clamp(min=0)[:, None], torch.zeros_like(popular[:, :1])], 1)
    own = layout.local_indices(rank).to(q.device) // config.block_size
    k += direction[own][:, None].to(k.dtype)
    q += direction[popular].sum(1)[own][:, None].to(q.dtype)
