"""The same GPT in plain torch around ``moba_cp.reference``, trained in plain torch: what the Megatron model is held to."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from moba_cp import MoBAConfig, reference

from .batches import document_lengths
from .config import TrainConfig
from .data import PackedText
from .model import moba_settings


class PlainGPT:
    """Weights under Megatron's names, and one optimizer step after the other.

    Args:
        config: sizes, attention and optimizer; everything about parallel groups is ignored. MoBA is in use from the first step
            to the last.
        weights: fp32 parameters of the whole model; copied.
    """

    def __init__(self, config: TrainConfig, weights: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
        section = config.optimizer
        groups = [
            {"params": [w for w in self.weights.values() if w.dim() > 1], "weight_decay": section.weight_decay},
            {"params": [w for w in self.weights.values() if w.dim() == 1], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, betas=(section.beta1, section.beta2), eps=section.eps)

    def loss(self, text: PackedText, first: int, count: int) -> torch.Tensor:
        """Mean loss per token of samples ``first`` to ``first + count``."""
        samples = torch.stack([text.sample(first + i) for i in range(count)])
        tokens, labels = samples[:, :-1], samples[:, 1:].flatten()
        lengths = [tokens.size(1)] * count
        if self.config.data.separate_documents:
            lengths = document_lengths(tokens)
        return F.cross_entropy(self.logits(tokens.flatten(), lengths), labels)

    def step(self, text: PackedText, first: int, learning_rate: float) -> tuple[float, float]:
        """Loss of the global batch from sample ``first`` on and norm of its gradients, before they are clipped."""
        self.adam.zero_grad()
        loss = self.loss(text, first, self.config.run.global_batch_size)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.config.optimizer.clip_grad or math.inf)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        return loss.item(), norm.item()

    def logits(self, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """``[tokens, vocabulary]`` for sequences of these lengths behind each other."""
        model, weights = self.config.model, self.weights
        positions = torch.cat([torch.arange(length) for length in lengths])
        x = weights["embedding.word_embeddings.weight"][tokens]
        for number in range(model.num_layers):
            layer = f"decoder.layers.{number}."
            normed = self._norm(x, layer + "input_layernorm")
            x = x + self._attention(normed, number, positions, lengths)
            hidden = F.linear(self._norm(x, layer + "pre_mlp_layernorm"), weights[layer + "mlp.linear_fc1.weight"])
            if model.swiglu:
                gate, up = hidden.chunk(2, -1)
                hidden = F.silu(gate) * up
            else:
                hidden = F.gelu(hidden)
            x = x + F.linear(hidden, weights[layer + "mlp.linear_fc2.weight"])
        output = "embedding.word_embeddings.weight" if model.tie_embeddings else "output_layer.weight"
        return F.linear(self._norm(x, "decoder.final_layernorm"), weights[output])

    def _attention(self, x: torch.Tensor, number: int, positions: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        model, settings = self.config.model, moba_settings(self.config)
        layer = f"decoder.layers.{number}.self_attention."
        heads, groups = model.num_attention_heads, model.num_query_groups
        dim = model.hidden_size // heads
        qkv = F.linear(x, self.weights[layer + "linear_qkv.weight"]).unflatten(-1, (groups, -1))
        q, k, v = qkv.split([heads // groups * dim, dim, dim], -1)
        q, k = (_rotate(t, positions, model.rotary_base) for t in (q.reshape(len(x), heads, dim), k))
        moba = settings.moba
        if not settings.computes_moba(number + 1, model.num_layers):  # every block of every sequence is selected
            moba = MoBAConfig(moba.block_size, topk=-(-max(lengths) // moba.block_size))
        cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        attended = reference.moba_attention(q, k, v, cu_seqlens, moba).flatten(1)
        return F.linear(attended, self.weights[layer + "linear_proj.weight"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[name + ".weight"]
        if self.config.model.normalization == "RMSNorm":
            return F.rms_norm(x, weight.shape, weight, eps=1e-5)
        return F.layer_norm(x, weight.shape, weight, self.weights[name + ".bias"], eps=1e-5)


def _rotate(x: torch.Tensor, positions: torch.Tensor, base: int) -> torch.Tensor:
    """Rotary embedding of ``[tokens, heads, d]``, halves rotated."""
    half = x.size(-1) // 2
    angles = positions[:, None] / base ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
