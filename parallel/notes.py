"""Notes in a group's store: a rank leaves one when it refuses its input, or has waited long for the others.

The notes of one call share a prefix: the group's name, its incarnation and the call's number. A group that is made again
under the same name is another incarnation. Threads talk to the store, so that a store whose host stalls blocks no caller. They
end before Python does: a thread inside torch while the interpreter shuts down aborts the process.

    refused     rank and error of the latest refusing rank
    refusals    how many ranks refused
    decision    whether the call's all-gather still takes place, by the first rank that decided: "none started" or "owed"
    waiting     written by a rank that has waited in the all-gather for `PATIENCE_S`
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch.distributed import distributed_c10d

PATIENCE_S = 0.3
"""Seconds that a rank waits for the others before it says so in the store and looks there for a refusal."""
GRACE_S = 2.0
"""Seconds that a refusing rank delays its caller to find out what the others do."""
_NAMES = ("refused", "refusals", "decision", "waiting")
_FIRST_POLL_S = 0.02
_LONGEST_POLL_S = 1.0
_LONGEST_REFUSING_POLL_S = 0.1, 0.5
"""While the caller is delayed, and afterwards."""
_EXIT_S = 5.0
"""Seconds that Python's end waits for threads; a request to a store takes as long only where its host stalls."""


def store_of(group: dist.ProcessGroup | None) -> dist.Store | None:
    """The store the group was made with; None for a group that was left, or that torch does not know."""
    try:
        return None if group is None else distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError, IndexError):
        return None


def rendezvous_of(group: dist.ProcessGroup) -> str:
    """Tells this incarnation of a gloo group from an earlier one of the same name: a digest of the address of rank 0. Empty for
    other backends, which store no address."""
    store, key = store_of(group), "cpu//0/0"
    with contextlib.suppress(RuntimeError):
        if store is not None and store.check([key]):
            return hashlib.blake2b(store.get(key), digest_size=8).hexdigest()
    return ""


class _Worker(threading.Thread):
    """A thread that talks to a store until its work is done or it is stopped; ended at Python's end."""

    _running: weakref.WeakSet[_Worker] = weakref.WeakSet()

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._stopped = threading.Event()

    def start(self) -> None:
        super().start()
        self._running.add(self)

    def stop(self) -> None:
        """No more requests after the one under way."""
        self._stopped.set()

    @classmethod
    def end_all(cls) -> None:
        """Stop all of them and wait, for `_EXIT_S` at most."""
        workers, end = list(cls._running), time.monotonic() + _EXIT_S
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))


atexit.register(_Worker.end_all)


def sweep(group: dist.ProcessGroup, prefixes: Sequence[str]) -> None:
    """Delete all notes under `prefixes`, in a thread."""
    _Sweep(group, prefixes).start()


class _Sweep(_Worker):
    def __init__(self, group: dist.ProcessGroup, prefixes: Sequence[str]) -> None:
        super().__init__()
        self._group, self._prefixes = weakref.ref(group), prefixes

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the host is gone
            for prefix in self._prefixes:
                if self._stopped.is_set():
                    return
                _delete(self._group, prefix)


def _delete(group: weakref.ref[dist.ProcessGroup], prefix: str) -> None:
    for name in _NAMES:
        if (store := store_of(group())) is not None:
            store.delete_key(f"{prefix}/{name}")


class Refusal(_Worker):
    """Tells the other ranks of a refusal, and finds out whether the call's all-gather still takes place.

    The caller waits up to `GRACE_S` for the outcome. The thread then keeps looking for waiting ranks, which would otherwise wait
    until this rank's next call.

    Args:
        group: the group; the thread keeps neither it nor its store alive.
        prefix: of the call's notes.
        note: rank and error.
        withdraw: called once if no rank starts the all-gather, since all refused.
        take_part: called once if some rank waits in the all-gather; waits for its end.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        prefix: str,
        note: str,
        withdraw: Callable[[], None],
        take_part: Callable[[], Callable[[], None]],
    ) -> None:
        super().__init__()
        self._group, self._size = weakref.ref(group), dist.get_world_size(group)
        self._prefix, self._note = prefix, note
        self._withdraw, self._take_part = withdraw, take_part
        self._known = threading.Event()

    def wait(self) -> None:
        """Until the outcome is known, or about `GRACE_S`."""
        self._known.wait(GRACE_S + 0.5)

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the host is gone
            self._look()
        self._known.set()

    def _look(self) -> None:
        begin, decided = time.monotonic(), False
        with self._open() as store:
            store.set(f"{self._prefix}/refused", self._note)
            refusals = store.add(f"{self._prefix}/refusals", 1)
        for pause in _pauses(lambda: _LONGEST_REFUSING_POLL_S[self._known.is_set()]):
            with self._open() as store:
                late = time.monotonic() - begin > GRACE_S
                if not decided and (late or refusals == self._size):
                    # One rank may have given up before the last one refused; it owes the all-gather, and so do all.
                    wish = "none started" if refusals == self._size else "owed"
                    if store.compare_set(f"{self._prefix}/decision", "", wish) == b"none started":
                        self._withdraw()
                        return
                    decided = True
                if store.check([f"{self._prefix}/waiting"]):
                    finish = self._take_part()
                    self._known.set()
                    finish()
                    _delete(self._group, self._prefix)
                    return
                if decided:
                    self._known.set()
                else:
                    refusals = store.add(f"{self._prefix}/refusals", 0)
            if self._stopped.wait(pause):
                return

    @contextlib.contextmanager
    def _open(self) -> Iterator[dist.Store]:
        """The group's store. No reference outlives the request: on the host, this object may be the server itself."""
        store = store_of(self._group())
        if store is None:
            raise RuntimeError("the group was left")
        yield store


class NoteReader(_Worker):
    """Says in the store that this rank waits, and looks for the note of a rank that refused its input.

    Attributes:
        note: rank and error, once found.
        found_at: when it was found.
    """

    def __init__(self, group: dist.ProcessGroup, prefix: str, waits: bool = True) -> None:
        super().__init__()
        self._store, self._prefix, self._waits = store_of(group), prefix, waits
        self.note: str | None = None
        self.found_at = 0.0

    def run(self) -> None:
        if self._store is None:
            return
        with contextlib.suppress(RuntimeError):  # the host is gone; the all-gather will tell
            if self._waits:
                self._store.set(f"{self._prefix}/waiting", "yes")
            for pause in _pauses(lambda: _LONGEST_POLL_S):
                if self._store.check([f"{self._prefix}/refused"]):
                    self.found_at = time.monotonic()
                    self.note = self._store.get(f"{self._prefix}/refused").decode()
                if self.note is not None or not self._waits or self._stopped.wait(pause):
                    break
        self._store = None


def _pauses(longest: Callable[[], float]) -> Iterator[float]:
    """Seconds between polls: exponential backoff up to `longest()`."""
    pause = _FIRST_POLL_S
    while True:
        yield min(pause, longest())
        pause = min(2 * pause, _LONGEST_POLL_S)
