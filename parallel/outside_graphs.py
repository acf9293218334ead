"""`torch.compiler.disable` without an import of dynamo where nothing else has imported it.

Dynamo takes as long to import as torch. It also binds the default group of that moment in
`torch.distributed.nn.functional`, which keeps the group until the process ends.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """`function` as one graph break of `torch.compile`: neither it nor what it calls is traced."""
    disabled: list[Callable[P, T]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():  # which knows no graph breaks
            raise RuntimeError(
                f"{function.__name__} cannot be part of an exported graph with these arguments: they ask for what no graph "
                "holds, or are not as the function takes them (call it eagerly to see)"
            )
        if not torch.compiler.is_dynamo_compiling() and "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)  # nothing traces; and dynamo would keep today's default group for good
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


def untraced(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which torch cannot trace: eager as it is, a graph break of `torch.compile`."""
    outside = outside_graphs(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return outside(*args, **kwargs) if torch.compiler.is_dynamo_compiling() else function(*args, **kwargs)

    return call
