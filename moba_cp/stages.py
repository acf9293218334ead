"""Names for the steps of a call in profiles, and their times when asked for. Does nothing for CPU tensors."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar

import torch

from .kernels.recording import recorder

T = TypeVar("T")


class StageTimer:
    """GPU time of each stage of the calls made inside `time_stages`, forward and backward."""

    def __init__(self) -> None:
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def milliseconds(self) -> dict[str, float]:
        """Time on the caller's stream by stage, summed; waits for the GPU."""
        torch.cuda.synchronize()
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self._events:
            total[name] += start.elapsed_time(end)
        return dict(total)

    def add(self, name: str, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._events.append((name, start, end))


_active: ContextVar[StageTimer | None] = ContextVar("moba_cp_stage_timer", default=None)


@contextlib.contextmanager
def time_stages() -> Iterator[StageTimer]:
    """Time the stages of every CUDA call begun inside, and of its backward pass.

    Example:
        >>> with time_stages() as timer:
        ...     moba_attention(q, k, v, config, layout=layout).sum().backward()
        >>> timer.milliseconds()
        {'gate': 1.5, 'lists': 0.6, ...}
    """
    timer = StageTimer()
    token = _active.set(timer)
    try:
        yield timer
    finally:
        _active.reset(token)


def is_timed() -> bool:
    """Whether `time_stages` is active here."""
    return _active.get() is not None


class _Range:
    """An NVTX range. Not a generator, and made once per name: a call enters about fifteen of these, and their time counts for
    short sequences."""

    def __init__(self, name: str) -> None:
        self._label = f"moba_cp {name}"

    def __enter__(self) -> None:
        _noted(torch.cuda.nvtx.range_push, self._label)

    def __exit__(self, *_: object) -> None:
        _noted(torch.cuda.nvtx.range_pop)


def _noted(function: Callable[..., object], *arguments: str) -> None:
    """Call `function`; a recording calls it too."""
    recording = recorder()
    if recording is None:
        function(*arguments)
    else:
        recording.call(function, *arguments)


_range = lru_cache(maxsize=64)(_Range)
"""The range of a name; it holds nothing of a call, so calls may share it and be inside it at once."""


@contextlib.contextmanager
def _timed(name: str, timer: StageTimer) -> Iterator[None]:
    """An NVTX range with its time on the caller's stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with _range(name):
        start.record()
        try:
            yield
        finally:
            end.record()
            timer.add(name, start, end)


_NOTHING = contextlib.nullcontext()


class Stages:
    """One call's stages: NVTX ranges on CUDA, and times where `time_stages` was active when the call began."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._timer = _active.get() if self._cuda else None

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """The stage `name`, as an NVTX range `moba_cp <name>`."""
        if not self._cuda:
            return _NOTHING
        return _range(name) if self._timer is None else _timed(name, self._timer)

    def taking(self, items: Iterable[T], name: str) -> Iterator[T]:
        """`items`, with the time to take each one as the stage `name`: what communication does not hide."""
        iterator = iter(items)
        while True:
            with self(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
