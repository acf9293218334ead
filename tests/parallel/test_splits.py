"""Over how many ranks `auto` splits heads: bytes by hand, measured rows of four GPUs, and real groups."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import moba_cp
from moba_cp import SequenceLayout
from moba_cp.parallel import cost
from moba_cp.parallel.cost import CallSizes, choose_head_parallel
from moba_cp.parallel.heads import HeadSplit, head_split, wide_layout
from moba_cp.parallel.partition import Chunked
from moba_cp.parallel.splits import COMMS, Split
from moba_cp.parallel.topology import Topology
from tests.cases import Case, every_layout
from tests.ranks import run_ranks

TOKENS = 131072
NODE = {size: Topology((0,) * size) for size in (1, 2, 4, 8)}
TWO_NODES = Topology((0,) * 4 + (1,) * 4)


def sizes(size: int, q_heads: int, kv_heads: int, gradients: bool = True, tokens: int = TOKENS) -> CallSizes:
    """bf16, D = Dv = 128."""
    return CallSizes(size, tokens, q_heads, kv_heads, 128, 128, 2, 4, gradients)


def test_which_kv_heads_a_member_has() -> None:
    assert head_split(16, 16, 4) == HeadSplit(4, 4, 4, 1)
    assert head_split(32, 8, 4) == HeadSplit(4, 8, 2, 1)
    assert head_split(32, 8, 16) == HeadSplit(16, 2, 1, 2)  # two neighbours share a kv head
    assert head_split(8, 1, 8) == HeadSplit(8, 1, 1, 8)
    # 6 q heads per kv head, 4 per member: members read kv heads 0 0, 0 1, 1 1, by two q heads each.
    assert head_split(12, 2, 3) == HeadSplit(3, 4, 2, 3)


@pytest.mark.parametrize("q_heads", [1, 6, 12, 16])
def test_every_q_head_reads_its_kv_head(q_heads: int) -> None:
    for kv_heads in [h for h in range(1, q_heads + 1) if q_heads % h == 0]:
        for size in [u for u in range(1, q_heads + 1) if q_heads % u == 0]:
            split, group = head_split(q_heads, kv_heads, size), q_heads // kv_heads
            assert split.q_heads % split.kv_heads == 0
            assert split.kv_heads * size == kv_heads * split.copies
            for head in range(q_heads):
                member, own = divmod(head, split.q_heads)
                local = member * split.kv_heads + own // (split.q_heads // split.kv_heads)
                assert local // split.copies == head // group


def test_bytes_of_the_two_ways() -> None:
    """Per token and GPU on four: 16/16 heads in and out 3/4 of 4 x 16 vectors, keys and values of three others 3 x 32. In
    backward also a number in fp32 for each q head, a 64th of its vector."""
    vector = TOKENS * 128 * 2
    forward, both = sizes(4, 16, 16, gradients=False), sizes(4, 16, 16)
    assert forward.head_bytes(4) == 48 * vector
    assert both.head_bytes(4) == (96 + 12 / 64) * vector
    assert forward.sequence_bytes(1, False) == 96 * vector
    assert both.sequence_bytes(1, True) == 4 * 96 * vector
    # Two groups of two: half of the heads of both kinds of tensors, and half of the kv heads of the other two ranks' tokens.
    assert both.head_bytes(2) == (64 + 8 / 64) * vector
    assert forward.sequence_bytes(2, False) == 32 * vector
    # One kv head on each of eight: it goes whole to everybody, and its gradients come back in fp32.
    assert sizes(8, 8, 1, gradients=False).head_bytes(8) == 7 / 8 * (16 + 16) * vector
    assert sizes(8, 8, 1).head_bytes(8) == 7 / 8 * (16 + 16 + 16 + 32 + 8 / 64) * vector


@pytest.mark.parametrize(
    ("size", "heads", "gradients", "topology", "expected"),
    [
        (
            4,
            (16, 16),
            True,
            NODE[4],
            4,
        ),  # measured, ms: 41.7 against 57.8 of pull at (128, 8), 438 against 485 at (4096, 12)
        (4, (32, 8), True, NODE[4], 4),  # 145 against 174
        (4, (32, 8), False, NODE[4], 4),  # 76.9 against 77.6, a draw
        (2, (16, 16), True, NODE[2], 2),  # 22.5 against 23.0 at (128, 8), 49.4 against 50.3 at (512, 8)
        (2, (32, 8), True, NODE[2], 1),
        (2, (16, 16), False, NODE[2], 1),  # 11.9 against 10.4
        (8, (16, 16), True, NODE[8], 8),
        (8, (32, 8), True, TWO_NODES, 4),  # as far as the node goes
        (8, (6, 6), True, TWO_NODES, 2),  # as far as heads go
        (4, (3, 3), True, NODE[4], 1),  # no head can be split
        (4, (16, 16), True, Topology((0, 1, 0, 1)), 1),  # neighbours are on different nodes
    ],
    ids=str,
)
def test_auto_takes_what_was_measured_to_be_faster(
    size: int, heads: tuple[int, int], gradients: bool, topology: Topology, expected: int
) -> None:
    chosen, reason = choose_head_parallel(sizes(size, *heads, gradients), topology, None)
    assert chosen == expected
    assert f"heads over {expected} ranks; model's ms of exposed communication" in reason


def test_auto_leaves_short_sequences_alone() -> None:
    vector = 128 * 2  # of the three others 32 per token
    most = cost.SPLIT_BYTES // (96 * vector)
    assert choose_head_parallel(sizes(4, 16, 16, tokens=most), NODE[4], None) == (1, "")
    assert choose_head_parallel(sizes(4, 16, 16, tokens=most + 1), NODE[4], None)[0] == 4
    assert choose_head_parallel(sizes(4, 16, 16, tokens=8), NODE[4], 2) == (2, "auto: head_parallel=2")


def test_a_report_names_the_value_of_comm_that_stands_for_the_choice() -> None:
    assert Split(1, "auto", "").transport("fetch") == "fetch"
    assert Split(4, "auto", "").transport("local") == "a2a"
    assert Split(2, "auto", "").transport("ring") == "a2a+ring"
    assert Split(4, "ring", "", "a2a+ring").transport("local") == "a2a+ring"
    assert {"a2a", "a2a+ring", "a2a+fetch", "a2a+all_gather", "a2a+pull"} <= set(COMMS)


def test_wide_ranks_hold_what_their_members_hold() -> None:
    for name, layout in every_layout([0, 29, 29, 61, 64], 4).items():
        for size in (1, 2, 4):
            wide = wide_layout(layout, size)
            assert wide_layout(layout, size) is wide, "kept"
            for rank in range(4 // size):
                members = [layout.local_indices(r) for r in range(rank * size, (rank + 1) * size)]
                assert torch.equal(wide.local_indices(rank), torch.cat(members)), name
    rule = wide_layout(SequenceLayout.contiguous([0, 1000], 8), 4)
    assert isinstance(rule.partition, Chunked)


def auto_on_rank(rank: int, size: int, case: Case, layout: SequenceLayout) -> tuple[str, int, str]:
    with mock.patch.object(cost, "SPLIT_BYTES", 0):
        qkv = [layout.shard(x, rank) for x in case.inputs()[:3]]
        _, report = moba_cp.moba_attention(*qkv, case.config, layout=layout, return_report=True)
    return report.transport, report.head_parallel, report.reason


def test_all_ranks_choose_alike() -> None:
    case = Case((90,), 8, 3, 4, 4, 4, 4)
    found = run_ranks(4, auto_on_rank, case, SequenceLayout.zigzag(case.cu_seqlens, 4))
    assert found == [found[0]] * 4
    assert found[0][:2] == ("a2a", 4)
    assert "auto: heads over 4 ranks; model's ms of exposed communication by ranks that split heads: 1: " in found[0][2]
