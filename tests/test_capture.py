"""Calls that a CUDA graph captures: refused over several ranks before any collective; on one rank the plan stays."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, dense, moba_attention, prepare
from moba_cp.parallel import backward_order
from moba_cp.parallel.blocks import HomePlan
from moba_cp.parallel.plan_cache import PLANS
from tests.calls import TWO, assert_works, full_result, good_call, outcome
from tests.ranks import run_ranks
from tests.recorder import recorded


def captured_on_two_ranks(rank: int, size: int) -> tuple[str, int, tuple[torch.Tensor, ...]]:
    original, prepare.is_captured = prepare.is_captured, lambda q: True
    try:
        error, collectives, _ = outcome(good_call(rank))
    finally:
        prepare.is_captured = original
    return str(error), collectives, full_result(rank)


def test_ranks_refuse_a_capture_and_go_on() -> None:
    results = run_ranks(2, captured_on_two_ranks)
    for error, collectives, _ in results:
        assert "a CUDA graph can capture attention on one rank, got a layout for 2" in error
        assert collectives == 0
    assert_works([result for _, _, result in results])


def others_captured_on_two_ranks(rank: int, size: int) -> tuple[list[str], int, tuple[torch.Tensor, ...]]:
    """Errors of full attention, scores of blocks and a backward pass; collectives that they started."""
    q, k, v, config = (good_call(rank)[name] for name in ("q", "k", "v", "config"))
    scores = importlib.import_module("moba_cp.block_scores")  # the package has the function under this name
    blocks, errors = torch.zeros(4, q.shape[0], 1, dtype=torch.int64), []
    calls = (
        lambda: dense.causal_attention(q, k, v, None, layout=TWO),
        lambda: scores.block_scores(q, k, blocks, config, layout=TWO),
        lambda: backward_order.check(None, 7, torch.device("cuda", 0), hooks=""),
    )
    with (
        recorded() as started,
        mock.patch.object(dense, "is_captured", return_value=True),
        mock.patch.object(scores, "is_captured", return_value=True),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
    ):
        for call in calls:
            with pytest.raises(ValueError) as raised:
                call()
            errors.append(str(raised.value))
    return errors, len(started), full_result(rank)


def test_ranks_refuse_other_captures_and_go_on() -> None:
    results = run_ranks(2, others_captured_on_two_ranks)
    for (full, scores, backward), collectives, _ in results:
        assert full == "a CUDA graph can capture attention on one rank, got a layout for 2: ranks agree on the host"
        assert scores == "a CUDA graph cannot capture block_scores: the values of blocks are checked on the host"
        assert backward == (
            "a CUDA graph can capture a backward pass on one rank, got call 7 of a group: ranks agree on the host"
        )
        assert collectives == 0
    assert_works([result for _, _, result in results])


def test_the_plan_of_a_captured_call_outlives_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[HomePlan] = []
    monkeypatch.setattr(PLANS, "keep", kept.append)
    q, k, v = (torch.zeros(12, 2, 4) for _ in range(3))
    call = {"config": MoBAConfig(4, 2), "layout": SequenceLayout.contiguous([0, 12], 1)}
    moba_attention(q, k, v, **call)
    assert not kept
    monkeypatch.setattr(prepare, "is_captured", lambda q: True)
    moba_attention(q, k, v, **call)
    PLANS.clear()
    (plan,) = kept
    assert plan.layout == call["layout"]
    assert len(plan.memo)  # what replays read
