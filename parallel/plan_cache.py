"""The one cache of plans: few, found by value, limited by bytes.

Planning a layout takes milliseconds. Every layer of a step asks for the same plan, and with packed data the next step brings
another layout. The cache keeps the latest plans, evicts the least recently used ones and counts what it keeps. A call holds its
plan, so eviction frees no plan in use.

What is derived from a plan is kept with it and evicted with it: index tensors in the plan's memo, and what refers to the plan
(one rank's side) beside it in the cache. No plan refers to itself, so an evicted plan is freed at once. A reference cycle would
keep its tensors until the garbage collector runs, which does not see the size of tensors.

On CUDA, an evicted tensor may have readers on side streams. The caller's stream has joined them by the end of the call that held
the plan. The memory is used next on the stream that allocated it: the caller's, or a side stream, which first waits for all that
the caller's stream had enqueued at its next `SideStream.mark`.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

MOST_HOST_BYTES = 96 << 20
"""Host memory above which plans are evicted, but never the newest."""
MOST_DEVICE_BYTES = 96 << 20
"""The same for all CUDA devices in total."""
MOST_PLANS = 64
"""Most plans, whatever their size."""


@dataclass(frozen=True)
class KeptBytes:
    """Bytes kept from call to call: in host memory, and on CUDA devices."""

    host: int
    device: int

    def __add__(self, other: KeptBytes) -> KeptBytes:
        return KeptBytes(self.host + other.host, self.device + other.device)


class Memo:
    """What was derived from a plan, kept as long as the plan. Nothing here may refer to the plan (see `PlanCache.beside`)."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned the first time for `key`. Tensors are made outside inference mode, so that later calls can
        use them in either."""
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]

    def find(self, key: Hashable) -> Any:
        """What is kept for `key`, or None."""
        return self._made.get(key)

    def values(self) -> Iterator[Any]:
        yield from tuple(self._made.values())  # other threads may add to it

    def __len__(self) -> int:
        return len(self._made)


@dataclass(frozen=True)
class _Kept:
    """A plan, and what refers to it."""

    plan: Any
    beside: Memo

    @property
    def made(self) -> int:
        """How many things have been derived from the plan so far."""
        return len(self.beside) + len(self.plan if isinstance(self.plan, Memo) else self.plan.memo)


class PlanCache:
    """Plans by value, the most recently used last. Threads may share it; nothing is made while one holds its lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._plans: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._sizes: dict[Hashable, tuple[int, KeptBytes]] = {}  # with `_Kept.made` at that time
        self._for_good: dict[int, Any] = {}  # by identity, which stays as long as they do

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The plan of `key`: kept, or made now."""
        with self._lock:
            kept = self._plans.get(key)
            if kept is not None:
                self._plans.move_to_end(key)
                return kept.plan
        plan = make()
        with self._lock:
            kept = self._plans.setdefault(key, _Kept(plan, Memo()))  # another thread's, if it was faster
            total = self.kept_bytes()
            while len(self._plans) > 1 and (
                len(self._plans) > MOST_PLANS or total.host > MOST_HOST_BYTES or total.device > MOST_DEVICE_BYTES
            ):
                oldest, _ = self._plans.popitem(last=False)
                _, dropped = self._sizes.pop(oldest)
                total = KeptBytes(total.host - dropped.host, total.device - dropped.device)
        return kept.plan

    def beside(self, key: Hashable, plan: object, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned the first time for `name`. It may refer to `plan`, the plan of `key`. Once the plan has been
        evicted, every call makes it again."""
        kept = self._plans.get(key)
        return kept.beside.get(name, make) if kept is not None and kept.plan is plan else make()

    def kept_beside(self, key: Hashable, plan: object, name: Hashable) -> Any:
        """What `beside` has made for `name`; None where it has made nothing, or the plan has been evicted."""
        kept = self._plans.get(key)
        return kept.beside.find(name) if kept is not None and kept.plan is plan else None

    def keep(self, plan: object) -> None:
        """Keep a plan that is in use for the life of the process, also once it has been evicted."""
        self._for_good[id(plan)] = plan

    def bytes_for_good(self) -> KeptBytes:
        """Bytes of what was given to `keep`."""
        return bytes_of(tuple(self._for_good.values()))

    def kept_bytes(self) -> KeptBytes:
        """Bytes of all plans that may be evicted."""
        with self._lock:
            for key, kept in self._plans.items():
                if key not in self._sizes or self._sizes[key][0] != kept.made:
                    self._sizes[key] = kept.made, bytes_of(kept)
            return sum((size for _, size in self._sizes.values()), KeptBytes(0, 0))

    def clear(self) -> None:
        """Drop all plans."""
        with self._lock:
            self._plans.clear()
            self._sizes.clear()

    def __len__(self) -> int:
        return len(self._plans)


PLANS = PlanCache()


def bytes_of(x: object) -> KeptBytes:
    """Bytes of the arrays and tensors that `x` holds; shared memory counts once."""
    seen: dict[int, KeptBytes] = {}
    _collect(x, seen, set())
    return sum(seen.values(), KeptBytes(0, 0))


def _collect(x: Any, seen: dict[int, KeptBytes], visited: set[int]) -> None:
    """Bytes by address of memory."""
    if isinstance(x, Tensor):
        storage = x.untyped_storage()
        size = storage.nbytes()
        if size:
            seen[storage.data_ptr()] = KeptBytes(0, size) if x.is_cuda else KeptBytes(size, 0)
        return
    if isinstance(x, np.ndarray):
        base = x if x.base is None or not isinstance(x.base, np.ndarray) else x.base
        if base.size:
            seen[base.__array_interface__["data"][0]] = KeptBytes(base.nbytes, 0)
        return
    if x is None or isinstance(x, (str, bytes, int, float, bool, torch.device, torch.dtype)) or id(x) in visited:
        return
    visited.add(id(x))
    if isinstance(x, Memo):
        for value in x.values():
            _collect(value, seen, visited)
    elif isinstance(x, (tuple, list)):
        if x and isinstance(x[0], (int, float)):
            seen[id(x)] = KeptBytes(sys.getsizeof(x), 0)
            return
        for value in x:
            _collect(value, seen, visited)
    elif is_dataclass(x):
        seen[id(x)] = KeptBytes(sys.getsizeof(x) + sys.getsizeof(getattr(x, "__dict__", ())), 0)
        for field in fields(x):
            _collect(getattr(x, field.name), seen, visited)
    elif isinstance(layout_bytes := getattr(x, "nbytes", None), int):
        seen[id(x)] = KeptBytes(layout_bytes, 0)
