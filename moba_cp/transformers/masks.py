"""The mask function: what a model's forward pass tells every attention layer about documents, padding and the cache.

transformers calls it once per forward pass and hands its result to every layer as `attention_mask`. It is None where there is
one document per sample, no padding and no cached token. Where transformers finds packed documents, it is an int16 tensor
`[samples, 1, 1, queries]`, 1 where a document begins. Else it is an int32 tensor `[samples, 1, 1, 2 + queries + 2 * slots]` that
holds `CachedTokens`:

    lengths (1) | before (1) | query_position (queries) | slots (slots) | slot_position (slots)

A tensor of four dimensions passes through transformers as it is: through masks prepared ahead of compiled decoding, device
hooks and checkpointing. The object is attached to it as well, so that its host facts are read once per forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from ..cached import CachedTokens
from ..tracing import without_numbers
from .settings import check_configured


@torch.compiler.disable
def moba_mask(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that `register` gives to transformers; version 4 passes `cache_position`, version 5 `q_offset`.

    Args:
        batch_size, q_length, kv_length: samples, queries per sample, slots of keys per sample.
        q_offset: slot of the first query.
        kv_offset: first slot whose key is kept; other than 0 under sliding windows only.
        mask_function: which keys a query sees; must be the causal one, or that of packed documents.
        attention_mask: bool `[batch_size, slots or fewer]`, False for padding; missing slots are padding.
        cache_position: slots of the queries.
        device: of the result.
        config: the model's, with the settings of `configure`. A model that has attention of its own must not run without a mask.
        **kwargs: `local_size`, `allow_is_bidirectional_skip` and `use_vmap` tell masks apart that are refused.

    Raises:
        ValueError: a mask that MoBA attention does not compute.
    """
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    if q_length is None:
        raise ValueError("the mask function needs q_length or cache_position, got neither")
    # Qwen2-MoE asks for this also where no layer has a window. A layer that had one would refuse the mask.
    if kwargs.get("local_size") == 0:
        return torch.empty(batch_size, 1, 0, 0, dtype=torch.bool, device=device)
    _check_causal(mask_function, attention_mask, kv_offset, kwargs)
    if config is not None:
        check_configured(config.get_text_config(decoder=True))
    if attention_mask is not None:
        device = attention_mask.device
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must have shape [samples, tokens], got {tuple(attention_mask.shape)}")
        if attention_mask.shape[1] > kv_length:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} is longer than the {kv_length} keys")
        if without_numbers(attention_mask):
            return None
    if q_length == kv_length:  # no cached token
        if attention_mask is None and mask_function is not causal_mask_function:
            return _begins(mask_function, batch_size, q_length, device)
        if attention_mask is None or (attention_mask.shape[1] == kv_length and bool(attention_mask.all())):
            return None
        q_offset = 0
    if device is None:
        device = q_offset.device if isinstance(q_offset, Tensor) else torch.device("cpu")
    return pack(
        CachedTokens.of(
            attention_mask, samples=batch_size, queries=q_length, slots=kv_length, offset=q_offset, device=device
        )
    )


def _check_causal(
    mask_function: Callable[..., Any], attention_mask: Tensor | None, kv_offset: int, kwargs: dict[str, Any]
) -> None:
    """Refuse by name what is not causal attention within documents."""
    if kwargs.get("local_size") is not None or kv_offset:
        raise ValueError(f"MoBA attention has no sliding windows or chunks, got local_size={kwargs.get('local_size')}")
    name = getattr(mask_function, "__qualname__", str(mask_function))
    if kwargs.get("allow_is_bidirectional_skip") or "bidirectional" in name:
        raise ValueError(f"MoBA attention is causal, got a bidirectional mask ({name})")
    packed = attention_mask is None and name.startswith("and_masks") and not kwargs.get("use_vmap")
    if mask_function is not causal_mask_function and not packed:
        raise ValueError(
            f"MoBA attention takes no or_mask_function, and_mask_function or blocks of its own, got {name}"
        )


def _begins(mask_function: Callable[..., Any], samples: int, queries: int, device: torch.device | None) -> Tensor:
    """int16 `[samples, 1, 1, queries]`: 1 where a token does not see the one before it."""
    sample, query = (torch.arange(n, device=device) for n in (samples, queries))
    sees = mask_function(sample[:, None], sample.new_zeros(()), query[None, 1:], query[None, :-1])
    begins = torch.ones(samples, queries, dtype=torch.int16, device=device)
    begins[:, 1:] = ~sees
    return begins[:, None, None]


def is_of_documents(mask: Tensor, queries: int) -> bool:
    """Whether `mask` tells packed documents apart; see `_begins`."""
    return mask.dtype == torch.int16 and mask.shape[1:] == (1, 1, queries)


def pack(tokens: CachedTokens) -> Tensor:
    """`tokens` as one tensor of four dimensions, with `tokens` attached."""
    parts = (tokens.lengths[:, None], tokens.before[:, None], tokens.query_position, tokens.slots, tokens.slot_position)
    packed = torch.cat(parts, 1)[:, None, None]
    packed._moba_tokens = tokens  # type: ignore[attr-defined]
    return packed


def unpack(packed: Tensor, queries: int, slots: int) -> CachedTokens:
    """`CachedTokens` of a tensor that `pack` made, also where it has been copied since.

    Raises:
        ValueError: it is some other mask.
    """
    if packed.dtype != torch.int32 or packed.shape[1:] != (1, 1, 2 + queries + 2 * slots):
        raise ValueError(
            "MoBA attention takes masks of shape [samples, tokens] that tell padding, not custom masks; an attention layer "
            f"got {tuple(packed.shape)} {packed.dtype} for {queries} queries and {slots} keys"
        )
    tokens = getattr(packed, "_moba_tokens", None)
    if tokens is None:
        lengths, before, query_position, table, position = packed[:, 0, 0].split([1, 1, queries, slots, slots], 1)
        tokens = CachedTokens(lengths[:, 0], before[:, 0], query_position, table, position)
        packed._moba_tokens = tokens  # type: ignore[attr-defined]
    return tokens
