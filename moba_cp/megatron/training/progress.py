"""What a run tells its user: a progress bar, one JSON line per step, and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class Reporter:
    """Shows and records metrics; on ranks other than the reporting one it does nothing.

    ``metrics.jsonl`` in the run's folder holds every number in full precision, one line per logged step or evaluation.

    Args:
        directory: folder of the run.
        active: whether this rank reports.
        total_steps: steps of the whole run.
        first_step: steps already done, for a resumed run; later lines of an earlier attempt are dropped.
        tokens_per_step: tokens of a global batch.
    """

    def __init__(self, directory: Path, active: bool, total_steps: int, first_step: int, tokens_per_step: int) -> None:
        self.active, self.tokens_per_step = active, tokens_per_step
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        path = directory / "metrics.jsonl"
        _drop_lines_after(path, first_step)
        self.file = path.open("a")
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self.bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.bar.add_task("train", total=total_steps, completed=first_step, status="")
        self.last_time, self.last_step = time.perf_counter(), first_step

    def __enter__(self) -> Reporter:
        if self.active:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self.bar.stop()
            self.file.close()
            self.writer.close()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.console.print(message, highlight=False)

    def step(self, step: int, **metrics: float) -> None:
        """Record the metrics of a training step, among them ``loss``; adds tokens per second since the last call."""
        if not self.active:
            return
        now = time.perf_counter()
        speed = self.tokens_per_step * (step - self.last_step) / (now - self.last_time)
        self.last_time, self.last_step = now, step
        self._write("train", step, metrics | {"tokens_per_second": speed})
        status = f"loss {metrics['loss']:.4f}  {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, status=status)
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {status}", highlight=False)

    def evaluation(self, step: int, loss: float) -> None:
        """Record the evaluation loss after a step; the time it took does not count as training time."""
        if self.active:
            self._write("eval", step, {"loss": loss})
            self.say(f"step {step}  evaluation loss {loss:.4f}")
            self.last_time = time.perf_counter()

    def _write(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps({"kind": kind, "step": step} | metrics) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)


def read_metrics(directory: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl`` of one kind (``train`` or ``eval``), in the order written."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def _drop_lines_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in kept))
