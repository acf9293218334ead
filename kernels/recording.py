"""Records what a pass does on its device, to do the same for other tensors at less cost for the host.

What the host decides on the way to a launch takes longer than many kernels run on short sequences. A `Recorder` notes the
operators of torch, the launches and the marks for profilers, in order, with the tensors that each reads and makes. A `Recording`
does these again and decides nothing: it fits calls for which every decision would be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode, _push_mode
from torch.utils.weak import WeakIdKeyDictionary

Tensors = list[Any]
"""Tensors of a pass by number, its inputs first; None where one is not made yet, or no longer needed."""
MOST_STEPS = 64
"""Most steps of a recording; a pass of attention has about 40 at most. Longer passes take the device longer than the host."""
_ALLOCATES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}
_FASTER = {torch.ops.aten.zeros.default: torch.zeros, torch.ops.aten.cumsum.default: torch.cumsum}
"""Functions that take the arguments of an operator, in a third of the time of a call by the operator itself."""
_NOT_THE_SAME_AGAIN = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}


def recorder() -> Recorder | None:
    """The recorder that notes launches and calls of this thread now."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recorder) and mode.is_noting else None


class _Step(NamedTuple):
    """One thing that a pass did: `run` does it again. `what` is equal in steps that do the same; `uses` and `makes` number the
    tensors."""

    run: Callable[[Tensors], object]
    what: tuple[Any, ...]
    uses: tuple[int, ...] = ()
    makes: tuple[int, ...] = ()


class Recorder(TorchDispatchMode):
    """Notes what is done while it is active, as a context manager; nothing in it may need a gradient.

    It keeps no tensor alive but those that it takes to be fixed, so a recorded pass has the memory of any other.

    Args:
        inputs: tensors that differ from call to call, each another object. A tensor that is read, but neither given nor made, is
            taken to be the same one in every call.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._numbers = WeakIdKeyDictionary({x: number for number, x in enumerate(inputs)})
        self._count = self._inputs = len(inputs)  # of numbers
        self._fixed: dict[int, Tensor] = {}
        self._steps: list[_Step] = []
        self._launching = False
        self._can_repeat = len(self._numbers) == len(inputs)

    @property
    def is_noting(self) -> bool:
        """False inside a launch, and once the pass cannot be recorded."""
        return self._can_repeat and not self._launching

    def __enter__(self) -> Recorder:
        # Not by super(): it sets flags of the process, which recorders in two threads would leave set, and while these are set
        # some versions of torch compile nothing.
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        _pop_mode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.is_noting:
            self._operator(func, args, kwargs, result)
        return result

    def launch(self, launch: Callable[..., object], what: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
        """Call `launch(*tensors)`, which launches a kernel: what else it does is not noted.

        Args:
            launch: does the same for other tensors.
            what: equal in launches that differ in their tensors only.
            tensors: of this call.
        """
        uses = tuple(self._number(x) for x in tensors)
        self._launching = True
        try:
            launch(*tensors)
        finally:
            self._launching = False

        def run(all_: Tensors) -> None:
            launch(*[all_[number] for number in uses])

        self._note(_Step(run, what, uses))

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call `function`, which reads and makes no tensors."""
        function(*arguments)
        self._note(_Step(lambda _: function(*arguments), (function, *arguments)))

    def recording(self, results: Sequence[Tensor]) -> Recording | None:
        """What makes `results`; None where that cannot be done again, or is not worth its memory."""
        numbers = [self._number(x) for x in results]
        if not self._can_repeat:
            return None
        return Recording(self._steps, self._inputs, self._count, self._fixed, numbers)

    def _note(self, step: _Step) -> None:
        self._steps.append(step)
        if len(self._steps) > MOST_STEPS:
            self._give_up()

    def _give_up(self) -> None:
        """Note nothing more, and hold nothing."""
        self._can_repeat = False
        self._steps.clear()
        self._fixed.clear()

    def _number(self, x: Tensor) -> int:
        """The number of a tensor that is read."""
        if x not in self._numbers:
            self._fixed[self._new_number(x)] = x
            if self._shares_memory(x):
                self._give_up()
        return self._numbers[x]

    def _new_number(self, x: Tensor) -> int:
        """The number of a tensor that was made. An operator may return its argument."""
        if x not in self._numbers:
            self._numbers[x] = self._count
            self._count += 1
        return self._numbers[x]

    def _shares_memory(self, x: Tensor) -> bool:
        """Whether `x` is in the memory of a tensor that is given or made: then it differs from call to call."""
        address = x.untyped_storage().data_ptr()
        others = (y for y, number in self._numbers.items() if number not in self._fixed)
        return address != 0 and any(y.untyped_storage().data_ptr() == address for y in others)

    def _operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func is torch.ops.aten.detach.default:  # the same numbers; functions that allocate end with it
            self._numbers[result] = self._number(args[0])
        elif func in _ALLOCATES:
            self._allocate(result)
        elif _can_repeat(func, args, kwargs, result):
            self._call(func, args, kwargs, result)
        else:
            self._give_up()

    def _allocate(self, x: Tensor) -> None:
        shape, stride = tuple(x.shape), x.stride()
        number = self._new_number(x)
        allocate = partial(torch.empty_strided, shape, stride, dtype=x.dtype, device=x.device)

        def run(all_: Tensors) -> None:
            all_[number] = allocate()

        self._note(_Step(run, ("allocate", shape, stride, x.dtype, x.device), (), (number,)))

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        uses = [(at, self._number(x)) for at, x in enumerate(args) if isinstance(x, Tensor)]
        if func.is_view and all(number in self._fixed for _, number in uses):
            self._number(result)  # a view of what is fixed
            return
        number = self._new_number(result)
        repeat = partial(_FASTER.get(func, func), **kwargs)
        values = [None if isinstance(x, Tensor) else x for x in args]

        def run(all_: Tensors) -> None:
            arguments = values.copy()
            for at, used in uses:
                arguments[at] = all_[used]
            all_[number] = repeat(*arguments)

        what = (func, *values, *kwargs.items())
        self._note(_Step(run, what, tuple(used for _, used in uses), (number,)))


def _can_repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> bool:
    """Whether an operator does the same again, and all its tensors are known: one result, and no lists of tensors."""
    nested = (y for x in args if isinstance(x, (tuple, list)) for y in x)
    return (
        isinstance(result, Tensor)
        and not any(isinstance(x, Tensor) for x in (*kwargs.values(), *nested))
        and not _NOT_THE_SAME_AGAIN & set(func.tags)
    )


class Recording:
    """What a `Recorder` noted.

    Args:
        steps: in order.
        inputs: how many tensors are given to each call; they have the first numbers.
        numbers: how many tensors there are.
        fixed: those that are neither given nor made, by number.
        results: numbers of the tensors that a call gives. Others are freed after their last use.
    """

    def __init__(
        self, steps: Sequence[_Step], inputs: int, numbers: int, fixed: dict[int, Tensor], results: Sequence[int]
    ) -> None:
        self._inputs, self._results = inputs, tuple(results)
        self._base: Tensors = [fixed.get(number) for number in range(numbers)]
        self._did = [step[1:] for step in steps]
        last = {number: at for at, step in enumerate(steps) for number in (*step.uses, *step.makes)}
        kept = {*results, *fixed, *range(inputs)}
        free: list[list[int]] = [[] for _ in steps]
        for number, at in last.items():
            if number not in kept:
                free[at].append(number)
        self._steps = [(step.run, tuple(done)) for step, done in zip(steps, free, strict=True)]
        self._calls = {step.run for step in steps if not step.uses and not step.makes}

    def agrees(self, other: Recording) -> bool:
        """Whether both did the same, with the same fixed tensors. While this one exists, no other tensor has the memory of what
        it holds to be fixed; so a tensor that was made unnoticed does not agree with the next one in its place."""
        return (
            (self._inputs, self._results, self._did) == (other._inputs, other._results, other._did)
            and [_where(x) for x in self._base] == [_where(x) for x in other._base]
        )  # fmt: skip

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The results for other inputs."""
        tensors = self._base.copy()
        tensors[: self._inputs] = inputs
        steps = iter(self._steps)
        try:
            for run, free in steps:
                run(tensors)
                for number in free:
                    tensors[number] = None
        except BaseException:
            for run, _ in steps:
                if run in self._calls:  # ranges for profilers close
                    run(tensors)
            raise
        return [tensors[number] for number in self._results]


def _where(x: Tensor | None) -> tuple[Any, ...] | None:
    return None if x is None else (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device)
