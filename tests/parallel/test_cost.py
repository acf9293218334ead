"""The rule behind comm="auto", on traffic matrices made by hand and on real groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moba_cp
from moba_cp import SequenceLayout
from moba_cp.parallel.blocks import HomePlan, home_plan
from moba_cp.parallel.cost import (
    FETCH_SHARE,
    GATHER_BYTES,
    PULL_BYTES,
    PULL_ROWS,
    choose_transport,
    choose_with_shared_memory,
    visible_tokens,
)
from tests.cases import Case, every_layout, layouts
from tests.ranks import run_ranks

# Two ranks with 8 tokens each, in blocks of 4.
PLAN = home_plan(SequenceLayout.contiguous([0, 16], 2), 4)
PAIR = 96


def wanted(*tokens: list[list[int]]) -> np.ndarray:
    """Remote tokens per destination, out of `[destination, home]` for each kv head."""
    total = np.array(tokens, dtype=np.int64).sum(0)
    return total.sum(1) - np.diagonal(total)


def seen(plan: HomePlan) -> list[list[int]]:
    """`[destination, home]`."""
    return [visible_tokens(plan, rank).tolist() for rank in range(plan.layout.cp_size)]


def test_visible_tokens_are_those_of_blocks_that_start_no_later() -> None:
    assert seen(PLAN) == [[8, 0], [8, 8]]
    zigzag = home_plan(SequenceLayout.zigzag([0, 16], 2), 4)  # rank 0 holds blocks 0 and 3, rank 1 blocks 1 and 2
    assert seen(zigzag) == [[8, 8], [4, 8]]
    documents = home_plan(SequenceLayout.contiguous([0, 8, 16], 2), 4)  # a rank sees its own document only
    assert seen(documents) == [[8, 0], [0, 8]]


@given(data=st.data())
def test_visible_tokens_by_brute_force(data: st.DataObject) -> None:
    cu = np.cumsum([0, *data.draw(st.lists(st.integers(0, 12), max_size=4))]).tolist()
    layout = data.draw(layouts(cu, data.draw(st.integers(1, 4))))
    plan = home_plan(layout, data.draw(st.integers(1, 5)))
    expected = np.zeros((layout.cp_size, layout.cp_size), dtype=np.int64)
    for rank in range(layout.cp_size):
        held = layout.local_indices(rank).tolist()
        for block, start in enumerate(plan.blocks.start):
            document = np.searchsorted(cu, start, side="right")
            if any(t >= start and np.searchsorted(cu, t, side="right") == document for t in held):
                expected[rank, plan.home[block]] += plan.blocks.length[block]
    assert seen(plan) == expected.tolist()


def test_fetch_up_to_its_share_of_what_the_others_hold() -> None:
    """A rank's others hold 8 tokens: fetch where the busiest wants at most 6 of them."""
    assert FETCH_SHARE == 0.75
    assert choose_transport(PLAN, wanted([[8, 0], [6, 8]]), 1, PAIR) == "fetch"
    assert choose_transport(PLAN, wanted([[8, 0], [7, 8]]), 1, PAIR) == "all_gather"
    assert choose_transport(PLAN, wanted([[8, 7], [0, 8]]), 1, PAIR) == "all_gather"  # the busiest rank, not the last
    assert choose_transport(PLAN, wanted([[8, 0], [0, 8]]), 1, PAIR) == "fetch"  # nothing is wanted


def test_kv_heads_count_on_both_sides() -> None:
    """8 of 16 pair-tokens are wanted: all of one kv head and nothing of the other."""
    both = wanted([[8, 0], [8, 8]], [[0, 0], [0, 0]])
    assert choose_transport(PLAN, both, 2, PAIR) == "fetch"


def test_ring_above_the_bytes_of_one_gather() -> None:
    everything = wanted([[8, 8], [8, 8]])
    assert choose_transport(PLAN, everything, 1, GATHER_BYTES // 8) == "all_gather"
    assert choose_transport(PLAN, everything, 1, GATHER_BYTES // 8 + 1) == "ring"


def test_pull_for_many_bytes_or_long_work() -> None:
    """A rank's others hold 8 tokens. Few kv heads may stand for many rows, whose work hides what `pull` costs the host."""
    assert choose_with_shared_memory(PLAN, PULL_ROWS - 1, 1, PULL_BYTES // 8) == "all_gather"
    assert choose_with_shared_memory(PLAN, 1, 1, PULL_BYTES // 8 + 1) == "pull"
    assert choose_with_shared_memory(PLAN, PULL_ROWS, 1, 1) == "pull"


def test_the_rank_that_holds_least_has_most_to_receive() -> None:
    """12 tokens on rank 0, 4 on rank 1: the others of rank 1 hold 12, so 9 wanted ones are fetched and 10 are not."""
    plan = home_plan(SequenceLayout.from_runs([[(0, 12)], [(12, 16)]], [0, 16]), 4)
    assert choose_transport(plan, wanted([[12, 0], [9, 4]]), 1, PAIR) == "fetch"
    assert choose_transport(plan, wanted([[12, 0], [10, 4]]), 1, PAIR) == "all_gather"


def test_no_token_at_all() -> None:
    plan = home_plan(SequenceLayout.contiguous([0], 2), 4)
    assert choose_transport(plan, wanted([[0, 0], [0, 0]]), 1, PAIR) == "fetch"


def chosen_on_rank(rank: int, size: int, calls: list[tuple[Case, SequenceLayout]]) -> list[tuple[str, list[int]]]:
    found = []
    for case, layout in calls:
        qkv = (layout.shard(x, rank) for x in case.inputs()[:3])
        _, report = moba_cp.moba_attention(*qkv, case.config, layout=layout, comm="auto", return_report=True)
        found.append((report.transport, report.lower_bound_bytes.tolist()))
    return found


@pytest.mark.parametrize("cp_size", [2, 4])
def test_all_ranks_choose_alike_and_by_the_rule(cp_size: int) -> None:
    calls = [
        (Case((37, 0, 22), 4, topk, 4, 2, 4, 4), layout)
        for topk in (1, 2, 20)
        for layout in every_layout([0, 37, 37, 59], cp_size).values()
    ]
    per_rank = run_ranks(cp_size, chosen_on_rank, calls)
    for others in per_rank[1:]:
        assert others == per_rank[0]
    for (case, layout), (transport, bound) in zip(calls, per_rank[0], strict=True):
        plan = home_plan(layout, case.block_size)
        most = 59 - plan.home_tokens.min()
        assert transport == ("fetch" if max(bound) <= 0.75 * most * 2 * 64 else "all_gather")  # 8 numbers of 8 bytes
    assert {t for t, _ in per_rank[0]} == {"fetch", "all_gather"}
