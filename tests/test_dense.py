"""Full causal attention over a group against the definition, and what its transports send, to the byte."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, dense
from moba_cp.parallel.comm import Traffic
from moba_cp.parallel.cost import GATHER_BYTES
from moba_cp.parallel.dense import choose_transport
from tests.cases import Case, assert_close, every_layout, full_on_rank, reference, whole
from tests.ranks import run_ranks
from tests.recorder import Started, recorded

COMMS = ("ring", "all_gather")
# A block that holds the longest document is full attention by the definition.
CASE = Case((13, 0, 1, 26), block_size=26, topk=1, q_heads=4, kv_heads=2, dim=8, v_dim=5)
CASES = [CASE, replace(CASE, lengths=(31,), block_size=31, kv_heads=1, v_dim=8, softmax_scale=0.3)]


def all_on_rank(rank: int, world_size: int, case: Case, dtype: torch.dtype) -> dict[str, tuple]:
    """By layout: the results, once it is clear that they are the same bits by either transport and each time."""
    results = {}
    for name, layout in every_layout(case.cu_seqlens, world_size).items():
        results[name] = full_on_rank(rank, case, layout, dtype, comm="ring")
        for comm in (*COMMS, "auto"):
            again = full_on_rank(rank, case, layout, dtype, comm=comm)
            assert all(map(torch.equal, again, results[name])), (name, comm)
    return results


@pytest.mark.parametrize("case", CASES, ids=["gqa", "mqa"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_layout_and_transport_gives_the_definition(world_size: int, case: Case) -> None:
    expected = reference(case)
    per_rank = run_ranks(world_size, all_on_rank, case, torch.float64)
    for name, layout in every_layout(case.cu_seqlens, world_size).items():
        results = whole(layout, [of_rank[name] for of_rank in per_rank])
        assert_close(results, expected, 1e-13, (name, world_size))  # fp64 sums of 26 terms at most, in another order


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_sums_in_fp32(dtype: torch.dtype, tolerance: float) -> None:
    expected = tuple(x.to(dtype) for x in reference(CASE))
    per_rank = run_ranks(3, all_on_rank, CASE, dtype)
    for name, layout in every_layout(CASE.cu_seqlens, 3).items():
        assert_close(whole(layout, [of_rank[name] for of_rank in per_rank]), expected, tolerance)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_scales_of_zero_and_below(scale: float) -> None:
    case = replace(CASE, softmax_scale=scale)
    layout = SequenceLayout.contiguous(case.cu_seqlens, 1)
    assert_close(full_on_rank(0, case, layout), reference(case), 1e-13)


def nan_on_rank(rank: int, world_size: int) -> bool:
    """The last document is NaN; the others must be finite, gradients as well."""
    layout = SequenceLayout.zigzag(CASE.cu_seqlens, world_size)
    document = CASE.cu_seqlens[-2]
    *qkv, dout = CASE.inputs()
    for x in (*qkv, dout):
        x[document:] = float("nan")
    local = [layout.shard(x, rank).requires_grad_() for x in qkv]
    out = dense.causal_attention(*local, None, layout=layout, comm="ring")
    gradients = torch.autograd.grad(out, local, layout.shard(dout, rank))
    finite = layout.local_indices(rank) < document
    return all(bool(x[finite].isfinite().all() and x[~finite].isnan().any()) for x in (out, *gradients))


def test_documents_do_not_see_each_other() -> None:
    assert all(run_ranks(2, nan_on_rank))


# What moves: 16 tokens on three ranks, fp64, 2 kv heads of 8 + 5 numbers.
SIXTEEN = replace(CASE, lengths=(16,), block_size=16)
THREE = SequenceLayout.contiguous([0, 16], 3)
HELD = (5, 5, 6)
TOKEN = 2 * 13 * 8
HEADER = Started("all_gather", 2 * 1024, 2 * 1024)  # by which ranks find that they agree
NUMBER = HEADER  # of the same form: by which they find that they run the same backward pass


def traffic_on_rank(rank: int, world_size: int, comm: str, dtype: torch.dtype) -> tuple[dict, list]:
    traffic = Traffic()
    with recorded() as events:
        full_on_rank(rank, SIXTEEN, THREE, dtype, comm=comm, traffic=traffic)
    return {name: (s.collectives, s.sent_bytes, s.received_bytes) for name, s in traffic.stages.items()}, events


@pytest.mark.parametrize(("dtype", "size", "gradient_size"), [(torch.float64, 8, 8), (torch.bfloat16, 2, 4)])
def test_ring_bytes(dtype: torch.dtype, size: int, gradient_size: int) -> None:
    """Shards travel forward and again in backward, in their dtype, unexpanded; gradients one step behind, in fp32."""
    for rank, (stages, events) in enumerate(run_ranks(3, traffic_on_rank, "ring", dtype)):
        before, after = HELD[rank - 1], HELD[(rank + 1) % 3]
        sent, received = HELD[rank] + before, before + after
        token, gradient = TOKEN // 8 * size, TOKEN // 8 * gradient_size
        assert stages == {
            "dense ring keys and values": (4, 2 * sent * token, 2 * received * token),
            "dense ring gradients": (2, received * gradient, (after + HELD[rank]) * gradient),
        }
        assert [events[0], events[3]] == [HEADER, NUMBER]
        shifts = [*events[1:3], *events[4:]]
        assert [e.name for e in shifts] == ["shift"] * 6
        assert sum(e.sent for e in shifts) == sum(s[1] for s in stages.values())
        assert sum(e.received for e in shifts) == sum(s[2] for s in stages.values())


def test_all_gather_bytes() -> None:
    """Padded to the largest shard on the way out; gradients go home without padding."""
    for rank, (stages, events) in enumerate(run_ranks(3, traffic_on_rank, "all_gather", torch.float64)):
        gathered = 2 * 6 * TOKEN
        assert stages == {
            "dense all_gather keys and values": (2, 2 * gathered, 2 * gathered),
            "dense all_gather gradients": (1, (16 - HELD[rank]) * TOKEN, 2 * HELD[rank] * TOKEN),
        }
        assert events == [
            HEADER,
            Started("all_gather", gathered, gathered),
            NUMBER,
            Started("all_gather", gathered, gathered),
            Started("all_to_all", (16 - HELD[rank]) * TOKEN, 2 * HELD[rank] * TOKEN),
        ]


def test_a_group_of_one_starts_nothing() -> None:
    with recorded() as events:
        full_on_rank(0, SIXTEEN, SequenceLayout.contiguous([0, 16], 1), comm="all_gather")
    assert events == []


def steps_on_rank(rank: int, world_size: int) -> list[str]:
    """Forward and backward as a list of "shift", "compute", "wait"."""
    layout = SequenceLayout.zigzag([0, 16], world_size)
    with recorded(steps=True) as events:
        kernels = {"attend": dense.dense.attend, "attend_backward": dense.dense.attend_backward}
        noted = {n: lambda *a, f=f: (events.append("compute"), f(*a))[1] for n, f in kernels.items()}
        with mock.patch.multiple(dense.dense, **noted):
            full_on_rank(rank, SIXTEEN, layout, comm="ring")
    return [e if isinstance(e, str) else e.name for e in events[1:]]


def test_ring_has_the_next_shard_under_way_while_it_computes() -> None:
    for steps in run_ranks(3, steps_on_rank):
        forward = ["shift", "compute", "wait", "shift", "compute", "wait", "compute"]
        assert steps == [
            *forward,
            "all_gather",  # the call's number
            # The same, and each step's gradients travel behind it while the next shard is computed.
            *["shift", "compute", "wait", "shift", "compute", "shift", "wait", "compute", "wait", "shift", "wait"],
        ]


def test_auto_gathers_what_is_small() -> None:
    layout = SequenceLayout.from_runs([[(0, 5)], [(5, 16)]], [0, 16])
    assert choose_transport(layout, GATHER_BYTES // 11) == "all_gather"
    assert choose_transport(layout, GATHER_BYTES // 11 + 1) == "ring"


def disagreeing_on_rank(rank: int, world_size: int, what: str) -> None:
    layout = SequenceLayout.contiguous([0, 16], world_size)
    comm = COMMS[rank] if what == "comm" else "ring"
    if what == "tokens" and rank == 1:
        layout = SequenceLayout.from_runs([[(0, 7)], [(7, 16)]], [0, 16])
        q, k, v, _ = (x[:7] for x in SIXTEEN.inputs())
        dense.causal_attention(q, k, v, None, layout=layout, comm=comm)
    full_on_rank(rank, SIXTEEN, layout, comm=comm)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("comm", "disagree on comm: rank 0 has ring, rank 1 has all_gather"),
        ("tokens", "the layout gives rank 1 9 tokens, but q has 7"),
    ],
)
def test_ranks_that_differ_raise_on_every_rank(what: str, message: str) -> None:
    errors = run_ranks(2, disagreeing_on_rank, what, expect_errors=True)
    assert all(isinstance(e, ValueError) and message in str(e) for e in errors), errors


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (float("inf"), ValueError, "softmax_scale must be finite, got inf"),
        (float("nan"), ValueError, "softmax_scale must be finite, got nan"),
        ("0.1", TypeError, "softmax_scale must be a float or None, got '0.1' \\(str\\)"),
    ],
)
def test_scales_are_refused_as_moba_refuses_them(scale: object, error: type[Exception], message: str) -> None:
    qkv, layout = CASE.inputs()[:3], SequenceLayout.contiguous(CASE.cu_seqlens, 1)
    with pytest.raises(error, match=message):
        dense.causal_attention(*qkv, scale, layout=layout)
    with pytest.raises(error, match=message):
        MoBAConfig(8, 2, softmax_scale=scale)


def bad_scale_on_rank(rank: int, world_size: int) -> None:
    layout = SequenceLayout.zigzag(CASE.cu_seqlens, world_size)
    qkv = [layout.shard(x, rank) for x in CASE.inputs()[:3]]
    dense.causal_attention(*qkv, float("inf") if rank == 0 else None, layout=layout)


def test_a_bad_scale_on_one_rank_is_told_to_the_other() -> None:
    errors = run_ranks(2, bad_scale_on_rank, expect_errors=True)
    assert all("softmax_scale must be finite, got inf" in str(error) for error in errors), errors


def test_unknown_transports_are_refused() -> None:
    with pytest.raises(ValueError, match="auto, all_gather, ring; got 'fetch'"):
        full_on_rank(0, SIXTEEN, SequenceLayout.contiguous([0, 16], 1), comm="fetch")
