"""Ranks find out that they disagree, or that one of them refused its input, before anything else moves.

Every call of a group begins with one small all-gather of what the ranks must have in common. It is read before the call goes
on; on CUDA, where that read would stall the host, a rank whose call looks like one agreed on before reads it later.

A rank that refuses its input leaves a note in the group's store. Where all ranks refuse theirs, they see it there and raise,
and no collective is started. Otherwise the others wait in the all-gather and soon say so in the store; then the refusing rank
takes part in it, with its refusal, and all raise, the group as usable as before. If nobody says that he waits, as the others
come much later, the refusing rank raises alone and takes part in what it missed at its next call.
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

from .comm import SideStream, process_group, start_all_gather

_HEADER_BYTES = 1024
_PATIENCE_S = 0.3
"""Seconds to wait for the others before saying so in the store, and looking there for a note that one refused its input."""
_GRACE_S = 2.0
"""Seconds that a refusing rank looks for others that refuse too, or that wait for it."""
_POLL_S = 0.02


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


def refuse(group: dist.ProcessGroup | None, error: Exception, tensor: object) -> None:
    """Let the other ranks know that this one refuses its input with `error`; starts a collective only if others wait in it.

    Args:
        group: the context-parallel group; None for the default one.
        error: why.
        tensor: of this call; where it lies, the others' are as a rule.
    """
    group = process_group(group)
    state = _states.setdefault(group, _GroupState())
    state.calls += 1
    message = f"{type(error).__name__}: {error}"
    state.owed.append(message)
    note = f"{dist.get_rank(group)}|{message}"
    refusal = _Refusal(_store(group), _key(group, state.calls), dist.get_world_size(group), note)
    refusal.start()
    match refusal.outcome():
        case "none started":
            state.owed.pop()
        case "waiting":
            _make_up(group, state, _device(group, tensor))


class _Refusal(threading.Thread):
    """Tells the others of a refusal, and finds out what becomes of the call's all-gather; in a thread of its own: a store
    whose host stalls never answers."""

    def __init__(self, store: dist.Store | None, key: str, size: int, note: str) -> None:
        super().__init__(daemon=True)
        self.store, self.key, self.size, self.note = store, key, size, note
        self.found, self.end = "owed", time.monotonic() + _GRACE_S

    def outcome(self) -> str:
        """ "none started": all ranks refused; "waiting": some wait in the all-gather; "owed": neither, in good time."""
        self.join(_GRACE_S + 0.5)
        return self.found

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the host is gone
            if self.store is not None:
                self.found = self._look(self.store)

    def _look(self, store: dist.Store) -> str:
        store.set(f"{self.key}/refused", self.note)
        refusals = store.add(f"{self.key}/refusals", 1)
        while time.monotonic() < self.end:
            if refusals == self.size:  # but one of them may have given up before, and owes the all-gather: then all do
                return self._decide(store, "none started")
            if store.check([f"{self.key}/waiting"]):
                return "waiting"
            time.sleep(_POLL_S)
            refusals = store.add(f"{self.key}/refusals", 0)
        return self._decide(store, "owed")

    def _decide(self, store: dist.Store, outcome: str) -> str:
        """What the first to decide said."""
        return store.compare_set(f"{self.key}/decision", "", outcome).decode()


def _device(group: dist.ProcessGroup, tensor: object) -> torch.device:
    """Where the others' headers are, as far as one can tell: where `tensor` is, if the group serves it."""
    try:
        served = dist.get_backend_config(group)
    except (AssertionError, TypeError):
        served = ""
    if isinstance(tensor, Tensor) and tensor.device.type in served:
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if "cuda:nccl" in served else torch.device("cpu")


def _make_up(group: dist.ProcessGroup, state: _GroupState, device: torch.device) -> None:
    """Take part in the all-gathers that this rank left out."""
    for message in state.owed:
        state.keep.append(_gather(group, _encode({"refused": message}, device)))
    state.owed.clear()


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
    group = process_group(group)
    state = _states.setdefault(group, _GroupState())
    state.calls += 1
    _read_late(state)
    _make_up(group, state, device)
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
    """Wait until `done()`; when it takes long, say so in the store, and look there for a refusal."""
    begin = time.monotonic()
    pause, notes = 2e-5, None
    try:
        while not done():
            time.sleep(pause)
            if notes is None and time.monotonic() - begin > _PATIENCE_S:
                pause, notes = _POLL_S, _NoteReader(_store(group), _key(group, state.calls))
                notes.start()
            # A refusing rank that still looks for those who wait completes the all-gather soon, which tells as much.
            if notes is not None and notes.found is not None and time.monotonic() - notes.found_at > _GRACE_S:
                rank, _, message = notes.found.partition("|")
                raise ValueError(f"rank {rank} refused its input: {message}")
    finally:
        if notes is not None:
            notes.stop = True


class _NoteReader(threading.Thread):
    """Says in the store that this rank waits, and looks for a note there, in a thread of its own: a store whose host stalls
    never answers."""

    def __init__(self, store: dist.Store | None, key: str) -> None:
        super().__init__(daemon=True)
        self.store, self.key, self.stop = store, key, False
        self.found: str | None = None
        self.found_at = 0.0

    def run(self) -> None:
        with contextlib.suppress(RuntimeError):  # the host is gone; the all-gather will tell
            if self.store is not None:
                self.store.set(f"{self.key}/waiting", "yes")
            while self.store is not None and not self.stop:
                if self.store.check([f"{self.key}/refused"]):
                    self.found_at = time.monotonic()
                    self.found = self.store.get(f"{self.key}/refused").decode()
                    return
                time.sleep(_POLL_S)


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


def _store(group: dist.ProcessGroup) -> dist.Store | None:
    """The store the group was made with."""
    try:
        return distributed_c10d._world.pg_map[group][1]
    except (AttributeError, KeyError, IndexError):
        return None


def _key(group: dist.ProcessGroup, call: int) -> str:
    """Under which the ranks of a group speak of one call in its store."""
    return f"moba_cp/{group.group_name}/{call}"


def _waiting(group: dist.ProcessGroup, why: str) -> str:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return f"rank {rank} of {size} waited for the other ranks to begin the same MoBA attention call: {why}"
