"""Specs as other programs call for them. Each call is written as that program makes it."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any

import pytest
import typing_extensions

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

import moba_cp.megatron
from moba_cp import MoBAConfig
from moba_cp.megatron import MoBACoreAttention, MoBASettings, moba_spec_builder
from moba_cp.megatron.arguments import add_moba_arguments, settings_from_arguments
from moba_cp.megatron.settings import DEFAULT_MOBA

MOBA = MoBAConfig(block_size=64, topk=4)
SIZES = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "transformer_impl": "local"}


def settings_of(layer: Any) -> MoBASettings:
    core = layer.submodules.self_attention.submodules.core_attention
    assert core.module is MoBACoreAttention
    return core.params["settings"]


def local_layer(config: TransformerConfig) -> ModuleSpec:
    """What a provider's own default may look like: a function of the configuration."""
    return get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)


@dataclasses.dataclass
class Provider(TransformerConfig):
    """Like Megatron-Bridge's: a configuration of the transformer that carries its spec along."""

    transformer_layer_spec: ModuleSpec | Callable[..., Any] = local_layer
    cp_partition_mode: str = "zigzag"

    def provide(self, vp_stage: int | None = None) -> Any:
        """The spec, found as Megatron-Bridge finds it."""
        spec = self.transformer_layer_spec
        if isinstance(spec, ModuleSpec):
            return spec
        if "vp_stage" in inspect.signature(spec).parameters:
            return spec(self, vp_stage=vp_stage)
        return spec(self)


Provider.__module__ = "megatron.bridge.models.gpt_provider"


def test_megatron_bridge_gets_the_providers_default_with_moba() -> None:
    provider = Provider(**SIZES, qk_layernorm=True)
    provider.transformer_layer_spec = moba_spec_builder(MOBA, comm="ring")
    layer = provider.provide(vp_stage=0)
    # Megatron-Bridge cuts packs sequence by sequence, also where it states no padded lengths.
    assert settings_of(layer) == MoBASettings(MOBA, comm="ring", packed_partition="zigzag")
    assert "Norm" in layer.submodules.self_attention.submodules.q_layernorm.__name__


def test_megatron_bridge_with_contiguous_packs_must_name_the_cut() -> None:
    provider = Provider(**SIZES, cp_partition_mode="contiguous")
    provider.transformer_layer_spec = moba_spec_builder(MOBA)
    assert settings_of(provider.provide()).packed_partition is None


def test_a_spec_that_the_provider_had_before_is_kept_as_the_base() -> None:
    provider = Provider(**SIZES)
    for base in (get_gpt_layer_local_spec(), local_layer):
        provider.transformer_layer_spec = moba_spec_builder(MOBA, base=base)
        assert settings_of(provider.provide(vp_stage=1)).moba == MOBA
    calls: list[Any] = []

    def of_stage(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec:
        calls.append((config, vp_stage))
        return get_gpt_layer_local_spec()

    provider.transformer_layer_spec = moba_spec_builder(MOBA, base=of_stage)
    assert settings_of(provider.provide(vp_stage=1)).moba == MOBA
    assert calls == [(provider, 1)]


def slime(spec: Any, config: TransformerConfig, vp_stage: int | None = None) -> Any:
    """The spec, found as slime finds it; what has ``pre_process`` would be taken for a model provider."""
    result = spec(argparse.Namespace(num_experts=config.num_moe_experts), config, vp_stage)
    assert not (callable(result) and "pre_process" in inspect.signature(result).parameters)
    return result


def test_slime_gets_layers_of_its_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = moba_spec_builder(MOBA)
    expected = MoBASettings(MOBA, packed_partition="zigzag")  # its packs state no padded lengths
    assert settings_of(slime(builder, TransformerConfig(**SIZES))) == expected
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    block = slime(builder, TransformerConfig(**SIZES, num_moe_experts=2, moe_layer_freq=[0, 1]))
    assert [settings_of(layer) for layer in block.layer_specs] == [expected] * 2


def test_slime_gets_norms_and_blocks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = slime(moba_spec_builder(MOBA), TransformerConfig(**SIZES, qk_l2_norm=True))
    assert "L2Norm" in str(layer.submodules.self_attention.submodules.q_layernorm)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    ffn = {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False}
    attends = {"n_heads_in_group": 1, "no_op": False, "replace_with_linear": False}
    blocks = [
        {"attention": attends, "ffn": ffn},
        {"attention": attends | {"n_heads_in_group": None, "no_op": True}, "ffn": ffn},
    ]
    config = HeterogeneousTransformerConfig(
        **SIZES, heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": blocks})
    )
    first, second = slime(moba_spec_builder(MOBA), config).layer_specs
    assert settings_of(first).moba == MOBA
    assert "core_attention" not in str(second.submodules.self_attention)


def plugin(args: argparse.Namespace, config: TransformerConfig, vp_stage: int | None) -> Any:
    """Like the specs of slime's plug-ins."""
    return get_gpt_layer_local_spec(qk_layernorm=args.num_experts is None)


def test_slime_plug_ins_are_a_base() -> None:
    layer = slime(moba_spec_builder(MOBA, base=plugin), TransformerConfig(**SIZES))
    assert settings_of(layer).moba == MOBA
    assert "Norm" in layer.submodules.self_attention.submodules.q_layernorm.__name__


def test_a_cut_that_was_named_stays() -> None:
    builder = moba_spec_builder(MOBA, packed_partition="contiguous_pack")
    assert settings_of(slime(builder, TransformerConfig(**SIZES))).packed_partition == "contiguous_pack"


def test_other_calls_are_refused() -> None:
    builder, config = moba_spec_builder(MOBA), TransformerConfig(**SIZES)
    with pytest.raises(TypeError, match="takes a GPTModelConfig or a TransformerConfig, got Namespace"):
        builder(argparse.Namespace())
    with pytest.raises(TypeError, match=r"with Namespace and 1 more: it takes .*\(args, config, vp_stage\)"):
        builder(argparse.Namespace(), config)
    config.transformer_impl = "inference_optimized"
    with pytest.raises(ValueError, match="transformer_impl='inference_optimized' is not supported"):
        builder(argparse.Namespace(), config, None)


@pytest.mark.parametrize("call", [slime, lambda spec, config: spec(config, vp_stage=None)])
def test_the_backend_that_would_replace_it_is_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="--attention-backend local would replace MoBA"):
        call(moba_spec_builder(MOBA, base=get_gpt_layer_local_spec()), _with_local_backend())


def _with_local_backend() -> TransformerConfig:
    return TransformerConfig(**SIZES, attention_backend=AttnBackend.local)


def test_models_that_build_a_spec_say_which_one_they_need() -> None:
    # What HybridModel does with its spec.
    with pytest.raises(TypeError, match="ModuleSpec, not a callable.*moba_cp.megatron.hybrid moba_hybrid_spec"):
        build_module(moba_cp.megatron.moba_spec, config=None)


def test_hybrid_model_gets_a_module_spec_with_moba() -> None:
    pytest.importorskip("megatron.core.models.hybrid")
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    from moba_cp.megatron.hybrid import hybrid_spec, moba_hybrid_spec

    assert isinstance(moba_hybrid_spec, ModuleSpec)
    assert settings_of(moba_hybrid_spec.submodules.attention_layer) == MoBASettings(DEFAULT_MOBA)
    assert settings_of(hybrid_spec(MOBA, comm="ring").submodules.attention_layer) == MoBASettings(MOBA, comm="ring")
    assert moba_hybrid_spec.submodules.mamba_layer == hybrid_stack_spec.submodules.mamba_layer


def test_megatron_lm_takes_a_base_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
    pytest.importorskip("megatron.training.models.gpt")
    from megatron.training.models.gpt import GPTModelConfig

    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    transformer = TransformerConfig(**SIZES, persist_layer_norm=False)
    config = GPTModelConfig(transformer=transformer, vocab_size=128)

    def base(config: Any, vp_stage: int | None = None) -> Any:
        return get_gpt_decoder_block_spec(config.transformer, use_transformer_engine=False, vp_stage=vp_stage)

    block = moba_spec_builder(MOBA, base=base)(config, vp_stage=None)
    assert [settings_of(layer) for layer in block.layer_specs] == [MoBASettings(MOBA)] * 2


def test_defaults_of_flags_and_of_ready_specs_are_one() -> None:
    flags = add_moba_arguments(argparse.ArgumentParser()).parse_args([])
    settings = settings_from_arguments(flags)
    by_flags = MoBASettings(settings.pop("moba_config"), **settings)
    assert by_flags == MoBASettings(DEFAULT_MOBA)
    assert moba_cp.megatron.moba_spec.settings == by_flags
    assert settings_of(moba_cp.megatron.moba_layer_spec) == by_flags
