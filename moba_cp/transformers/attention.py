"""The attention function that transformers calls in every layer: MoBA, or full causal attention in layers that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..attention import moba_attention
from ..cached import CachedTokens, CentroidCache, moba_attention_cached
from ..config import MoBAConfig
from ..dense import causal_attention
from ..parallel.comm import process_group_of
from ..parallel.layout import SequenceLayout
from ..tracing import infer_output, without_numbers
from ..validation import RefusedTogether, check_layout, check_placement
from . import kept, masks
from .settings import Settings, settings_of

REFUSED = ("sliding_window", "softcap", "s_aux", "sinks", "position_bias", "head_mask", "indices", "block_indices")
"""Arguments of attention functions that change its meaning, and that MoBA attention does not have."""


@torch.compiler.disable
def moba_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    moba_layout: SequenceLayout | None = None,
    moba_group: dist.ProcessGroup | None = None,
    moba_centroids: CentroidCache | None = None,
    moba_cached_tokens: CachedTokens | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MoBA attention for an attention module of transformers.

    Args:
        module: its `config` has the settings of `configure`, its `layer_idx` counts layers from 0.
        query: `[samples, Hq, queries, D]`.
        key, value: `[samples, Hkv, slots, D]`, `[samples, Hkv, slots, Dv]`, not expanded to `Hq`.
        attention_mask: of `moba_mask`.
        scaling: factor on the scores; None for `D ** -0.5`.
        dropout: must be 0.
        position_ids: `[samples or 1, queries]`. Without a mask and a cache, a document begins wherever a position is not one
            more than the position before it; with padding, wherever positions do not increase from one content token to the next.
        cu_seq_lens_q, cu_seq_lens_k: int `[documents + 1]`, where documents begin; instead of positions, for one sample.
        moba_layout, moba_group: the sample is this rank's part of a sequence under context parallelism. They reach this
            function as arguments of the model's forward pass, with `position_ids` in each token's document.
        moba_centroids, moba_cached_tokens: of the keys in the cache, and the tokens that they are of; from a hook on the module.
        **kwargs: others are for other attention functions. Those that would change the result are refused.

    Returns:
        `[samples, queries, Hq, Dv]`, and None in place of attention weights.

    Raises:
        ValueError: what MoBA attention does not compute, named; with `moba_layout`, on every rank.
    """
    documents = None
    if attention_mask is not None and masks.is_of_documents(attention_mask, query.shape[2]):
        documents, attention_mask = attention_mask, None
    if moba_layout is None:
        settings, moba, config = _settings(module, scaling, dropout, kwargs)
    else:
        with RefusedTogether(moba_layout, moba_group, query, key, value):
            settings, moba, config = _settings(module, scaling, dropout, kwargs)
            if attention_mask is not None or query.shape[0] != 1 or query.shape[2] != key.shape[2]:
                shapes = [tuple(x.transpose(1, 2).shape) for x in (query, key)]
                raise ValueError(
                    f"moba_layout needs one sample without padding and without a cache, got q {shapes[0]}, k {shapes[1]}"
                )
            if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
                raise ValueError("give cu_seq_lens or moba_layout, not both: the layout says where documents begin")
            if position_ids is not None:
                _refuse_default_positions(position_ids, query, cast(int, module.layer_idx), moba_layout, moba_group)
    cached_key = key
    query, key, value = _as_autocast_wants(query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [samples, tokens, heads, head size]
    if without_numbers(q, k, v):
        return infer_output(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, q.shape[:2]), None
    if moba_layout is not None:
        return _attend(moba, q[0], k[0], v[0], config, moba_layout, moba_group)[None], None
    if moba_group is not None:
        raise ValueError("moba_group needs moba_layout, which says which of the sequence's tokens this rank holds")
    if attention_mask is None:
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"{q.shape[1]} queries and {k.shape[1]} keys need the mask of moba_mask, got none: cross-attention, or a "
                "cache that transformers makes no masks for"
            )
        ends = _documents(q, cast(int, module.layer_idx), documents, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        layout = SequenceLayout.contiguous(ends, 1)
        out = _attend(moba, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), config, layout)
        kept.hook(module)
        return out.unflatten(0, q.shape[:2]), None
    if cu_seq_lens_q is not None:
        raise ValueError("give cu_seq_lens or a mask with padding, not both")
    if attention_mask.shape[0] != q.shape[0]:
        raise ValueError(f"the mask is of {attention_mask.shape[0]} samples, the queries of {q.shape[0]}")
    tokens = masks.unpack(attention_mask, q.shape[1], k.shape[1])
    kept.hook(module)
    decoding = q.shape[1] == 1 and k.shape[1] > 1
    if not decoding and tokens.host.whole:
        ends = _ends_of_content(tokens, cast(int, module.layer_idx), position_ids)
        return _prefill(moba, q, k, v, config, tokens, ends), None
    if not moba or (decoding and settings.decode == "full"):
        return _full_from_cache(query, key, value, tokens, scaling), None
    centroids = moba_centroids
    if centroids is None or kept.moved(tokens, moba_cached_tokens):
        centroids = CentroidCache()
    if not centroids.fits(k, config.block_size):  # autocast was switched in between, or `configure` called
        centroids = CentroidCache()
    out = moba_attention_cached(q, k, v, config, tokens=tokens, centroids=centroids)
    kept.keep(cached_key, centroids, tokens)
    return out, None


def _as_autocast_wants(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, `tensors` in its dtype, as for torch's own attention; fp64 stays.

    Projections leave q, k and v in autocast's dtype, but rotary embeddings in fp32 take q and k out of it again.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


@lru_cache(maxsize=64)
def _config(block_size: int, topk: int, scaling: float | None) -> MoBAConfig:
    """The same object for the same values: decoding asks for one in every layer of every token."""
    return MoBAConfig(block_size, topk, scaling)


def _settings(
    module: nn.Module, scaling: float | None, dropout: float, kwargs: dict[str, Any]
) -> tuple[Settings, bool, MoBAConfig]:
    """The model's settings, whether this layer computes MoBA, and its configuration; what MoBA does not compute is refused."""
    _refuse(module, dropout, kwargs)
    settings, moba = settings_of(module)
    return settings, moba, _config(settings.block_size, settings.topk, scaling)


def _refuse(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise ValueError for what MoBA attention does not compute."""
    if dropout:
        raise ValueError(
            f"MoBA attention has no dropout, got {dropout}: set config.attention_dropout, or what the model calls it, to 0"
        )
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise ValueError(f"MoBA attention has no {name}, got {_shown(kwargs[name])}")
    if kwargs.get("output_attentions"):
        raise ValueError("MoBA attention makes no attention weights, got output_attentions=True")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            f"MoBA attention is causal: {type(module).__name__} computes cross-attention or bidirectional one"
        )


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _attend(
    moba: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """MoBA or full causal attention of `[T, H, D]` within the documents of `layout`; differentiable."""
    if moba:
        return moba_attention(q, k, v, config, layout=layout, group=group)
    return causal_attention(q, k, v, config.softmax_scale, layout=layout, group=group)


def _documents(
    q: Tensor,
    layer: int,
    documents: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> Sequence[int]:
    """Ends of the documents of `q` `[samples, tokens, Hq, D]` of one layer, samples one after the other, from 0. `documents`: a
    mask that tells them apart."""
    samples, tokens = q.shape[:2]
    for name, x in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if cu_seq_lens_q is None and cu_seq_lens_k is not None:
        raise ValueError("give cu_seq_lens_q with cu_seq_lens_k: queries and keys have the same documents")
    if cu_seq_lens_q is not None:
        if samples != 1:
            raise ValueError(f"cu_seq_lens are for one sample, got {samples}")
        if cu_seq_lens_k is None or cu_seq_lens_k is cu_seq_lens_q:
            return _on_host(cu_seq_lens_q, layer, "ends", lambda x: x.tolist())
        ends, of_keys = (_on_host(x, layer, "ends", lambda x: x.tolist()) for x in (cu_seq_lens_q, cu_seq_lens_k))
        if ends != of_keys:
            raise ValueError(f"queries and keys must have the same documents, got {ends} and {of_keys}")
        return ends
    if documents is not None:
        begin = _on_host(documents, layer, "begins", lambda x: x.flatten().nonzero()[:, 0].tolist())
        return [*begin, samples * tokens]
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        return [tokens * i for i in range(samples + 1)]
    begins = _on_host(position_ids, layer, "begins", _begins)
    if len(begins) == 1:
        begins = begins * samples
    elif len(begins) != samples:
        raise ValueError(f"position_ids are of {len(begins)} samples, the queries of {samples}")
    return [tokens * i + begin for i, of_sample in enumerate(begins) for begin in of_sample] + [tokens * samples]


def _refuse_default_positions(
    position_ids: Tensor, query: Tensor, layer: int, layout: SequenceLayout, group: dist.ProcessGroup | None
) -> None:
    """Refuse positions 0, 1, ... of this rank's tokens, which a model makes where it is given none, if its tokens are not as far
    apart in their documents. `query`: `[1, Hq, tokens, D]`."""
    check_layout(layout)
    group = process_group_of(group)
    check_placement(query[0].transpose(0, 1), layout, group)
    tokens = query.shape[2]
    if without_numbers(position_ids) or position_ids.shape != (1, tokens):
        return
    rank = dist.get_rank(group) if layout.cp_size > 1 else 0

    def read(x: Tensor) -> list[bool]:
        default = bool((x[0] == torch.arange(tokens, device=x.device)).all())
        return [default and not _are_as_in_documents(np.arange(tokens), layout, rank)]

    if _on_host(position_ids, layer, "default", read) == [True]:
        raise ValueError(
            f"moba_layout needs position_ids of this rank's tokens, each from its document's first token: rank {rank} got 0 to "
            f"{tokens - 1}, which are not those of {layout!r}"
        )


def _are_as_in_documents(position: np.ndarray, layout: SequenceLayout, rank: int) -> bool:
    """Whether `position` of the tokens of `rank` is that in their documents, or, of documents that `rank` holds whole, as far
    apart."""
    ends, number = layout.cu_seqlens_array, layout.local_indices(rank).numpy()
    document = np.searchsorted(ends, number, side="right") - 1
    shift = position - (number - ends[document])
    here, first, count = np.unique(document, return_index=True, return_counts=True)
    whole = count == np.diff(ends)[here]
    expected = np.where(whole, shift[first], 0)
    return bool((shift == expected[np.searchsorted(here, document)]).all())


def _begins(position_ids: Tensor) -> list[list[int]]:
    """Of each sample, the tokens that begin a document."""
    found = []
    for row in position_ids.cpu().numpy():
        begins = np.flatnonzero(np.diff(row) != 1) + 1
        found.append([0, *begins.tolist()])
    return found


def _ends_of_content(tokens: CachedTokens, layer: int, position_ids: Tensor | None) -> Sequence[int]:
    """Ends of the documents of a padded batch, padding left out, samples one after the other, from 0."""
    content = tokens.host.query_position >= 0  # [samples, queries]
    ends = {0, *np.cumsum(tokens.host.lengths).tolist()}
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == content.shape[1]:
        rows = np.array(_on_host(position_ids, layer, "positions", lambda x: x.tolist()))
        if len(rows) not in (1, len(content)):
            raise ValueError(f"position_ids are of {len(rows)} samples, the queries of {len(content)}")
        position = np.broadcast_to(rows, content.shape)[content]
        ends |= set((np.flatnonzero(np.diff(position) <= 0) + 1).tolist())
    return sorted(ends)


def _on_host(x: Tensor, layer: int, name: str, read: Callable[[Tensor], list[Any]]) -> list[Any]:
    """`read(x)` for one layer. Reading from a GPU waits for it, so what a layer read is kept with the tensor for the layers after
    it. A layer that does not come after the last one begins another forward pass, and reads again: writes by `broadcast`,
    through `.data` or by numpy raise no version.
    """
    if x.is_inference() or x.device.type == "cpu":
        return read(x)
    kept_values = getattr(x, "_moba_read", {})
    found = kept_values.get(name)
    if found is None or found[0] != x._version or layer <= found[1]:
        found = (x._version, layer, read(x))
    else:
        found = (found[0], layer, found[2])
    x._moba_read = {**kept_values, name: found}  # type: ignore[attr-defined]
    return found[2]


def _prefill(
    moba: bool, q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, tokens: CachedTokens, ends: Sequence[int]
) -> Tensor:
    """Attention of whole samples, padding left out, within documents that end at `ends`; differentiable. `k` and `v` may have
    slots of padding before those of the queries, and slots that are not used yet."""
    host, (samples, queries) = tokens.host, q.shape[:2]
    layout = SequenceLayout.contiguous(ends, 1)
    first = host.first_query
    k, v = (x[:, first : first + queries] for x in (k, v))
    at = np.flatnonzero(host.query_position.ravel() >= 0)
    if at.size == samples * queries:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return _attend(moba, q, k, v, config, layout).unflatten(0, (samples, queries))
    rows = torch.from_numpy(at).to(q.device)
    q, k, v = (x.flatten(0, 1).index_select(0, rows) for x in (q, k, v))
    out = _attend(moba, q, k, v, config, layout)
    padded = out.new_zeros(samples * queries, *out.shape[1:]).index_copy(0, rows, out)
    return padded.unflatten(0, (samples, queries))


def _full_from_cache(query: Tensor, key: Tensor, value: Tensor, tokens: CachedTokens, scaling: float | None) -> Tensor:
    """Full causal attention of new queries to a cache, by torch's own attention with a mask; zeros for padding."""
    position = tokens.slot_position[:, None, None, :]
    query_position = tokens.query_position[:, None, :, None]
    visible = (position >= 0) & (position <= query_position)
    grouped = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=scaling, enable_gqa=grouped
    )
    out = out.masked_fill(query_position < 0, 0)  # a row that sees nothing
    return out.transpose(1, 2)
