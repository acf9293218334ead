"""FLOPs of a step against counts made one query, one block and one matrix at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig, reference
from moba_cp.megatron.flops import attended_pairs, causal_pairs, peak_of_name, scored_pairs, step_flops

LENGTHS = ([1], [7], [8], [64], [65], [3, 0, 40, 8, 100], [])
SIZES = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 40}


def model(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**(SIZES | {"gated_linear_unit": True} | changes))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("size", "topk"), [(1, 1), (8, 1), (8, 2), (8, 3), (5, 4), (16, 1000)])
def test_pairs_are_those_of_every_query(lengths: list[int], size: int, topk: int) -> None:
    attended = scored = 0
    for position in (p for length in lengths for p in range(length)):
        earlier = position // size
        attended += min(topk - 1, earlier) * size + position % size + 1
        scored += earlier if topk > 1 else 0
    moba = MoBAConfig(size, topk)
    assert attended_pairs(lengths, moba) == attended
    assert scored_pairs(lengths, moba) == scored
    assert causal_pairs(lengths) == sum(p + 1 for length in lengths for p in range(length))


@pytest.mark.parametrize(("size", "topk"), [(8, 1), (8, 3), (5, 4), (16, 1000)])
def test_attended_pairs_are_those_of_the_definition(size: int, topk: int) -> None:
    moba, generator = MoBAConfig(size, topk), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 61, 1, 8, generator=generator)
    assert attended_pairs([61], moba) == int(reference.attention_mask(q, k, moba).sum())


def test_linear_layers_and_logits_are_the_parameters_that_a_token_meets() -> None:
    hidden, heads, groups, ffn = (SIZES[name] for name in list(SIZES)[1:])
    dim = hidden // heads
    qkv, proj = torch.nn.Linear(hidden, (heads + 2 * groups) * dim), torch.nn.Linear(heads * dim, hidden)
    fc1, fc2 = torch.nn.Linear(hidden, 2 * ffn), torch.nn.Linear(ffn, hidden)
    parameters = sum(layer.weight.numel() for layer in (qkv, proj, fc1, fc2))
    flops = step_flops(model(), MoBAConfig(8, 3), [10, 20], 384)
    assert flops.linear == 6 * 30 * 3 * parameters
    assert flops.logits == 6 * 30 * hidden * 384
    plain = step_flops(model(gated_linear_unit=False), MoBAConfig(8, 3), [10, 20], 384)
    assert flops.linear - plain.linear == 6 * 30 * 3 * hidden * ffn


def test_attention_and_scoring_follow_the_layers() -> None:
    moba, lengths = MoBAConfig(8, 3), [100, 30]
    flops = step_flops(model(), moba, lengths, 384, moba_layers=2)
    assert flops.attention == 12 * 24 * (2 * attended_pairs(lengths, moba) + causal_pairs(lengths))
    assert flops.scoring == 2 * 24 * 2 * scored_pairs(lengths, moba)
    assert flops.total == flops.linear + flops.attention + flops.scoring + flops.logits
    # With blocks enough for everything, MoBA attends as full attention does.
    everything = step_flops(model(), MoBAConfig(8, 100), lengths, 384)
    assert everything.attention == step_flops(model(), moba, lengths, 384, moba_layers=0).attention
    wide = step_flops(model(kv_channels=12), moba, lengths, 384)
    assert wide.attention == 2 * step_flops(model(), moba, lengths, 384).attention


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="moba_layers=4 must be between 0 and 3"):
        step_flops(model(), MoBAConfig(8, 3), [10], 384, moba_layers=4)
    with pytest.raises(ValueError, match="num_moe_experts=8"):
        step_flops(model(num_moe_experts=8), MoBAConfig(8, 3), [10], 384)


def test_peaks_are_known_by_name() -> None:
    assert peak_of_name("NVIDIA H100 80GB HBM3") == peak_of_name("NVIDIA H200") == 989e12
    assert peak_of_name("NVIDIA H100 PCIe") is None
    assert peak_of_name("NVIDIA A100-SXM4-80GB") is None
