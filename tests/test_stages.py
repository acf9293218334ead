"""Stages are NVTX ranges that close in order whatever happens inside; on the CPU they are nothing."""

from __future__ import annotations

import pytest
import torch

from moba_cp.stages import Stages


@pytest.fixture
def ranges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is pushed and popped ("-"), in order."""
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("-"))
    return seen


def test_ranges_nest(ranges: list[str]) -> None:
    stage = Stages(torch.device("cuda"))
    with stage("outer"), stage("inner"):
        pass
    assert ranges == ["moba_cp outer", "moba_cp inner", "-", "-"]


def test_a_range_closes_when_its_stage_fails(ranges: list[str]) -> None:
    with pytest.raises(KeyError), Stages(torch.device("cuda"))("gate"):
        raise KeyError
    assert ranges == ["moba_cp gate", "-"]


def test_only_taking_an_item_is_in_its_stage(ranges: list[str]) -> None:
    stage = Stages(torch.device("cuda"))
    for item in stage.taking(["part"], "wait"):
        with stage(f"attend {item}"):
            pass
    assert ranges == ["moba_cp wait", "-", "moba_cp attend part", "-", "moba_cp wait", "-"]


def test_nothing_on_the_cpu(ranges: list[str]) -> None:
    stage = Stages(torch.device("cpu"))
    with stage("gate"):
        assert list(stage.taking([1, 2], "wait")) == [1, 2]
    assert ranges == []
