"""What small models lose by MoBA, for the README; `docs/learning.md` has the study, made by `examples.learning.report`."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.learning.rounding import twins
from examples.learning.summary import (
    Run,
    answer_loss,
    arms,
    finished,
    gaps,
    loss_apart,
    mean_and_error,
    share_of_keys,
    shown,
    switch_step,
    table,
)
from examples.learning.tables import percent_answered, plain_arm

NAMES = {
    "full": "full attention",
    "moba_512_3": "(512, 3)",
    "moba_128_8": "(128, 8)",
    "moba_2048_3": "(2048, 3)",
    "window_1536": "window of 1,536",
    "moba_512_3_last2_full": "(512, 3), last 2 of 8 layers full",
    "hybrid_90_full": "(512, 3), last 10 % of steps full",
    "full_90_moba": "full, last 10 % of steps (512, 3)",
}
"""Arms that the README shows, in this order, and what they are called there."""


def learning_headline(results: dict[str, Any]) -> str:
    """Markdown: a column per arm, rows for seeds and keys, loss and retrieval."""
    runs = finished(results)
    found = arms(runs)
    known = {arm: found[arm] for arm in NAMES if arm in found}
    length = runs[0]["config"]["data"]["length"]
    nats, answered = [], []
    for arm, seeds in known.items():
        values = gaps(seeds, found["full"])
        nats.append("0" if arm == "full" else shown(values, 3, sign=True))
        answered.append(shown([p for run in seeds.values() if (p := percent_answered(run)) is not None], 0))
    keys = [f"{len(seeds)}; {100 * share_of_keys(next(iter(seeds.values()))):.0f}" for seeds in known.values()]
    rows = [["seeds; % of full attention's keys", *keys]]
    rows += [["loss above full attention's, nats", *nats], [f"% answered at {length:,} tokens", *answered]]
    tokens, size = runs[0]["tokens"] / 1e6, runs[0]["parameters"] / 1e6
    text = (
        f"Models of {size:.0f}M parameters after {tokens:.0f}M tokens of code and prose, windows of {length:,} tokens; ± is the "
        "standard error over seeds. *Answered*: prompts whose answer stands somewhere before. At this size blocks alone lose "
        "answers, and full attention in the last layers, or at the end of training, brings them back: [method, curves and "
        "limits](docs/learning.md)."
    )
    return f"{text}\n\n{table(['', *(NAMES[arm] for arm in known)], rows).replace(' (one seed)', '')}"


def learning_figures(content: dict[str, Any]) -> dict[str, str]:
    """Figures of the page's reading, by name.

    Raises:
        ValueError: a run across whose switch something is told has no counterpart.
    """
    runs = finished(content)
    found = arms(runs)

    def gap(arm: str, key: str = "eval_loss") -> float:
        return mean_and_error(gaps(found[arm], found["full"], key))[0]

    def keys(arm: str) -> str:
        return f"{100 * share_of_keys(next(iter(found[arm].values()))):.0f} %"

    back = found["full_90_moba"][0]
    throughout = plain_arm(runs, back, back["spec"]["switch"]["attention"])
    if throughout is None:
        raise ValueError(f"no run of seed 0 has {back['spec']['switch']['attention']} throughout")
    answers = [answer_loss(run) for run in (back, throughout)]
    parts = (gap("hybrid_90_full"), gap("moba_512_3_last2_full"))
    best, worst = (f"{x:.3f}" for x in (min(parts), max(parts)))
    apart = [float(np.mean(pair.difference(pair.short, pair.same))) for pair in twins(runs) if pair.same > pair.short]
    return {
        "rounding": f"{max(map(abs, apart)):.3f} nats",
        "gap_512": f"{gap('moba_512_3'):.2f} nats",
        "gap_of_full_parts": f"{best} to {worst} nats",
        "keys_last2": keys("moba_512_3_last2_full"),
        "keys_2048": keys("moba_2048_3"),
        "gap_2048": f"{gap('moba_2048_3'):.3f} nats",
        "tail_2048": f"{gap('moba_2048_3', 'trailing_2k'):.2f} nats",
        "tail_last2": f"{gap('moba_512_3_last2_full', 'trailing_2k'):.2f} nats",
        "down_to_full": _steps_at_switch(runs, "hybrid_90_full"),
        "up_to_moba": _steps_at_switch(runs, "full_90_moba"),
        "back_to_moba": f"{abs(back['eval_loss'] - throughout['eval_loss']):.3f} nats",
        "over_ranks": f"{abs(_over_ranks(found)):.4f} nats",
        "answers_back": " against ".join(f"{x:.1f}" for x in answers if x is not None) + " nats",
    }


def _over_ranks(found: dict[str, dict[int, Run]]) -> float:
    """Held-out loss of seed 0 over two ranks, minus that on one."""
    two, one = (found[arm][0]["eval_loss"] for arm in ("moba_512_3_cp2", "moba_512_3"))
    return float(two - one)


def _steps_at_switch(runs: list[Run], arm: str) -> str:
    """How far the training loss of three steps from the switch on is from that of the arm that did not switch, all seeds."""
    sizes: list[float] = []
    for run in (r for r in runs if r["arm"] == arm):
        other = plain_arm(runs, run, run["spec"]["attention"])
        if other is None:
            raise ValueError(f"no run of seed {run['seed']} has {run['spec']['attention']} throughout")
        at = switch_step(run)
        sizes += np.abs(loss_apart(run, other, at, at + 3)).tolist()
    return f"{min(sizes):.2f} to {max(sizes):.2f} nats"
