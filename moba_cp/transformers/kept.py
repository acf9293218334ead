"""Centroids beside a cache of transformers, from one forward pass to the next.

The `CentroidCache` of a layer is attached to the tensor of keys that the cache holds. That is what ties their lives together: a
cache that reorders, repeats, selects, crops or offloads its keys makes a new tensor, which has no centroids: they are computed
anew. A dynamic cache also makes a new tensor when it grows, so a hook on the attention module looks at the keys before they grow
and passes their centroids on. A static cache writes in place: the version counter of its keys tells other writers apart.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..cached import CentroidCache

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")
"""Under which a model passes its cache to an attention module: newest version of transformers first."""
ARGUMENT = "moba_centroids"
"""Under which the hook passes centroids on to the attention function."""
_HOOKED = "_moba_keeps_centroids"


def keep(keys: Tensor, centroids: CentroidCache) -> None:
    """Attach `centroids` of the content of `keys` to them."""
    keys._moba_kept = (centroids, _version(keys))  # type: ignore[attr-defined]


def take(keys: object) -> CentroidCache | None:
    """Centroids attached to `keys`, detached, if nobody has written to `keys` since; else None."""
    kept = getattr(keys, "_moba_kept", None)
    if kept is None or not isinstance(keys, Tensor):
        return None
    del keys._moba_kept  # type: ignore[attr-defined]
    centroids, version = kept
    return centroids if version == _version(keys) else None


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
    """Before the module's cache grows: the centroids of what it holds."""
    cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
    layers, index = getattr(cache, "layers", None), getattr(module, "layer_idx", None)
    if layers is None or index is None or index >= len(layers):
        return None
    centroids = take(getattr(layers[index], "keys", None))
    return None if centroids is None else (args, {**kwargs, ARGUMENT: centroids})
