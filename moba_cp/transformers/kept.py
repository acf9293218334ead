"""Centroids beside a cache of transformers, from one forward pass to the next.

The `CentroidCache` of a layer is attached to the tensor of keys that the cache holds. That is what ties their lives together: a
cache that reorders, repeats, selects, crops or offloads its keys makes a new tensor, which has no centroids: they are computed
anew. A dynamic cache also makes a new tensor when it grows, so a hook on the attention module looks at the keys before they grow
and passes their centroids on. A static cache writes in place: the version counter of its keys tells other writers apart.

Beside them are the tokens that the centroids are of, since a later call may have another mask of what the cache holds.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..cached import CachedTokens, CentroidCache

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")
"""Under which a model passes its cache to an attention module: newest version of transformers first."""
ARGUMENTS = ("moba_centroids", "moba_cached_tokens")
"""Under which the hook passes centroids, and the tokens that they are of, on to the attention function."""
_HOOKED = "_moba_keeps_centroids"


def keep(keys: Tensor, centroids: CentroidCache, tokens: CachedTokens) -> None:
    """Attach `centroids` of the content of `keys`, which `tokens` says, to them."""
    keys._moba_kept = (centroids, tokens, _version(keys))  # type: ignore[attr-defined]


def take(keys: object) -> tuple[CentroidCache, CachedTokens] | None:
    """What is attached to `keys`, detached, if nobody has written to `keys` since; else None."""
    kept = getattr(keys, "_moba_kept", None)
    if kept is None or not isinstance(keys, Tensor):
        return None
    del keys._moba_kept  # type: ignore[attr-defined]
    centroids, tokens, version = kept
    return (centroids, tokens) if version == _version(keys) else None


def moved(tokens: CachedTokens, earlier: CachedTokens | None) -> bool:
    """Whether the mask of what the cache holds has changed since `earlier`; layers of one forward pass compare once.

    On a GPU a single token per sample is not compared, for which the host would wait: see docs/huggingface.md.
    """
    if earlier is None or (tokens.query_position.is_cuda and tokens.query_position.shape[1] == 1):
        return False
    compared = tokens.__dict__.get("_compared")
    if compared is None or compared[0]() is not earlier:
        compared = tokens.__dict__["_compared"] = (weakref.ref(earlier), not tokens.extends(earlier))
    return bool(compared[1])


def _version(keys: Tensor) -> int | None:
    """Number of writes to `keys`; inference tensors do not count theirs."""
    return None if keys.is_inference() else keys._version


def hook(module: nn.Module) -> None:
    """Make the attention module pass centroids of its cache on, from its next call. Hooks a module once.

    A module that does not hand unknown arguments to the attention function is left alone: it computes all centroids at each call.
    """
    if getattr(module, _HOOKED, False):
        return
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        module.register_forward_pre_hook(_pass_centroids, with_kwargs=True)
    setattr(module, _HOOKED, True)


@torch.compiler.disable
def _pass_centroids(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the module's cache grows: the centroids of what it holds, and its tokens."""
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    layers, index = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    if layers is None or index is None or index >= len(layers):
        return None
    found = take(getattr(layers[index], "keys", None))
    return None if found is None else (args, {**kwargs, **dict(zip(ARGUMENTS, found, strict=True))})
