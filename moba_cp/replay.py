"""Passes of plain calls on one rank: run step by step three times, recorded in two of these, and replayed from then on.

Such a pass does the same for all tensors of equal shapes, strides and alignment; only their addresses differ. What the pipeline
decides on the way takes the host longer than short sequences take the device, so it is not decided again. The first run also
makes what is kept with the plan, and is not recorded. The next two are, and must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels.recording import MOST_STEPS, Recorder, Recording
from .saving import taken

MOST_KINDS = 4
"""Most kinds of inputs of a pass that are recorded; others run step by step."""
_STEP_BYTES = 1 << 10
"""Host memory of one step, about: measured 24 KiB for the 36 steps of both passes."""


class Replay:
    """One pass of one call.

    Inputs are of one kind if dtypes, devices, shapes, strides and addresses modulo 16 bytes are equal. An operator's selected
    blocks are int32, so its backward is of another kind than that of an eager call.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple, _Kind] = {}

    @property
    def nbytes(self) -> int:
        """Most bytes of host memory that recordings take."""
        return MOST_KINDS * MOST_STEPS * _STEP_BYTES

    def run(self, inputs: Sequence[Tensor], make: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """What `make()` returns, without its tensors, and these; see `saving.taken`.

        Args:
            inputs: all tensors that `make` reads and that differ from call to call.
            make: the pass; allocates, calls operators and launches kernels, on the current stream only. Returns dataclasses and
                tuples of tensors.
        """
        if torch._C._len_torch_dispatch_stack():  # a mode of the caller sees the same operators in each call
            return taken(make())
        which = tuple([(x.dtype, x.device, x.shape, x.stride(), x.data_ptr() % 16) for x in inputs])
        kind = self._kinds.get(which)
        if kind is None:
            if len(self._kinds) < MOST_KINDS:
                self._kinds[which] = _Kind()
            return taken(make())
        if kind.agreed is not None:
            result, recording = kind.agreed
            return result, recording.run(inputs)
        return kind.record(inputs, make) if kind.tries > 0 else taken(make())


class _Kind:
    """What is known of the pass for one kind of inputs.

    Attributes:
        tries: how often it is still recorded, unless two recordings agree before.
        agreed: the result without its tensors, and a recording that agreed with the one before it.
    """

    def __init__(self) -> None:
        self.tries = 3
        self.agreed: tuple[Any, Recording] | None = None
        self._before: Recording | None = None

    def record(self, inputs: Sequence[Tensor], make: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
        """Run the pass step by step, and record it."""
        self.tries -= 1
        with Recorder(inputs) as recorder:
            made = make()
        result, tensors = taken(made)
        recording, before = recorder.recording(tensors), self._before  # another thread may change it
        if recording is None:
            self.tries = 0
        elif before is not None and before.agrees(recording):
            self.agreed = result, recording
        self._before = recording if self.tries > 0 and self.agreed is None else None
        return result, tensors


class Replays:
    """Both passes of a call."""

    def __init__(self) -> None:
        self.forward, self.backward = Replay(), Replay()

    @property
    def nbytes(self) -> int:
        """Most bytes that recordings take."""
        return self.forward.nbytes + self.backward.nbytes
