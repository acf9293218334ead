"""Swap the core attention: in a layer spec before the model is built, or in a model that is already built."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from moba_cp import MoBAConfig

from .core_attention import MoBACoreAttention
from .parts import LayerParts
from .settings import MoBASettings

Spec = TypeVar("Spec")


def swap_core_attention(
    model: torch.nn.Module | Iterable[torch.nn.Module], moba_config: MoBAConfig, **settings: Any
) -> int:
    """Put MoBA in place of the core attention of every self-attention of a built model.

    For programs that build layers themselves and take no spec, such as verl and ms-swift: call it between building the model
    and the first forward pass, on every rank. Parameters, their names and the optimizer are not touched. Afterwards the
    model is what a spec of :func:`moba_cp.megatron.with_moba` would have given.

    Args:
        model: a model, wrapped or not, or the list of model chunks that Megatron's virtual pipeline makes. Of a multimodal
            model pass the language model: encoders attend without a causal mask, which is refused.
        moba_config: block size, top-k and softmax scale.
        **settings: the other fields of :class:`moba_cp.megatron.MoBASettings`. verl and ms-swift cut packs sequence by
            sequence; ms-swift does not state padded lengths, so it needs ``packed_partition="zigzag"``.

    Returns:
        Number of layers that were swapped on this rank. A pipeline stage may have none.

    Raises:
        ValueError: the whole model has none, an option that MoBA attention cannot honour, or a core attention with
            parameters. Nothing is swapped then.

    Example::

        models = get_model(...)  # the program's own
        swap_core_attention(models, MoBAConfig(block_size=512, topk=8))
    """
    chosen = MoBASettings(moba_config, **settings)
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    modules = dict.fromkeys(m for chunk in chunks for m in chunk.modules())  # each once, also where chunks share it
    attentions = [m for m in modules if _has_core_attention(m)]
    if not attentions and not any(is_pipelined(chunk) for chunk in chunks):
        raise ValueError(
            f"no core_attention found in {', '.join(type(chunk).__name__ for chunk in chunks) or 'nothing'}"
        )
    cores = [_core_for(attention, chosen) for attention in attentions]
    for attention, core in zip(attentions, cores, strict=True):
        attention.core_attention = core
    return len(cores)


def _has_core_attention(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "core_attention", None), torch.nn.Module) and hasattr(module, "layer_number")


def is_pipelined(chunk: torch.nn.Module) -> bool:
    """Whether the model is cut into pipeline stages, of which one may have no attention."""
    configs = (getattr(module, "config", None) for module in chunk.modules())
    return any(getattr(config, "pipeline_model_parallel_size", 1) > 1 for config in configs)


def _core_for(attention: Any, settings: MoBASettings) -> MoBACoreAttention:
    """What the layer would have built for a spec with MoBA."""
    old, config, number = attention.core_attention, attention.config, attention.layer_number
    if names := [name for name, _ in old.named_parameters()]:
        raise ValueError(
            f"layer {number}: {type(old).__name__} has parameters of its own, {names}, which MoBA attention does not have"
        )
    comm = config.cp_comm_type if config.context_parallel_size > 1 else None
    core = MoBACoreAttention(
        config,
        number,
        attention.attn_mask_type,
        attention.attention_type,
        settings,
        softmax_scale=getattr(config, "softmax_scale", None),
        cp_comm_type=comm[number - 1] if isinstance(comm, list) else comm,
        pg_collection=attention.pg_collection,
    )
    return core.train(old.training)


def with_settings(spec: Spec, settings: MoBASettings, parts: LayerParts | None = None) -> Spec:
    """Copy of a spec in which every self-attention computes MoBA.

    Args:
        spec: of one transformer layer, or of a stack of layers.
        settings: MoBA's.
        parts: what the layers consist of, to be checked against Megatron's configuration; None for a spec that whoever
            builds the model has chosen for it.

    Raises:
        ValueError: there is no core attention in the spec.
    """
    params = {"settings": settings} if parts is None else {"settings": settings, "parts": parts}
    core = ModuleSpec(module=MoBACoreAttention, params=params)
    swap = Swap(lambda name, _: core if name == "core_attention" else None)
    swapped = swap.copy(spec)
    if not swap.replaced:
        raise ValueError(f"no core_attention found in {type(spec).__name__}: is it a layer or block spec?")
    return swapped


class Swap:
    """Copies the lists and dataclasses that a spec is made of, and shares everything else with the original. What is one
    object in the original (``[layer] * n``) is one in the copy."""

    def __init__(self, replacement: Callable[[str, Any], Any]) -> None:
        self.replacement = replacement  # of a field, by name and value; None leaves it
        self.replaced = 0
        self.copies: dict[int, Any] = {}

    def copy(self, node: Any) -> Any:
        """Copy of ``node`` with fields replaced everywhere below it."""
        if id(node) not in self.copies:
            self.copies[id(node)] = self._copy(node)
        return self.copies[id(node)]

    def _copy(self, node: Any) -> Any:
        if isinstance(node, list | tuple):
            return type(node)(self.copy(item) for item in node)
        if not dataclasses.is_dataclass(node) or isinstance(node, type):
            return node
        if node.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # no part of a spec
            return node
        result = copy.copy(node)
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            replacement = self.replacement(field.name, value)
            self.replaced += replacement is not None
            setattr(result, field.name, self.copy(value) if replacement is None else replacement)
        return result
