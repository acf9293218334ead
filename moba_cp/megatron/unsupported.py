"""Megatron options and flags that MoBA attention cannot honour. Each is refused when the layer is built, by name."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType

_GRAPHS = "only a layer on one rank can be captured, and Megatron's CUDA graphs were never run with it: turn them off"

# (config attribute, values under which it is off, what to do)
_REFUSED_OPTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("attention_dropout", (None, 0, 0.0), "set attention_dropout=0 (--attention-dropout 0)"),
    ("window_size", (None,), "MoBA chooses its own blocks: remove the sliding window"),
    ("window_attn_skip_freq", (None,), "MoBA chooses its own blocks: remove the sliding window"),
    (
        "softmax_type",
        (None, "vanilla"),
        "attention sinks in the softmax are not implemented: use softmax_type='vanilla'",
    ),
    ("multi_latent_attention", (None, False), "MLA is not supported: use ordinary or grouped-query attention"),
    ("experimental_attention_variant", (None,), "another attention variant is chosen: use one of the two"),
    ("apply_query_key_layer_scaling", (None, False), "set apply_query_key_layer_scaling=False"),
    ("qk_clip", (None, False), "QK-clip needs the largest logits, which MoBA attention does not record"),
    ("log_max_attention_logit", (None, False), "MoBA attention does not record the largest logits"),
    ("fp8_dot_product_attention", (None, False), "attention runs in bf16 or fp32: set fp8_dot_product_attention=False"),
    ("fp8_multi_head_attention", (None, False), "attention runs in bf16 or fp32: set fp8_multi_head_attention=False"),
    ("enable_cuda_graph", (None, False), _GRAPHS),
    ("external_cuda_graph", (None, False), _GRAPHS),
    ("cuda_graph_impl", (None, "none"), _GRAPHS),
    ("flash_decode", (None, False), "inference with a key-value cache is not supported"),
    ("use_kitchen_attention", (None, False), "MoBA takes the place of Kitchen's attention: turn it off"),
    ("mtp_num_layers", (None, 0), "multi-token-prediction layers would silently get stock attention: turn them off"),
)


# Flags of Megatron-LM and of programs built on it: (attribute of the parsed arguments, flag, only under context parallelism,
# why and what to do)
_REFUSED_FLAGS: tuple[tuple[str, str, bool, str], ...] = (
    (
        "dataloader_inter_document_masking",
        "--dataloader-inter-document-masking",
        True,
        "it cuts the pack as a whole, but Megatron's rotary embedding takes every document as cut by itself: use "
        "--context-parallel-size 1, or packed data that is cut document by document (--sft)",
    ),
    (
        "reset_attention_mask",
        "--reset-attention-mask",
        False,
        "it works through mask tensors, which MoBA attention does not take: use packed sequences "
        "(--dataloader-inter-document-masking or --sft)",
    ),
    (
        "allgather_cp",
        "--allgather-cp",
        True,
        "it cuts the pack as a whole, but Megatron's rotary embedding takes every sequence as cut by itself: leave it out",
    ),
)


def refuse_flags(arguments: Any, cp_size: int) -> None:
    """Raise for a flag of the training script that cannot be honoured together with MoBA.

    Args:
        arguments: Megatron's parsed arguments.
        cp_size: context-parallel size of the model.

    Raises:
        ValueError: names the flag and what to do.
    """
    for name, flag, sharded_only, advice in _REFUSED_FLAGS:
        if not getattr(arguments, name, False) or (sharded_only and cp_size == 1):
            continue
        if name == "dataloader_inter_document_masking" and getattr(arguments, "sft", False):
            continue  # --sft decides how packs are cut
        raise ValueError(
            f"MoBA attention: {flag} is not supported{f' with {cp_size} ranks' if sharded_only else ''}; {advice}"
        )


def refuse_unsupported(config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str) -> None:
    """Raise if the layer is asked for anything that MoBA attention does not compute.

    Args:
        config: Megatron's ``TransformerConfig``.
        layer_number: 1-based number of the layer, for the message.
        attn_mask_type: mask of the layer; only causal ones are supported.
        attention_type: ``"self"`` is the only one supported.

    Raises:
        ValueError: names the option, its value and what to do.
    """
    where = f"MoBA attention, layer {layer_number}"
    if attention_type != "self":
        raise ValueError(f"{where}: attention_type={attention_type!r} is not supported, only 'self' is")
    if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
        raise ValueError(
            f"{where}: attn_mask_type={attn_mask_type} is not supported, only AttnMaskType.causal is "
            "(padding belongs in packed_seq_params)"
        )
    for name, off, advice in _REFUSED_OPTIONS:
        value = getattr(config, name, None)
        if not any(value is allowed or value == allowed for allowed in off):
            raise ValueError(f"{where}: {name}={value!r} is not supported; {advice}")


def refuse_dynamic_batching() -> None:
    """Make layers with MoBA refuse inference with dynamic batching, for the rest of the process. Calling it again does nothing.

    Megatron's attention hands queries and the key-value cache of such a batch to FlashAttention and never asks its core
    attention, so a model trained with MoBA would answer with full attention. Layers of other kinds are not touched.
    """
    original = Attention.flash_decode_and_prefill
    if getattr(original, "refuses_moba", False):
        return

    @functools.wraps(original)
    def flash_decode_and_prefill(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.core_attention, "computes_moba", False):
            raise ValueError(
                f"MoBA attention, layer {self.layer_number}: inference with dynamic batching is not supported, it would "
                "compute full attention in place of MoBA"
            )
        return original(self, *args, **kwargs)

    vars(flash_decode_and_prefill)["refuses_moba"] = True
    Attention.flash_decode_and_prefill = flash_decode_and_prefill


def refuse_extra(where: str, arguments: dict[str, Any]) -> None:
    """Raise for keyword arguments that carry a value and that nothing here honours (None and False ask for nothing).

    Raises:
        TypeError: names the arguments and their values.
    """
    given = {name: value for name, value in arguments.items() if value is not None and value is not False}
    if given:
        listed = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
        raise TypeError(f"{where} does not support {listed}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{type(value).__name__} object"
