"""Small configurations of Megatron-Core that several tests build models from."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig


def transformer_config(**changes: Any) -> TransformerConfig:
    """Two layers, 4 q heads and 2 kv heads, without what needs apex, Transformer Engine or a GPU."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**(settings | changes))


def packed_params(lengths: tuple[int, ...], padded: tuple[int, ...], **changes: Any) -> PackedSeqParams:
    """Packed sequences with these boundaries, without and with padding."""
    true, held = torch.tensor(lengths), torch.tensor(padded)
    bounds = {"cu_seqlens_q": true, "cu_seqlens_kv": true, "cu_seqlens_q_padded": held, "cu_seqlens_kv_padded": held}
    return PackedSeqParams(**({"qkv_format": "thd"} | bounds | changes))
