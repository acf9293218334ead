"""scripts/tables/scaling.py: what the tables of the scaling results say."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("matplotlib")

from scripts.tables.scaling import longest_table, scaling_tables

CASE = {"q_heads": 4, "kv_heads": 2, "block_size": 64, "topk": 3, "routing": "uniform", "layout": "zigzag"}


def result(ranks: int, comm: str, forward: float, both: float, **more: Any) -> dict[str, Any]:
    return CASE | {
        "ranks": ranks, "tokens": 4 << 20, "comm": comm, "forward_ms": forward, "forward_backward_ms": both,
        "exposed_ms": 0.5, "received_bytes": 1 << 30, "peak_gib_forward_backward": 2.0, "output_error": 1e-3,
        "bitwise_equal_to_first": True, "commit": "c" * 40,
    } | more  # fmt: skip


def content(*results: dict[str, Any]) -> dict[str, Any]:
    about = {"device": "GPU", "world_size": 2, "nccl": "2", "torch": "2", "commit": "c" * 40, "baselines": []}
    return about | {"results": list(results)}


def test_a_budget_that_is_not_the_default_has_a_row_of_its_own() -> None:
    few = result(2, "ring", 1500.0, 6000.0)
    many = result(2, "ring", 500.0, 1000.0, exchange_bytes=16 << 30)
    text = scaling_tables([content(few, many)])
    assert "| uniform, zigzag | 1500.0 / 6000.0 |" in text
    assert "| uniform, zigzag, exchange_bytes 16 GiB | 500.0 / 1000.0 |" in text
    rows = [line for line in longest_table([content(few, many)]).splitlines() if "4,194,304" in line]
    assert ["exchange_bytes 16 GiB" in row for row in rows] == [True, False]  # the faster one first
    fastest = longest_table([content(few, many)], fastest=True)
    assert fastest.count("4,194,304") == 1
    assert "exchange_bytes 16 GiB" in fastest


def test_the_same_problem_on_more_gpus_is_compared() -> None:
    alone, two = result(1, "auto", 4.0, 10.0), [result(2, "pull", 2.5, 6.0), result(2, "a2a", 2.0, 5.0)]
    text = scaling_tables([content(alone, *two)])
    assert "- 4M tokens, 4/2, (64, 3), uniform: 1 to 2 GPUs 2.00x / 2.00x (a2a)" in text
    assert "more GPUs" not in scaling_tables([content(*two)])


def test_results_of_two_commits_name_both() -> None:
    text = scaling_tables([content(result(2, "pull", 2.5, 6.0), result(2, "a2a", 2.0, 5.0, commit="d" * 40))])
    assert "commit cccccccccc and dddddddddd" in text


def test_other_documents_and_selections_have_rows_of_their_own() -> None:
    of = [{"document": 1024}, {"document": 2048}, {"document": 2048, "selections": "b.npz: layer_0"}]
    entries = [result(2, "pull", 2.0 + i, 6.0 + i, routing="trained", **more) for i, more in enumerate(of)]
    text = scaling_tables([content(*entries)])
    assert "| trained, documents of 2,048, zigzag | 3.0 / 7.0 |" in text
    assert "| trained (b.npz: layer_0), documents of 2,048, zigzag | 4.0 / 8.0 |" in text
    for i in range(3):
        assert f"{2.0 + i} / {6.0 + i}" in text
