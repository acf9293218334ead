"""What a run is told, and the files it shares with others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .attention import Phase
from .windows import lengths_of_steps


@dataclass(frozen=True)
class Task:
    """What one run needs.

    Attributes:
        name: of its files.
        arm: name of the arm; `spec` says what it is.
        seed: of weights and of the order of the data.
        config: the plan without its runs: `model`, `data`, `optimizer`, `measures`.
        corpus, work: folders.
        deadline: seconds since the epoch; an unfinished run then writes a checkpoint and stops.
    """

    name: str
    arm: str
    spec: dict[str, Any]
    seed: int
    config: dict[str, Any]
    corpus: str
    work: str
    deadline: float


def phase_at(phases: list[Phase], steps: int, step: int) -> Phase:
    return [p for p in phases if step >= round(p.start * steps)][-1]


def common_start(task: Task, found: list[Phase]) -> Path | None:
    """The checkpoint after the short windows, which all arms of a seed share; None where the attention of these phases already
    differs from full attention there, or where all windows are of one length."""
    steps = task.config["optimizer"]["steps"]
    stages = lengths_of_steps(task.config["data"], steps)
    layers = {spec for step in range(stages[-1][0]) for spec in phase_at(found, steps, step).layers}
    if len(stages) == 1 or not all(spec.is_full(stages[0][2]) for spec in layers):
        return None
    return Path(task.work) / "checkpoints" / f"short_windows_s{task.seed}.pt"


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)
