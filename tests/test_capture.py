"""Calls that a CUDA graph captures: refused over several ranks before any collective; on one rank the plan stays."""

from __future__ import annotations

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, prepare
from moba_cp.parallel.plan_cache import PLANS
from tests.calls import assert_works, full_result, good_call, outcome
from tests.ranks import run_ranks


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


def test_the_plan_of_a_captured_call_outlives_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_captured", {})
    q, k, v = (torch.zeros(12, 2, 4) for _ in range(3))
    call = {"config": MoBAConfig(4, 2), "layout": SequenceLayout.contiguous([0, 12], 1)}
    moba_attention(q, k, v, **call)
    assert not prepare._captured
    monkeypatch.setattr(prepare, "is_captured", lambda q: True)
    moba_attention(q, k, v, **call)
    PLANS.clear()
    (plan,) = prepare._captured.values()
    assert plan.layout == call["layout"]
    assert len(plan.memo)  # what replays read
