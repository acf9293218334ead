"""Addresses of wanted pairs in messages: a loop over ranks, heads and blocks, and what comes is what was sent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moba_cp import SequenceLayout
from moba_cp.parallel.blocks import HomePlan, home_plan, rank_plan
from moba_cp.parallel.messages import Messages, messages
from moba_cp.parallel.wanted import exchange_wanted

from .test_wanted import Gathered

LAYOUTS = [
    SequenceLayout.zigzag([0, 70, 70, 203], 5),
    SequenceLayout.contiguous([0, 64], 4),
    SequenceLayout.from_runs([[(0, 7), (30, 40)], [], [(7, 30)]], [0, 12, 40]),  # the second rank has nothing
    SequenceLayout.contiguous([0, 3], 3),
]


def of_all_ranks(plan: HomePlan, masks: Tensor, ranges: list[slice]) -> list[Messages]:
    tables = [
        exchange_wanted(masks[rank], rank_plan(plan, rank), Gathered(masks, rank))  # type: ignore[arg-type]
        for rank in range(len(masks))
    ]
    return [messages(table, rank, ranges) for rank, table in enumerate(tables)]


def looped(plan: HomePlan, masks: Tensor, rank: int, ranges: list[slice]) -> tuple[dict, dict]:
    """Row of each (rank, head, block) in what `rank` sends and in what it receives."""
    sent, received = {}, {}
    for heads in ranges:
        rows = 0, 0
        for peer in range(len(masks)):
            for head in range(heads.start, heads.stop):
                for block, (home, length) in enumerate(zip(plan.home, plan.blocks.length, strict=True)):
                    if peer != rank and home == rank and masks[peer, head, block]:
                        sent[peer, head, block] = rows[0]
                        rows = rows[0] + int(length), rows[1]
                    if peer != rank and home == peer and masks[rank, head, block]:
                        received[peer, head, block] = rows[1]
                        rows = rows[0], rows[1] + int(length)
    return sent, received


@given(
    st.sampled_from(LAYOUTS),
    st.integers(1, 9),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_addresses_are_those_of_a_loop(
    layout: SequenceLayout, block_size: int, widths: list[int], share: float
) -> None:
    plan, size = home_plan(layout, block_size), layout.cp_size
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    ranges = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    masks = torch.rand(size, ends[-1], len(plan.blocks), generator=torch.Generator().manual_seed(block_size)) < share
    for rank, found in enumerate(of_all_ranks(plan, masks, ranges)):
        sent, received = looped(plan, masks, rank, ranges)
        mine = [block for block, home in enumerate(plan.home) if home == rank]
        expected = torch.full((size, ends[-1], len(mine)), -1)
        for (peer, head, block), row in sent.items():
            expected[peer, head, mine.index(block)] = row
        assert torch.equal(found.sent, expected)
        start = torch.full((ends[-1], len(plan.blocks)), -1, dtype=torch.int32)
        for (_, head, block), row in received.items():
            start[head, block] = row
        assert torch.equal(found.start, start)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_addresses_grow_with_the_blocks_not_with_the_group(heads: int) -> None:
    """16M tokens over 128 ranks in blocks of 128: 8 bytes per head and block, however many ranks want it."""
    plan = home_plan(SequenceLayout.zigzag([0, 1 << 24], 128), 128)
    masks = torch.zeros(128, heads, len(plan.blocks), dtype=torch.bool)
    table = exchange_wanted(masks[0], rank_plan(plan, 0), Gathered(masks, 0))  # type: ignore[arg-type]
    found = messages(table, 0, [slice(0, heads)])
    assert found.sent.nbytes == 8 * heads * len(plan.blocks)
    assert found.start.nbytes == 4 * heads * len(plan.blocks)
