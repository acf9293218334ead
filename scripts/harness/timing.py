"""Times of repeated calls, their stages and their peak memory. Device times come from CUDA events; on the CPU, from the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moba_cp.stages import time_stages

Mark = torch.cuda.Event | float


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated calls.

    Attributes:
        all: of each call on the device, in order.
        host: of each call on the host, in order; empty where it was not measured.
    """

    all: tuple[float, ...]
    host: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third one; the only value twice where there is one."""
        if len(self.all) == 1:
            return self.all[0], self.all[0]
        first, _, third = statistics.quantiles(self.all, n=4)
        return max(first, min(self.all)), min(third, max(self.all))  # of two values, quartiles would lie outside

    def record(self) -> dict[str, float]:
        """For JSON: `median`, `quartile_1`, `quartile_3`, `count`, and `host_ms` (a median) where it was measured."""
        first, third = self.quartiles
        values = {"median": self.median, "quartile_1": first, "quartile_3": third}
        found: dict[str, float] = {name: round(value, 4) for name, value in values.items()} | {"count": len(self.all)}
        return found | ({"host_ms": round(statistics.median(self.host), 4)} if self.host else {})


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], Any],
    device: torch.device,
    *,
    iterations: int = 20,
    seconds: float = 6.0,
    warmup: int = 2,
    ahead: bool = False,
) -> Times:
    """Time `call` back to back on one device, so that launch overhead shows where it is not hidden.

    Args:
        iterations: calls to time, at least 1; fewer where `seconds` end before.
        seconds: budget, by the duration of the call after the warm-up.
        warmup: calls before that, which compile and fill caches.
        ahead: hold the GPU back at the start, so that the host runs ahead and launch overhead does not show.
    """
    for _ in range(warmup):
        call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    count = max(1, min(iterations, int(seconds / max(1e-9, time.perf_counter() - began))))
    if ahead and device.type == "cuda":
        torch.cuda._sleep(3_000_000)  # cycles: about 2 ms
    marks, host = [], []
    for _ in range(count):
        began = time.perf_counter()
        start = mark(device)
        call()
        marks.append((start, mark(device)))
        host.append(1e3 * (time.perf_counter() - began))
    synchronize(device)
    return Times(tuple(elapsed(start, end) for start, end in marks), tuple(host))


def from_common_start(call: Callable[[], Any] | None, device: torch.device) -> float:
    """Milliseconds of one call on the slowest rank of the default group, all of which start together.

    Args:
        call: None where this rank only keeps time with the others.
    """
    dist.barrier()
    synchronize(device)
    start = mark(device)
    if call is not None:
        call()
    end = mark(device)
    synchronize(device)
    return over_all(elapsed(start, end), device)


def over_all(number: float, device: torch.device) -> float:
    """The largest of all ranks' numbers."""
    x = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.item()


def stage_milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> dict[str, float]:
    """GPU milliseconds of a call by stage (`moba_cp.stages`), medians; empty on the CPU, where stages have no events."""
    if device.type != "cuda":
        return {}
    runs = []
    for _ in range(repeats):
        with time_stages() as timer:
            call()
        runs.append(timer.milliseconds())
    return {name: round(statistics.median(run[name] for run in runs), 4) for name in runs[0]}


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak of torch's GPU memory during one call, with inputs and all that the call leaves behind; 0 on the CPU."""
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    left = call()
    torch.cuda.synchronize(device)
    del left
    return torch.cuda.max_memory_allocated(device)


def mark(device: torch.device) -> Mark:
    """A point in the device's time; on the CPU, the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Mark, end: Mark) -> float:
    """Milliseconds between two marks; the device must have reached both."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return 1e3 * (end - start)
    return start.elapsed_time(end)
