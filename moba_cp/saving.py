"""Takes tensors out of plain objects and puts them back, so that they go through autograd's `save_for_backward`.

Checkpointing does not free a tensor that is kept on `ctx` in any other way, and `saved_tensors_hooks` do not move it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
_PLAIN = frozenset({int, float, bool, str, type(None)})
"""Types of most values that hold no tensors: they are skipped at no cost."""


@dataclasses.dataclass(frozen=True)
class _Taken:
    """Placeholder of a tensor."""

    index: int


def take_tensors(x: Any, tensors: list[Tensor]) -> Any:
    """`x` (a tensor, or dataclasses and tuples that hold some) without its tensors, which are appended to `tensors`.

    Dataclasses that hold tensors are copied; `x` itself stays as it is.
    """
    if isinstance(x, Tensor):
        tensors.append(x)
        return _Taken(len(tensors) - 1)
    return _mapped(x, lambda value: take_tensors(value, tensors))


def put_tensors(x: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `take_tensors`."""
    if isinstance(x, _Taken):
        return tensors[x.index]
    return _mapped(x, lambda value: put_tensors(value, tensors))


def _mapped(x: Any, change: Callable[[Any], Any]) -> Any:
    """`x` with `change` applied to what it holds; `x` itself where nothing changes."""
    if isinstance(x, tuple):
        values = tuple([value if type(value) in _PLAIN else change(value) for value in x])
        return values if any(new is not old for new, old in zip(values, x, strict=True)) else x
    changed: dict[str, Any] = {}
    for name in _field_names(x.__class__):
        old = getattr(x, name)
        if type(old) not in _PLAIN and (new := change(old)) is not old:
            changed[name] = new
    if not changed:
        return x
    copied = object.__new__(x.__class__)
    copied.__dict__.update(x.__dict__, **changed)
    return copied


@lru_cache(maxsize=64)
def _field_names(kind: type) -> tuple[str, ...]:
    """Fields of a dataclass; none for other classes."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
