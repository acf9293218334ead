"""What a run tells its user: a progress bar, one JSON line per step, and TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
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
        devices: GPUs (or, on CPU, processes) of the run.
        peak: FLOP/s that one device can reach, if known.

    Raises:
        OSError: the folder or a file in it cannot be written; also raised by what records metrics.
    """

    def __init__(
        self,
        directory: Path,
        active: bool,
        total_steps: int,
        first_step: int,
        tokens_per_step: int,
        devices: int = 1,
        peak: float | None = None,
    ) -> None:
        self.active, self.tokens_per_step, self.devices, self.peak = active, tokens_per_step, devices, peak
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
        self.task = self.bar.add_task("train", total=max(total_steps, first_step), completed=first_step, status="")
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
            with suppress(OSError) if error else nullcontext():  # a full disk must not hide what ended the run
                self.file.close()
                self.writer.close()

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.active:
            self.console.print(message, highlight=False, markup=False)

    def model(self, parameters: int) -> None:
        """Record the size of the model, once for each start of the run (kind ``model``)."""
        if self.active:
            self._write("model", 0, {"parameters": parameters})
            self.say(f"{parameters:,} parameters")

    def moba(self, settings: dict[str, Any]) -> None:
        """Record what attention computes, once for each start of the run (kind ``moba``; in TensorBoard a text)."""
        if self.active:
            self.file.write(json.dumps({"kind": "moba", "step": 0} | settings) + "\n")
            self.file.flush()
            line = ", ".join(f"{name}={value}" for name, value in settings.items())
            self.writer.add_text("moba", line, 0)
            self.say(f"MoBA: {line}")

    def step(self, step: int, flops: float = 0.0, peak_memory: int | None = None, **metrics: float) -> None:
        """Record the metrics of a training step, among them ``loss``; adds tokens per second since the last call.

        ``flops``: what all devices computed since the last call; adds TFLOP/s of a device and, if its peak is known,
        the share of it (``mfu``).
        ``peak_memory``: bytes, recorded in GiB (``peak_memory_gib``).
        """
        if not self.active:
            return
        now = time.perf_counter()
        seconds = now - self.last_time
        speed = self.tokens_per_step * (step - self.last_step) / seconds
        self.last_time, self.last_step = now, step
        metrics["tokens_per_second"] = speed
        status = f"loss {metrics['loss']:.4f}  {speed:,.0f} tokens/s"
        if flops:
            per_device = flops / seconds / self.devices
            metrics["tflops_per_device"] = per_device / 1e12
            status += f"  {per_device / 1e12:.3g} TFLOP/s per device"
            if self.peak:
                metrics["mfu"] = per_device / self.peak
                status += f"  MFU {metrics['mfu']:.1%}"
        if peak_memory is not None:
            metrics["peak_memory_gib"] = peak_memory / 2**30
        self._write("train", step, metrics)
        self.bar.update(self.task, completed=step, status=status)
        if not self.console.is_terminal:
            self.console.print(f"step {step}  {status}", highlight=False, markup=False)

    def evaluation(self, step: int, loss: float) -> None:
        """Record the evaluation loss after a step."""
        if self.active:
            self._write("eval", step, {"loss": loss})
            self.say(f"step {step}  evaluation loss {loss:.4f}")

    def routing(self, step: int, statistics: dict[int, dict[str, float]]) -> None:
        """Record routing statistics by layer number, under ``routing/layer_<number>/<name>`` in TensorBoard."""
        if self.active:
            for number, values in sorted(statistics.items()):
                self._write("routing", step, values, layer=number)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside the ``with`` block does not count as training time."""
        begin = time.perf_counter()
        yield
        if self.active:
            self.last_time += time.perf_counter() - begin

    def _write(self, kind: str, step: int, metrics: dict[str, Any], layer: int | None = None) -> None:
        where = {} if layer is None else {"layer": layer}
        self.file.write(json.dumps({"kind": kind, "step": step} | where | metrics) + "\n")
        self.file.flush()
        prefix = kind if layer is None else f"{kind}/layer_{layer}"
        for name, value in metrics.items():
            self.writer.add_scalar(f"{prefix}/{name}", value, step)


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines up to a step, none at step 0. What is no line of metrics goes, too, as one that a killed run did not
    finish."""
    if path.exists():
        lines = path.read_text(errors="replace").splitlines() if step else []
        kept = [line for line in lines if _step_of(line) <= step]
        shorter = path.with_name(path.name + ".tmp")
        shorter.write_text("".join(line + "\n" for line in kept))
        os.replace(shorter, path)


def _step_of(line: str) -> float:
    """Step of a line of ``metrics.jsonl``; infinity where it is not one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
