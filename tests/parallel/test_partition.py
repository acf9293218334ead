"""Layouts kept as a rule answer what the same layouts listed run by run answer, and both have one normal form."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moba_cp import SequenceLayout
from moba_cp.parallel.blocks import block_table
from moba_cp.parallel.partition import Chunked, Listed, Partition, merge_adjacent
from tests.cases import interleaved

lengths = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 90)), max_size=5)
MAKE = {
    "contiguous": SequenceLayout.contiguous,
    "zigzag": SequenceLayout.zigzag,
    "zigzag whole": lambda cu, size: SequenceLayout.zigzag(cu, size, per_document=False),
}


def listed(cu: list[int], size: int, kind: str) -> list[list[tuple[int, int]]]:
    """Runs of each rank, one chunk at a time, as the definition of the layouts says."""
    runs: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    bounds = list(zip(cu[:-1], cu[1:])) if kind == "zigzag" else [(0, cu[-1])]
    chunks = size if kind == "contiguous" else 2 * size
    for start, end in bounds:
        for rank in range(size):
            for c in (rank,) if kind == "contiguous" else (rank, chunks - 1 - rank):
                runs[rank].append((start + c * (end - start) // chunks, start + (c + 1) * (end - start) // chunks))
    return runs


@given(lengths=lengths, size=st.integers(1, 9), kind=st.sampled_from(list(MAKE)), block_size=st.integers(1, 40))
@example(lengths=[2], size=9, kind="zigzag", block_size=2)  # most chunks are empty
@example(lengths=[89, 1, 50], size=2, kind="zigzag", block_size=40)  # blocks over the middle of a document
def test_a_rule_answers_as_its_runs_do(lengths: list[int], size: int, kind: str, block_size: int) -> None:
    cu = list(accumulate(lengths, initial=0))
    layout, runs = MAKE[kind](cu, size), listed(cu, size, kind)
    rule = layout.partition
    explicit = Listed([merge_adjacent(np.array(r, dtype=np.int64).reshape(-1, 2)) for r in runs])
    assert isinstance(rule, Chunked)
    assert [rule.runs(r).tolist() for r in range(size)] == [explicit.runs(r).tolist() for r in range(size)]
    assert rule.tokens().tolist() == explicit.tokens().tolist() == [layout.local_tokens(r) for r in range(size)]
    assert layout.all_local_tokens == tuple(explicit.tokens().tolist())
    blocks = block_table(np.array(cu), block_size)
    start, end = blocks.start, blocks.start + blocks.length
    assert [x.tolist() for x in rule.largest(start, end)] == [x.tolist() for x in explicit.largest(start, end)]
    assert holders(rule, start, end) == holders(explicit, start, end) == by_hand(runs, start, end)


def holders(partition: Partition, start: np.ndarray, end: np.ndarray) -> list[tuple[int, int, int]]:
    """(interval, token, rank) of every token of the intervals."""
    found = partition.fragments(start, end)
    assert (found.length > 0).all()
    return [(i, t, r) for i, r, a, n in zip(*(x.tolist() for x in found), strict=True) for t in range(a, a + n)]


def by_hand(runs: list[list[tuple[int, int]]], start: np.ndarray, end: np.ndarray) -> list[tuple[int, int, int]]:
    holder = {t: rank for rank, own in enumerate(runs) for a, b in own for t in range(a, b)}
    return [(i, t, holder[t]) for i in range(len(start)) for t in range(start[i], end[i])]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_largest_holder_of_every_interval_of_short_documents(size: int) -> None:
    """All intervals of all documents of up to 41 tokens: rules by their formula, runs by counting."""
    for length in range(1, 42):
        for kind, make in MAKE.items():
            rule = make([0, length], size).partition
            explicit = Listed([merge_adjacent(np.array(r).reshape(-1, 2)) for r in listed([0, length], size, kind)])
            start, end = np.triu_indices(length + 1, 1)
            got, expected = rule.largest(start, end), explicit.largest(start, end)
            assert np.array_equal(got, expected), (length, kind)


@given(lengths=lengths, size=st.integers(1, 6), kind=st.sampled_from(list(MAKE)))
def test_runs_are_recognised_as_the_rule_that_gives_them(lengths: list[int], size: int, kind: str) -> None:
    cu = list(accumulate(lengths, initial=0))
    rule = MAKE[kind](cu, size)
    same = SequenceLayout.from_runs(listed(cu, size, kind), cu)
    assert same == rule
    assert hash(same) == hash(rule)
    assert same.digest == rule.digest
    assert repr(same) == repr(rule)


@given(lengths=lengths, size=st.integers(1, 5))
def test_layouts_are_equal_exactly_if_every_rank_holds_the_same(lengths: list[int], size: int) -> None:
    cu = list(accumulate(lengths, initial=0))
    made = [make(cu, size) for make in MAKE.values()] + [interleaved(cu, size), interleaved(cu, size, 2, backward=True)]
    for a in made:
        for b in made:
            held = [x.local_indices(r).tolist() for x in (a, b) for r in range(size)]
            assert (a == b) == (held[:size] == held[size:])
            assert (a.digest == b.digest) == (a == b)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rules_that_put_every_token_on_the_same_rank_are_equal(size: int) -> None:
    """A document of one token goes to rank 0, and 2P - 1 tokens after it are cut where 2P are; so for any multiple of 2P."""
    for tokens in (2 * size, 6 * size):
        by_document = SequenceLayout.zigzag([0, 1, tokens], size)
        whole = SequenceLayout.zigzag([0, 1, tokens], size, per_document=False)
        assert [r.tolist() for r in by_document.runs] == [r.tolist() for r in whole.runs]
        assert by_document == whole
        assert by_document.digest == whole.digest
        other = SequenceLayout.zigzag([0, 2, tokens], size), SequenceLayout.zigzag([0, 2, tokens], size, False)
        assert other[0] != other[1]


def test_a_rank_of_many_plans_for_itself() -> None:
    """1,000 documents on 4,096 ranks: a list of all runs would have 8 million."""
    cu = np.concatenate([[0], np.cumsum(np.arange(1_000) * 7919 % 16_001)])
    layout = SequenceLayout.zigzag(cu, 4096)
    assert layout.nbytes <= 2 * 8 * 1_001
    assert len(layout.runs_of(7)) <= 2_000
    assert layout.digest
    assert sum(layout.all_local_tokens) == layout.total_tokens
    assert "runs" not in vars(layout)
