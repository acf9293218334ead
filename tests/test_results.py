"""Committed results hold what programs that read them rely on (docs/results.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
LAYER = {
    "ranks", "tokens", "q_heads", "kv_heads", "block_size", "topk", "routing", "comm", "forward_ms", "forward_backward_ms",
    "output_error",
}  # fmt: skip
TRAINING = {"gpus", "tokens_per_step", "attention", "tokens_per_second", "mfu", "peak_memory_gib", "loss"}
LEARNING = {"arm", "seed", "parameters", "tokens", "eval_loss"}


@pytest.mark.parametrize(
    ("files", "rows", "names"),
    [("scaling*.json", "results", LAYER), ("training*.json", "runs", TRAINING), ("learning.json", "runs", LEARNING)],
)
def test_rows_have_their_names(files: str, rows: str, names: set[str]) -> None:
    found = sorted(RESULTS.glob(files))
    assert found
    for file in found:
        entries = json.loads(file.read_text())[rows]
        assert isinstance(entries, list)
        assert entries
        for entry in entries:
            assert names <= entry.keys() or "error" in entry, (file.name, sorted(names - entry.keys()))
