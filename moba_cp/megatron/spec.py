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
        **settings: the other fields of :class:`moba_cp.megatron.MoBASettings` (``comm``,
            ``partition``, ``full_attention_last_n_layers``, ``layer_pattern``, ``full_attention_comm``,
            ``full_attention_backend``).

    Returns:
        A spec of the same kind. Parameter names and checkpoints do not change.

    Raises:
        ValueError: there is no core attention in the spec.

    Example::

        spec = with_moba(get_gpt_layer_local_spec(), MoBAConfig(block_size=512, topk=8), comm="fetch")
        model = GPTModel(config, spec, ...)
    """
    core = ModuleSpec(module=MoBACoreAttention, params={"settings": MoBASettings(moba_config, **settings)})
    swap = _Swap(core)
    swapped = swap.copy(spec)
    if not swap.replaced:
        raise ValueError(f"no core_attention found in {type(spec).__name__}: is it a layer or block spec?")
    return swapped


class _Swap:
    """Copies the lists and dataclasses that a spec is made of, and shares everything else with the original. What is one
    object in the original (``[layer] * n``) is one in the copy."""

    def __init__(self, core: ModuleSpec) -> None:
        self.core = core
        self.replaced = 0
        self.copies: dict[int, Any] = {}

    def copy(self, node: Any) -> Any:
        """Copy of ``node`` with the core attention replaced in every field of that name below it."""
        if id(node) not in self.copies:
            self.copies[id(node)] = self._copy(node)
        return self.copies[id(node)]

    def _copy(self, node: Any) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(self.copy(item) for item in node)
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            return node
        result = copy.copy(node)
        for field in dataclasses.fields(node):
            if field.name == "core_attention":
                setattr(result, field.name, self.core)
                self.replaced += 1
            else:
                setattr(result, field.name, self.copy(getattr(node, field.name)))
        return result


#: For ``--spec moba_cp.megatron moba_layer_spec``: local implementation, the paper's (512, 3) for sequences of 8K.
moba_layer_spec = with_moba(get_gpt_layer_local_spec(), MoBAConfig(block_size=512, topk=3))
