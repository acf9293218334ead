"""Full causal attention over a group, the choice of layers, and switching while training."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.megatron import MoBASchedule, MoBASettings, use_full_attention
from moba_cp.dense import causal_attention
from tests.megatron.test_core_attention import MOBA, build, random_qkv
from tests.ranks import run_ranks

CU_SEQLENS = [0, 13, 13, 14, 40]


def layouts(cp_size: int) -> list[SequenceLayout]:
    """Every kind; the last leaves all tokens but some to the last rank."""
    shares = [[(0, 5), (30, 31)], *[[] for _ in range(cp_size - 2)], [(31, 40), (5, 30)]]
    return [
        SequenceLayout.contiguous(CU_SEQLENS, cp_size),
        SequenceLayout.zigzag(CU_SEQLENS, cp_size, per_document=True),
        SequenceLayout.zigzag(CU_SEQLENS, cp_size, per_document=False),
        *([SequenceLayout.from_runs(shares, CU_SEQLENS)] if cp_size > 1 else []),
    ]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """torch's attention, one document at a time."""
    outputs = []
    for start, end in zip(CU_SEQLENS, CU_SEQLENS[1:]):
        heads = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        outputs.append(
            F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(outputs)


def dense_on_rank(rank: int, world_size: int, scale: float | None) -> float:
    """Largest error of output and gradients over all layouts."""
    leaves = [x.requires_grad_() for x in random_qkv(CU_SEQLENS[-1])]
    whole = causal(*leaves, scale)
    wanted = [whole, *torch.autograd.grad(whole.square().sum(), leaves)]
    worst = 0.0
    for layout in layouts(world_size):
        local = [layout.shard(x.detach(), rank).requires_grad_() for x in leaves]
        out = causal_attention(*local, scale, layout=layout, group=dist.group.WORLD)
        got = [out, *torch.autograd.grad(out.square().sum(), local)]
        for mine, all_of_it in zip(got, wanted, strict=True):
            worst = max([worst, *(mine - layout.shard(all_of_it, rank)).abs().flatten().tolist()])
    return worst


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_dense_attention_equals_torch_for_every_layout(world_size: int) -> None:
    assert max(run_ranks(world_size, dense_on_rank, 0.3 if world_size == 2 else None)) < 1e-12


def test_tensors_of_another_share_are_refused() -> None:
    layout = SequenceLayout.contiguous([0, 8], 1)
    with pytest.raises(ValueError, match=r"holds 8 tokens, got q \(7, 4, 8\)"):
        causal_attention(*random_qkv(7), None, layout=layout)


def test_layers_are_chosen_by_their_number_over_the_whole_model() -> None:
    last_two = MoBASettings(MOBA, full_attention_last_n_layers=2)
    assert [last_two.computes_moba(n, 5) for n in range(1, 6)] == [True, True, True, False, False]
    pattern = MoBASettings(MOBA, layer_pattern=(1, 0, 1))
    assert [pattern.computes_moba(n, 3) for n in range(1, 4)] == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"full_attention_last_n_layers": -1}, "-1"),
        ({"full_attention_last_n_layers": 1, "layer_pattern": (1, 0)}, "not both"),
        ({"layer_pattern": (1, 2)}, r"got \[1, 2\]"),
    ],
)
def test_choices_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoBASettings(MOBA, **settings)


def test_choices_that_do_not_fit_the_model_are_refused_when_the_layer_is_built() -> None:
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        build(settings=MoBASettings(MOBA, layer_pattern=(1, 0, 1)))
    with pytest.raises(ValueError, match="full_attention_last_n_layers=3, the model has 2 layers"):
        build(settings=MoBASettings(MOBA, full_attention_last_n_layers=3))


def test_a_full_layer_attends_to_everything_and_a_switched_one_does_so_until_it_is_switched_back() -> None:
    qkv = random_qkv(30, 1)
    everything = build(moba=MoBAConfig(5, 6))(*qkv)
    full = build(layer_number=2, settings=MoBASettings(MOBA, full_attention_last_n_layers=1))
    torch.testing.assert_close(full(*qkv), everything, rtol=0, atol=1e-12)
    switched = build(layer_number=1, settings=MoBASettings(MOBA, full_attention_last_n_layers=1))
    moba = switched(*qkv)
    assert (moba - everything).abs().max() > 1e-3
    assert use_full_attention(torch.nn.ModuleList([switched, full]), True) == 2
    torch.testing.assert_close(switched(*qkv), everything, rtol=0, atol=1e-12)
    assert use_full_attention([switched, full], False) == 1
    assert torch.equal(switched(*qkv), moba)


def test_schedules() -> None:
    assert [MoBASchedule(3).is_full(step) for step in (1, 2, 3, 4)] == [False, False, True, True]
    assert not MoBASchedule().is_full(10**9)
    assert MoBASchedule.by_fraction(0.9, 10) == MoBASchedule(10)
    assert MoBASchedule.by_fraction(1.0, 10) == MoBASchedule(None)
    assert MoBASchedule.by_fraction(0.0, 10) == MoBASchedule(1)
    with pytest.raises(ValueError, match=r"1\.5"):
        MoBASchedule.by_fraction(1.5, 10)
    with pytest.raises(ValueError, match="got 0"):
        MoBASchedule(0)
