"""Layer specs for the programs that build the model: each calls a spec in its own way.

| program | call | what it passes |
|---|---|---|
| Megatron-LM 0.19 and newer, GPT | ``spec(config, vp_stage=...)`` | ``GPTModelConfig`` |
| Megatron-Bridge | ``spec(provider, vp_stage=...)`` | ``GPTModelProvider`` (a ``TransformerConfig``), or ``GPTModelConfig`` |
| slime | ``spec(args, config, vp_stage)`` | parsed arguments and a ``TransformerConfig`` |
| Megatron-LM, ``HybridModel`` | none: it wants a ``ModuleSpec`` | (see :mod:`moba_cp.megatron.hybrid`) |
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer import transformer_block
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig

from .norm import TorchNorm
from .settings import DEFAULT_MOBA, MoBASettings
from .swap import Swap, with_settings
from .te import require_te


def moba_spec_builder(moba_config: MoBAConfig = DEFAULT_MOBA, *, base: Any = None, **settings: Any) -> SpecBuilder:
    """Like :func:`moba_cp.megatron.with_moba`, for whichever spec the program itself would choose for a model.

    The result is a callable. Megatron-LM from 0.19 on (``--spec``, ``GPTModelConfig.transformer_layer_spec``),
    Megatron-Bridge (``provider.transformer_layer_spec``) and slime (``--spec``) take it.

    Args:
        moba_config: as for :func:`moba_cp.megatron.with_moba`.
        base: the spec to put MoBA into, or a callable that the program would call for it. None: the program's default for
            the model (Transformer Engine or local layers, experts, normalised queries and keys, as its configuration says).
        **settings: as for :func:`moba_cp.megatron.with_moba`.

    Example::

        provider.transformer_layer_spec = moba_spec_builder(config, base=provider.transformer_layer_spec)
    """
    return SpecBuilder(MoBASettings(moba_config, **settings), base)


@dataclasses.dataclass(frozen=True)
class SpecBuilder:
    """Made by :func:`moba_spec_builder`."""

    settings: MoBASettings
    base: Any = None

    def __call__(self, config: Any, *more: Any, vp_stage: int | None = None) -> Any:
        """Spec of one model chunk.

        Args:
            config: ``GPTModelConfig`` of Megatron-LM or Megatron-Bridge, a ``TransformerConfig`` (Megatron-Bridge's
                providers are some), or parsed arguments (slime).
            *more: after parsed arguments: ``TransformerConfig`` and number of the model chunk.
            vp_stage: number of the model chunk in its pipeline stage; None without virtual pipeline.

        Returns:
            A layer spec, or a ``TransformerBlockSubmodules`` if the layers differ.

        Raises:
            TypeError: a call that none of these programs makes.
            ValueError: the local attention backend, for which Megatron would replace MoBA again.
        """
        if len(more) == 2 and isinstance(more[0], TransformerConfig):
            transformer, vp_stage = more
            spec = _by_arguments(self.base, config, transformer, vp_stage)
        elif more:
            raise TypeError(
                f"{type(self).__name__} was called with {type(config).__name__} and {len(more)} more: it takes "
                "(config, vp_stage=...) or (args, config, vp_stage)"
            )
        elif isinstance(config, TransformerConfig):
            transformer, spec = config, _by_provider(self.base, config, vp_stage)
        elif isinstance(getattr(config, "transformer", None), TransformerConfig):
            transformer, spec = config.transformer, _by_model_config(self.base, config, vp_stage)
        else:
            raise TypeError(
                f"{type(self).__name__} takes a GPTModelConfig or a TransformerConfig, got {type(config).__name__}"
            )
        if transformer.attention_backend == AttnBackend.local:
            raise ValueError("--attention-backend local would replace MoBA by Megatron's attention: leave it out")
        spec = with_settings(spec, self._settings(config, transformer, sliced_by_documents=bool(more)))
        if transformer.sequence_parallel and transformer_block.LayerNormImpl is WrappedTorchNorm:
            return _with_torch_norms(spec, transformer, vp_stage)
        return spec

    def _settings(self, config: Any, transformer: TransformerConfig, sliced_by_documents: bool) -> MoBASettings:
        """The settings, with the cut of packs where the program is known to have one only."""
        bridge = type(config).__module__.startswith("megatron.bridge.")
        known = sliced_by_documents or (bridge and getattr(transformer, "cp_partition_mode", "zigzag") == "zigzag")
        if self.settings.packed_partition is not None or self.settings.partition != "zigzag" or not known:
            return self.settings
        return dataclasses.replace(self.settings, packed_partition="zigzag")

    @property
    def module(self) -> Any:
        """What ``build_module`` asks of a spec, and a callable does not have.

        Raises:
            TypeError: always; it names the spec to use.
        """
        raise TypeError(
            "this model takes a ModuleSpec, not a callable: for HybridModel use --spec moba_cp.megatron.hybrid "
            "moba_hybrid_spec, for others moba_cp.megatron.with_moba(spec, ...)"
        )


def _by_model_config(base: Any, config: Any, vp_stage: int | None) -> Any:
    if base is None:  # Megatron-LM and Megatron-Bridge have one each, beside the class of the configuration
        base = getattr(inspect.getmodule(type(config)), "default_layer_spec", None)
    if base is None:
        base = importlib.import_module("megatron.training.models.gpt").default_layer_spec
    return _called(base, config, vp_stage)


def _by_provider(base: Any, provider: Any, vp_stage: int | None) -> Any:
    if base is None:  # the field's default, which the builder took the place of
        base = getattr(type(provider), "transformer_layer_spec", None)
    if base is None:
        return _default(provider, vp_stage)
    return _called(base, provider, vp_stage)


def _by_arguments(base: Any, arguments: Any, config: TransformerConfig, vp_stage: int | None) -> Any:
    if base is None:
        return _default(config, vp_stage)
    return base if not callable(base) or isinstance(base, ModuleSpec) else base(arguments, config, vp_stage)


def _called(base: Any, config: Any, vp_stage: int | None) -> Any:
    if not callable(base) or isinstance(base, ModuleSpec):
        return base
    if "vp_stage" in inspect.signature(base).parameters:
        return base(config, vp_stage=vp_stage)
    return base(config)


def _default(config: TransformerConfig, vp_stage: int | None) -> Any:
    """Layers of Megatron-Core for a configuration."""
    with_te = config.transformer_impl == "transformer_engine"
    if not with_te and config.transformer_impl != "local":
        raise ValueError(
            f"transformer_impl={config.transformer_impl!r} is not supported, only 'local' and 'transformer_engine' are"
        )
    if with_te:
        require_te("transformer_impl='transformer_engine'", "transformer_impl='local' (--transformer-impl local)")
    if config.num_moe_experts is not None:
        stage = {} if vp_stage is None else {"vp_stage": vp_stage}
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=with_te,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            **stage,
        )
    if isinstance(config, HeterogeneousTransformerConfig):
        return get_gpt_heterogeneous_layer_spec(config, with_te)
    norms = {"qk_layernorm": config.qk_layernorm, "qk_l2_norm": config.qk_l2_norm}
    if with_te:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**norms)
    return gpt_layer_specs.get_gpt_layer_local_spec(normalization=config.normalization, **norms)


def _with_torch_norms(spec: Any, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Megatron's norm of plain torch refuses sequence parallelism; this is a block without it, its last norm included."""
    if not isinstance(spec, TransformerBlockSubmodules):
        layers = transformer_block.get_num_layers_to_build(config, vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=WrappedTorchNorm)
    return Swap(lambda _, value: TorchNorm if value is WrappedTorchNorm else None).copy(spec)


#: For ``--spec moba_cp.megatron moba_spec`` (Megatron-LM 0.19 and newer): the flags' defaults for whichever layers the other
#: flags describe.
moba_spec = moba_spec_builder()
