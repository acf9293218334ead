"""Options of Megatron that touch attention without being refused: MoBA that selects every block gives what stock attention gives.

Each case trains a model of stock layers and one with MoBA for one step. Whatever happens around core attention (norms, gates,
positions, scales, recomputation) must reach it, or the logits or gradients differ.
"""

from __future__ import annotations

import argparse
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig
from moba_cp.megatron.arguments import add_moba_arguments, layer_spec_from_arguments
from moba_cp.megatron.spec import moba_layer_spec
from tests.megatron_models import transformer_config
from tests.ranks import run_fresh_ranks

LENGTH = 32
EVERY_BLOCK = MoBAConfig(block_size=8, topk=4)
MOST = 2e-5
"""Largest relative difference: fp32, two layers, sums in another order."""

ROPE = {"position_embedding_type": "rope"}
# Options of the configuration, of the model and of the layer spec.
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "rope": ({}, ROPE, {}),
    "MQA": ({"num_query_groups": 1}, ROPE, {}),
    "kv_channels": ({"kv_channels": 24}, ROPE, {}),
    "add_qkv_bias": ({"add_bias_linear": False, "add_qkv_bias": True}, ROPE, {}),
    "qk_layernorm": ({"qk_layernorm": True}, ROPE, {"qk_layernorm": True}),
    "qk_l2_norm": ({"qk_l2_norm": True, "normalization": "RMSNorm"}, ROPE, {"qk_l2_norm": True}),
    "attention_output_gate": ({"attention_output_gate": True}, ROPE, {}),
    "softmax_scale": ({"softmax_scale": 0.6}, ROPE, {}),
    "use_mup": ({"use_mup": True, "mup_base_hidden_size": 16}, ROPE, {}),
    "rotary_interleaved": ({"rotary_interleaved": True}, ROPE, {}),
    "rotary_percent": ({}, ROPE | {"rotary_percent": 0.5}, {}),
    "rotary_base": ({}, ROPE | {"rotary_base": 100}, {}),
    "seq_len_interpolation_factor": ({}, ROPE | {"seq_len_interpolation_factor": 4.0}, {}),
    "rope_scaling": ({}, ROPE | {"rope_scaling": True, "rope_scaling_factor": 4.0}, {}),
    "no_rope_freq": ({"no_rope_freq": 2}, ROPE, {}),
    "learned_absolute": ({}, {"position_embedding_type": "learned_absolute"}, {}),
    "none": ({}, {"position_embedding_type": "none"}, {}),
    "attention_softmax_in_fp32": ({"attention_softmax_in_fp32": True}, ROPE, {}),
    "fp32_residual_connection": ({"fp32_residual_connection": True}, ROPE, {}),
    "apply_residual_connection_post_layernorm": ({"apply_residual_connection_post_layernorm": True}, ROPE, {}),
    "num_moe_experts": ({"num_moe_experts": 2, "add_bias_linear": False}, ROPE, {"num_experts": 2}),
    "recompute full, uniform": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        ROPE,
        {},
    ),
    "recompute full, block": (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        ROPE,
        {},
    ),
    "recompute core_attn": ({"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}, ROPE, {}),
    # Megatron-Core 0.16.1 never ends this with biases, whatever attention there is.
    "recompute mlp": (
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"], "add_bias_linear": False},
        ROPE,
        {},
    ),
}


def runs_here(name: str) -> bool:
    """Whether this version of Megatron has the options, and runs them without Transformer Engine."""
    if name == "num_moe_experts" and not hasattr(
        moe_utils, "te_general_gemm"
    ):  # 0.16.1 reads the name without defining it
        return False
    return set(CASES[name][0]) <= {field.name for field in dataclasses.fields(TransformerConfig)}


def step(case: Case, with_moba: bool) -> list[torch.Tensor]:
    """Logits and gradients of one step."""
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moba_cp.megatron import MoBACoreAttention, swap_core_attention

    config_options, model_options, spec_options = case
    torch.manual_seed(0)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(**config_options)
    spec = get_gpt_layer_local_spec(normalization=config.normalization, **spec_options)
    model = GPTModel(config, spec, 128, LENGTH, **model_options)
    for parameter in model.parameters():  # so that no attention is close to uniform, and no bias is zero
        parameter.data.normal_(0, 0.3)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    if with_moba:
        assert swap_core_attention(model, EVERY_BLOCK) == 2
        assert sum(isinstance(module, MoBACoreAttention) for module in model.modules()) == 2
    tokens = torch.randint(0, 128, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, torch.arange(LENGTH).expand(2, -1), None if with_moba else mask)
    logits.logsumexp(-1).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def compare_on_rank(rank: int, world_size: int) -> dict[str, float]:
    """Largest difference of a tensor of each case, relative to its norm."""
    from megatron.core import parallel_state

    from moba_cp.megatron.cpu import use_cpu_as_cuda

    use_cpu_as_cuda()
    parallel_state.initialize_model_parallel()
    errors: dict[str, float] = {}
    for name, case in CASES.items():
        if not runs_here(name):
            continue
        stock, ours = (step(case, with_moba) for with_moba in (False, True))
        assert len(stock) == len(ours) > 10
        errors[name] = max(((a - b).norm() / a.norm().clamp_min(1e-3)).item() for a, b in zip(stock, ours, strict=True))
    return errors


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    (outcome,) = run_fresh_ranks(1, compare_on_rank, group_timeout=60, timeout=120)
    assert outcome.exception is None, outcome
    return outcome.result


@pytest.mark.parametrize("name", sorted(CASES))
def test_options_around_attention_reach_it(errors: dict[str, float], name: str) -> None:
    if not runs_here(name):
        pytest.skip("not in this version of Megatron, or not without Transformer Engine")
    assert errors[name] < MOST


def test_flags_that_a_finished_spec_cannot_follow_are_refused() -> None:
    """``--spec moba_cp.megatron moba_layer_spec`` would train dense layers without norms of queries and keys."""
    core = moba_layer_spec.submodules.self_attention.submodules.core_attention
    for options, message in (
        ({"num_moe_experts": 4}, "num_moe_experts=4, but moba_layer_spec builds layers without it"),
        ({"qk_layernorm": True}, "qk_layernorm=True, but moba_layer_spec builds layers without it"),
        ({"qk_l2_norm": True}, "qk_l2_norm=True, but"),
        ({"heterogeneous_block_specs": True}, "heterogeneous_block_specs=True, but"),
        ({"fp8": "e4m3"}, "fp8='e4m3', but"),
    ):
        config = transformer_config()
        vars(config).update(options)  # some of them ask for Transformer Engine when the configuration is made
        with pytest.raises(ValueError, match=message):
            build_core(core, config)
    build_core(core, transformer_config())


def test_flags_that_the_start_script_did_not_see_are_refused() -> None:
    """Such as those that ``--use-checkpoint-args`` and ``--yaml-cfg`` bring."""
    arguments = add_moba_arguments(argparse.ArgumentParser()).parse_args([])
    vars(arguments).update(qk_layernorm=True, transformer_impl="local", num_layers=2)
    core = layer_spec_from_arguments(arguments).submodules.self_attention.submodules.core_attention
    build_core(core, transformer_config(qk_layernorm=True))
    with pytest.raises(ValueError, match="qk_layernorm=False, but .*pretrain.* builds layers with it"):
        build_core(core, transformer_config())
    arguments.qk_l2_norm = True
    norms = layer_spec_from_arguments(arguments).submodules.self_attention.submodules
    assert "L2Norm" in getattr(norms.q_layernorm, "__name__", str(norms.q_layernorm))


def build_core(spec: Any, config: TransformerConfig) -> Any:
    alone = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    return spec.module(config, 1, AttnMaskType.causal, "self", pg_collection=alone, **spec.params)


def test_inference_with_dynamic_batching_is_refused() -> None:
    """Megatron's attention computes such batches without its core attention: full attention in place of MoBA."""
    core = build_core(moba_layer_spec.submodules.self_attention.submodules.core_attention, transformer_config())
    dynamic = Attention.flash_decode_and_prefill
    with pytest.raises(ValueError, match="layer 3: inference with dynamic batching is not supported"):
        dynamic(SimpleNamespace(core_attention=core, layer_number=3))  # type: ignore[call-arg,arg-type]
    core.full_attention = True
    for other in (core, torch.nn.Identity()):
        with pytest.raises(TypeError, match="missing 10 required"):  # Megatron's own method is called
            dynamic(SimpleNamespace(core_attention=other, layer_number=3))  # type: ignore[call-arg,arg-type]
    build_core(moba_layer_spec.submodules.self_attention.submodules.core_attention, transformer_config())
    assert Attention.flash_decode_and_prefill is dynamic  # patched once
