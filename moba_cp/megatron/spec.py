"""Layer specs: swap the core attention of any Megatron-Core spec for MoBA, and leave everything else as it is."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from moba_cp import MoBAConfig

from .core_attention import MoBACoreAttention
from .settings import MoBASettings

Spec = TypeVar("Spec")


def with_moba(spec: Spec, moba_config: MoBAConfig, **settings: Any) -> Spec:
    """Copy of a spec in which every self-attention computes MoBA; the spec that was passed in stays as it was.

    Args:
        spec: a layer spec, a ``TransformerBlockSubmodules`` or any other spec that contains layers, built for the local
            implementation or for Transformer Engine.
        moba_config: block size, top-k and softmax scale.
        **settings: the other fields of :class:`moba_cp.megatron.MoBASettings` (``comm``, ``partition``).

    Returns:
        A spec of the same kind. Parameter names and checkpoints do not change.

    Raises:
        ValueError: there is no core attention in the spec.

    Example::

        spec = with_moba(get_gpt_layer_local_spec(), MoBAConfig(block_size=512, topk=8), comm="fetch")
        model = GPTModel(config, spec, ...)
    """
    swapped = copy.deepcopy(spec)
    core = ModuleSpec(module=MoBACoreAttention, params={"settings": MoBASettings(moba_config, **settings)})
    if not _swap(swapped, core, seen=set()):
        raise ValueError(f"no core_attention found in {type(spec).__name__}: is it a layer or block spec?")
    return swapped


def _swap(node: Any, core: ModuleSpec, seen: set[int]) -> int:
    """Replace every ``core_attention`` field below ``node``; the number of fields replaced."""
    if id(node) in seen:
        return 0
    seen.add(id(node))
    if isinstance(node, list | tuple):
        return sum(_swap(item, core, seen) for item in node)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return 0
    replaced = 0
    for field in dataclasses.fields(node):
        if field.name == "core_attention":
            setattr(node, field.name, core)
            replaced += 1
        else:
            replaced += _swap(getattr(node, field.name), core, seen)
    return replaced


#: For ``--spec moba_cp.megatron moba_layer_spec``: local implementation, the paper's (512, 3) for sequences of 8K.
moba_layer_spec = with_moba(get_gpt_layer_local_spec(), MoBAConfig(block_size=512, topk=3))
