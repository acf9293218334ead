"""How a batch is cut over the ranks: computed where somebody names it, refused where nothing tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams

from moba_cp import reference
from moba_cp.megatron import MoBASettings
from moba_cp.megatron.layout import packed_layout
from moba_cp.megatron.record import packs_of_flags
from moba_cp.megatron.unsupported import refuse_flags
from tests.megatron.test_core_attention import MOBA, TO_DEFINITION, build, random_qkv
from tests.ranks import run_ranks

CONTIGUOUS = {"partition": "contiguous"}


@pytest.mark.parametrize(
    ("partition", "rank0", "rank1"),
    [
        ("zigzag", [0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]),
        ("zigzag_pack", [0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]),
        ("contiguous", [0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]),
        ("contiguous_pack", [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]),
    ],
)
def test_who_holds_what(partition: str, rank0: list[int], rank1: list[int]) -> None:
    layout = packed_layout((0, 4, 12), None, 2, partition)
    assert [layout.local_indices(rank).tolist() for rank in range(2)] == [rank0, rank1]
    assert [int(c) for c in layout.cu_seqlens] == [0, 4, 12]


def test_a_whole_pack_may_be_cut_inside_sequences_and_their_padding() -> None:
    layout = packed_layout((0, 3, 5), (0, 5, 8), 2, "contiguous_pack")
    assert layout.local_indices(0).tolist() == [0, 1, 2, 3]
    assert [int(c) for c in layout.cu_seqlens] == [0, 3, 5, 7, 8]


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ("contiguous", "sequence 0 holds 5 tokens.*'contiguous'.*multiple of 2"),
        ("contiguous_pack", "the pack holds 11 tokens.*'contiguous_pack'.*multiple of 2"),
        ("zigzag_pack", "the pack holds 11 tokens.*multiple of 4"),
    ],
)
def test_unequal_parts_are_refused(partition: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_layout((0, 5, 11), None, 2, partition)


CU_SEQLENS = (0, 16, 64)


def pack(mode: str | None = None, cu_seqlens: tuple[int, ...] = CU_SEQLENS, padded: bool = False) -> PackedSeqParams:
    lengths = torch.tensor(cu_seqlens)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    if padded:
        packed.cu_seqlens_q_padded = packed.cu_seqlens_kv_padded = lengths
    if mode is not None:
        packed.cp_partition_mode = mode
    return packed


def core_for(group: Any, settings: dict[str, Any], stated: str | None = None) -> Any:
    """A layer of a model whose Megatron configuration states a ``cp_partition_mode``."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    if stated is not None:
        TransformerConfig.cp_partition_mode = stated
    try:
        return build(group, settings=MoBASettings(MOBA, **settings), config={"context_parallel_size": 2})
    finally:
        if stated is not None:
            del TransformerConfig.cp_partition_mode


def packed_on_rank(
    rank: int, world_size: int, cut: str, settings: dict[str, Any], stated: str | None, packed: dict[str, Any]
) -> float:
    """Largest error on this rank of a pack that is cut like ``cut``."""
    cu_seqlens = packed.get("cu_seqlens", CU_SEQLENS)
    held = packed_layout(cu_seqlens, None, world_size, cut).local_indices(rank)
    qkv = random_qkv(cu_seqlens[-1])
    out = core_for(dist.group.WORLD, settings, stated)(*(x[held] for x in qkv), packed_seq_params=pack(**packed))
    return (out - reference.moba_attention(*qkv, list(cu_seqlens), MOBA).flatten(1)[held]).abs().max().item()


@pytest.mark.parametrize(
    ("cut", "settings", "stated", "packed"),
    [
        ("zigzag", {}, None, {"padded": True}),
        ("zigzag", {}, None, {"padded": True, "mode": "zigzag"}),
        ("zigzag", {}, None, {"cu_seqlens": (0, 64, 64)}),
        ("zigzag", {"packed_partition": "zigzag"}, None, {}),
        ("zigzag_pack", {"packed_partition": "zigzag_pack"}, None, {}),
        ("zigzag_pack", {"packed_partition": "zigzag_pack"}, None, {"cu_seqlens": (0, 13, 64), "mode": "zigzag"}),
        ("contiguous_pack", {"packed_partition": "contiguous_pack"}, None, {"mode": "contiguous"}),
        ("contiguous_pack", {"packed_partition": "contiguous_pack"}, None, {"cu_seqlens": (0, 13, 64)}),
        ("contiguous", {"packed_partition": "contiguous"}, None, {"mode": "contiguous"}),
        ("contiguous_pack", CONTIGUOUS | {"packed_partition": "contiguous_pack"}, "contiguous", {"mode": "contiguous"}),
    ],
)
def test_a_cut_that_is_named_equals_the_definition(
    cut: str, settings: dict[str, Any], stated: str | None, packed: dict[str, Any]
) -> None:
    assert max(run_ranks(2, packed_on_rank, cut, settings, stated, packed)) < TO_DEFINITION


TWO = SimpleNamespace(size=lambda: 2, rank=lambda: 0)


@pytest.mark.parametrize(
    ("settings", "stated", "packed", "message"),
    [
        ({}, None, {}, "2 sequences.*nothing says.*packed_partition"),
        ({}, "zigzag", {"mode": "zigzag"}, "2 sequences.*nothing says.*packed_partition"),
        ({}, None, {"mode": "contiguous"}, "cp_partition_mode='contiguous'.*'zigzag'.*packed_partition"),
        ({}, None, {"mode": "contiguous", "padded": True}, "cp_partition_mode='contiguous'.*packed_partition"),
        ({}, None, {"mode": "striped"}, "cp_partition_mode='striped' is not supported"),
        ({"packed_partition": "zigzag"}, None, {"mode": "contiguous"}, "cp_partition_mode='contiguous'.*'zigzag'"),
        ({"packed_partition": "contiguous_pack"}, None, {"mode": "zigzag"}, "cp_partition_mode='zigzag'"),
        (CONTIGUOUS, "contiguous", {}, "contiguous pack of 2.*packed_partition"),
        (CONTIGUOUS, "contiguous", {"mode": "contiguous", "cu_seqlens": (0, 64)}, "contiguous pack of 1"),
    ],
)
def test_a_cut_that_is_not_named_is_refused(
    settings: dict[str, Any], stated: str | None, packed: dict[str, Any], message: str
) -> None:
    core = core_for(TWO, settings, stated)
    with pytest.raises(ValueError, match=message):
        core(*random_qkv(32), packed_seq_params=pack(**packed))


def test_a_pack_of_several_sequences_under_dynamic_context_parallelism_is_refused() -> None:
    packed = pack(padded=True)
    packed.local_cp_size, packed.cp_group = 2, TWO
    with pytest.raises(ValueError, match="2 sequences.*nothing says"):
        build()(*random_qkv(32), packed_seq_params=packed)


def test_one_rank_needs_no_name() -> None:
    qkv = random_qkv(64)
    wanted = reference.moba_attention(*qkv, list(CU_SEQLENS), MOBA).flatten(1)
    assert (build()(*qkv, packed_seq_params=pack("contiguous")) - wanted).abs().max() < TO_DEFINITION


def test_lengths_of_another_format_are_refused() -> None:
    packed = pack()
    packed.qkv_format = "sbhd"
    with pytest.raises(ValueError, match="cu_seqlens_q with qkv_format='sbhd'"):
        build()(*random_qkv(64, 1), packed_seq_params=packed)


def test_a_contiguous_cut_is_refused_where_megatron_slices_zigzag() -> None:
    with pytest.raises(ValueError, match="--moba-partition contiguous.*zigzag.*cp_partition_mode = 'contiguous'"):
        core_for(TWO, CONTIGUOUS)
    with pytest.raises(ValueError, match="cp_partition_mode='zigzag'.*MoBA's is 'contiguous'"):
        core_for(TWO, CONTIGUOUS, "zigzag")
    with pytest.raises(ValueError, match="cp_partition_mode='contiguous'.*MoBA's is 'zigzag'"):
        core_for(TWO, {}, "contiguous")


def test_a_contiguous_cut_is_refused_when_only_a_micro_batch_is_cut() -> None:
    packed = PackedSeqParams(local_cp_size=2, cp_group=TWO)
    with pytest.raises(ValueError, match="--moba-partition contiguous"):
        build(settings=MoBASettings(MOBA, **CONTIGUOUS))(*random_qkv(8, 1), packed_seq_params=packed)


def contiguous_on_rank(rank: int, world_size: int) -> float:
    core = core_for(dist.group.WORLD, CONTIGUOUS, "contiguous")
    qkv = random_qkv(40, 1)
    mine = slice(rank * 20, rank * 20 + 20)
    wanted = reference.moba_attention(*(x[:, 0] for x in qkv), [0, 40], MOBA).flatten(1)[mine]
    return (core(*(x[mine] for x in qkv))[:, 0] - wanted).abs().max().item()


def test_a_contiguous_cut_that_megatron_confirms_equals_the_definition() -> None:
    assert max(run_ranks(2, contiguous_on_rank)) < TO_DEFINITION


@pytest.mark.parametrize(
    ("flags", "cp_size", "message"),
    [
        ({"dataloader_inter_document_masking": True}, 2, "--dataloader-inter-document-masking is not supported with 2"),
        ({"reset_attention_mask": True}, 1, "--reset-attention-mask is not supported; .*packed sequences"),
        ({"allgather_cp": True}, 4, "--allgather-cp is not supported with 4"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused_at_the_start(
    flags: dict[str, bool], cp_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_flags(SimpleNamespace(**flags), cp_size)


def test_flags_that_change_nothing_are_not_refused() -> None:
    refuse_flags(SimpleNamespace(dataloader_inter_document_masking=True, allgather_cp=True), 1)
    refuse_flags(SimpleNamespace(dataloader_inter_document_masking=True, sft=True), 2)
    refuse_flags(SimpleNamespace(reset_attention_mask=False), 2)


def test_flags_of_the_data_loader_name_the_cut() -> None:
    assert packs_of_flags(SimpleNamespace(sft=True)) == "zigzag"
    assert packs_of_flags(SimpleNamespace(sft=True, hybrid_context_parallel=True)) is None
    assert packs_of_flags(SimpleNamespace()) is None
