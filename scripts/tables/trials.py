"""Trials whose result files were not kept: tables and figures of `docs/results/trials.json`, recorded by hand."""

from __future__ import annotations

from typing import Any

from .text import Entry

BY_HAND = "recorded by hand from a run whose file was not kept"
"""Key that every trial has, and sets: none of its figures can be checked against a file."""


def trial_tables(content: dict[str, Any]) -> dict[str, str]:
    """By block name: Markdown of each trial that has rows; cells that this version uses in bold.

    Raises:
        ValueError: a trial does not say how it was recorded.
    """
    return {f"results:trial_{trial['name']}": _table(trial) for trial in _trials(content) if "rows" in trial}


def trial_figures(content: dict[str, Any]) -> dict[str, str]:
    """By `trial.figure`: the text of each figure.

    Raises:
        ValueError: a trial does not say how it was recorded.
    """
    return {
        f"{trial['name']}.{name}": text for trial in _trials(content) for name, text in trial.get("figures", {}).items()
    }


def _trials(content: dict[str, Any]) -> list[Entry]:
    trials: list[Entry] = content["trials"]
    for trial in trials:
        if not trial.get(BY_HAND):
            raise ValueError(f"trial {trial['name']!r} is not marked as {BY_HAND!r}: measure it into a file of its own")
    return trials


def _table(trial: Entry) -> str:
    used = {tuple(cell) for cell in trial.get("used", [])}
    rows = [[f"**{x}**" if (i, j) in used else x for j, x in enumerate(row)] for i, row in enumerate(trial["rows"])]
    lines = ["|" + "|".join(f" {x} " if x else " " for x in cells) + "|" for cells in [trial["columns"], *rows]]
    lines.insert(1, "|---" * len(trial["columns"]) + "|")
    by_hand = f"Recorded by hand in commit {trial['written down in commit']}."
    return "\n".join([*lines, "", f"{trial['device']}; {trial['what']}. {by_hand}"])
