"""Swapping the core attention in specs, and the norm that goes with the local implementation."""

from __future__ import annotations

import typing
from typing import Any

import pytest
import torch
import typing_extensions

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

import moba_cp.megatron
from moba_cp import MoBAConfig
from moba_cp.megatron import MoBACoreAttention, MoBASettings, TorchNorm, moba_spec_builder, with_moba

MOBA = MoBAConfig(block_size=64, topk=4)


def core_of(layer: object) -> object:
    return layer.submodules.self_attention.submodules.core_attention  # type: ignore[attr-defined]


def test_only_the_core_attention_changes_and_the_original_stays() -> None:
    original = get_gpt_layer_local_spec()
    swapped = with_moba(original, MOBA, comm="ring")
    assert core_of(original) is DotProductAttention
    assert core_of(swapped).module is MoBACoreAttention  # type: ignore[attr-defined]
    assert core_of(swapped).params == {"settings": MoBASettings(MOBA, comm="ring")}  # type: ignore[attr-defined]
    swapped.submodules.self_attention.submodules.core_attention = DotProductAttention
    assert swapped == original


def test_block_specs_are_swapped_in_every_layer() -> None:
    block = TransformerBlockSubmodules(layer_specs=[get_gpt_layer_local_spec() for _ in range(3)])
    assert all(core_of(layer).module is MoBACoreAttention for layer in with_moba(block, MOBA).layer_specs)  # type: ignore[attr-defined]
    assert all(core_of(layer) is DotProductAttention for layer in block.layer_specs)


def test_a_layer_spec_stands_ready_for_the_command_line() -> None:
    # Megatron's --spec reads it like this.
    assert core_of(vars(moba_cp.megatron)["moba_layer_spec"]).module is MoBACoreAttention  # type: ignore[attr-defined]


@pytest.fixture
def scripts_that_take_callables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-LM 0.19 and newer, on one pipeline stage; of Python 3.12 they want ``override`` alone."""
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
    pytest.importorskip("megatron.training.models.gpt")


@pytest.mark.usefixtures("scripts_that_take_callables")
def test_a_callable_is_megatrons_own_choice_with_moba() -> None:
    config = transformer_config(num_moe_experts=2, moe_layer_freq=[0, 1])
    block = moba_cp.megatron.moba_spec(model_config(config))
    assert [core_of(layer).module for layer in block.layer_specs] == [MoBACoreAttention] * 2  # type: ignore[attr-defined]
    assert block.layer_specs[0].submodules.mlp != block.layer_specs[1].submodules.mlp
    builder = moba_spec_builder(MOBA, comm="ring")
    layer = builder(model_config(transformer_config(qk_layernorm=True)))
    assert core_of(layer).params == {"settings": MoBASettings(MOBA, comm="ring")}  # type: ignore[attr-defined]
    assert "Norm" in layer.submodules.self_attention.submodules.q_layernorm.__name__


@pytest.mark.usefixtures("scripts_that_take_callables")
def test_a_callable_brings_norms_for_sequence_parallelism() -> None:
    config = transformer_config(tensor_model_parallel_size=2, sequence_parallel=True)
    block = moba_cp.megatron.moba_spec(model_config(config))
    assert block.layer_norm is TorchNorm
    assert [layer.submodules.pre_mlp_layernorm for layer in block.layer_specs] == [TorchNorm] * 2


@pytest.mark.usefixtures("scripts_that_take_callables")
def test_a_callable_refuses_the_backend_that_would_replace_it() -> None:
    config = transformer_config(attention_backend=AttnBackend.local)
    with pytest.raises(ValueError, match="--attention-backend local would replace MoBA"):
        moba_cp.megatron.moba_spec(model_config(config))


def transformer_config(**options: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        transformer_impl="local",
        persist_layer_norm=False,
        **options,
    )


def model_config(transformer: TransformerConfig) -> Any:
    from megatron.training.models.gpt import GPTModelConfig

    return GPTModelConfig(transformer=transformer, vocab_size=128)


def test_something_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="no core_attention found in MoBAConfig: is it a layer or block spec"):
        with_moba(MoBAConfig(16, 2), MoBAConfig(16, 2))
    with pytest.raises(ValueError, match="no core_attention found in TransformerBlockSubmodules"):
        with_moba(TransformerBlockSubmodules(), MOBA)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="partition must be one of.*'striped'"):
        with_moba(get_gpt_layer_local_spec(), MOBA, partition="striped")
    with pytest.raises(TypeError, match="colour"):
        with_moba(get_gpt_layer_local_spec(), MOBA, colour="red")


@pytest.mark.parametrize(("kind", "module"), [("RMSNorm", torch.nn.RMSNorm), ("LayerNorm", torch.nn.LayerNorm)])
def test_norm_tags_its_parameters_for_sequence_parallelism(kind: str, module: type) -> None:
    for sequence_parallel in (False, True):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            normalization=kind,
            tensor_model_parallel_size=2,
            sequence_parallel=sequence_parallel,
            persist_layer_norm=False,
        )
        norm = TorchNorm(config, hidden_size=8, eps=1e-6)
        assert type(norm) is module
        assert norm.eps == 1e-6
        assert all(p.sequence_parallel is sequence_parallel for p in norm.parameters())


def test_norm_refuses_what_torch_does_not_have() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2, layernorm_zero_centered_gamma=True)
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma"):
        TorchNorm(config, hidden_size=8)
