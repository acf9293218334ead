"""A Llama-like model with MoBA attention, in plain torch: what FSDP2 and `torch.compile` are measured with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moba_cp import MoBAAttention, MoBAConfig


class Block(nn.Module):
    """One layer of a Llama: norm, q, k, v, rotary positions, MoBA attention, output; norm, gated MLP."""

    def __init__(self, hidden: int, heads: tuple[int, int], config: MoBAConfig, group: DeviceMesh | None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, hidden // heads[0]
        widths = (hidden + 2 * heads[1] * self.head_dim, 2 * hidden * 11 // 4)
        self.norm_1, self.norm_2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, widths[0], bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, widths[1], bias=False), nn.Linear(widths[1] // 2, hidden, bias=False)
        self.attention = MoBAAttention(config, group=group)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` `[T, hidden]`; `cos` and `sin` `[T, 1, head size / 2]`."""
        q_heads, kv_heads = self.heads
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (q_heads + 2 * kv_heads, self.head_dim))
        q, k, v = qkv.split([q_heads, kv_heads, kv_heads], 1)
        x = x + self.out(self.attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v).flatten(1))
        gate, up = self.up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rotary(position: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` `[T, 1, head_dim / 2]` of positions `[T]`."""
    frequency = 5e5 ** -(torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    angle = (position[:, None] * frequency)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Model(nn.Module):
    """A Llama-like language model with MoBA attention in every layer."""

    def __init__(self, vocabulary: int, layers: int, *of_block: Any) -> None:
        super().__init__()
        hidden, heads = of_block[:2]
        self.head_dim: int = hidden // heads[0]
        self.embedding, self.norm = nn.Embedding(vocabulary, hidden), nn.RMSNorm(hidden)
        self.blocks = nn.ModuleList(Block(*of_block) for _ in range(layers))
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """Logits `[T, vocabulary]` of tokens `[T]`."""
        x = self.embedding(ids)
        cos, sin = rotary(position, self.head_dim, x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))
