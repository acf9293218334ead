"""Which rows of two shards see each other."""

from __future__ import annotations

import pytest
import torch

from moba_cp import SequenceLayout
from moba_cp.parallel.dense import Pair, equal_documents, visible_pairs
from tests.cases import every_layout

CU_SEQLENS = [0, 13, 13, 14, 40]


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", every_layout([0, 1], 1))
def test_pairs_are_what_causal_attention_sees_each_once(cp_size: int, name: str) -> None:
    layout = every_layout(CU_SEQLENS, cp_size)[name]
    document = torch.bucketize(torch.arange(CU_SEQLENS[-1]), torch.tensor(CU_SEQLENS), right=True)
    for rank in range(cp_size):
        for source in range(cp_size):
            queries, keys = layout.local_indices(rank), layout.local_indices(source)
            expected = (document[queries][:, None] == document[keys]) & (queries[:, None] >= keys)
            seen = torch.zeros(len(queries), len(keys), dtype=torch.int)
            for pair in visible_pairs(layout, rank, source):
                block = seen[pair.queries, pair.keys]
                assert block.numel()
                block += torch.ones_like(block).tril() if pair.causal else 1
            assert torch.equal(seen, expected.int())


def test_zigzag_takes_one_pair_a_document_and_source() -> None:
    layout = SequenceLayout.zigzag([0, 8], 2)  # rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5
    everything, first, last = slice(0, 4), slice(0, 2), slice(2, 4)
    assert visible_pairs(layout, 0, 0) == visible_pairs(layout, 1, 1) == (Pair(everything, everything, True),)
    assert visible_pairs(layout, 1, 0) == (Pair(everything, first, False),)
    assert visible_pairs(layout, 0, 1) == (Pair(last, everything, False),)


def test_what_a_row_sees_first_is_causal() -> None:
    """Every row has a finite log-sum-exp before anything else is merged into it, even if runs are held backward."""
    layout = SequenceLayout.from_runs([[(10, 20), (0, 10), (20, 30)]], [0, 30])
    causal = [pair.causal for pair in visible_pairs(layout, 0, 0)]
    assert causal == sorted(causal, reverse=True)
    assert sum(causal) == 2


def test_equal_documents() -> None:
    assert equal_documents(SequenceLayout.contiguous([0, 8, 8, 16], 2))
    assert equal_documents(SequenceLayout.contiguous([0], 2))
    assert not equal_documents(SequenceLayout.contiguous([0, 8, 9], 2))
