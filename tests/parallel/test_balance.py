"""`SequenceLayout.balanced`: every rank has the same number of tokens and the same counted work."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, reference
from moba_cp.parallel.balance import CANDIDATE_WORK, KEY_WORK, work_before


def row_work(length: int, block_size: int, topk: int) -> np.ndarray:
    """Work of each row of a document, row by row as the definition counts."""
    t = np.arange(length)
    block = t // block_size
    return KEY_WORK * (np.minimum(topk - 1, block) * block_size + t % block_size + 1) + CANDIDATE_WORK * block


def work_of_ranks(layout: SequenceLayout, block_size: int, topk: int) -> np.ndarray:
    """`[P]`, counted."""
    work = np.concatenate([row_work(n, block_size, topk) for n in np.diff(layout.cu_seqlens_array)] or [np.zeros(0)])
    return np.array([work[layout.local_indices(rank).numpy()].sum() for rank in range(layout.cp_size)])


sizes = st.tuples(st.integers(1, 40), st.integers(1, 6))
documents = st.lists(st.integers(0, 300), max_size=5)


@given(length=st.integers(0, 500), size=sizes)
@settings(deadline=None, max_examples=50)
def test_the_closed_form_counts_row_by_row(length: int, size: tuple[int, int]) -> None:
    counted = np.concatenate([[0], np.cumsum(row_work(length, *size))])
    assert work_before(np.arange(length + 1), *size).tolist() == counted.tolist()


@given(lengths=documents, ranks=st.integers(1, 9), size=sizes)
@settings(deadline=None, max_examples=150)
def test_every_token_once_with_equal_tokens_and_work(lengths: list[int], ranks: int, size: tuple[int, int]) -> None:
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(int).tolist()
    layout = SequenceLayout.balanced(ends, ranks, *size)
    held = torch.cat([layout.local_indices(rank) for rank in range(ranks)])
    assert held.sort().values.tolist() == list(range(ends[-1]))
    for start, end in zip(ends[:-1], ends[1:]):
        tokens = [int(((i >= start) & (i < end)).sum()) for i in map(layout.local_indices, range(ranks))]
        assert max(tokens) - min(tokens) <= 1
    # Cuts are between rows, and ranks may hold one token more than others: two rows of the most work. Inside a block, work per
    # row starts over: a share of less than a block may be all cheap rows or all dear ones, which is B * B keys at the most.
    block_size, topk = size
    work = work_of_ranks(layout, block_size, topk)
    row = KEY_WORK * topk * block_size + CANDIDATE_WORK * max([0, *lengths]) // block_size
    assert np.abs(work - work.mean()).max(initial=0) <= len(lengths) * (2 * row + KEY_WORK * block_size**2) + 1e-9
    runs = [len(layout.runs_of(rank)) for rank in range(ranks)]
    assert max(runs) <= 2 * len(lengths)


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
@pytest.mark.parametrize(("block_size", "topk"), [(4096, 12), (512, 8), (128, 8)])
def test_long_documents_balance_where_zigzag_does_not(ranks: int, block_size: int, topk: int) -> None:
    def imbalance(layout: SequenceLayout) -> float:
        work = [
            sum(
                int(work_before(e, block_size, topk) - work_before(s, block_size, topk))
                for s, e in layout.runs_of(rank)
            )
            for rank in range(ranks)
        ]
        return max(work) * ranks / sum(work)

    ends = [0, 131072 * ranks]
    balanced = imbalance(SequenceLayout.balanced(ends, ranks, block_size, topk))
    assert balanced < 1.0005
    assert balanced <= imbalance(SequenceLayout.zigzag(ends, ranks))
    if (ranks, block_size) == (2, 4096):
        assert (
            imbalance(SequenceLayout.zigzag(ends, ranks)) > 1.09
        )  # as docs/results/layer.json measured: 1.0985 by keys


def test_many_documents_are_planned_fast_and_evenly() -> None:
    generator = np.random.default_rng(0)
    ends = np.concatenate([[0], np.cumsum(generator.integers(1, 3000, 2000))])
    layout = SequenceLayout.balanced(ends.tolist(), 16, 128, 8)
    tokens = layout.all_local_tokens
    assert max(tokens) - min(tokens) < 0.001 * np.mean(tokens)
    work = work_of_ranks(layout, 128, 8)
    assert work.max() < 1.002 * work.mean()


def test_attention_does_not_depend_on_it() -> None:
    """Every layout gives the output of the definition; here each rank's rows, computed alone from the whole sequence."""
    torch.manual_seed(0)
    config, ends = MoBAConfig(16, 3), [0, 70, 150]
    q, k, v = (torch.randn(150, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    out = moba_attention(q, k, v, config, layout=SequenceLayout.balanced(ends, 1, 16, 3))
    assert (out - reference.moba_attention(q, k, v, ends, config)).abs().max() < 1e-12
    layout = SequenceLayout.balanced(ends, 3, 16, 3)
    assert torch.equal(layout.unshard([layout.shard(q, rank) for rank in range(3)]), q)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 8], 2, 0, 3), ValueError, "block_size must be at least 1, got 0"),
        (([0, 8], 2, 4, -1), ValueError, "topk must be at least 1, got -1"),
        (([0, 8], 2, 4.0, 3), TypeError, "block_size must be an int, got 4.0"),
        (([0, 8], 2, 4, True), TypeError, "topk must be an int, got True"),
        (([0, 8], 0, 4, 3), ValueError, "cp_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SequenceLayout.balanced(*arguments)


def test_block_size_and_topk_beyond_64_bits_mean_full_attention() -> None:
    huge = SequenceLayout.balanced([0, 40, 99], 3, 2**70, 2**70)
    assert huge == SequenceLayout.balanced([0, 40, 99], 3, 99, 100)
