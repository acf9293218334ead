"""Layer specs: swap the core attention of any Megatron-Core spec for MoBA, and leave everything else as it is.

Megatron-LM's own scripts take a spec by name, ``--spec MODULE NAME``, and no settings with it. Two are ready,
``moba_layer_spec`` and ``moba_spec``; other settings are a module of one's own on ``PYTHONPATH``::

    # my_specs.py, for --spec my_specs long_context
    from moba_cp import MoBAConfig
    from moba_cp.megatron import moba_spec_builder

    long_context = moba_spec_builder(MoBAConfig(block_size=4096, topk=12), full_attention_last_n_layers=3)
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig

from .core_attention import MoBACoreAttention
from .norm import TorchNorm
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
    return _with_settings(spec, MoBASettings(moba_config, **settings))


def moba_spec_builder(moba_config: MoBAConfig, **settings: Any) -> SpecBuilder:
    """Like :func:`with_moba`, for whichever spec Megatron-LM itself chooses for a model.

    The result is a callable, which ``--spec`` and ``GPTModelConfig.transformer_layer_spec`` take from Megatron-LM 0.19 on:
    local implementation or Transformer Engine, experts, normalised queries and keys, as the other flags say.

    Args:
        moba_config, **settings: as for :func:`with_moba`.
    """
    return SpecBuilder(MoBASettings(moba_config, **settings))


@dataclasses.dataclass(frozen=True)
class SpecBuilder:
    """Made by :func:`moba_spec_builder`."""

    settings: MoBASettings

    def __call__(self, config: Any, vp_stage: int | None = None) -> Any:
        """Spec of one model chunk.

        Args:
            config: Megatron-LM's ``GPTModelConfig``.
            vp_stage: number of the model chunk in its pipeline stage; None without virtual pipeline.

        Returns:
            A layer spec, or a ``TransformerBlockSubmodules`` if the layers differ.

        Raises:
            ValueError: the local attention backend, for which Megatron would replace MoBA again.
        """
        from megatron.training.models.gpt import default_layer_spec

        transformer = config.transformer
        if transformer.attention_backend == AttnBackend.local:
            raise ValueError("--attention-backend local would replace MoBA by Megatron's attention: leave it out")
        spec = _with_settings(default_layer_spec(config, vp_stage), self.settings)
        if transformer.sequence_parallel and transformer_block.LayerNormImpl is WrappedTorchNorm:
            return _with_torch_norms(spec, transformer, vp_stage)
        return spec


def _with_settings(spec: Spec, settings: MoBASettings) -> Spec:
    core = ModuleSpec(module=MoBACoreAttention, params={"settings": settings})
    swap = _Swap(lambda name, _: core if name == "core_attention" else None)
    swapped = swap.copy(spec)
    if not swap.replaced:
        raise ValueError(f"no core_attention found in {type(spec).__name__}: is it a layer or block spec?")
    return swapped


def _with_torch_norms(spec: Any, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's norm of plain torch refuses sequence parallelism; this is a block without it, its last norm included."""
    if not isinstance(spec, TransformerBlockSubmodules):
        layers = transformer_block.get_num_layers_to_build(config, vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=WrappedTorchNorm)
    return _Swap(lambda _, value: TorchNorm if value is WrappedTorchNorm else None).copy(spec)


class _Swap:
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
        result = copy.copy(node)
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            replacement = self.replacement(field.name, value)
            self.replaced += replacement is not None
            setattr(result, field.name, self.copy(value) if replacement is None else replacement)
        return result


#: For ``--spec moba_cp.megatron moba_layer_spec``: local implementation, the paper's (512, 3) for sequences of 8K.
moba_layer_spec = with_moba(get_gpt_layer_local_spec(), MoBAConfig(block_size=512, topk=3))

#: For ``--spec moba_cp.megatron moba_spec`` (Megatron-LM 0.19 and newer): the same for whichever layers the flags describe.
moba_spec = moba_spec_builder(MoBAConfig(block_size=512, topk=3))
