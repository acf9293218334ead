"""MoBACoreAttention against the definition, with tensors and arguments as Megatron passes them."""

from __future__ import annotations

import copy
import io
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig, reference
from moba_cp.megatron import MoBACoreAttention, MoBASettings, core_attention
from moba_cp.megatron.layout import packed_layout
from tests.megatron_models import packed_params
from tests.ranks import run_ranks

HEADS, KV_HEADS, DIM = 4, 2, 8
MOBA = MoBAConfig(block_size=5, topk=3)
TO_DEFINITION = 1e-10


def build(
    group: Any = None, moba: MoBAConfig = MOBA, config: dict[str, Any] | None = None, **arguments: Any
) -> MoBACoreAttention:
    """A layer; ``group=None`` stands for a context-parallel group of one rank."""
    group = group or SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    settings = {"num_layers": 2, "hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_query_groups": KV_HEADS}
    transformer = TransformerConfig(**settings, **({"attention_dropout": 0.0} | (config or {})))
    built_with: dict[str, Any] = {
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "settings": MoBASettings(moba),
        "pg_collection": SimpleNamespace(cp=group),
    }
    return MoBACoreAttention(transformer, **(built_with | arguments))


def random_qkv(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(*shape, h, DIM, generator=generator, dtype=torch.float64) for h in (HEADS, KV_HEADS, KV_HEADS)]


def expected(qkv: list[torch.Tensor], cu_seqlens: list[int]) -> list[torch.Tensor]:
    """Output and gradients of ``sum(out ** 2)`` by the definition; tensors are ``[tokens, heads, d]``."""
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = reference.moba_attention(*leaves, cu_seqlens, MOBA)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def zigzag(x: torch.Tensor, rank: int, cp_size: int) -> torch.Tensor:
    """This rank's chunks of ``[s, ...]``."""
    chunks = x.chunk(2 * cp_size)
    return torch.cat([chunks[rank], chunks[2 * cp_size - 1 - rank]])


def sbhd_on_rank(rank: int, world_size: int, batch: int) -> float:
    """Largest error of output and gradients on this rank."""
    length = 24 * world_size
    core = build(dist.group.WORLD, cp_comm_type="moba_fetch" if world_size > 1 else None)
    q, k, v = random_qkv(length, batch)
    local = [zigzag(x, rank, world_size).requires_grad_() for x in (q, k, v)]
    out = core(*local, None, attn_mask_type=AttnMaskType.causal, attention_bias=None, packed_seq_params=None)
    assert out.shape == (length // world_size, batch, HEADS * DIM)
    got = [out, *torch.autograd.grad(out.square().sum(), local)]
    worst = 0.0
    for b in range(batch):
        wanted = expected([x[:, b] for x in (q, k, v)], [0, length])
        for mine, whole in zip(got, wanted, strict=True):
            error = mine[:, b].reshape(len(mine), -1) - zigzag(whole, rank, world_size).flatten(1)
            worst = max(worst, error.abs().max().item())
    return worst


def refusing_layer(rank: int, size: int) -> tuple[list[str], float]:
    """What rank 0 alone refuses; then the error of a good call."""
    core, good, errors = build(dist.group.WORLD), [x.chunk(2)[rank] for x in random_qkv(48, 1)], []
    packed = packed_params((0, 13, 30, 33, 33), (0, 16, 36, 40, 44))
    bad: tuple[dict[str, Any], ...] = (
        {"attention_mask": torch.zeros(1, 1, 24, 24)},
        {"attention_bias": torch.zeros(1)},
        {"unknown": 1},
        {"packed_seq_params": packed},
        {"query": good[0][:23]},
        {"query": good[0][:, 0]},
        {"packed_seq_params": PackedSeqParams(local_cp_size=4, cp_group=dist.group.WORLD)},
        {"query": None},
        {"value": [good[2]]},
        {"key": good[1][0, 0, 0, 0]},
        {"packed_seq_params": "x"},
    )
    for change in bad:
        arguments = dict(zip(("query", "key", "value"), good, strict=True)) | (change if rank == 0 else {})
        with pytest.raises((TypeError, ValueError)) as error:  # the text is looked at below
            core(**arguments)
        errors.append(str(error.value))
    return errors, sbhd_on_rank(rank, size, 1)


def test_what_one_rank_refuses_ends_the_others_too() -> None:
    texts = (
        "attention_mask",
        "attention_bias is not",
        "unknown",
        "end at token 44",
        "23 queries but 24",
        "must be",
        "local_cp_size=4",
        "query must be a tensor .*, got NoneType",
        "value must be a tensor .*, got list",
        r"key must be a tensor .*, got \(\)",
        "packed_seq_params must be PackedSeqParams or None, got str",
    )
    for rank, (errors, worst) in enumerate(run_ranks(2, refusing_layer)):
        for text, error in zip(texts, errors, strict=True):
            assert re.search(text, error), (rank, error)
            assert rank == 0 or "rank 0 refused its input" in error
        assert worst < TO_DEFINITION


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_sbhd_equals_the_definition(world_size: int, batch: int) -> None:
    assert max(run_ranks(world_size, sbhd_on_rank, batch)) < TO_DEFINITION


TRUE, PADDED = (0, 13, 30, 33, 33), (0, 16, 36, 40, 40)


def thd_on_rank(rank: int, world_size: int, local_cp_size: int | None) -> float:
    """Largest error over true tokens; padding holds NaN, which must not reach them."""
    core = build(dist.group.WORLD)
    cp_size = local_cp_size or world_size
    held = packed_layout(TRUE, PADDED, cp_size).local_indices(rank % cp_size)
    real = torch.cat([torch.arange(p, p + e - s) for p, s, e in zip(PADDED, TRUE, TRUE[1:])])
    is_real = torch.zeros(PADDED[-1], dtype=torch.bool).index_fill_(0, real, True)
    qkv = random_qkv(PADDED[-1])
    wanted = expected([x[real] for x in qkv], list(TRUE))
    for x in qkv:
        x[~is_real] = float("nan")
    packed = packed_params(TRUE, PADDED)
    if local_cp_size:  # dynamic context parallelism: off for this micro-batch
        packed.local_cp_size = local_cp_size
    local = [x[held].requires_grad_() for x in qkv]
    out = core(*local, None, attn_mask_type=AttnMaskType.padding_causal, packed_seq_params=packed)
    assert out.shape == (len(held), HEADS * DIM)
    mine = is_real[held]
    got = [out, *torch.autograd.grad(out[mine].square().sum(), local)]
    worst = 0.0
    for local_values, true_values in zip(got, wanted, strict=True):
        whole = torch.zeros(PADDED[-1], *true_values.shape[1:], dtype=torch.float64)
        whole[real] = true_values
        error = local_values.reshape(len(held), -1)[mine] - whole[held][mine].flatten(1)
        worst = max(worst, error.abs().max().item())
    return worst


@pytest.mark.parametrize(("world_size", "local_cp_size"), [(1, None), (2, None), (2, 1)])
def test_packed_sequences_equal_the_definition_and_never_see_padding(
    world_size: int, local_cp_size: int | None
) -> None:
    assert max(run_ranks(world_size, thd_on_rank, local_cp_size)) < TO_DEFINITION


def test_it_adds_nothing_to_checkpoints() -> None:
    core = build()
    assert not list(core.parameters())
    assert not list(core.buffers())
    assert not core.sharded_state_dict()


class One:
    """A group of one rank that can be pickled."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def saved(core: MoBACoreAttention) -> MoBACoreAttention:
    buffer = io.BytesIO()
    torch.save(core, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda core: pickle.loads(pickle.dumps(core)), saved])
def test_a_copied_or_saved_layer_computes_the_same(copied: Any) -> None:
    core, qkv = build(One()), random_qkv(20)
    packed = packed_params((0, 7, 20), (0, 7, 20))
    assert torch.equal(copied(core)(*qkv, packed_seq_params=packed), core(*qkv, packed_seq_params=packed))


def test_the_dtype_is_that_of_the_tensors() -> None:
    qkv = random_qkv(20, 1)
    wanted = build()(*qkv)
    half = build().half()(*(x.half() for x in qkv))
    assert half.dtype == torch.float16
    # The inputs' rounding to 2 ** -11 may change which block scores highest in a row or two, and every value a little.
    assert ((half - wanted).abs() > 0.02).any(-1).float().mean() < 0.2
    with pytest.raises(TypeError, match="one dtype, got q torch.float64, k torch.float16"):
        build().half()(qkv[0], qkv[1].half(), qkv[2].half())


def test_a_compiled_model_breaks_its_graph_once_per_layer_and_gives_the_same_numbers() -> None:
    core = build()

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSeqParams | None) -> torch.Tensor:
        return core(q * 2, k * 2, v * 2, packed_seq_params=packed) * 2

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for cu_seqlens in ([0, 20], [0, 7, 20], [0, 15, 20]):
        lengths = torch.tensor(cu_seqlens)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
        qkv = random_qkv(20)
        assert torch.equal(compiled(*qkv, packed), model(*qkv, packed))
    assert len(graphs) == 2
    qkv = random_qkv(20, 1)
    assert torch.equal(compiled(*qkv, None), model(*qkv, None))
    torch._dynamo.reset()


def test_one_sequence_is_not_copied() -> None:
    core = build()
    seen: list[torch.Tensor] = []
    core._attend = lambda q, k, v, layout, group: (seen.extend((q, k, v)), q)[1]  # type: ignore[method-assign]
    q, k, v = random_qkv(10, 1)
    core(q, k, v)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in (q, k, v)]


def test_scale_comes_from_megatron_or_from_moba_but_not_from_both() -> None:
    assert build(softmax_scale=0.25).moba.softmax_scale == 0.25
    with pytest.raises(ValueError, match=r"0\.25.*0\.5"):
        build(moba=MoBAConfig(5, 3, softmax_scale=0.5), softmax_scale=0.25)


def test_transport_can_be_chosen_for_a_layer() -> None:
    assert build(cp_comm_type="p2p").comm == "auto"
    assert build(cp_comm_type="moba_ring").comm == "ring"
    with pytest.raises(ValueError, match="'a2a'.*moba_<comm>"):
        build(cp_comm_type="a2a")
    with pytest.raises(ValueError, match="'moba_smoke' names no transport.*moba_ring"):
        build(cp_comm_type="moba_smoke")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_dropout": 0.1}, r"layer 1: attention_dropout=0\.1 is not supported"),
        ({"window_size": (128, 0)}, r"window_size=\(128, 0\)"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
        ({"qk_clip": True}, "qk_clip=True"),
        ({"fp8_dot_product_attention": True}, "fp8_dot_product_attention=True"),
        ({"flash_decode": True}, "flash_decode=True.*cache"),
    ],
)
def test_options_it_cannot_honour_are_refused_when_the_layer_is_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config=config)


def test_arguments_it_cannot_honour_are_refused_when_the_layer_is_built() -> None:
    with pytest.raises(ValueError, match="attn_mask_type=AttnMaskType.no_mask"):
        build(attn_mask_type=AttnMaskType.no_mask)
    with pytest.raises(ValueError, match="attention_type='cross'"):
        build(attention_type="cross")
    with pytest.raises(TypeError, match="k_channels=16, v_channels=8"):
        build(k_channels=16, v_channels=8)
    build(some_future_option=None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, ValueError, r"attention_mask of shape \(1, 1, 4, 4\)"),
        ({"attention_bias": torch.zeros(1)}, ValueError, "attention_bias is not supported"),
        ({"attn_mask_type": AttnMaskType.arbitrary}, ValueError, "AttnMaskType.arbitrary"),
        ({"num_splits": 4}, TypeError, "num_splits=4"),
        ({"key": torch.zeros(9, 1, KV_HEADS, DIM)}, ValueError, "4 queries but 9 keys.*cache"),
        (  # as Megatron's static engine decodes
            {"key": torch.zeros(9, 1, KV_HEADS, DIM), "attn_mask_type": AttnMaskType.no_mask},
            ValueError,
            "4 queries but 9 keys.*cache",
        ),
        ({"packed_seq_params": PackedSeqParams(qkv_format="thd")}, ValueError, "cu_seqlens_q is None"),
    ],
)
def test_calls_it_cannot_honour_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    q, k, v = (torch.zeros(4, 1, h, DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    with pytest.raises(error, match=message):
        build()(**({"query": q, "key": k, "value": v} | arguments))


def test_lengths_that_do_not_fit_the_tensors_are_refused() -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_kv=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="end at token 4.*hold 6 tokens"):
        build()(*random_qkv(6), packed_seq_params=packed)
    packed.cu_seqlens_kv = torch.tensor([0, 6])
    with pytest.raises(ValueError, match="cu_seqlens_kv differs"):
        build()(*random_qkv(4), packed_seq_params=packed)


@pytest.mark.parametrize("given", [{}, {"workspace_bytes": 4096}, {"exchange_bytes": 0, "workspace_bytes": 8192}])
def test_budgets_reach_the_layer(given: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    attention = core_attention.moba_attention
    noted = lambda *tensors, **options: seen.append(options) or attention(*tensors, **options)  # noqa: E731
    monkeypatch.setattr(core_attention, "moba_attention", noted)
    core = build(settings=MoBASettings(MOBA, **given))
    core(*random_qkv(20, 1), attention_mask=None, attn_mask_type=AttnMaskType.causal)
    assert [{x: options[x] for x in options if x.endswith("_bytes")} for options in seen] == [given]


def test_a_budget_that_is_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="workspace_bytes must be at least 1, got 0"):
        MoBASettings(MOBA, workspace_bytes=0)
    with pytest.raises(TypeError, match="workspace_bytes must be an int"):
        MoBASettings(MOBA, workspace_bytes=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exchange_bytes must be at least 0, got -1"):
        MoBASettings(MOBA, exchange_bytes=-1)
