"""Gluon kernels on the CPU, one program after another and one operation at a time: Gluon has no interpreter.

Tensors are torch's, pointers are `Pointer`s, and layouts mean nothing. All threads do an operation before any does the next, so
missing barriers do not show. Only what tests need is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton.language import constexpr


@dataclass
class Pointer:
    """A pointer to elements of a tensor."""

    memory: Tensor
    index: Tensor | int = 0

    def __add__(self, offset: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.index + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)


@dataclass
class Words:
    """A buffer in shared memory: int32 words, a view of a tensor."""

    memory: Tensor

    def load(self, layout: object) -> Tensor:
        return self.memory.clone()

    def store(self, x: Tensor) -> None:
        self.memory.copy_(x)

    def index(self, at: int) -> Words:
        return Words(self.memory[at])

    def slice(self, first: int, length: int) -> Words:
        return Words(self.memory[first : first + length])

    def _reinterpret(self, dtype: object, shape: list[int], layout: object) -> Words:
        return Words(self.memory.view(shape))

    def _keep_alive(self) -> None:
        pass


def run_on_host(kernel: Any, module: ModuleType, grid: tuple[int, ...], arguments: tuple, constants: dict) -> None:
    """Run all programs of a kernel of `module`; each begins with other numbers in shared memory than zeros."""
    pointers = [Pointer(x.as_strided((_extent(x),), (1,))) if isinstance(x, Tensor) else x for x in arguments]
    for y in range(grid[1]):
        for x in range(grid[0]):
            on_host(kernel, module, (x, y), grid)(*pointers, **constants)


def on_host(jitted: Any, module: ModuleType, program: tuple[int, ...] = (0, 0), grid: tuple[int, ...] = (1, 1)) -> Any:
    """A jitted function of `module` as a Python function, in program `program` of `grid`."""
    language = _Language(program, grid)
    ours = language.shared_words() | {"gl": language, "line_layout": _no_layout, "warp_layout": _no_layout}
    names = vars(module) | ours
    for name, value in vars(module).items():
        if name in ours:
            continue
        if hasattr(value, "fn"):
            names[name] = FunctionType(value.fn.__code__, names)
        elif isinstance(value, constexpr):
            names[name] = value.value
    return FunctionType(jitted.fn.__code__, names)


def _no_layout(*arguments: Any) -> None:
    """In place of a function that makes a layout."""


def _extent(x: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))


class _Language:
    """What `gl` is in a program."""

    int32, int64, minimum, where = torch.int32, torch.int64, staticmethod(min), staticmethod(torch.where)

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self._program, self._grid = program, grid
        self._words = torch.empty(0)

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self._program[axis], dtype=torch.int32)

    def num_programs(self, axis: int) -> int:
        return self._grid[axis]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: object) -> Words:
        self._words = torch.full(shape, 0x55AA55AA, dtype=dtype)
        return Words(self._words)

    arange = staticmethod(lambda first, end, layout: torch.arange(first, end, dtype=torch.int32))
    zeros = staticmethod(lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype))
    full_like = staticmethod(torch.full_like)
    static_range = staticmethod(range)
    static_assert = staticmethod(lambda condition: None)
    min = staticmethod(torch.amin)
    sum = staticmethod(lambda x, axis: x.sum(axis, dtype=torch.int32))
    associative_scan = staticmethod(lambda x, axis, combine: x.cumsum(axis, dtype=torch.int32))
    BlockedLayout = SliceLayout = staticmethod(_no_layout)

    @staticmethod
    def load(pointer: Pointer, mask: Tensor, other: int) -> Tensor:
        mask, index = torch.broadcast_tensors(mask, pointer.index)
        assert (index[mask] >= 0).all()
        found = torch.full(index.shape, other, dtype=pointer.memory.dtype)
        found[mask] = pointer.memory[index[mask].long()]
        return found

    @staticmethod
    def store(pointer: Pointer, value: Tensor | int, mask: Tensor | None = None) -> None:
        if mask is None:
            pointer.memory[pointer.index] = value
        else:
            assert (pointer.index[mask] >= 0).all()
            pointer.memory[pointer.index[mask].long()] = value[mask]

    def shared_words(self) -> dict[str, Any]:
        """The functions of `shared_words.py`, and a barrier, on the words of this program."""

        def change(combine: Any) -> Any:
            def changed(word: Tensor, value: Tensor, mask: Tensor) -> None:
                assert (word[mask] >= 0).all(), "torch and numpy would count from the end"
                combine(self._words.view(-1).numpy(), word[mask].numpy(), value[mask].numpy())

            return changed

        def load_words(word: Tensor, mask: Tensor) -> Tensor:
            assert (word[mask] >= 0).all()
            found = torch.zeros_like(word)
            found[mask] = self._words.view(-1)[word[mask].long()]
            return found

        def put(memory: np.ndarray, at: np.ndarray, value: np.ndarray) -> None:
            memory[at] = value
            assert (memory[at] == value).all(), "threads store different values into one word"

        def count_bits(x: Tensor) -> Tensor:
            return sum(((x >> bit) & 1 for bit in range(32)), torch.zeros_like(x))

        return {
            "load_words": load_words, "store_words": change(put), "add_to_words": change(np.add.at),
            "set_bits": change(np.bitwise_or.at), "count_bits": count_bits, "barrier": lambda: None,
        }  # fmt: skip
