"""Which layers compute full attention, with what, and switching while training."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core.extensions import transformer_engine as extension
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from moba_cp import MoBAConfig
from moba_cp.megatron import MoBACoreAttention, MoBASchedule, MoBASettings, collect_reports, use_full_attention
from moba_cp.megatron.layout import packed_layout
from tests.megatron.test_core_attention import HEADS, MOBA, PADDED, TRUE, build, random_qkv
from tests.megatron_models import packed_params
from tests.ranks import run_ranks


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
        ({"comm": "smoke"}, "comm must be one of.*'ring'.*got 'smoke'"),
        ({"full_attention_comm": "fetch"}, "full_attention_comm must be one of.*'ring'.*got 'fetch'"),
        ({"full_attention_backend": "flash"}, "full_attention_backend must be one of.*got 'flash'"),
        ({"full_attention_backend": "te", "full_attention_comm": "ring"}, "'ring' is for.*'torch'.*cp_comm_type"),
    ],
)
def test_choices_that_make_no_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoBASettings(MOBA, **settings)


def test_settings_of_other_types_are_refused() -> None:
    for name in ("full_attention_last_n_layers", "head_parallel"):
        for value in (1.5, True):
            with pytest.raises(TypeError, match=f"{name} must be an int, got {value}"):
                MoBASettings(MOBA, **{name: value})
    with pytest.raises(TypeError, match=r"full_from must be an int, got 2.5"):
        MoBASchedule(2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer_pattern must be a sequence of 1 and 0, got 1"):
        MoBASettings(MOBA, layer_pattern=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be a MoBAConfig, got dict"):
        MoBASettings({"block_size": 4})  # type: ignore[arg-type]


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
    assert MoBASchedule(1).is_full(0)
    assert not MoBASchedule(2).is_full(0)
    with pytest.raises(ValueError, match=r"1\.5"):
        MoBASchedule.by_fraction(1.5, 10)
    with pytest.raises(ValueError, match="got 0"):
        MoBASchedule(0)
    for fraction, steps, message in (
        (0.5, -10, "total_steps must be at least 1, got -10"),
        (0.5, 10.5, "total_steps must be an int, got 10.5"),
        (0.5, "10", "total_steps must be an int, got '10'"),
        ("x", 10, "moba_fraction must be a number, got 'x'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            MoBASchedule.by_fraction(fraction, steps)  # type: ignore[arg-type]
    for step in (-1, -1.5):
        with pytest.raises((TypeError, ValueError), match=f"step must .* got {step}"):
            MoBASchedule(3).apply(torch.nn.ModuleList(), step)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="full must be a bool, got 'no'"):
        use_full_attention(torch.nn.ModuleList(), "no")  # type: ignore[arg-type]


def test_reports_of_nested_blocks_go_to_each() -> None:
    layer, qkv = build(), random_qkv(30, 1)
    model = torch.nn.ModuleList([layer])
    with collect_reports(model) as outer:
        with collect_reports(model) as inner:
            layer(*qkv)
        layer(*qkv)
    layer(*qkv)
    assert (len(outer), len(inner)) == (2, 1)
    assert outer[0].report is inner[0].report


def full(comm: str = "auto", **arguments: Any) -> MoBACoreAttention:
    """A layer that computes full attention."""
    settings = MoBASettings(MOBA, layer_pattern=(0, 1), full_attention_comm=comm)
    return build(settings=settings, **arguments)


def test_transport_of_full_layers() -> None:
    assert full().full_comm == "auto"
    assert full(cp_comm_type="p2p").full_comm == "auto"
    assert full(cp_comm_type="moba_ring").full_comm == "ring"
    assert full(cp_comm_type="moba_all_gather").full_comm == "all_gather"
    assert full(cp_comm_type="moba_fetch").full_comm == "auto"  # it brings selected blocks; here all are wanted
    assert full("all_gather", cp_comm_type="moba_ring").full_comm == "all_gather"
    assert build(cp_comm_type="moba_ring").full_comm == "ring"  # for when it is switched
    with pytest.raises(ValueError, match="'a2a'.*moba_<comm>"):
        full(cp_comm_type="a2a")


def full_on_rank(rank: int, world_size: int, comm: str) -> float:
    """Largest difference, forward and backward, from MoBA whose blocks hold a whole document; padding is NaN."""
    packed = packed_params(TRUE, PADDED)
    held = packed_layout(TRUE, PADDED, world_size).local_indices(rank)
    real = torch.cat([torch.arange(p, p + e - s) for p, s, e in zip(PADDED, TRUE, TRUE[1:])])
    mine = torch.isin(held, real)
    qkv = [x[held].masked_fill(~mine[:, None, None], float("nan")) for x in random_qkv(PADDED[-1])]
    results = []
    for core in (full(comm, group=dist.group.WORLD), build(dist.group.WORLD, MoBAConfig(PADDED[-1], 1))):
        local = [x.clone().requires_grad_() for x in qkv]
        out = core(*local, packed_seq_params=packed)
        gradients = torch.autograd.grad(out[mine].square().sum(), local)
        results.append([x.flatten(1)[mine] for x in (out, *gradients)])
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("comm", ["ring", "all_gather"])
def test_full_layers_see_whole_documents_and_no_padding(comm: str) -> None:
    assert max(run_ranks(2, full_on_rank, comm)) < 1e-12


class FakeTE(torch.nn.Module):
    """Stands for `TEDotProductAttention`: notes how it is built and called, and adds the state that it would."""

    def __init__(self, config: Any, **arguments: Any) -> None:
        super().__init__()
        self.arguments, self.calls = arguments, []

    def forward(self, query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls.append((query, *args, kwargs))
        return query.flatten(-2)

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(0)


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "HAVE_TE", True)
    monkeypatch.setattr(extension, "TEDotProductAttention", FakeTE)


WITH_TE = MoBASettings(MOBA, layer_pattern=(0, 1), full_attention_backend="te")


@pytest.mark.usefixtures("te")
def test_transformer_engine_computes_full_layers() -> None:
    layer = build(settings=WITH_TE, softmax_scale=0.25)
    (inner,) = layer._te
    given = dict(inner.arguments)
    assert given.pop("pg_collection").cp is layer.cp_group
    assert given == {
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "attention_dropout": None,
        "softmax_scale": 0.25,
        "cp_comm_type": "p2p",
    }
    q, k, v = random_qkv(10, 1)
    assert layer(q, k, v).shape == (10, 1, HEADS * 8)
    packed = PackedSeqParams(qkv_format="thd")
    layer(q[:, 0], k[:, 0], v[:, 0], attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=packed)
    first, second = inner.calls
    assert first[1:] == (k, v, None, {"attn_mask_type": AttnMaskType.causal, "packed_seq_params": None})
    assert second[-1] == {"attn_mask_type": AttnMaskType.padding_causal, "packed_seq_params": packed}
    with pytest.raises(ValueError, match="attention_bias is not supported"):
        layer(q, k, v, attention_bias=torch.zeros(1))


@pytest.mark.usefixtures("te")
def test_a_switched_layer_computes_what_a_full_one_does() -> None:
    layer = build(layer_number=2, settings=WITH_TE)
    q, k, v = random_qkv(10, 1)
    moba = build()(q, k, v)
    assert torch.equal(layer(q, k, v), moba)
    use_full_attention(layer, True)
    assert torch.equal(layer(q, k, v), q.flatten(-2))
    use_full_attention(layer, False)
    assert torch.equal(layer(q, k, v), moba)


@pytest.mark.usefixtures("te")
def test_transformer_engine_changes_no_checkpoint() -> None:
    layer = build(settings=WITH_TE)
    assert not layer.state_dict()
    assert not layer.sharded_state_dict()
    assert len(list(layer.modules())) == 1
    layer.load_state_dict({}, strict=True)
    layer.eval()
    assert not layer._te[0].training
    layer.train()
    assert layer._te[0].training


@pytest.mark.usefixtures("te")
def test_transformer_engine_gets_a_transport_that_it_knows() -> None:
    def given(cp_comm_type: str, **arguments: Any) -> str:
        return build(settings=WITH_TE, cp_comm_type=cp_comm_type, **arguments)._te[0].arguments["cp_comm_type"]

    assert given("moba_fetch") == "p2p"
    assert given("a2a") == "a2a"
    assert given("moba_ring", layer_number=2) == "p2p"
    with pytest.raises(ValueError, match="'a2a'.*moba_<comm>"):  # a MoBA layer
        given("a2a", layer_number=2)


@pytest.mark.usefixtures("te")
def test_transformer_engine_shards_zigzag_only() -> None:
    contiguous = MoBASettings(MOBA, partition="contiguous", full_attention_backend="te")
    assert build(settings=contiguous)._te
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    with pytest.raises(ValueError, match="partition='contiguous'.*full_attention_backend='torch'"):
        build(two, settings=contiguous, config={"context_parallel_size": 2})


@pytest.mark.usefixtures("te")
def test_transformer_engine_gets_no_pack_that_is_cut_otherwise() -> None:
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    whole = dataclasses.replace(WITH_TE, packed_partition="zigzag_pack")
    with pytest.raises(ValueError, match="packed_partition='zigzag_pack'.*full_attention_backend='torch'"):
        build(two, settings=whole, config={"context_parallel_size": 2})
    lengths = torch.tensor([0, 8, 20])
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    layer = build(two, settings=WITH_TE)
    with pytest.raises(ValueError, match="2 sequences.*nothing says.*packed_partition"):
        layer(*random_qkv(10), packed_seq_params=packed)
    packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = lengths
    layer(*random_qkv(10), packed_seq_params=packed)
    assert len(layer._te[0].calls) == 1


@pytest.mark.skipif(extension.HAVE_TE, reason="Transformer Engine is installed")
def test_without_transformer_engine_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match="layer 1: full_attention_backend='te'.*pip install.*full_attention_backend"):
        build(settings=WITH_TE)
