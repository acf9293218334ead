"""A GPT with grouped-query attention, RoPE, RMSNorm and SwiGLU; fp32 weights, bf16 arithmetic, tied head.

What stands around attention is three functions of tensors alone: `before`, `after` and `token_losses`. Each is compiled once
and serves all layers; attention itself runs outside the compiled code.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moba_cp import MoBAReport, SequenceLayout

from .attention import Attention, attend


@dataclass(frozen=True)
class Sizes:
    """The model.

    Attributes:
        head_dim: of a head; need not be `hidden / heads`.
        rope_theta: RoPE's base.
        qk_norm: divide each query and key by its root mean square before RoPE.
        zero_residual: layers begin as the identity: what they add to the residual stream begins at zero.
        logit_scale: factor of the logits, learnt per q head, at the start; None for none. With `qk_norm` alone no logit
            exceeds `head_dim ** 0.5`, which over 16K keys leaves little weight for a single one.
        rope_share: share of the pairs of dimensions that RoPE rotates, those of the highest frequencies.
    """

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    qk_norm: bool = False
    zero_residual: bool = False
    logit_scale: float | None = None
    rope_share: float = 1.0

    def __post_init__(self) -> None:
        if self.logit_scale is not None and not self.logit_scale > 0:
            raise ValueError(f"logit_scale must be positive, got {self.logit_scale}")
        if not 0 < self.rope_share <= 1:
            raise ValueError(f"rope_share must be in (0, 1], got {self.rope_share}")

    @property
    def rotated(self) -> int:
        """Pairs of dimensions that RoPE rotates."""
        return round(self.rope_share * self.head_dim / 2)

    def rope_period(self) -> float:
        """Tokens of a full turn of the slowest pair that is rotated."""
        return 2 * math.pi * self.rope_theta ** ((self.rotated - 1) / (self.head_dim // 2))


class Layer(nn.Module):
    """Weights of one layer, fp32."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(s.hidden)), nn.Parameter(torch.ones(s.hidden))
        self.qkv = nn.Parameter(torch.empty((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden))
        self.out = nn.Parameter(torch.empty(s.hidden, s.heads * s.head_dim))
        self.up = nn.Parameter(torch.empty(2 * s.mlp, s.hidden))
        self.down = nn.Parameter(torch.empty(s.hidden, s.mlp))
        self.scale = None if s.logit_scale is None else nn.Parameter(torch.full((s.heads,), float(s.logit_scale)))


class GPT(nn.Module):
    """The model.

    Args:
        sizes: its sizes.
        seed: of the initial weights, drawn on the CPU: equal on every device.
        compiled: run `before`, `after` and `token_losses` through `torch.compile`.
        dtype: of the arithmetic.
    """

    def __init__(self, sizes: Sizes, seed: int, *, compiled: bool, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype
        self.embedding = nn.Parameter(torch.empty(sizes.vocabulary, sizes.hidden))
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith((".out", ".down"))
                of_residual = 0.0 if sizes.zero_residual else 0.02 / (2 * sizes.layers) ** 0.5
                nn.init.normal_(weight, std=of_residual if residual else 0.02, generator=generator)
        self.fast = [
            torch.compile(f, dynamic=False, fullgraph=True) if compiled else f for f in (before, after, token_losses)
        ]

    def weights_hash(self) -> str:
        """SHA-256 of all weights."""
        digest = hashlib.sha256()
        for weight in self.parameters():
            digest.update(weight.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def hidden(
        self,
        tokens: Tensor,
        attention: tuple[Attention, ...],
        layout: SequenceLayout,
        length: int,
        *,
        group: dist.ProcessGroup | None = None,
        theta: float | None = None,
        compiled: bool = True,
        reports: list[MoBAReport] | None = None,
    ) -> Tensor:
        """Last hidden states `[T, hidden]`, before the last norm.

        Args:
            tokens: `[T]`, this rank's tokens of packed sequences of `length` tokens.
            attention: one per layer.
            layout: of the sequences over the group.
            length: tokens per sequence.
            group: the context-parallel group.
            theta: RoPE's base; None for the model's own.
            compiled: False runs the plain functions, for shapes that occur once.
            reports: gets one report per MoBA layer.
        """
        s = self.sizes
        if len(attention) != s.layers:
            raise ValueError(f"attention must have {s.layers} entries, got {len(attention)}")
        rank = dist.get_rank(group) if layout.cp_size > 1 else 0
        positions = (layout.local_indices(rank) % length).to(tokens.device, torch.float32)
        half = torch.arange(s.head_dim // 2, device=tokens.device, dtype=torch.float32) / (s.head_dim // 2)
        frequencies = torch.where(half < s.rotated / (s.head_dim // 2), (theta or s.rope_theta) ** -half, 0.0)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        pre, post, _ = self.fast if compiled else (before, after, token_losses)
        x = F.embedding(tokens, self.embedding).to(self.dtype)
        for layer, spec in zip(self.layers, attention):
            q, k, v = pre(x, layer.norm1, layer.qkv, cos, sin, s.heads, s.kv_heads, s.head_dim, s.qk_norm, layer.scale)
            attended = attend(spec, q, k, v, layout, length, group, reports)
            x = post(x, attended, layer.out, layer.norm2, layer.up, layer.down)
        return x

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy `[T]`, fp32, of `targets [T]` given hidden states."""
        return self.fast[2](x, self.norm, self.embedding, targets)


def before(
    x: Tensor,
    norm: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    dim: int,
    qk_norm: bool,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[T, heads, dim]`, k and v `[T, kv_heads, dim]` of `x [T, hidden]`.

    q and k are rotated; before that both are normalised with `qk_norm`, and q is multiplied by `scale [heads]`, if any.
    """
    projected = F.linear(rms_norm(x, norm), qkv.to(x.dtype)).unflatten(1, (-1, dim))
    q, k, v = projected.split([heads, kv_heads, kv_heads], 1)
    q, k = (unit_rms(y) if qk_norm else y.float() for y in (q, k))
    q = q if scale is None else q * scale[:, None]
    return rotate(q, cos, sin).to(x.dtype), rotate(k, cos, sin).to(x.dtype), v.contiguous()


def after(x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The residual stream after attention's projection and the MLP."""
    x = x + F.linear(attended.flatten(1), out.to(x.dtype))
    gate, value = F.linear(rms_norm(x, norm), up.to(x.dtype)).chunk(2, 1)
    return x + F.linear(F.silu(gate) * value, down.to(x.dtype))


def token_losses(x: Tensor, norm: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits(x, norm, embedding).float(), targets, reduction="none")


def logits(x: Tensor, norm: Tensor, embedding: Tensor) -> Tensor:
    return F.linear(rms_norm(x, norm), embedding.to(x.dtype))


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (unit_rms(x) * weight).to(x.dtype)


def unit_rms(x: Tensor) -> Tensor:
    """fp32, each last dimension divided by its root mean square."""
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of fp32 `[T, H, D]`, halves rotated; `cos` and `sin` are `[T, D / 2]`."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
