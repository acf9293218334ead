"""Launches of Triton and Gluon kernels, with less work for the host than `kernel[grid](...)`.

Triton's own launch classifies every argument, formats the options and checks the globals of the kernel's module, each time. On
short sequences that takes longer than many kernels run. `launch_kernel` leaves it to Triton once per set of types and sizes, and
remembers the compiled kernel that Triton chose.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.runtime import JITFunction, driver

from .recording import recorder

MOST_KEPT = 4096
"""Most launches that are remembered. Sizes that differ from step to step fill the table; then it is emptied."""
_kept: dict[tuple, tuple[Any, tuple]] = {}
"""By kernel, device, constants and kinds of arguments: the compiled kernel, and the constants that end its arguments."""
TENSOR = object()
"""Stands for a tensor among the arguments of a `BoundLaunch`."""


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> tuple[Any, tuple] | None:
    """`kernel[grid](*arguments, **constants)` on the current stream; a compiled kernel is found at less cost.

    Two launches run the same compiled kernel if their integers, their constants and the dtypes of their tensors are equal and all
    tensors start at multiples of 16 bytes. Launches with other tensors are left to Triton.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made.
        grid: programs per dimension; one to three dimensions.
        arguments: tensors on the current device, numbers and tensor descriptors: the kernel's first parameters, in order.
        constants: its other parameters, all of them `constexpr`, and Triton's options (`num_warps`), in the same order in each
            launch of the kernel.

    Returns:
        the compiled kernel and the constants that end its arguments, where they are remembered.
    """
    recording = recorder()
    if recording is not None:
        launch = BoundLaunch(kernel, grid, arguments, constants)
        recording.launch(launch, launch.what, launch.tensors_of(arguments))
        return None
    if not isinstance(kernel, JITFunction):  # Triton's interpreter compiles nothing
        kernel[grid](*arguments, **constants)
        return None
    values, kinds, addresses = list(arguments), list(arguments), 0
    for index, x in enumerate(arguments):
        if x.__class__ is int:
            continue
        if x.__class__ is float:
            kinds[index] = float
            continue
        if isinstance(x, Tensor):
            values[index] = address = x.data_ptr()
            kinds[index] = x.dtype
        else:
            address = x.base.data_ptr()
            kinds[index] = (x.base.dtype, *x.block_shape, getattr(x, "layout", None))
        addresses |= address
    if addresses % 16:
        kernel[grid](*arguments, **constants)
        return None
    device = driver.active.get_current_device()
    key = (id(kernel), device, *constants.values(), *kinds)
    if key in _kept:
        compiled, last = _kept[key]
        x, y, z = (*grid, 1, 1)[:3]
        compiled[x, y, z](*values, *last, stream=driver.active.get_current_stream(device))
        return compiled, last
    compiled = kernel[grid](*arguments, **constants)
    if compiled is None:  # a hook of Triton's took over
        return None
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    return _kept[key]


class BoundLaunch:
    """Launches of one kernel that differ in the addresses of their tensors alone: `launch_kernel` with its numbers bound.

    Args:
        kernel, grid, arguments, constants: as for `launch_kernel`. Of a tensor, also of one in a descriptor, only its position
            among the arguments is kept; `TENSOR` may stand for one.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: dict[str, Any]) -> None:
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._arguments = [x if isinstance(x, (int, float)) else _template(x) for x in arguments]
        self._places = [at for at, x in enumerate(self._arguments) if not isinstance(x, (int, float))]
        self._tiles = [(index, at) for index, at in enumerate(self._places) if self._arguments[at] is not TENSOR]
        self.what = (kernel, grid, self._arguments, constants)
        """Equal in launches that differ in their tensors only."""
        self._device: int | None = None
        self._run: Any = None
        self._values = list(self._arguments)

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream. The tensors have the same shapes, strides and dtypes each time, and are on the current
        device."""
        values, together = self._values.copy(), 0
        for at, x in zip(self._places, tensors, strict=True):
            values[at] = address = x.data_ptr()
            together |= address
        if self._run is None or together % 16 or driver.active.get_current_device() != self._device:
            self._launch(tensors)
            return
        for index, at in self._tiles:
            values[at] = _of_tensor(self._arguments[at], tensors[index])
        self._run(*values, stream=driver.active.get_current_stream(self._device))

    def tensors_of(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The tensors among the arguments of such a launch, and in their descriptors: what a call takes."""
        found = [arguments[at] for at in self._places]
        return [x if isinstance(x, Tensor) else x.base for x in found]

    def _launch(self, tensors: Sequence[Tensor]) -> None:
        """As any launch; where that has kept the compiled kernel, the next call takes it."""
        arguments = list(self._arguments)
        for at, tensor in zip(self._places, tensors, strict=True):
            arguments[at] = tensor if arguments[at] is TENSOR else _of_tensor(arguments[at], tensor)
        found = launch_kernel(self._kernel, self._grid, *arguments, **self._constants)
        if found is not None and self._run is None:
            compiled, last = found
            x, y, z = (*self._grid, 1, 1)[:3]
            self._values = [*self._arguments, *last]
            self._device, self._run = driver.active.get_current_device(), compiled[x, y, z]


def _template(x: Any) -> Any:
    """A descriptor without its tensor; `TENSOR` for a tensor."""
    return TENSOR if x is TENSOR or isinstance(x, Tensor) else _of_tensor(x, None)


def _of_tensor(descriptor: Any, x: Tensor | None) -> Any:
    """The same tiles of another tensor."""
    other = copy.copy(descriptor)
    other.base = x
    return other
