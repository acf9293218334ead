"""Ranks find out that they disagree, or that one of them refused its input, before anything else moves.

Every call of a group begins with one small all-gather of what the ranks must have in common. It is read before the call goes
on; on CUDA, where that read would stall the host, a rank whose call looks like one agreed on before reads it later.

A rank that refuses its input raises at once and starts no collective. It leaves a note in the group's store for the others,
who look there when the all-gather does not complete, and it takes part in the missed all-gather at its next call, so
the group stays usable.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from .comm import SideStream, start_all_gather

_HEADER_BYTES = 1024
_PATIENCE_S = 1.0
"""Seconds to wait for the others before looking for a note that one of them refused its input."""


@dataclass
class _GroupState:
    """What this process remembers of a group."""

    calls: int = 0
    owed: list[str] = field(default_factory=list)
    agreed: set[bytes] = field(default_factory=set)
    headers: dict[tuple[bytes, torch.device], Tensor] = field(default_factory=dict)
    unread: list[tuple[torch.cuda.Event, Tensor]] = field(default_factory=list)
    keep: list[object] = field(default_factory=list)


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupState] = weakref.WeakKeyDictionary()


def refuse(group: dist.ProcessGroup | None, error: Exception) -> None:
    """Leave a note that this rank refuses its input with `error`; starts no collective."""
    group = _group(group)
    state = _states.setdefault(group, _GroupState())
    state.calls += 1
    message = f"{type(error).__name__}: {error}"
    state.owed.append(message)
    store = _store(group)
    if store is not None:
        store.set(_note(group, state.calls), f"{dist.get_rank(group)}|{message}")


def check(group: dist.ProcessGroup | None, facts: dict[str, str], device: torch.device) -> None:
    """Raise on every rank unless all ranks of `group` came with the same `facts`.

    Args:
        group: the context-parallel group; None for the default one.
        facts: what must be the same, by name.
        device: where the group's backend communicates.

    Raises:
        ValueError: the facts differ, with the values of two ranks; or another rank refused its input.
        RuntimeError: a rank did not come within the group's timeout.
    """
    group = _group(group)
    state = _states.setdefault(group, _GroupState())
    state.calls += 1
    _read_late(state)
    for message in state.owed:
        state.keep.append(_gather(group, _encode({"refused": message}, device)))
    state.owed.clear()
    payload = json.dumps(facts).encode()
    header = state.headers.get((payload, device))
    if header is None:
        if len(state.headers) > 64:
            state.headers.clear()
        header = state.headers.setdefault((payload, device), _encode(facts, device))
    if device.type == "cuda":
        _check_cuda(group, state, header, payload)
    else:
        work, gathered = _gather(group, header)
        _wait(group, state, work.is_completed)
        try:
            work.wait()
        except RuntimeError as error:
            raise RuntimeError(_waiting(group, f"it did not come ({error})")) from error
        _compare(gathered)
    if len(state.agreed) > 64:
        state.agreed.clear()
    state.agreed.add(payload)
    state.keep.clear()


def _check_cuda(group: dist.ProcessGroup, state: _GroupState, header: Tensor, payload: bytes) -> None:
    """Beside the caller's stream; read at once only where this rank comes with facts that were not agreed on before."""
    side = SideStream(header.device, "agreement")
    side.mark()
    with side.use():
        work, gathered = _gather(group, header)
        work.wait()
        host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
        host.copy_(gathered, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    if payload in state.agreed:
        state.unread.append((event, host))
        return
    _wait(group, state, event.query)
    _compare(host)


def _read_late(state: _GroupState) -> None:
    """Compare the headers of earlier calls that have arrived by now."""
    while state.unread and state.unread[0][0].query():
        _compare(state.unread.pop(0)[1])


def _gather(group: dist.ProcessGroup, header: Tensor) -> tuple[dist.Work, Tensor]:
    gathered = header.new_empty(dist.get_world_size(group), _HEADER_BYTES)
    return start_all_gather(gathered.view(-1), header, group), gathered


def _wait(group: dist.ProcessGroup, state: _GroupState, done: Callable[[], bool]) -> None:
    """Wait until `done()`, and look for a refusal when it takes long."""
    begin = time.monotonic()
    pause, notes = 2e-5, None
    try:
        while not done():
            time.sleep(pause)
            if notes is None and time.monotonic() - begin > _PATIENCE_S:
                pause, notes = 0.05, _NoteReader(_store(group), _note(group, state.calls))
                notes.start()
            if notes is not None and notes.found is not None:
                rank, _, message = notes.found.partition("|")
                raise ValueError(f"rank {rank} refused its input: {message}")
    finally:
        if notes is not None:
            notes.stop = True


class _NoteReader(threading.Thread):
    """Looks for a note in the store, in a thread of its own: a store whose host stalls never answers."""

    def __init__(self, store: dist.Store | None, note: str) -> None:
        super().__init__(daemon=True)
        self.store, self.note, self.stop = store, note, False
        self.found: str | None = None

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the host is gone; the all-gather will tell
            while self.store is not None and not self.stop:
                if self.store.check([self.note]):
                    self.found = self.store.get(self.note).decode()
                    return
                time.sleep(0.05)


def _encode(facts: dict[str, str], device: torch.device) -> Tensor:
    room = 96 if len(facts) > 1 else 440  # a refusal may hold quotation marks, which take two bytes each
    text = json.dumps({name: _short(value, room) for name, value in facts.items()}).encode()
    assert len(text) <= _HEADER_BYTES, text
    return torch.tensor(list(text.ljust(_HEADER_BYTES)), dtype=torch.uint8).to(device)


def _short(value: str, room: int) -> str:
    """At most `room` printable characters of ASCII; the last of them tell apart what is too long to show."""
    value = "".join(c if c.isascii() and c.isprintable() else "?" for c in value)
    if len(value) <= room:
        return value
    return value[: room - 16] + hashlib.blake2b(value.encode(), digest_size=8).hexdigest()


def _compare(gathered: Tensor) -> None:
    """Raise where two ranks' headers `[P, bytes]` differ."""
    different = (gathered != gathered[:1]).any(1).nonzero()
    if not len(different):
        return
    other = int(different[0])
    first, second = (json.loads(bytes(gathered[r].tolist()).decode()) for r in (0, other))
    for rank, facts in ((0, first), (other, second)):
        if "refused" in facts:
            raise ValueError(f"rank {rank} refused its input: {facts['refused']}")
    names = [name for name in first if first[name] != second.get(name)]
    values = "; ".join(f"{n}: rank 0 has {first[n]}, rank {other} has {second.get(n)}" for n in names)
    raise ValueError(f"the ranks of the context-parallel group disagree on {values}")


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    return distributed_c10d._get_default_group() if group is None else group


def _store(group: dist.ProcessGroup) -> dist.Store | None:
    """The store the group was made with."""
    try:
        return distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError, IndexError):
        return None


def _note(group: dist.ProcessGroup, call: int) -> str:
    return f"moba_cp/{group.group_name}/{call}/refused"


def _waiting(group: dist.ProcessGroup, why: str) -> str:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return f"rank {rank} of {size} waited for the other ranks to begin the same MoBA attention call: {why}"
