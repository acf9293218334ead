"""SIGTERM and SIGINT ask a run to save and end; they do not interrupt a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Name of the signal that asked this process to stop; empty if none did."""

    name = ""


@contextmanager
def note_signals() -> Iterator[Stop]:
    """Within the ``with`` block, the two signals only set the ``name`` of what is returned."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.name = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
