"""The integers that layouts are made of, read on the host. Anything else is refused by name."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np
from torch import Tensor, strided

from .partition import merge_adjacent

MOST_TOKENS = 1 << 48
"""Token numbers times ranks, and sums of such products, stay inside int64."""


def integer(name: str, value: int) -> int:
    """`value` as an int.

    Raises:
        TypeError: it is not an integer, or a bool.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    return operator.index(value)


def _refuse_bools(values: Iterable[object]) -> None:
    """Raise TypeError if a value is a bool, which would pass as an int: all types at once, since lists are long."""
    if {bool, np.bool_} & set(map(type, values)):
        raise TypeError("a bool is not an int")


def positive(name: str, value: int) -> int:
    """`value` as an int of at least 1.

    Raises:
        TypeError, ValueError: it is not such an integer.
    """
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number


def check_cp_size(cp_size: int) -> int:
    """`cp_size`, an int of at least 1.

    Raises:
        TypeError, ValueError: it is not such an int.
    """
    if isinstance(cp_size, bool) or not isinstance(cp_size, int):
        raise TypeError(f"cp_size must be an int, got {cp_size!r} ({type(cp_size).__name__})")
    if cp_size < 1:
        raise ValueError(f"cp_size must be at least 1, got {cp_size}")
    return cp_size


def host_cu_seqlens(cu_seqlens: Iterable[int] | Tensor | np.ndarray) -> np.ndarray:
    """int64 `[documents + 1]`: where documents begin and end, starting at 0.

    Raises:
        TypeError, ValueError: they are not integers on the host, do not start at 0, or decrease.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.device.type != "cpu":
            raise TypeError(f"cu_seqlens must be on the host (a list, tuple or CPU tensor), got {cu_seqlens.device}")
        if cu_seqlens.layout != strided or cu_seqlens.is_nested:
            kind = "a nested tensor" if cu_seqlens.is_nested else f"layout {cu_seqlens.layout}"
            raise TypeError(f"cu_seqlens must be an ordinary dense tensor, got {kind}")
        if cu_seqlens.is_floating_point() or cu_seqlens.is_complex():  # numpy takes not all of them
            raise TypeError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
        cu_seqlens = cu_seqlens.numpy()
    if isinstance(cu_seqlens, np.ndarray):
        if cu_seqlens.dtype.kind not in "iu":
            raise TypeError(f"cu_seqlens must be integers, got {cu_seqlens.dtype}")
        if cu_seqlens.max(initial=0) > np.iinfo(np.int64).max:
            raise ValueError(f"cu_seqlens must fit 64 bits with a sign, got {cu_seqlens.max()}")
        array = cu_seqlens.astype(np.int64)
    else:
        try:
            cu_seqlens = list(cu_seqlens)
            _refuse_bools(cu_seqlens)
            array = np.array([operator.index(x) for x in cu_seqlens], dtype=np.int64)
        except OverflowError as error:
            raise ValueError(f"cu_seqlens must fit 64 bits, got {cu_seqlens!r}") from error
        except TypeError as error:
            raise TypeError(f"cu_seqlens must be a list, tuple or CPU tensor of ints, got {cu_seqlens!r}") from error
    if array.ndim != 1 or array.size < 1:
        raise ValueError(f"cu_seqlens must be one-dimensional and not empty, got shape {array.shape}")
    if array[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got {array[0]}: it holds boundaries of documents, not lengths")
    down = np.flatnonzero(np.diff(array) < 0)
    if down.size:
        i = int(down[0])
        raise ValueError(f"cu_seqlens must not decrease, got {array[i]} then {array[i + 1]} at position {i + 1}")
    if array[-1] > MOST_TOKENS:
        raise ValueError(f"cu_seqlens must end at {MOST_TOKENS} or before, got {array[-1]}")
    return array


def host_runs(rank: int, runs: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """int64 `[runs, 2]`: start and end, one row per run.

    Raises:
        TypeError, ValueError: they are not pairs of integers.
    """
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # whatever is wrong is named below
        if not isinstance(runs, np.ndarray):
            _refuse_bools(chain.from_iterable(runs))
        array = np.array(runs)
        if array.dtype == np.int64 and array.ndim == 2 and array.shape[1] == 2:
            return array
    try:
        _refuse_bools(x for pair in runs for x in pair)
        array = np.array([[operator.index(a), operator.index(b)] for a, b in runs], dtype=np.int64).reshape(-1, 2)
    except OverflowError as error:
        raise ValueError(f"runs of rank {rank} must fit 64 bits, got {runs!r}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(f"runs of rank {rank} must be (start, end) pairs of ints, got {runs!r}") from error
    return array


def check_cover(runs: Sequence[np.ndarray], total: int) -> None:
    """Check that the runs of all ranks hold each of `total` tokens exactly once.

    Raises:
        ValueError: they do not.
    """
    whole = np.concatenate(runs) if len(runs) else np.zeros((0, 2), dtype=np.int64)
    whole = whole[np.argsort(whole[:, 0], kind="stable")]
    if len(whole) and whole[0, 0] < 0:
        raise ValueError(f"runs must hold tokens 0 to {total - 1}, got a run from {whole[0, 0]}")
    expected = 0
    for start, end in merge_adjacent(whole).tolist():
        if start != expected:
            what = "no rank holds" if start > expected else "more than one rank or run holds"
            raise ValueError(
                f"the runs must hold each of {total} tokens exactly once; {what} token {min(start, expected)}"
            )
        expected = end
    if expected != total:
        what = f"no rank holds token {expected}" if expected < total else f"token {expected - 1} is past the end"
        raise ValueError(f"the runs must hold each of {total} tokens exactly once; {what}")
