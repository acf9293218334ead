"""Plans as pure data: the block table, one home per block, the pieces that each rank holds, and what has to move."""

from __future__ import annotations

import time
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moba_cp import SequenceLayout
from moba_cp.parallel.blocks import HomePlan, RankPlan, block_table, home_plan, rank_plan
from moba_cp.parallel.home import centroid_start
from moba_cp.parallel.partition import Listed
from tests.cases import interleaved, layouts


@st.composite
def plans(draw: st.DrawFn) -> HomePlan:
    cu = list(accumulate(draw(st.lists(st.integers(0, 25), max_size=5)), initial=0))
    return home_plan(draw(layouts(cu, draw(st.integers(1, 5)))), draw(st.integers(1, 9)))


def tokens_of(plan: HomePlan, block: int) -> list[int]:
    return list(range(plan.blocks.start[block], plan.blocks.start[block] + plan.blocks.length[block]))


def test_block_table() -> None:
    """Documents of 5, 0, 4 and 1 tokens in blocks of 2."""
    blocks = block_table(np.array([0, 5, 5, 9, 10]), 2)
    assert blocks.start.tolist() == [0, 2, 4, 5, 7, 9]
    assert blocks.length.tolist() == [2, 2, 1, 2, 2, 1]
    assert blocks.first_of_document.tolist() == [0, 0, 0, 3, 3, 5]
    assert blocks.is_last.tolist() == [False, False, True, False, True, True]


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_no_token_means_no_block(cu_seqlens: list[int]) -> None:
    plan = home_plan(SequenceLayout.contiguous(cu_seqlens, 3), 4)
    assert len(plan.blocks) == 0
    assert plan.home_tokens.tolist() == [0, 0, 0]
    assert not plan.has_fragments
    mine = rank_plan(plan, 1)
    assert mine.block.size == mine.send_rows.size == mine.centroid_rows.size == 0
    assert mine.home_from is None


def test_the_example_of_the_module() -> None:
    """Blocks of 8 over 20 tokens, cut at 10: block 1 has 2 tokens on rank 0 and 6 on rank 1, its home."""
    plan = home_plan(SequenceLayout.contiguous([0, 20], 2), 8)
    assert plan.home.tolist() == [0, 1, 1]
    assert plan.home_row.tolist() == [0, 0, 8]
    assert plan.home_tokens.tolist() == [8, 12]
    pieces = [plan.pieces(r) for r in range(2)]
    assert [p.block.tolist() for p in pieces] == [[0, 1], [1, 2]]
    assert [p.position.tolist() for p in pieces] == [[0, 0], [2, 0]]
    assert [p.length.tolist() for p in pieces] == [[8, 2], [6, 4]]
    assert [p.row.tolist() for p in pieces] == [[0, 8], [0, 6]]
    assert plan.has_fragments
    sender, receiver = rank_plan(plan, 0), rank_plan(plan, 1)
    assert sender.send_rows.tolist() == [8, 9]
    assert sender.send_tokens.tolist() == [0, 2]
    assert sender.home_from.tolist() == list(range(8))
    assert receiver.receive_tokens.tolist() == [2, 0]
    assert receiver.home_from.tolist() == [10, 11, *range(10)]
    assert receiver.local_from.tolist() == list(range(2, 12))
    assert (sender.centroid_blocks.tolist(), receiver.centroid_blocks.tolist()) == ([0], [1])


def test_the_lowest_rank_wins_among_equal_holders() -> None:
    assert home_plan(interleaved([0, 12], 3), 6).home.tolist() == [0, 0]
    rotated = SequenceLayout.from_runs([[], [(3, 6)], [(0, 3)]], [0, 6])
    assert home_plan(rotated, 6).home.tolist() == [1]


def test_nothing_moves_where_blocks_lie_whole_and_in_order() -> None:
    plan = home_plan(SequenceLayout.contiguous([0, 16, 32], 2), 8)
    assert not plan.has_fragments
    for r in range(2):
        mine = rank_plan(plan, r)
        assert mine.home_from is None
        assert mine.local_from is None
        assert mine.send_rows.size == 0


def test_blocks_out_of_order_on_a_rank_are_put_in_order_without_traffic() -> None:
    plan = home_plan(SequenceLayout.from_runs([[(8, 16), (0, 8)]], [0, 16]), 8)
    assert not plan.has_fragments
    assert rank_plan(plan, 0).home_from.tolist() == [*range(8, 16), *range(8)]


def test_blocks_out_of_order_stay_where_they_lie_if_asked() -> None:
    """In a group of one, where nobody else has to know their rows. A block whose keys lie apart still moves them all."""
    runs = [(8, 16), (0, 8), (16, 19)]
    plan = home_plan(SequenceLayout.from_runs([runs], [0, 19]), 4, keeps_rows=True)
    assert plan.home_row.tolist() == [8, 12, 0, 4, 16]
    mine = rank_plan(plan, 0)
    assert mine.home_from is None
    assert mine.local_from is None
    apart = home_plan(SequenceLayout.from_runs([[(7, 16), (0, 7), (16, 19)]], [0, 19]), 4, keeps_rows=True)
    assert apart.home_row.tolist() == [0, 4, 8, 12, 16]
    assert rank_plan(apart, 0).home_from is not None


@given(plan=plans())
def test_pieces_hold_every_token_where_the_layout_says(plan: HomePlan) -> None:
    held: dict[int, list[int]] = {r: [] for r in range(plan.layout.cp_size)}
    of_ranks = [(r, *piece) for r in held for piece in zip(*plan.pieces(r), strict=True)]
    for rank, row, block, position, length in of_ranks:
        assert length > 0
        assert row == len(held[rank])  # in order of (rank, local row), without gaps
        first = plan.blocks.start[block] + position
        assert position + length <= plan.blocks.length[block]
        held[rank] += range(first, first + length)
    assert held == {r: plan.layout.local_indices(r).tolist() for r in held}


@given(plan=plans())
def test_home_is_the_rank_that_holds_most(plan: HomePlan) -> None:
    holder = {t: r for r in range(plan.layout.cp_size) for t in plan.layout.local_indices(r).tolist()}
    rows = dict.fromkeys(range(plan.layout.cp_size), 0)
    for block in range(len(plan.blocks)):
        held = np.bincount([holder[t] for t in tokens_of(plan, block)], minlength=plan.layout.cp_size)
        assert plan.home[block] == held.argmax()  # the lowest of equals
        assert plan.home_row[block] == rows[plan.home[block]]
        rows[plan.home[block]] += plan.blocks.length[block]
    assert plan.home_tokens.tolist() == list(rows.values())


@given(plan=plans())
def test_bringing_blocks_home_and_sending_them_back(plan: HomePlan) -> None:
    """Carry token numbers through the plans as the all-to-all would: home rows hold their blocks in order, and every
    token comes back to its row."""
    size = plan.layout.cp_size
    mine = [rank_plan(plan, r) for r in range(size)]
    local = [plan.layout.local_indices(r).numpy() for r in range(size)]

    def exchanged(values: list[np.ndarray], rows: list[np.ndarray], counts: list[np.ndarray], to: int) -> np.ndarray:
        parts = [np.split(values[r][rows[r]], np.cumsum(counts[r])[:-1])[to] for r in range(size)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    home = []
    for r, rank in enumerate(mine):
        received = exchanged(local, [m.send_rows for m in mine], [m.send_tokens for m in mine], r)
        assert received.size == rank.receive_tokens.sum()
        assert rank.send_tokens[r] == rank.receive_tokens[r] == 0
        everything = np.concatenate([local[r], received])
        home.append(everything if rank.home_from is None else everything[rank.home_from])
        expected = [t for b in np.flatnonzero(plan.home == r) for t in tokens_of(plan, b)]
        assert home[r].tolist() == expected
    for r, rank in enumerate(mine):
        returning = [_return_rows(m) for m in mine]
        back = exchanged(home, returning, [m.receive_tokens for m in mine], r)
        everything = np.concatenate([home[r], back])
        assert (everything if rank.local_from is None else everything[rank.local_from]).tolist() == local[r].tolist()


def _return_rows(plan: RankPlan) -> np.ndarray:
    from moba_cp.parallel.home import _return_rows

    return _return_rows(plan)


@given(plan=plans())
def test_rows_know_their_block_and_centroids_are_of_complete_blocks(plan: HomePlan) -> None:
    candidates: list[int] = []
    for r in range(plan.layout.cp_size):
        mine = rank_plan(plan, r)
        token = plan.layout.local_indices(r).numpy()
        assert (plan.blocks.start[mine.block] + mine.position).tolist() == token.tolist()
        assert mine.first_block.tolist() == plan.blocks.first_of_document[mine.block].tolist()
        assert (plan.blocks.length[mine.centroid_blocks] == plan.block_size).all()
        assert mine.centroid_rows.tolist() == plan.home_row[mine.centroid_blocks].tolist()
        candidates += mine.centroid_blocks.tolist()
    assert sorted(candidates) == np.flatnonzero(~plan.blocks.is_last).tolist()  # each once, over all ranks


@given(plan=plans())
def test_centroids_are_made_of_complete_blocks_in_the_order_they_are_wanted(plan: HomePlan) -> None:
    """Also in a group of one, whose centroids are used as they are made: there candidates stand in for the other blocks."""
    for r in range(plan.layout.cp_size):
        mine = rank_plan(plan, r)
        start = centroid_start(mine, torch.device("cpu")).numpy()
        whole_blocks = set(plan.home_row[(plan.home == r) & (plan.blocks.length == plan.block_size)].tolist())
        assert set(start.tolist()) <= whole_blocks
        if plan.layout.cp_size == 1 and mine.centroid_blocks.size:
            assert start.size == len(plan.blocks)
            assert start[mine.centroid_blocks].tolist() == mine.centroid_rows.tolist()
        else:
            assert start.tolist() == mine.centroid_rows.tolist()


def test_plans_are_made_once_for_equal_layouts() -> None:
    a, b = (home_plan(SequenceLayout.contiguous([0, 64], 2), 8) for _ in range(2))
    assert a is b
    assert rank_plan(a, 0) is rank_plan(b, 0)


def test_many_documents_are_planned_quickly() -> None:
    """5,000 documents of 0 to 400 tokens: a million tokens, eight ranks, in a small part of a training step."""
    cu = np.concatenate([[0], np.cumsum(np.arange(5_000) * 7919 % 401)])
    layout = SequenceLayout.zigzag(cu, 8)
    begin = time.process_time()  # not the time of others on this machine
    plan = rank_plan(home_plan(layout, 64), 3)
    assert time.process_time() - begin < 0.5  # about 25 ms; the rest is for a slow machine
    assert plan.block.size == layout.local_tokens(3)


@given(lengths=st.lists(st.integers(0, 25), max_size=5), size=st.integers(1, 6), block_size=st.integers(1, 9))
def test_plans_of_a_rule_are_those_of_its_runs(lengths: list[int], size: int, block_size: int) -> None:
    cu = list(accumulate(lengths, initial=0))
    for rule in (SequenceLayout.zigzag(cu, size), SequenceLayout.contiguous(cu, size)):
        listed = SequenceLayout(rule.cu_seqlens_array, Listed(rule.runs))  # `from_runs` would find the rule
        a, b = home_plan(rule, block_size), home_plan(listed, block_size)
        assert a is not b
        for plans_of in ((a, b), *((rank_plan(a, r), rank_plan(b, r)) for r in range(size))):
            x, y = (
                {n: v for n, v in vars(p).items() if n not in ("layout", "blocks", "plan", "memo")} for p in plans_of
            )
            assert all(np.array_equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("block_size", [1, 5, 16, 100, 2**62])
def test_most_rows_are_at_least_those_of_every_block(block_size: int) -> None:
    plan = home_plan(SequenceLayout.contiguous([0, 70, 70, 203], 2), block_size)
    assert plan.blocks.longest == min(block_size, 133)
    assert plan.blocks.longest <= plan.most_rows <= min(block_size, 256)
