"""Takes tensors out of plain objects and puts them back, so that they go through autograd's `save_for_backward`.

Checkpointing does not free a tensor that is kept on `ctx` in any other way, and `saved_tensors_hooks` do not move it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Placeholder of a tensor."""

    index: int


def take_tensors(x: Any, tensors: list[Tensor]) -> Any:
    """A copy of `x` (a tensor, or dataclasses and tuples that hold some) without its tensors, which are appended to `tensors`."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _Taken(len(tensors) - 1)
    return _mapped(x, lambda value: take_tensors(value, tensors))


def put_tensors(x: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `take_tensors`."""
    if isinstance(x, _Taken):
        return tensors[x.index]
    return _mapped(x, lambda value: put_tensors(value, tensors))


def _mapped(x: Any, change: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(change(value) for value in x)
    if dataclasses.is_dataclass(x):
        copied = copy.copy(x)
        for field in dataclasses.fields(x):
            object.__setattr__(copied, field.name, change(getattr(x, field.name)))
        return copied
    return x
