"""SequenceLayout: who holds what, in which order; shard and unshard are inverses; bad layouts say what is wrong."""

from __future__ import annotations

import copy
import pickle
import time
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moba_cp import SequenceLayout
from tests.cases import layouts

lengths = st.lists(st.integers(0, 30), max_size=5)


def held(layout: SequenceLayout) -> list[list[int]]:
    return [layout.local_indices(r).tolist() for r in range(layout.cp_size)]


def test_contiguous() -> None:
    """Rank r holds [r * T // P, (r + 1) * T // P), whatever the documents."""
    layout = SequenceLayout.contiguous([0, 4, 4, 11], 3)
    assert held(layout) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]
    assert layout.cu_seqlens == (0, 4, 4, 11)
    assert (layout.cp_size, layout.total_tokens) == (3, 11)
    assert [layout.local_tokens(r) for r in range(3)] == [3, 4, 4]


def test_zigzag_over_the_whole_sequence() -> None:
    """Six chunks of 12 tokens; rank r holds chunks r and 5 - r."""
    layout = SequenceLayout.zigzag([0, 5, 12], 3, per_document=False)
    assert held(layout) == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_zigzag_per_document() -> None:
    """Four chunks of 5 tokens are 1 1 1 2, of 7 tokens 1 2 2 2."""
    layout = SequenceLayout.zigzag([0, 5, 12], 2)
    assert held(layout) == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]


def test_from_runs_keeps_the_order_of_each_rank() -> None:
    layout = SequenceLayout.from_runs([[(5, 7), (0, 2)], [], [(2, 3), (3, 5), (6, 6)]], [0, 7])
    assert held(layout) == [[5, 6, 0, 1], [], [2, 3, 4]]
    assert [r.tolist() for r in layout.runs] == [[[5, 7], [0, 2]], [], [[2, 5]]]  # neighbours join, empty runs go


@given(lengths=lengths, cp_size=st.integers(1, 5), data=st.data())
def test_every_token_once_and_unshard_undoes_shard(lengths: list[int], cp_size: int, data: st.DataObject) -> None:
    cu = list(accumulate(lengths, initial=0))
    layout = data.draw(layouts(cu, cp_size))
    assert sorted(t for rank in held(layout) for t in rank) == list(range(cu[-1]))
    x = torch.arange(3 * cu[-1] * 2).reshape(3, cu[-1], 2)
    parts = [layout.shard(x, r, dim=1) for r in range(cp_size)]
    for r, part in enumerate(parts):
        assert torch.equal(part, x[:, layout.local_indices(r)])
    assert torch.equal(layout.unshard(parts, dim=1), x)
    assert torch.equal(layout.unshard([layout.shard(x, r, dim=-2) for r in range(cp_size)], dim=-2), x)


@given(lengths=lengths, cp_size=st.integers(1, 5), per_document=st.booleans())
def test_zigzag_is_balanced(lengths: list[int], cp_size: int, per_document: bool) -> None:
    """No two ranks' tokens differ by more than 2 a cut piece, and where 2P divides it each rank has the same."""
    cu = list(accumulate(lengths, initial=0))
    layout = SequenceLayout.zigzag(cu, cp_size, per_document)
    counts = [layout.local_tokens(r) for r in range(cp_size)]
    pieces = len(lengths) if per_document else 1
    assert max(counts) - min(counts) <= 2 * pieces
    even = SequenceLayout.zigzag([2 * cp_size * c for c in cu], cp_size, per_document)
    assert len({even.local_tokens(r) for r in range(cp_size)}) == 1


def test_equal_layouts_are_equal_however_they_were_made() -> None:
    a = SequenceLayout.contiguous([0, 8], 2)
    same = SequenceLayout.from_runs([[(0, 3), (3, 4)], [(4, 8), (8, 8)]], torch.tensor([0, 8], dtype=torch.int32))
    assert a == same
    assert hash(a) == hash(same)
    assert pickle.loads(pickle.dumps(a)) == a
    different = [
        SequenceLayout.contiguous([0, 4, 8], 2),  # another document
        SequenceLayout.contiguous([0, 8, 8], 2),  # an empty document more
        SequenceLayout.from_runs([[(4, 8)], [(0, 4)]], [0, 8]),  # other ranks
        SequenceLayout.from_runs([[(0, 2), (3, 4), (2, 3)], [(4, 8)]], [0, 8]),  # another order
        SequenceLayout.from_runs([[(0, 4)], [(4, 8)], []], [0, 8]),  # a rank more
    ]
    assert len({a, *different}) == 6
    assert a != "layout"


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
def test_cu_seqlens_may_be_any_host_ints(make) -> None:
    assert SequenceLayout.contiguous(make([0, 3, 7]), 2) == SequenceLayout.contiguous([0, 3, 7], 2)


def test_layouts_cannot_be_changed() -> None:
    given_ = np.array([0, 8])
    layout = SequenceLayout.contiguous(given_, 2)
    given_[1] = 4
    assert layout.cu_seqlens == (0, 8)
    with pytest.raises(ValueError, match="read-only"):
        layout.runs[0][0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        layout.cu_seqlens_array[0] = 1
    layout = SequenceLayout.contiguous([0, 5, 10], 1)
    for change in (
        lambda: setattr(layout, "partition", SequenceLayout.contiguous([0, 10], 2).partition),
        lambda: setattr(layout, "cu_seqlens", (0, 10)),
        lambda: delattr(layout, "partition"),
    ):
        with pytest.raises(AttributeError, match="a SequenceLayout is immutable, got"):
            change()
    assert (layout.cu_seqlens, layout.cp_size) == ((0, 5, 10), 1)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "text"),
    [
        ([1, 5], ValueError, "start at 0, got 1"),
        ([0, 7, 5], ValueError, "not decrease, got 7 then 5 at position 2"),
        ([], ValueError, "not empty"),
        ([[0, 5]], TypeError, r"\[\[0, 5\]\]"),
        (np.zeros((1, 2), dtype=np.int64), ValueError, r"\(1, 2\)"),
        ([0, 2.5], TypeError, r"\[0, 2.5\]"),
        (torch.tensor([0.0, 4.0]), TypeError, "float32"),
        (torch.tensor([0, 4], device="meta"), TypeError, "meta"),
        (7, TypeError, "7"),
        (None, TypeError, "None"),
    ],
    ids=str,
)
def test_bad_cu_seqlens(cu_seqlens: object, error: type[Exception], text: str) -> None:
    for make in (
        lambda: SequenceLayout.contiguous(cu_seqlens, 2),
        lambda: SequenceLayout.zigzag(cu_seqlens, 2),
        lambda: SequenceLayout.from_runs([[(0, 5)]], cu_seqlens),
    ):
        with pytest.raises(error, match=text):
            make()


@pytest.mark.parametrize(
    ("runs", "error", "text"),
    [
        ([[(0, 4)], [(5, 8)]], ValueError, "8 tokens exactly once; no rank holds token 4"),
        ([[(0, 4)], [(3, 8)]], ValueError, "more than one rank or run holds token 3"),
        ([[(0, 4), (0, 4)], [(4, 8)]], ValueError, "more than one rank or run holds token 0"),
        ([[(0, 4)], []], ValueError, "no rank holds token 4"),
        ([[(0, 9)], []], ValueError, "token 8 is past the end"),
        ([[(-1, 8)], []], ValueError, "-1"),
        ([[(4, 0)], [(4, 8)]], ValueError, r"\(4, 0\)"),
        ([], ValueError, "got none"),
        ([[(0, 1.5)], []], TypeError, r"rank 0 .*\(0, 1.5\)"),
        ([[0, 8]], TypeError, r"rank 0 .*\[0, 8\]"),
        ([[(0, 4, 8)]], TypeError, r"rank 0 .*\(0, 4, 8\)"),
        ("abc", TypeError, "abc"),
        (None, TypeError, "None"),
    ],
    ids=str,
)
def test_bad_runs(runs: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SequenceLayout.from_runs(runs, [0, 8])


@pytest.mark.parametrize(("cp_size", "error"), [(0, ValueError), (-2, ValueError), (2.0, TypeError), (True, TypeError)])
def test_bad_cp_size(cp_size: object, error: type[Exception]) -> None:
    for make in (SequenceLayout.contiguous, SequenceLayout.zigzag):
        with pytest.raises(error, match=f"got {cp_size}"):
            make([0, 8], cp_size)


def test_bad_shards() -> None:
    layout = SequenceLayout.contiguous([0, 8], 2)
    with pytest.raises(ValueError, match=r"8 tokens along dim 0, got shape \(7, 2\)"):
        layout.shard(torch.zeros(7, 2), 0)
    with pytest.raises(ValueError, match=r"along dim 3, got shape \(8,\)"):
        layout.shard(torch.zeros(8), 0, dim=3)
    with pytest.raises(ValueError, match=r"\[0, 2\), got 2"):
        layout.shard(torch.zeros(8), 2)
    with pytest.raises(ValueError, match=r"\[0, 2\), got -1"):
        layout.local_indices(-1)
    with pytest.raises(TypeError, match="list"):
        layout.shard([0] * 8, 0)
    with pytest.raises(TypeError, match="dim must be an int, got 'a'"):
        layout.shard(torch.zeros(8), 0, dim="a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tensor of each rank, got \[None, None\]"):
        layout.unshard([None, None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="2 ranks, got 1"):
        layout.unshard([torch.zeros(8)])
    with pytest.raises(ValueError, match=r"rank 1 must have 4 tokens along dim 0, got shape \(3,\)"):
        layout.unshard([torch.zeros(4), torch.zeros(3)])
    with pytest.raises(
        ValueError, match=r"agree in all but dim 0 .* got \(4, 2\) on cpu of rank 0, \(4, 3\) on cpu of rank 1"
    ):
        layout.unshard([torch.zeros(4, 2), torch.zeros(4, 3)])
    with pytest.raises(ValueError, match=r"one device, got \(4,\) on cpu of rank 0, \(4,\) on meta of rank 1"):
        layout.unshard([torch.zeros(4), torch.zeros(4, device="meta")])
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32 of rank 0, torch.float64 of rank 1"):
        layout.unshard([torch.zeros(4), torch.zeros(4, dtype=torch.float64)])


def test_a_description_is_the_layout() -> None:
    for layout in (
        SequenceLayout.contiguous([0, 5, 12], 2),
        SequenceLayout.zigzag([0, 5, 12], 2),
        SequenceLayout.zigzag([0, 5, 12], 2, per_document=False),
        SequenceLayout.from_runs([[(7, 12), (0, 2)], [], [(2, 7)]], [0, 5, 12]),
    ):
        assert SequenceLayout.from_description(layout.description) == layout


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ([], r"no layout has the description \[\]"),
        ([4], r"no layout has the description \[4\]"),
        ([-4, 0, 5], "cp_size must be at least 1, got -1"),
        ([4, 0, 5, 3], "must not decrease, got 5 then 3"),
        ([7, -1, 0, 3, 0, 3], r"no layout has the description \[7, -1, 0, 3, 0, 3\]"),
        ([11, 100, 0, 3], r"no layout has the description \[11, 100, 0, 3\]"),
        ([3, 0, 3], r"no layout has the description \[3, 0, 3\]"),
        ([11, 1, 1, 0, 5, 0, 5, 0, 5], "more than one rank or run holds token 0"),
    ],
    ids=str,
)
def test_other_descriptions_are_refused(description: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SequenceLayout.from_description(np.array(description, dtype=np.int64))


def test_more_ranks_than_integers_hold_are_refused() -> None:
    for make, ranks in ((SequenceLayout.zigzag, 1 << 14), (SequenceLayout.contiguous, 1 << 14)):
        with pytest.raises(ValueError, match=f"{ranks} ranks are too many for {1 << 48} tokens"):
            make([0, 1 << 48], ranks)
        assert sum(make([0, 1 << 48], ranks - 1).all_local_tokens) == 1 << 48


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_copies_share_no_read_only_memory(protocol: int) -> None:
    """torch warns of it."""
    for layout in (SequenceLayout.zigzag([0, 5, 12], 2), SequenceLayout.from_runs([[(3, 5)], [(0, 3)]], [0, 5])):
        buffers: list[pickle.PickleBuffer] = []
        kept = pickle.dumps(layout, protocol, buffer_callback=buffers.append if protocol == 5 else None)
        for other in (
            copy.copy(layout),
            copy.deepcopy(layout),
            pickle.loads(kept, buffers=[bytes(x) for x in buffers]),
        ):
            assert other == layout
            assert other.described.tolist() == layout.described.tolist()


def test_many_documents_are_laid_out_quickly() -> None:
    """20,000 documents over 8 ranks in a small part of a training step; a loop over documents in Python would show."""
    cu = np.arange(20_001) * 50
    begin = time.process_time()  # not the time of others on this machine
    layout = SequenceLayout.zigzag(cu, 8)
    assert layout.digest
    assert time.process_time() - begin < 0.2  # about 2 ms; the rest is for a slow machine


def test_numbers_beyond_64_bits_and_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must fit 64 bits, got \[0, 1180591620717411303424\]"):
        SequenceLayout.contiguous([0, 2**70], 1)
    with pytest.raises(ValueError, match="cu_seqlens must fit 64 bits with a sign, got 9223372036854775813"):
        SequenceLayout.contiguous(np.array([0, 2**63 + 5], dtype=np.uint64), 1)
    with pytest.raises(ValueError, match="runs of rank 0 must fit 64 bits"):
        SequenceLayout.from_runs([[(0, 2**70)]], [0, 4])
    for make in (SequenceLayout.contiguous, SequenceLayout.zigzag):
        with pytest.raises(ValueError, match="must end at 281474976710656 or before, got 4611686018427387904"):
            make([0, 2**62], 2)
    with pytest.raises(TypeError, match="dense tensor, got a nested tensor"):
        SequenceLayout.contiguous(torch.nested.nested_tensor([torch.tensor([0, 4])]), 1)
    for bad in (torch.tensor([0, 5.0], requires_grad=True), torch.tensor([0, 5.0], dtype=torch.bfloat16)):
        with pytest.raises(TypeError, match=f"cu_seqlens must be integers, got {bad.dtype}"):
            SequenceLayout.contiguous(bad, 1)


def test_types_of_rank_and_per_document_are_checked() -> None:
    layout = SequenceLayout.contiguous([0, 6], 2)
    with pytest.raises(TypeError, match="rank must be an int, got 'a'"):
        layout.local_indices("a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"cu_seqlens must be .* of ints, got \[False, True\]"):
        SequenceLayout.zigzag([False, True], 2)
    with pytest.raises(TypeError, match="cu_seqlens must be .* of ints"):
        SequenceLayout.zigzag([0, np.True_], 2)
    with pytest.raises(TypeError, match=r"runs of rank 1 must be .* pairs of ints, got \[\(True, 3\)\]"):
        SequenceLayout.from_runs([[(0, 1)], [(True, 3)]], [0, 3])
    with pytest.raises(TypeError, match=r"description must be a one-dimensional int64 array, got \[4, 0, 3\]"):
        SequenceLayout.from_description([4, 0, 3])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rank must be an int, got True"):
        layout.local_indices(True)
    with pytest.raises(TypeError, match="per_document must be True or False, got 'no'"):
        SequenceLayout.zigzag([0, 6], 2, per_document="no")  # type: ignore[arg-type]


def test_what_describes_a_layout_is_read_only() -> None:
    layout = SequenceLayout.zigzag([0, 8], 2)
    for one in (layout, pickle.loads(pickle.dumps(layout))):
        with pytest.raises(ValueError, match="read-only"):
            one.description[0] = 77
