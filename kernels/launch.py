"""Launches of Triton and Gluon kernels, with less work for the host than `kernel[grid](...)`.

Triton's own launch classifies every argument, formats the options and checks the globals of the kernel's module, each time. On
short sequences that takes longer than many kernels run. `launch_kernel` leaves it to Triton once per set of types and sizes, and
remembers the compiled kernel that Triton chose.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime import JITFunction, driver

MOST_KEPT = 4096
"""Most launches that are remembered. Sizes that differ from step to step fill the table; then it is emptied."""
_kept: dict[tuple, tuple[Any, tuple]] = {}
"""By kernel, device, constants and kinds of arguments: the compiled kernel, and the constants that end its arguments."""


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the current stream; a compiled kernel is found at less cost.

    Two launches run the same compiled kernel if their integers, their constants and the dtypes of their tensors are equal and all
    tensors start at multiples of 16 bytes. Launches with other tensors are left to Triton.

    Args:
        kernel: what `triton.jit` or `gluon.jit` made.
        grid: programs per dimension; one to three dimensions.
        arguments: tensors on the current device, numbers and tensor descriptors: the kernel's first parameters, in order.
        constants: its other parameters, all of them `constexpr`, and Triton's options (`num_warps`, `maxnreg`), in the same order
            in each launch of the kernel.
    """
    if not isinstance(kernel, JITFunction):  # Triton's interpreter compiles nothing
        kernel[grid](*arguments, **constants)
        return
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
        return
    device = driver.active.get_current_device()
    key = (id(kernel), device, *constants.values(), *kinds)
    if key in _kept:
        compiled, last = _kept[key]
        x, y, z = (*grid, 1, 1)[:3]
        compiled[x, y, z](*values, *last, stream=driver.active.get_current_stream(device))
        return
    compiled = kernel[grid](*arguments, **constants)
    if compiled is None:  # a hook of Triton's took over
        return
    if len(_kept) >= MOST_KEPT:
        _kept.clear()
    _kept[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


class BoundLaunch:
    """Launches of one kernel that differ in the addresses of their tensors alone: `launch_kernel` with its numbers bound.

    Args:
        kernel, grid: as for `launch_kernel`.
        numbers: ints and floats that follow the tensors among the kernel's parameters.
        constants: as for `launch_kernel`.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[float, ...], constants: dict[str, Any]
    ) -> None:
        self._kernel, self._grid, self._numbers, self._constants = kernel, grid, numbers, constants
        self._device: int | None = None
        self._run: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *tensors: Tensor) -> None:
        """Launch on the current stream. The tensors have the same dtypes each time, and are on the current device."""
        addresses = [x.data_ptr() for x in tensors]
        together = 0
        for address in addresses:
            together |= address
        if self._run is None or together % 16:
            self._launch(tensors)
            return
        device = driver.active.get_current_device()
        if device != self._device:
            self._launch(tensors)
            return
        self._run(*addresses, *self._rest, stream=driver.active.get_current_stream(device))

    def _launch(self, tensors: tuple[Tensor, ...]) -> None:
        """As any launch; where that has kept the compiled kernel, the next call takes it."""
        arguments = (*tensors, *self._numbers)
        launch_kernel(self._kernel, self._grid, *arguments, **self._constants)
        if not isinstance(self._kernel, JITFunction):
            return
        device = driver.active.get_current_device()
        kinds = [x.dtype if isinstance(x, Tensor) else float if x.__class__ is float else x for x in arguments]
        found = _kept.get((id(self._kernel), device, *self._constants.values(), *kinds))
        if found is not None and self._run is None:
            compiled, last = found
            x, y, z = (*self._grid, 1, 1)[:3]
            self._device, self._run, self._rest = device, compiled[x, y, z], (*self._numbers, *last)
