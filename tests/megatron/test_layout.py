"""Megatron's slicing rules as layouts: who holds which token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from moba_cp.megatron.layout import host_integers, packed_layout, sbhd_layout


def megatron_zigzag(length: int, cp_size: int, rank: int) -> list[int]:
    """The rule as Megatron's ``get_batch_on_this_cp_rank`` writes it: view as 2 * cp chunks and select two."""
    chunks = torch.arange(length).view(2 * cp_size, -1)
    return chunks[[rank, 2 * cp_size - 1 - rank]].flatten().tolist()


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sbhd_is_megatrons_zigzag_of_every_sequence(cp_size: int, batch: int) -> None:
    length = 2 * cp_size * 5
    layout = sbhd_layout(length // cp_size, batch, cp_size)
    for rank in range(cp_size):
        expected = [b * length + t for b in range(batch) for t in megatron_zigzag(length, cp_size, rank)]
        assert layout.local_indices(rank).tolist() == expected


def test_contiguous_is_one_run_of_every_sequence() -> None:
    layout = sbhd_layout(3, 2, 2, "contiguous")
    assert layout.local_indices(1).tolist() == [3, 4, 5, 9, 10, 11]


def test_a_share_that_is_not_two_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 5 tokens.*cp=2.*multiple of 4"):
        sbhd_layout(5, 1, 2)


def test_packed_sequences_are_cut_one_by_one_and_padding_is_documents_of_its_own() -> None:
    layout = packed_layout((0, 5, 9, 9), (0, 8, 12, 12), 2)
    assert layout.local_indices(0).tolist() == [0, 1, 6, 7, 8, 11]
    assert layout.local_indices(1).tolist() == [2, 3, 4, 5, 9, 10]
    assert [int(c) for c in layout.cu_seqlens] == [0, 5, 8, 12]


def test_without_padding_documents_are_the_sequences() -> None:
    layout = packed_layout((0, 4, 12, 12, 12), None, 1)
    assert [int(c) for c in layout.cu_seqlens] == [0, 4, 12]


@pytest.mark.parametrize(
    ("true", "padded", "message"),
    [
        ((1, 4), None, "start at 0.*1, 4"),
        ((0, 4, 2), None, "never decrease.*0, 4, 2"),
        ((0, 4), (0, 4, 8), "2 entries.*3"),
        ((0, 6, 8), (0, 4, 8), "sequence 0 has 6 tokens but only 4"),
        ((0, 6, 8), None, "sequence 0 holds 6 tokens.*cp=2.*multiple of 4"),
    ],
)
def test_lengths_that_megatron_would_not_cut_are_refused(
    true: tuple[int, ...], padded: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        packed_layout(true, padded, 2)


def test_host_integers_follow_changes_of_the_tensor() -> None:
    lengths = torch.tensor([0, 4, 8])
    assert host_integers(lengths) == (0, 4, 8)
    lengths[2] = 12
    assert host_integers(lengths) == (0, 4, 12)


def test_host_integers_in_inference_mode() -> None:
    with torch.inference_mode():
        lengths = torch.tensor([0, 4, 8])
        assert host_integers(lengths) == (0, 4, 8)
        lengths[2] = 12
        assert host_integers(lengths) == (0, 4, 12)
