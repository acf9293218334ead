"""MoBA in a model that is already built, for programs that take no spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig
from moba_cp.megatron import MoBACoreAttention, swap_core_attention
from tests.megatron_models import transformer_config
from tests.ranks import run_fresh_ranks

MOBA = MoBAConfig(block_size=16, topk=2)
SETTINGS: dict[str, Any] = {"full_attention_last_n_layers": 1, "packed_partition": "zigzag"}
LENGTH = 64


def compare_on_rank(rank: int, world_size: int) -> dict[str, Any]:
    """A swapped model beside one that was built from a spec with MoBA."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moba_cp.megatron import with_moba
    from moba_cp.megatron.cpu import use_cpu_as_cuda

    use_cpu_as_cuda()
    parallel_state.initialize_model_parallel(context_parallel_size=world_size)
    config = transformer_config(context_parallel_size=world_size, cp_comm_type="moba_ring", softmax_scale=0.5)

    def model(spec: Any) -> GPTModel:
        torch.manual_seed(0)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        return GPTModel(config, spec, 128, LENGTH, position_embedding_type="rope")

    # Stock core attention of the local implementation refuses context parallelism when it is built.
    built = model(with_moba(get_gpt_layer_local_spec(), MOBA, **SETTINGS))
    swapped = model(with_moba(get_gpt_layer_local_spec(), MoBAConfig(8, 1), comm="fetch"))
    names = list(swapped.state_dict())
    optimised = list(swapped.parameters())
    swapped.eval()
    count = swap_core_attention([torch.nn.Sequential(swapped)], MOBA, **SETTINGS)
    cores = [layer.self_attention.core_attention for layer in swapped.decoder.layers]
    expected = [layer.self_attention.core_attention for layer in built.decoder.layers]
    tokens = torch.randint(0, 128, (1, LENGTH // world_size), generator=torch.Generator().manual_seed(rank))
    positions = torch.arange(LENGTH // world_size)[None]
    return {
        "count": count,
        "names": list(swapped.state_dict()) == names == list(built.state_dict()),
        "parameters": all(a is b for a, b in zip(swapped.parameters(), optimised, strict=True)),
        "training": any(core.training for core in cores),
        "comm": [core.comm for core in cores] == [core.comm for core in expected] == ["ring", "ring"],
        "moba": [core.computes_moba for core in cores],
        "config": [core.moba for core in cores] == [core.moba for core in expected],
        "equal": torch.equal(swapped(tokens, positions, None), built(tokens, positions, None)),
    }


def test_a_swapped_model_is_what_a_spec_would_have_given() -> None:
    for outcome in run_fresh_ranks(2, compare_on_rank, group_timeout=60):
        assert outcome.exception is None, outcome
        assert outcome.result == {
            "count": 2,
            "names": True,
            "parameters": True,
            "training": False,
            "comm": True,
            "moba": [True, False],
            "config": True,
            "equal": True,
        }


class Attention(MegatronModule):
    """The parts of Megatron's ``SelfAttention`` that are looked at."""

    def __init__(self, config: TransformerConfig, core: torch.nn.Module, **options: Any) -> None:
        from types import SimpleNamespace

        from megatron.core.transformer.enums import AttnMaskType

        super().__init__(config)
        self.layer_number, self.attn_mask_type, self.attention_type = 1, AttnMaskType.causal, "self"
        self.pg_collection = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
        self.core_attention = core
        vars(self).update(options)


def small(**options: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, **({"attention_dropout": 0.0} | options)
    )


def test_nothing_is_swapped_where_one_layer_is_refused() -> None:
    good, bad = (Attention(small(), torch.nn.Identity()) for _ in range(2))
    bad.attention_type = "cross"
    with pytest.raises(ValueError, match="attention_type='cross'"):
        swap_core_attention(torch.nn.ModuleList([good, bad]), MOBA)
    assert isinstance(good.core_attention, torch.nn.Identity)
    assert swap_core_attention([good, good], MOBA) == 1, "shared by two chunks"
    assert isinstance(good.core_attention, MoBACoreAttention)


def test_a_list_of_transports_has_an_entry_per_layer() -> None:
    config = small(context_parallel_size=2, cp_comm_type=["moba_ring", "moba_fetch"])
    attention = Attention(config, torch.nn.Identity(), layer_number=2)
    swap_core_attention(attention, MOBA)
    assert attention.core_attention.comm == "fetch"


def test_options_and_core_attentions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="attention_dropout=0.1"):
        swap_core_attention(Attention(small(attention_dropout=0.1), torch.nn.Identity()), MOBA)
    with pytest.raises(ValueError, match=r"layer 1: Linear has parameters of its own, \['weight', 'bias'\]"):
        swap_core_attention(Attention(small(), torch.nn.Linear(2, 2)), MOBA)


def test_a_model_without_attention_is_refused_unless_it_is_a_pipeline_stage() -> None:
    with pytest.raises(ValueError, match="no core_attention found in Linear"):
        swap_core_attention(torch.nn.Linear(2, 2), MOBA)
    with pytest.raises(ValueError, match="no core_attention found in nothing"):
        swap_core_attention([], MOBA)
    stage = MegatronModule(small(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32))
    assert swap_core_attention([stage], MOBA) == 0
