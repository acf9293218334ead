"""scripts/tables/layer.py: the tables of the layer over several ranks."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.tables.layer import layer_tables

CASE = {"q_heads": 4, "kv_heads": 2, "block_size": 64, "topk": 3, "routing": "uniform", "layout": "zigzag"}


def result(ranks: int, comm: str, forward: float, both: float, **stages: float) -> dict[str, Any]:
    return CASE | {
        "ranks": ranks, "tokens": 1024 * ranks, "comm": comm, "transport": "ring" if ranks > 1 else "local",
        "forward_ms": forward, "forward_backward_ms": both, "stages_ms_rank0": {"gate": 0.5 * ranks} | stages,
        "output_error": 1e-3 * ranks, "wanted_share": 0.25, "attended_keys": [40, 50] if ranks > 1 else [40],
        "peak_gib_forward": 1.0, "peak_gib_forward_backward": 2.0, "bitwise_equal_to_first": True,
    }  # fmt: skip


def content(*results: dict[str, Any], commit: str = "c" * 40) -> dict[str, Any]:
    about = {"device": "GPU", "world_size": 2, "nccl": "2", "torch": "2", "commit": commit}
    return about | {"results": [*results, {"error": "out of memory"}]}


def test_transports_stand_beside_each_other_and_what_is_lost_below() -> None:
    waits = {"wait for keys and values": 0.25, "wait for keys and values, send gradients": 0.5, "return gradients": 1.0}
    text = layer_tables(
        [
            content(result(2, "ring", 4.0, 9.0), result(2, "auto", 5.0, 10.0, **waits)),
            content(result(1, "auto", 2.5, 8.0)),
        ]
    )
    assert "| 4/2 | (64, 3) | 2K | uniform | 25% | 4.0 / 9.0 | 5.0 / 10.0 (ring) | 2.5 / 8.0 | 2.0e-03 |" in text
    assert "| 4/2 | (64, 3) | 2K | uniform | 50% / 80% | 0.5 to 1.0 | 0.2 / 1.5 | 1.25 | 1.0 / 2.0 |" in text
    assert "are the same bits" in text


def test_a_case_not_run_alone_has_no_efficiency() -> None:
    text = layer_tables([content(result(2, "auto", 5.0, 10.0))])
    assert text.count("| 4/2 |") == 1


def test_different_bits_show() -> None:
    assert "are NOT the same bits" in layer_tables(
        [content(result(2, "auto", 5.0, 10.0) | {"bitwise_equal_to_first": False})]
    )


def test_results_of_two_commits_are_refused() -> None:
    with pytest.raises(ValueError, match="dddd"):
        layer_tables([content(result(2, "auto", 5.0, 10.0)), content(commit="d" * 40)])
