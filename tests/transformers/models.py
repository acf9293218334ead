"""Tiny random models of transformers, the same for every test; nothing is downloaded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import sdpa_mask

from moba_cp import MoBAConfig, reference
from moba_cp.transformers import configure

CONFIG = MoBAConfig(block_size=4, topk=3)
VOCABULARY, LAYERS = 64, 3
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What this version of transformers calls a model's cache."""
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}
"""Logits are of order 1 to 10. Sums of other lengths, in fp32, are amplified by three layers of large random weights."""


def tiny(kind: str = "llama", config: MoBAConfig = CONFIG, layers: int = LAYERS, **settings: Any) -> PreTrainedModel:
    """A random model in eval mode, with MoBA; `settings` as for `configure`. Weights are large, so that attention matters."""
    config_class, model_class = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
            bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    configure(model, config, **settings)
    return model


def text(samples: int, tokens: int, seed: int = 0) -> Tensor:
    """Token numbers `[samples, tokens]`, none of them padding."""
    return torch.randint(1, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def new_cache(model: PreTrainedModel, kind: str, slots: int = 64) -> Any:
    """An empty "dynamic" or "static" cache."""
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=slots)


@torch.no_grad()
def in_chunks(model: PreTrainedModel, ids: Tensor, chunks: list[int], cache: Any, **more: Any) -> Tensor:
    """Logits of `ids`, which come in chunks of so many tokens. `attention_mask` and `position_ids` are those of all tokens."""
    mask, positions = more.get("attention_mask"), more.get("position_ids")
    logits, begin = [], 0
    for size in chunks:
        end = begin + size
        here = {CACHE: cache, "use_cache": True}
        if mask is not None:
            here["attention_mask"] = mask[:, :end]
        if positions is not None:
            here["position_ids"] = positions[:, begin:end]
        logits.append(model(ids[:, begin:end], **here).logits)
        begin = end
    return torch.cat(logits, 1)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    """Logits of one forward pass without a cache."""
    return model(ids, use_cache=False, **more).logits


def use_reference(model: PreTrainedModel) -> None:
    """Let the model compute attention by `moba_cp.reference`, one sample after the other, with the same settings."""
    settings = model.config.moba

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        moba = module.layer_idx < LAYERS - settings["full_last"]
        config = MoBAConfig(settings["block_size"], settings["topk"] if moba else 10**6, scaling)
        samples = [
            reference.moba_attention(*(x.transpose(0, 1) for x in sample), [0, query.shape[2]], config)
            for sample in zip(query, key, value, strict=True)
        ]
        return torch.stack(samples), None

    AttentionInterface.register("moba_reference", attend)
    AttentionMaskInterface.register("moba_reference", sdpa_mask)
    model.set_attn_implementation("moba_reference")
