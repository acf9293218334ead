"""Committed results hold what programs that read them rely on (docs/results.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moba_cp.parallel import cost

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


def test_exposed_times_that_the_cost_model_cites() -> None:
    """The table of `HEADS_EXPOSED`: what calls took longer than equal work, and that over the time on the wire."""
    content = json.loads((RESULTS / "scaling.json").read_text())
    row = re.compile(
        r"2 H200 +(\d+)K +(\d+)/(\d+) +(\d+), (\d+) +([\d.]+)(?: \(([\d.]+)\))? +([\d.]+)(?: \(([\d.]+)\))?"
    )
    rows = row.findall(Path(cost.__file__).read_text())
    assert len(rows) == 5
    for tokens, q_heads, kv_heads, block_size, topk, *figures in rows:
        sizes = {
            "ranks": 2,
            "tokens": 2048 * int(tokens),
            "block_size": int(block_size),
            "topk": int(topk),
            "routing": "uniform",
        }
        alone = sizes | {"q_heads": int(q_heads) // 2, "kv_heads": int(kv_heads) // 2, "baseline": "equal_work"}
        (equal,) = (b for b in content["baselines"] if alone.items() <= b.items())
        for comm, ms, share in (("a2a", *figures[:2]), ("pull", *figures[2:])):
            case = sizes | {"q_heads": int(q_heads), "kv_heads": int(kv_heads), "comm": comm, "layout": "zigzag"}
            (found,) = (r for r in content["results"] if case.items() <= r.items())
            longer = found["forward_backward_ms"] - equal["forward_backward_ms"]
            assert ms == f"{longer:.1f}", case
            if share:
                assert share == f"{longer / (found['received_bytes'] / cost.INSIDE_BYTES_PER_MS):.2f}", case
