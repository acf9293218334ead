"""Tables that tell keys, commits, switches, rounding and bytes apart, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.learning import measure, report, rounding, summary, tables, transfers
from tests.learning.test_report import make_run

FULL, MOBA = {"kind": "full"}, {"kind": "moba", "block_size": 2, "topk": 1}


def run_of(arm: str, seed: int, spec: dict[str, Any], curve: list[float], **more: Any) -> dict[str, Any]:
    made = make_run(arm, seed, 1.0, spec=spec, loss_curve=curve, steps=len(curve), **more)
    made["config"]["model"] = {"layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 8}
    return made


def test_share_of_keys_counts_the_attention_at_the_end() -> None:
    def share(spec: dict[str, Any]) -> float:
        run = run_of("x", 0, spec, [])
        run["config"]["data"]["length"] = 6
        return summary.share_of_keys(run)

    # Full attention of six rows: 21 pairs.
    assert share({"attention": FULL}) == 1.0
    assert share({"attention": MOBA}) == pytest.approx(9 / 21)  # 1 2 1 2 1 2
    assert share({"attention": MOBA | {"topk": 2}}) == pytest.approx((1 + 2 + 3 + 4 + 3 + 4) / 21)
    assert share({"attention": {"kind": "window", "window": 3}}) == pytest.approx(15 / 21)
    assert share({"attention": MOBA, "full_layers": 1}) == pytest.approx(0.25 + 0.75 * 9 / 21)
    assert share({"attention": MOBA, "switch": {"at": 0.5, "attention": FULL}}) == 1.0


def test_intervals_are_students() -> None:
    assert summary.interval([1.0]) is None
    assert summary.interval([0.0, 2.0]) == pytest.approx((1 - 12.706, 1 + 12.706))
    assert summary.interval([0.0, 1.0, 2.0]) == pytest.approx((1 - 4.303 / 3**0.5, 1 + 4.303 / 3**0.5))


def test_speeds_of_two_commits_stand_apart() -> None:
    about = {"tokens_per_second": 5e5, "seconds_per_step": 0.1, "peak_memory_bytes": 1 << 30}
    runs = [
        run_of("full", 0, {"attention": FULL}, [1.0] * 200, commit="a" * 40, **about),
        run_of("moba", 0, {"attention": MOBA}, [1.0] * 200, **about),  # of the commit of the file
        run_of("moba", 1, {"attention": MOBA}, [1.0] * 200, commit="b" * 40, **about | {"tokens_per_second": 6e5}),
    ]
    text = tables.speed_table({"commit": "a" * 40}, runs)
    assert "| `aaaaaaa` | moba | 0 | 500 (one seed) |" in text
    assert "| `bbbbbbb` | moba | 1 | 600 (one seed) |" in text
    assert "Full attention was not run at `bbbbbbb`:" in text
    assert "was not run" not in tables.speed_table({"commit": "a" * 40}, runs[:2])
    lines = report.machines({"commit": "a" * 40, "machine_gpus": 2}, [*runs[:2], runs[2] | {"machine_gpus": 1}])
    assert lines == [
        f"- Commit `{'b' * 12}`, on a machine of 1 GPU: `moba` seed 1.",
        f"- Commit `{'a' * 12}`, on a machine of 2 GPUs: the other 2 runs.",
    ]


def test_a_switch_stands_beside_both_arms_without_one() -> None:
    before, after = [2.0, 3.0] * 50, [2.0, 3.0] * 50
    runs = [
        run_of("full", 0, {"attention": FULL}, before + after),
        run_of("moba", 0, {"attention": MOBA}, [x + 0.5 for x in before + after]),
        run_of("back", 0, {"attention": FULL, "switch": {"at": 0.5, "attention": MOBA}},
               before + [x + 0.75 for x in after[:50]] + [x + 0.625 for x in after[50:]]),
    ]  # fmt: skip
    row = tables.switch_table({}, runs).splitlines()[2].split(" | ")
    assert row[:3] == ["| back", "0", "100"]
    assert row[3] == "2.5000"
    assert row[7:] == ["+0.7500 +0.7500 +0.7500", "+0.2500", "+0.1250 |"]
    assert tables.plain_arm(runs, runs[2] | {"seed": 1}, MOBA) is None


def test_twins_are_runs_that_trained_the_short_windows_apart() -> None:
    short, other = [3.0] * 100, [3.25] * 100
    runs = [
        run_of("full", 0, {"attention": FULL}, short + [2.0] * 100),
        run_of("moba", 0, {"attention": MOBA}, short + [2.5] * 100),
        run_of("wide", 0, {"attention": MOBA | {"topk": 2}}, other + [2.25] * 100),
        run_of("late", 0, {"attention": MOBA, "switch": {"at": 0.75, "attention": FULL}}, other + [2.75] * 50 + [0.0] * 50),
        run_of("full", 1, {"attention": FULL}, other + [2.0] * 100),
    ]  # fmt: skip
    found = rounding.twins(runs)
    assert [(t.name, t.same) for t in found] == [("`wide` − `full`, seed 0", 100), ("`late` − `moba`, seed 0", 150)]
    text = rounding.rounding_table({"runs": runs}, runs)
    assert "| `wide` − `full`, seed 0 | +0.2500 | – | – |" in text
    assert "| `late` − `moba`, seed 0 | +0.2500 | +0.2500 ± 0.0000 | +0.2500 ± 0.0000 (50) |" in text
    assert "not measured" in rounding.rounding_table({"runs": runs[:2]}, runs[:2])


def test_a_run_over_ranks_is_judged_by_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "EARLY", 50)
    spec = {"attention": MOBA}
    runs = [
        run_of("moba", 0, spec, [3.0] * 100 + [2.0] * 100),
        run_of("again", 0, spec, [3.5] * 100 + [2.5] * 100),
    ]
    for apart, verdict in ((0.25, "no further than"), (0.75, "further than")):
        two = run_of("moba_cp2", 0, spec | {"cp": 2}, [3.0] * 100 + [2.0 - apart] * 100, complete=False)
        text = rounding.rounding_table({"runs": runs, "unfinished": [two]}, runs)
        assert f"`moba_cp2` is {apart:.4f} nats from one rank over 50 long steps, {verdict} the furthest" in text


def test_wanted_share_by_ranks_comes_from_the_recorded_selections(tmp_path: Path) -> None:
    # Four blocks of two tokens, one kv head. Each row selects its own block; the last two also block 0.
    selected = np.array([[[-1, 0], [-1, 0], [-1, 1], [-1, 1], [-1, 2], [-1, 2], [0, 3], [0, 3]]], dtype=np.int16)
    per_group = measure.earlier_blocks(selected, 2)
    assert measure.wanted_share(per_group, 2, 2) == 0.5  # the second half wants block 0 of 0 and 1
    assert measure.wanted_share(per_group, 2, 4) == pytest.approx(1 / 6)
    assert measure.wanted_share(per_group, 2, 1) is None
    np.savez(tmp_path / "selections_plan_moba.npz", layer_0=selected, block_size=2, kv_heads=1, step=1)
    results = {"plan": "configs/plan.yaml", "runs": [{"arm": "full"}, {"arm": "moba"}]}
    found = transfers.recorded_shares(tmp_path, results)
    assert found == {"moba": {2: 0.5, 4: pytest.approx(1 / 6)}}  # eight ranks would hold less than a block
    runs = [run_of("moba", 0, {"attention": MOBA}, [])]
    runs[0]["config"]["data"]["length"] = 1 << 20
    text = transfers.transfers(results | {"wanted": found}, runs)
    assert "| moba | 0.50 | 0.17 | – | – | – |" in text
    # Keys and values of 2^19 tokens, 2 heads of 8, bf16: 32 MiB, half of it wanted. Heads: half of q, k, v and output, 6 of 16.
    assert "| 2 | 32.0 | 16.0 | 48.0 |" in text
    assert "the least share here is 0.17" in text
    assert "receive as much as a ring" not in text
    results["wanted"] = {"moba": {2: 1.0, 4: 0.5}}
    assert "With 2 ranks every arm wants all that is in sight" in " ".join(transfers.transfers(results, runs).split())
    assert transfers.transfers({}, runs) == "No selections are recorded yet."


def test_what_a_run_lacks_is_on_the_page() -> None:
    about = {"device": "GPU", "versions": {"torch": "2"}, "parameters": 10**6, "tokens": 10**6, "hashes": {"data": "d"}}
    run = run_of("back", 0, {"attention": FULL}, [1.0] * 200, **about)
    run["config"] |= {"optimizer": {"steps": 200, "lr": 0.1, "warmup": 1}, "data": {"length": 64, "batch": 1}}
    corpus = {"train_tokens": 1, "eval_tokens": 1, "train_documents": 1, "eval_documents": 1, "tokenizer": "",
              "characters_per_token": 1, "fingerprint": ""}  # fmt: skip
    results = {"corpus": corpus, "commit": "c", "machine_gpus": 1, "runs": [run]}
    assert "in part" not in report.setup(results, [run])
    run |= {"lacks": ["recorded selections", "retrieval"], "error": "KeyError: 'x'"}
    assert "Measured in part: `back` seed 0 lacks recorded selections and retrieval: KeyError: 'x'" in report.setup(
        results, [run]
    )
