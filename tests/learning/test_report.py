"""Figures of the page, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from examples.learning import summary, tables


def make_run(arm: str, seed: int, loss: float, exact: float | None = None, **more: Any) -> dict[str, Any]:
    config = {"data": {"length": 64, "begin_with": {"length": 16, "share": 0.5}}, "optimizer": {"steps": 200}}
    asked = [] if exact is None else [
        {"length": 64, "needles": 0, "exact": 0.0},
        {"length": 64, "needles": 1, "exact": exact},
        {"length": 64, "needles": 16, "exact": exact / 2},
        {"length": 128, "needles": 1, "exact": 0.0},
    ]  # fmt: skip
    return {"arm": arm, "seed": seed, "eval_loss": loss, "retrieval": asked, "config": config, "gpus": 1} | more


def test_answer_pairs_seeds_and_gives_single_seeds_no_interval() -> None:
    runs = [make_run("full", s, 2.0 + s, 1.0) for s in range(3)]
    runs += [make_run("moba_8_2", s, 2.1 + s + 0.01 * s, 0.5) for s in range(3)]
    runs += [make_run("window_16", s, 2.3 + s, 0.1) for s in (0, 2)] + [make_run("late", 1, 3.05)]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in tables.answer({}, runs).splitlines()}
    assert rows["full"] == "| full | 3 | 0 | – | 75 ± 0 |"
    # Gaps of 0.10, 0.11 and 0.12: standard error 0.01 / 3 ** 0.5, times Student's 4.303.
    assert rows["moba_8_2"] == "| moba_8_2 | 3 | +0.1100 ± 0.0058 | +0.085 to +0.135 | 38 ± 0 |"
    assert rows["late"] == "| late | 1 | +0.0500 (one seed) | – | – |"
    spread = summary.spread_of_gaps(runs)
    assert spread is not None
    assert spread[0] == pytest.approx((2e-4 / 3) ** 0.5)  # squares of 2e-4 in two degrees of freedom, none in a third
    assert spread[1] == 3
    assert "moba_8_2` − `window_16`, 2 seeds: -0.1900 ± 0.0100 nats, +30.0 ± 0.0 points" in tables.against_window(
        {}, runs
    )


def test_seconds_count_from_the_first_long_window() -> None:
    curve = [3.0] * 120 + [1.0] * 80
    run = make_run("full", 0, 1.0, loss_curve=curve, seconds_per_step=0.5)
    assert summary.first_long_step(run) == 100
    assert summary.seconds_to(run, 1.001) == (160 - 100) * 0.5  # the mean of 40 steps is there after step 160
    assert summary.seconds_to(run, 3.001) == 0.0
    assert summary.seconds_to(run, 0.9) is None


def test_ranks_are_compared_on_the_steps_that_both_have() -> None:
    spec: dict[str, Any] = {"attention": {"kind": "moba"}}
    one = make_run("moba_8_2", 0, 1.0, loss_curve=[3.0] * 100 + [2.0] * 100, spec=spec, complete=True)
    curve = [3.5] * 100 + [2.0, 2.2]
    two = make_run("moba_8_2_cp2", 0, 1.0, loss_curve=curve, spec=spec | {"cp": 2}, complete=False)
    text = tables.context_parallel({"runs": [one, two]}, [one])
    assert (
        "+0.1000 nats over 2 long steps, standard error between steps 0.1000; +0.5000 at the end of the short" in text
    )
    assert text.endswith("Stopped after 102 steps.")
    assert "No run over several ranks" in tables.context_parallel({"runs": [one]}, [one])
