"""Transformer Engine: whether it is there, and its attention for layers that compute full causal attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from .settings import COMM_PREFIX, MoBASettings


def require_te(what: str, instead: str) -> None:
    """Raise where Transformer Engine is not installed.

    Args:
        what: needs it.
        instead: the setting that does not.

    Raises:
        ImportError: it is not installed; Megatron's own specs then end in a NameError.
    """
    from megatron.core.extensions import transformer_engine as extension

    if not extension.HAVE_TE:
        raise ImportError(
            f"{what} needs Transformer Engine: pip install 'transformer_engine[pytorch]', or set {instead}"
        )


def build_te_attention(
    config: TransformerConfig, layer_number: int, settings: MoBASettings, cp_comm_type: str | None, **arguments: Any
) -> torch.nn.Module:
    """Megatron's ``TEDotProductAttention`` for one layer.

    Args:
        config: the layer's configuration.
        layer_number: 1-based.
        settings: the layer's; Transformer Engine shards zigzag only, and packs sequence by sequence.
        cp_comm_type: the layer's own; ``moba_<comm>`` means nothing to Transformer Engine and becomes its default, ``"p2p"``.
        **arguments: the other arguments that Megatron builds a core attention with.

    Raises:
        ImportError: Transformer Engine is not installed.
        ValueError: another partition under context parallelism.
    """
    from megatron.core.extensions import transformer_engine as extension

    where = f"MoBA attention, layer {layer_number}: full_attention_backend='te'"
    require_te(where, "full_attention_backend='torch'")
    other = {settings.partition, settings.packed_partition} - {"zigzag", None}
    if other and config.context_parallel_size > 1:
        raise ValueError(
            f"{where} takes every context-parallel shard as zigzag, but partition={settings.partition!r} and "
            f"packed_partition={settings.packed_partition!r}; set full_attention_backend='torch'"
        )
    if cp_comm_type is None or cp_comm_type.startswith(COMM_PREFIX):
        cp_comm_type = "p2p"
    return extension.TEDotProductAttention(
        config=config, layer_number=layer_number, cp_comm_type=cp_comm_type, **arguments
    )
