"""Heads split over ranks, the sequence over the rest: the definition's numbers for every split, and what each split sends."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moba_cp
from moba_cp import SequenceLayout, wide
from moba_cp.parallel.comm import StageTraffic
from moba_cp.parallel.heads import HeadTransfer, PeerHeadTransfer
from tests.cases import (
    FP64,
    MIXED,
    NAMES,
    TO_DEFINITION,
    TO_EACH_OTHER,
    TRANSPORTS,
    Case,
    assert_close,
    every_layout,
    layouts,
    on_rank,
    reference,
    relative_error,
    whole,
)
from tests.ranks import run_ranks

TWELVE = replace(MIXED, q_heads=12, kv_heads=6)
# Of kv heads: each its own, shared by neighbours, by all, and by groups that no member's share fits (12 q heads over 4).
HEADS = [(12, 12), (12, 4), (12, 2), (12, 1)]


def splits(q_heads: int, size: int) -> list[int]:
    """Divisors of both."""
    return [u for u in range(1, size + 1) if size % u == 0 and q_heads % u == 0]


def comms(u: int, size: int) -> list[str]:
    """Values of `comm` that split heads over `u` of `size` ranks."""
    return ["a2a"] if u == size else [f"a2a+{name}" for name in TRANSPORTS]


def on_rank_in_slabs(rank: int, size: int, calls: list[tuple]) -> list[tuple[torch.Tensor, ...]]:
    """`on_rank` for each `(case, layout, comm, head_parallel, workspace)`; in several slabs, by all-to-all and through each
    other's memory in turn."""
    found = []
    for number, (case, layout, comm, u, workspace) in enumerate(calls):
        how = (HeadTransfer, PeerHeadTransfer)[number % 2]
        with (
            mock.patch.object(wide, "SLAB_BYTES", 1),
            mock.patch.object(wide, "head_transfer", lambda *a, how=how: how(*a[:2])),
        ):
            found += on_rank(rank, size, case, layout, comm, FP64, workspace, head_parallel=u)
    return found


def ways_on_rank(rank: int, size: int, case: Case, layout: SequenceLayout, u: int) -> list[tuple[torch.Tensor, ...]]:
    """By all-to-all and through each other's memory, in several slabs, three times in turn."""
    found = []
    for how in (HeadTransfer, PeerHeadTransfer) * 3:
        with (
            mock.patch.object(wide, "SLAB_BYTES", 1),
            mock.patch.object(wide, "head_transfer", lambda *a, how=how: how(*a[:2])),
        ):
            found += on_rank(rank, size, case, layout, "a2a" if u == size else "a2a+ring", head_parallel=u)
    return found


@pytest.mark.parametrize("u", [2, 4])
@pytest.mark.parametrize("kind", every_layout([0, 1], 1))
def test_how_heads_travel_changes_no_bit(kind: str, u: int) -> None:
    case = Case((61, 0, 3, 22, 1), 5, 3, 16, 8, 8, 5)
    for first, *others in run_ranks(4, ways_on_rank, case, every_layout(case.cu_seqlens, 4)[kind], u):
        for other in others:
            assert all(map(torch.equal, first, other))


def run_calls(size: int, calls: list[tuple], timeout: float = 120.0) -> list[tuple[torch.Tensor, ...]]:
    per_rank = run_ranks(size, on_rank_in_slabs, calls, timeout=timeout)
    return [whole(call[1], [of_rank[i] for of_rank in per_rank]) for i, call in enumerate(calls)]


@st.composite
def problems(draw: st.DrawFn, size: int) -> tuple:
    q_heads, kv_heads = draw(st.sampled_from(HEADS))
    block = draw(st.integers(1, 9))
    lengths = tuple(draw(st.lists(st.integers(0, 4 * block + 3), max_size=4)))
    dims = draw(st.sampled_from([(1, 1), (4, 5), (8, 8)]))
    case = Case(lengths, block, draw(st.integers(1, 5)), q_heads, kv_heads, *dims, seed=draw(st.integers(0, 2**16)))
    u = draw(st.sampled_from(splits(q_heads, size)))
    layout = draw(layouts(case.cu_seqlens, size))
    return case, layout, draw(st.sampled_from(comms(u, size))), u, draw(st.sampled_from([1, 1 << 30]))


@pytest.mark.parametrize("size", [2, 4])
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_equals_the_definition(size: int, data: st.DataObject) -> None:
    problem = data.draw(problems(size))
    for result in run_calls(size, [problem] * 2):
        assert_close(result, reference(problem[0]), TO_DEFINITION, problem)


@pytest.mark.heavy
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_equals_the_definition_often(size: int, data: st.DataObject) -> None:
    problem = data.draw(problems(size))
    for result in run_calls(size, [problem] * 2):
        assert_close(result, reference(problem[0]), TO_DEFINITION, problem)


@pytest.mark.parametrize("kv_heads", [12, 4, 1])
@pytest.mark.parametrize("size", [4, pytest.param(6, marks=pytest.mark.heavy)])
def test_splits_and_exchanges_agree(size: int, kv_heads: int) -> None:
    """Every split by one exchange, and one split by every exchange; layouts of all kinds in turn."""
    case = replace(TWELVE, kv_heads=kv_heads)
    kinds = list(every_layout(case.cu_seqlens, size).values())
    expected = reference(case)
    calls = [(case, layout, "ring", 1, 1 << 30) for layout in kinds]
    names = [(u, comm) for u in splits(12, size) for comm in comms(u, size)]
    calls += [(case, kinds[i % len(kinds)], comm, u, 1 << 30) for i, (u, comm) in enumerate(names)]
    results = run_calls(
        size, [(c, la, "ring" if u == 1 and comm == "ring" else comm, u, w) for c, la, comm, u, w in calls]
    )
    flat = dict(zip(kinds, results, strict=False))
    for call, result in zip(calls, results, strict=True):
        assert_close(result, expected, TO_DEFINITION, call)
        assert_close(result, flat[call[1]], TO_EACH_OTHER, call)


@pytest.mark.heavy
def test_eight_ranks() -> None:
    case = Case((61, 0, 3, 22, 1), 5, 3, 8, 2, 8, 5)
    kinds = every_layout(case.cu_seqlens, 8).values()
    calls = [(case, la, comm, u, 1 << 30) for la in kinds for u in splits(8, 8) for comm in comms(u, 8)]
    expected = reference(case)
    for call, result in zip(calls, run_calls(8, calls, timeout=600.0), strict=True):
        assert_close(result, expected, TO_DEFINITION, call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_shared_kv_heads_are_rounded_once(dtype: torch.dtype) -> None:
    """One kv head on four ranks: its gradients travel in fp32, and are as close to the exact ones as those of one rank."""
    case = Case((90, 7), 8, 4, 8, 1, 16, 16)
    layout, alone = SequenceLayout.zigzag(case.cu_seqlens, 4), SequenceLayout.contiguous(case.cu_seqlens, 1)
    per_rank = run_ranks(4, on_rank, case, layout, "a2a", dtype, 1 << 30, 2)
    four = whole(layout, [of_rank[0] for of_rank in per_rank])
    one = run_ranks(1, on_rank, case, alone, "auto", dtype)[0][0]
    for name, got, expected in zip(NAMES, four, one, strict=True):
        # fp32 sums in another order; where these round to different numbers, half a unit in the last place of bf16.
        assert relative_error(got, expected) < (2e-6 if dtype == torch.float32 else 4e-3), name
    for first, second in per_rank:
        assert all(map(torch.equal, first, second))


# Two ranks, 16 tokens each of 4 q heads and 2 kv heads, D = 8, Dv = 4, fp64.
BYTES = Case((64,), block_size=4, topk=16, q_heads=4, kv_heads=2, dim=8, v_dim=4)


def traffic_on_rank(
    rank: int, size: int, case: Case, layout: SequenceLayout, comm: str, u: int | None, nodes: int, dtype: torch.dtype
) -> tuple[dict[str, StageTraffic], dict[str, StageTraffic], dict]:
    """Traffic of forward, that with backward, and figures of the report; ranks in `nodes` pretended nodes of neighbours. In a
    group of its own, since nodes are found once per group."""
    group = dist.new_group(list(range(size)))
    with mock.patch.dict(os.environ, {"MOBA_CP_NODE": str(rank * nodes // size)}):
        qkv = [layout.shard(x, rank).requires_grad_() for x in case.inputs(dtype)[:3]]
        options = {"layout": layout, "group": group, "comm": comm, "head_parallel": u, "return_report": True}
        out, report = moba_cp.moba_attention(*qkv, case.config, **options)
    forward = {name: StageTraffic(**vars(stage)) for name, stage in report.traffic.stages.items()}
    out.sum().backward()
    text = moba_cp.diagnostics.format_report(report)
    assert ("from other nodes" in text) == (report.traffic.between_bytes > 0)
    assert (f"split over {report.head_parallel} ranks: " in text) == (report.head_parallel > 1)
    figures = {"transport": report.transport, "head_parallel": report.head_parallel, "reason": report.reason}
    return forward, report.traffic.stages, figures | {"selected": report.selected}


def traffic(
    case: Case, size: int, comm: str, u: int | None = None, nodes: int = 1, dtype: torch.dtype = torch.float64
) -> list[tuple]:
    layout = SequenceLayout.contiguous(case.cu_seqlens, size)
    return run_ranks(size, traffic_on_rank, case, layout, comm, u, nodes, dtype)


def test_bytes_of_heads_in_and_out() -> None:
    """Each rank gives away half of its heads of its 32 tokens and gets half of the other's: q, k, v in and the output out."""
    for forward, both, figures in traffic(BYTES, 2, "a2a"):
        heads = 32 * 8  # tokens, bytes of a number
        to, back, delta = heads * (2 * 8 + 1 * 8 + 1 * 4), heads * 2 * 4, heads * 2
        assert forward == {"heads in": StageTraffic(3, to, to), "heads out": StageTraffic(1, back, back)}
        assert both == {  # and the output's gradient in, with a number per row and q head; dq, dk and dv out
            "heads in": StageTraffic(5, to + back + delta, to + back + delta),
            "heads out": StageTraffic(4, back + to, back + to),
        }
        assert (figures["transport"], figures["head_parallel"]) == ("a2a", 2)


def test_deltas_travel_as_they_are_accumulated() -> None:
    """In bf16 two bytes a number, of which a row and head has D or Dv, and four for its delta."""
    for forward, both, _ in traffic(BYTES, 2, "a2a", dtype=torch.bfloat16):
        assert forward["heads in"].received_bytes == 32 * 2 * (2 * 8 + 1 * 8 + 1 * 4)
        assert both["heads in"].received_bytes - forward["heads in"].received_bytes == 32 * 2 * (2 * 4) + 32 * 2 * 4


def test_bytes_of_shared_kv_heads() -> None:
    """One kv head for both: it goes whole to the other rank, and its gradients come back in the accumulation dtype."""
    case = Case((64,), 4, 16, 4, 1, 8, 4)
    for forward, both, _ in traffic(case, 2, "a2a"):
        heads = 32 * 8
        assert forward["heads in"].received_bytes == heads * (2 * 8 + 8 + 4)
        assert both["heads out"].received_bytes == heads * (2 * 4 + 2 * 8 + 8 + 4)


@pytest.mark.parametrize("exchange", ["all_gather", "ring", "fetch"])
def test_bytes_between_nodes_are_a_share_of_the_flat_exchanges(exchange: str) -> None:
    """Two nodes of two: a rank gets half of the heads of the other node's tokens, and of a ring the other way round, once."""
    flat, split = traffic(BYTES, 4, exchange, None, 2), traffic(BYTES, 4, f"a2a+{exchange}", None, 2)
    token = (8 + 4) * 8
    for index, width in ((0, 1), (1, 3)):  # forward, with backward: keys and values twice, and their gradients
        moved = {"flat": 0, "split": 0}
        for name, per_rank in (("flat", flat), ("split", split)):
            for outcome in per_rank:
                stages = {n: s for n, s in outcome[index].items() if n not in ("centroids", "wanted pairs")}
                between = sum(s.between_bytes for s in stages.values())
                moved[name] += between
                assert all(s.between_bytes == 0 for n, s in stages.items() if n.startswith("heads"))
                if name == "split" and exchange == "all_gather":  # one wide rank's 32 tokens of one kv head
                    assert between == 32 * token * width
        # Over all ranks, the flat exchanges move every kv head to each rank of the other node; here to half of them.
        assert moved["split"] * (3 if exchange == "ring" else 2) == moved["flat"] * (2 if exchange == "ring" else 1)
    for *_, figures in split:
        assert (figures["transport"], figures["head_parallel"]) == (f"a2a+{exchange}", 2)
        assert "heads over 2 ranks: as many ranks of a node as heads allow" in figures["reason"]


def test_the_report_selects_for_local_tokens() -> None:
    flat = traffic(TWELVE, 4, "ring")
    for comm, u in (("a2a", 4), ("a2a+ring", 2)):
        for mine, expected in zip(traffic(TWELVE, 4, comm, u), flat, strict=True):
            assert torch.equal(mine[2]["selected"], expected[2]["selected"])


def defaults_on_rank(rank: int, size: int, case: Case) -> list[tuple[str, int] | str]:
    """Transport and ranks that split heads, or the error, of calls in a group of two nodes: three ranks, and one."""
    group = dist.new_group(list(range(size)))
    layout, found = SequenceLayout.contiguous(case.cu_seqlens, size), []
    with mock.patch.dict(os.environ, {"MOBA_CP_NODE": str(rank // 2)}):
        for comm, u in (("a2a+ring", None), ("a2a+fetch", 4), ("a2a", None), ("a2a+pull", None), ("auto", 2)):
            qkv = [layout.shard(x, rank) for x in case.inputs()[:3]]
            options = {"layout": layout, "group": group, "comm": comm, "head_parallel": u, "return_report": True}
            try:
                _, report = moba_cp.moba_attention(*qkv, case.config, **options)
                found.append((report.transport, report.head_parallel))
            except ValueError as error:
                found.append(str(error))
    return found


def test_defaults_follow_the_nodes() -> None:
    for found in run_ranks(4, defaults_on_rank, TWELVE):
        assert found[:3] == [("a2a+ring", 2), ("a2a+fetch", 4), ("a2a", 4)]
        assert "comm='a2a+pull' needs sequence ranks of one node, got rank 0 on node 0, rank 2 on node 1" in found[3]
        assert found[4][0].startswith("a2a+")
        assert found[4][1] == 2
