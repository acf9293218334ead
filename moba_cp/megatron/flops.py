"""Floating-point operations of a training step with MoBA counted as what it computes, and the share of a GPU's peak.

One multiplication with its addition counts as two operations, a backward pass as twice its forward pass, and nothing that
is computed a second time (recomputation, scores in the kernels' backward) counts at all: the usual meaning of model FLOPs.
Norms, rotary embedding, softmax and top-k are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moba_cp import MoBAConfig

#: Dense bf16 operations per second by a part of the device's name (NVIDIA's datasheets, SXM modules).
_PEAK_BF16 = {"H100 80GB HBM3": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step, forward and backward, over all ranks.

    Attributes:
        linear: the layers' matrices.
        attention: queries with the keys they attend to, and weights with the values.
        scoring: queries with centroids; only forward, since no gradient passes through the choice of blocks.
        logits: the output layer.
    """

    linear: int
    attention: int
    scoring: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.scoring + self.logits


def step_flops(
    config: Any, moba: MoBAConfig, lengths: Iterable[int], padded_vocab_size: int, moba_layers: int | None = None
) -> StepFlops:
    """Operations of one training step of a dense GPT with MoBA attention.

    Args:
        config: Megatron's ``TransformerConfig`` of the whole model, or anything with its names for sizes.
        moba: block size and top-k.
        lengths: tokens of every document or sequence of the step's global batch.
        padded_vocab_size: rows of the output layer.
        moba_layers: layers that compute MoBA; the others compute full causal attention. None: all.

    Raises:
        ValueError: more MoBA layers than layers, or a mixture of experts.
    """
    layers = config.num_layers
    moba_layers = layers if moba_layers is None else moba_layers
    if not 0 <= moba_layers <= layers:
        raise ValueError(f"moba_layers={moba_layers} must be between 0 and {layers}, the number of layers")
    if getattr(config, "num_moe_experts", None):
        raise ValueError(f"num_moe_experts={config.num_moe_experts}: operations of experts are not counted")
    lengths = list(lengths)
    tokens, hidden, heads = sum(lengths), config.hidden_size, config.num_attention_heads
    dim = getattr(config, "kv_channels", None) or hidden // heads
    kv_heads = getattr(config, "num_query_groups", None) or heads
    up = 2 if config.gated_linear_unit else 1
    matrices = hidden * dim * (2 * heads + 2 * kv_heads) + hidden * config.ffn_hidden_size * (up + 1)
    pairs = moba_layers * attended_pairs(lengths, moba) + (layers - moba_layers) * causal_pairs(lengths)
    return StepFlops(
        linear=3 * 2 * tokens * layers * matrices,
        attention=3 * 2 * 2 * heads * dim * pairs,
        scoring=2 * heads * dim * moba_layers * scored_pairs(lengths, moba),
        logits=3 * 2 * tokens * hidden * padded_vocab_size,
    )


def attended_pairs(lengths: Iterable[int], moba: MoBAConfig) -> int:
    """(query, key) pairs of one head: ``min(topk - 1, earlier blocks)`` whole blocks per query, and its own up to itself."""
    size = moba.block_size
    total = 0
    for length in lengths:
        blocks, rest = divmod(length, size)
        own = blocks * _up_to(size) + _up_to(rest)
        earlier = size * _capped_sum(blocks, moba.topk - 1) + rest * min(blocks, moba.topk - 1)
        total += own + size * earlier
    return total


def scored_pairs(lengths: Iterable[int], moba: MoBAConfig) -> int:
    """(query, centroid) pairs of one head: every earlier block of the document, which decides nothing if ``topk`` is 1."""
    if moba.topk == 1:
        return 0
    size = moba.block_size
    total = 0
    for length in lengths:
        blocks, rest = divmod(length, size)
        total += size * _up_to(blocks - 1) + rest * blocks
    return total


def causal_pairs(lengths: Iterable[int]) -> int:
    """(query, key) pairs of one head under full causal attention."""
    return sum(_up_to(length) for length in lengths)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device's datasheet states for dense bf16; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """The same by the device's name."""
    return next((peak for part, peak in _PEAK_BF16.items() if part in name), None)


def _up_to(n: int) -> int:
    """1 + 2 + ... + n; 0 for n below 1."""
    return n * (n + 1) // 2 if n > 0 else 0


def _capped_sum(n: int, cap: int) -> int:
    """``min(0, cap) + min(1, cap) + ... + min(n - 1, cap)``."""
    full = min(n, cap + 1)
    return _up_to(full - 1) + (n - full) * cap
