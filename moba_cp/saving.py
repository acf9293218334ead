"""Takes tensors out of plain objects and puts them back, so that they go through autograd's `save_for_backward`.

Checkpointing does not free a tensor that is kept on `ctx` in any other way, and `saved_tensors_hooks` do not move it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

_PLAIN = frozenset({int, float, bool, str, type(None)})
"""Types of most values that hold no tensors: they are skipped at no cost."""


class _Taken:
    """Placeholder of a tensor."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def take_tensors(x: Any, tensors: list[Tensor]) -> Any:
    """`x` (a tensor, or dataclasses and tuples that hold some) without its tensors, which are appended to `tensors`.

    Dataclasses that hold tensors are copied; `x` itself stays as it is.
    """
    if isinstance(x, Tensor):
        tensors.append(x)
        return _Taken(len(tensors) - 1)
    return _mapped(x, take_tensors, tensors)


def taken(x: Any) -> tuple[Any, list[Tensor]]:
    """`x` without its tensors, and these."""
    tensors: list[Tensor] = []
    return take_tensors(x, tensors), tensors


def put_tensors(x: Any, tensors: Sequence[Tensor]) -> Any:
    """The inverse of `take_tensors`."""
    if x.__class__ is _Taken:
        return tensors[x.index]
    return _mapped(x, put_tensors, tensors)


def _mapped(x: Any, change: Callable[[Any, Any], Any], tensors: Sequence[Tensor]) -> Any:
    """`x` with `change` applied to what it holds; `x` itself where nothing changes. Every call of attention comes here in both
    passes, so this calls nothing for plain values."""
    if isinstance(x, tuple):
        values = [value if value.__class__ in _PLAIN else change(value, tensors) for value in x]
        return tuple(values) if any(new is not old for new, old in zip(values, x, strict=True)) else x
    copied = None
    for name in _field_names(x.__class__):
        old = getattr(x, name)
        if old.__class__ not in _PLAIN and (new := change(old, tensors)) is not old:
            if copied is None:
                copied = object.__new__(x.__class__)
                copied.__dict__.update(x.__dict__)
            copied.__dict__[name] = new
    return x if copied is None else copied


@lru_cache(maxsize=64)
def _field_names(kind: type) -> tuple[str, ...]:
    """Fields of a dataclass; none for other classes."""
    return tuple(field.name for field in dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else ()
