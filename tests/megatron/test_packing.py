"""Packed sequences without Transformer Engine: padding, parameters and slices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from moba_cp.megatron import Packing, slice_packed


def group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def test_the_example_of_the_module() -> None:
    packing = Packing.of([5, 4], cp_size=2)
    assert (packing.cu_seqlens, packing.cu_seqlens_padded) == ((0, 5, 9), (0, 8, 12))
    padded = packing.pad(torch.tensor([ord(c) for c in "abcdeABCD"]), fill=ord("-"))
    assert "".join(map(chr, padded)) == "abcde---ABCD"
    parameters = packing.parameters(torch.device("cpu"))
    slices = [slice_packed(padded[None], parameters, group(rank, 2), dim=1)[0] for rank in range(2)]  # type: ignore[arg-type]
    assert ["".join(map(chr, x)) for x in slices] == ["ab--AD", "cde-BC"]
    assert (parameters.qkv_format, parameters.max_seqlen_q) == ("thd", 8)


def test_slices_are_those_of_the_layout_and_cover_the_pack() -> None:
    packing = Packing.of([7, 0, 1, 20], cp_size=3)
    x = torch.arange(packing.cu_seqlens_padded[-1])
    parameters = packing.parameters(torch.device("cpu"))
    slices = [slice_packed(x, parameters, group(rank, 3), dim=0) for rank in range(3)]  # type: ignore[arg-type]
    assert all(torch.equal(s, packing.layout(3).local_indices(rank)) for rank, s in enumerate(slices))
    assert torch.equal(torch.cat(slices).sort().values, x)


def test_one_rank_needs_no_padding() -> None:
    assert Packing.of([5, 3], 1).cu_seqlens_padded == (0, 5, 8)


@pytest.mark.parametrize(
    ("cp_size", "shards", "padded"), [(1, 4, (0, 5, 7, 8)), (2, 2, (0, 8, 12)), (2, 5, (0, 8, 12, 20))]
)
def test_sequence_parallelism_gets_equal_parts_of_every_ranks_tokens(
    cp_size: int, shards: int, padded: tuple[int, ...]
) -> None:
    packing = Packing.of([5, 2], cp_size, sequence_shards=shards)
    assert packing.cu_seqlens_padded == padded
    assert packing.cu_seqlens == (0, 5, 7, 7)[: len(padded)]
    # What was added are documents of their own, and no token of the pack.
    assert packing.layout(cp_size).total_tokens == padded[-1]
    assert packing.pad(torch.ones(7)).sum() == 7


def test_tensors_and_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TypeError, match=r"a length must be an int, got 1.5"):
        Packing.of([1.5, 2], 2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"got \[3, -1\]"):
        Packing.of([3, -1], 2)
    with pytest.raises(ValueError, match=r"has 8 tokens, got a tensor of \(7,\)"):
        Packing.of([5, 3], 2).pad(torch.zeros(7))
    with pytest.raises(ValueError, match=r"torch\.int64 cannot hold fill=0\.5"):
        Packing.of([5, 3], 2).pad(torch.zeros(8, dtype=torch.int64), fill=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "cp_size must be at least 1, got 0"), ((-2,), "cp_size .* got -2"), ((2, 0), "sequence_shards .* got 0")],
)
def test_sizes_that_divide_nothing_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packing.of([5, 4], *arguments)
