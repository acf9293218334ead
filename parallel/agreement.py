"""Ranks find out that they disagree, or that one of them refused its input, before anything else moves.

Every call of a group begins with one small all-gather of what the ranks must have in common. It is read before the call goes
on; on CUDA, where that read would stall the host, a rank whose call looks like one agreed on before reads it later. Beside the
facts, the message carries one word that says which backward passes a rank has begun (`parallel.backward_order`).

A rank that refuses its input leaves a note in the group's store (`parallel.notes`). Where all ranks refuse theirs, they see it
there and raise, and no collective is started. Otherwise the others wait in the all-gather and soon say so in the store; then
the refusing rank takes part in it, with its refusal, and all raise, the group as usable as before. If the others come much
later, the refusing rank raises alone; it takes part as soon as one of them says that it waits, at the latest at its next call.
If it is gone by then, the others find its note.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .comm import HostCopy, SideStream, backends_of, process_group, start_all_gather
from .notes import GRACE_S, PATIENCE_S, NoteReader, Refusal, rendezvous_of, sweep

READ_LATE = ("cuda",)
"""Types of devices where headers with facts agreed on before are read later."""
_HEADER_BYTES = 1024
_FACTS_BYTES = 1008
"""Of a header: facts in JSON. Then come the life of the group as the rank counts it, in digits, and the rank's word."""
_WORD_AT = 1016
_FIRST_PAUSE_S, _LONG_PAUSE_S = 2e-5, 0.02


class _Header:
    """What this rank sends for some facts: uint8 `[_HEADER_BYTES]` on the group's device. Its word is replaced in place."""

    def __init__(self, facts: dict[str, str], device: torch.device, life: int) -> None:
        with torch.inference_mode(False):  # calls inside and outside of inference mode share it
            self.bytes = _encode(facts, device, life)
            self._word, self._as_int64 = 0, self.bytes[_WORD_AT:].view(torch.int64)

    def carry(self, word: int) -> None:
        """Send `word` from now on; on CUDA from the current stream's next operation on."""
        if word != self._word:
            self._as_int64.fill_(word)
            self._word = word


@dataclass
class _GroupState:
    """What this process remembers of one life of a group.

    Attributes:
        name: of the group, and its ranks.
        life: how many groups of this name and these ranks there were, this one included, as far as this process used them;
            the ranks' largest number once an all-gather was read.
        rendezvous: what tells lives apart where the backend gives it.
        calls: so far.
        owed: call and message of refusals whose all-gather this rank has not taken part in.
        refusals: the threads that look after these.
        agreed: facts that the ranks had in common before.
        headers: by facts and device.
        word: what this rank's headers carry.
        latest: all ranks' headers of the latest call.
        unread: those of calls whose facts are to be compared later.
        keep: what all-gathers in flight use.
        litter: prefixes of notes that nobody needs once an all-gather is complete.
        alone: whether other ranks would not join a call now; see `no_calls`.
        lock: orders this rank's all-gathers.
    """

    name: tuple[str, tuple[int, ...]]
    life: int
    rendezvous: str
    calls: int = 0
    owed: list[tuple[int, str]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    agreed: set[bytes] = field(default_factory=set)
    headers: dict[tuple[bytes, torch.device], _Header] = field(default_factory=dict)
    word: int = 0
    latest: HostCopy | None = None
    unread: list[HostCopy] = field(default_factory=list)
    keep: list[object] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)
    alone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def life_name(self) -> str:
        """What tells this life of the group from others, alike on all ranks."""
        return self.rendezvous or str(self.life)

    def prefix(self) -> str:
        """Of the notes of the latest call."""
        return f"moba_cp/{self.name[0]}/{self.life_name}/{self.calls}"

    def learn_life(self, gathered: Tensor) -> None:
        """The ranks' largest number, so that a rank that did not use an earlier life counts like the others."""
        with _foreign():
            life = max(int(bytes(row).decode()) for row in gathered[:, _FACTS_BYTES:_WORD_AT].tolist())
        if life != self.life:
            self.life = _lives[self.name] = life
            self.headers.clear()


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupState] = weakref.WeakKeyDictionary()
_lives: Counter[tuple[str, tuple[int, ...]]] = Counter()


def _state(group: dist.ProcessGroup) -> _GroupState:
    state = _states.get(group)
    if state is None:
        served = backends_of(group)
        if "fake" in served.values():  # its collectives never end
            raise ValueError(
                f"ranks cannot agree over torch's fake backend, which moves nothing, got a group of {served}"
            )
        name = group.group_name, tuple(dist.get_process_group_ranks(group))
        _lives[name] += 1
        state = _states.setdefault(group, _GroupState(name, _lives[name], rendezvous_of(group)))
    return state


def life_of(group: dist.ProcessGroup) -> str:
    """What tells this life of a group from earlier ones of the same name; its ranks know it alike once they have agreed."""
    return _state(group).life_name


def refuse(group: dist.ProcessGroup | None, error: Exception, tensor: object) -> None:
    """Let the other ranks know that this one refuses its input with `error`; starts a collective only if others wait in it.

    Args:
        group: the context-parallel group; None for the default one.
        error: why.
        tensor: of this call; where it lies, the others' are as a rule.
    """
    group = process_group(group)
    state = _state(group)
    state.calls += 1
    number, message = state.calls, f"{type(error).__name__}: {error}"
    with state.lock:
        state.owed.append((number, message))
    state.litter.append(state.prefix())
    weak, device = weakref.ref(group), _device(group, tensor)

    def withdraw() -> None:
        with state.lock:
            state.owed = [owed for owed in state.owed if owed[0] != number]

    def take_part() -> Callable[[], None]:
        held = weak()
        return (lambda: None) if held is None else _make_up(held, state, device, number)

    refusal = Refusal(group, state.prefix(), f"{dist.get_rank(group)}|{message}", withdraw, take_part)
    state.refusals.append(refusal)
    refusal.start()
    refusal.wait()


def _device(group: dist.ProcessGroup, tensor: object) -> torch.device:
    """Where the others' headers are, as far as one can tell: where `tensor` is, if the group serves it."""
    served = backends_of(group)
    if isinstance(tensor, Tensor) and tensor.device.type in served:
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if served.get("cuda") == "nccl" else torch.device("cpu")


def _make_up(
    group: dist.ProcessGroup, state: _GroupState, device: torch.device, last: int | None = None
) -> Callable[[], None]:
    """Take part in the all-gathers that this rank left out, up to call `last`; the result waits for them."""
    works = []
    with state.lock:
        while state.owed and (last is None or state.owed[0][0] <= last):
            _, message = state.owed.pop(0)
            with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
                started = _gather(group, _encode({"refused": message}, device, state.life))
            state.keep.append(started)
            works.append(started[0])

    def finish() -> None:
        for work in works:
            work.wait()

    return finish


def check(group: dist.ProcessGroup | None, facts: dict[str, str], device: torch.device) -> None:
    """Raise on every rank unless all ranks of `group` came with the same `facts`.

    Args:
        group: the context-parallel group; None for the default one.
        facts: what must be the same, by name.
        device: where the group's backend communicates.

    Raises:
        ValueError: the facts differ, with the values of two ranks; or another rank refused its input.
        RuntimeError: a rank did not come within the group's timeout, or sent something else; or the call is inside `no_calls`.
    """
    group = process_group(group)
    state = _state(group)
    if state.alone:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} computes a call again in backward, as activation "
            "checkpointing does, and another rank does not: checkpoint the same calls on every rank"
        )
    state.calls += 1
    _read_late(state)
    try:
        if state.refusals:
            for refusal in state.refusals:
                refusal.stop()
            state.refusals.clear()
            _make_up(group, state, device)
        payload = json.dumps(facts).encode()
        header = state.headers.get((payload, device))
        if header is None:
            if len(state.headers) > 64:
                state.headers.clear()
            with SideStream(device, "agreement").alone():  # whose gathers may still read headers that were cleared
                header = state.headers.setdefault((payload, device), _Header(facts, device, state.life))
        if device.type in READ_LATE:
            gathered = _gather_to_read_late(group, state, header, device, payload)
        else:
            header.carry(state.word)
            work, gathered = _gather(group, header.bytes)
            _wait(group, state, work.is_completed)
            work.wait()
            state.latest = HostCopy(gathered)
    except RuntimeError as error:
        reader = NoteReader(group, state.prefix(), waits=False)
        reader.start()
        reader.join(1.0)
        _raise_refusal(reader.note, error)
        raise RuntimeError(_waiting(group, f"it did not come ({error})")) from error
    if gathered is not None:
        if state.litter:
            sweep(group, state.litter)
            state.litter = []
        if not state.agreed:
            state.learn_life(gathered)
        _compare(gathered)
    if len(state.agreed) > 64:
        state.agreed.clear()
    state.agreed.add(payload)
    state.keep.clear()


@contextlib.contextmanager
def no_calls(group: dist.ProcessGroup) -> Iterator[None]:
    """Inside, `check` raises: other ranks are elsewhere."""
    state = _state(group)
    state.alone = True
    try:
        yield
    finally:
        state.alone = False


def _gather_to_read_late(
    group: dist.ProcessGroup, state: _GroupState, header: _Header, device: torch.device, payload: bytes
) -> Tensor | None:
    """Headers `[P, bytes]` on the host, gathered beside the caller's stream; None where these facts were agreed on before,
    and the headers are read later."""
    side = SideStream(device, "agreement")
    side.mark()
    with side.use():
        header.carry(state.word)  # after the gather before, which this stream has waited for
        work, gathered = _gather(group, header.bytes)
        work.wait()
        state.latest = copy = HostCopy(gathered)
    if payload in state.agreed:
        state.unread.append(copy)
        return None
    _wait(group, state, copy.arrived)
    return copy.wait()


def _read_late(state: _GroupState) -> None:
    """Compare the headers of earlier calls that have arrived by now."""
    while state.unread and state.unread[0].arrived():
        _compare(state.unread.pop(0).wait())


def tell(group: dist.ProcessGroup, word: int) -> None:
    """Let this rank's next headers carry `word`, an int64. `check` does not compare words: see `words`."""
    _state(group).word = word


def latest_headers(group: dist.ProcessGroup) -> HostCopy:
    """All ranks' headers `[P, bytes]` of the group's latest call that agreed."""
    latest = _state(group).latest
    assert latest is not None, "no call has agreed yet"
    return latest


def words(headers: Tensor) -> list[int] | None:
    """Each rank's word, from headers `[P, bytes]`; None where the ranks' facts differ, or a rank refused its input."""
    if _facts_differ(headers):
        return None
    return headers.numpy()[:, _WORD_AT:].copy().view(np.int64)[:, 0].tolist()


def _gather(group: dist.ProcessGroup, header: Tensor) -> tuple[dist.Work, Tensor]:
    gathered = header.new_empty(dist.get_world_size(group), _HEADER_BYTES)
    return start_all_gather(gathered.view(-1), header, group), gathered


def _wait(group: dist.ProcessGroup, state: _GroupState, done: Callable[[], bool]) -> None:
    """Wait until `done()`; when it takes long, say so in the store, and look there for a refusal."""
    begin = time.monotonic()
    pause, reader = _FIRST_PAUSE_S, None
    try:
        while not done():
            time.sleep(pause)
            if reader is None and time.monotonic() - begin > PATIENCE_S:
                pause, reader = _LONG_PAUSE_S, NoteReader(group, state.prefix())
                reader.start()
                state.litter.append(state.prefix())
            # A refusing rank that is still there completes the all-gather soon, which tells as much.
            if reader is not None and reader.note is not None and time.monotonic() - reader.found_at > GRACE_S:
                _raise_refusal(reader.note, None)
    finally:
        if reader is not None:
            reader.stop()


def _raise_refusal(note: str | None, cause: Exception | None) -> None:
    """Raise what another rank's note says, if there is one."""
    if note is not None:
        rank, _, message = note.partition("|")
        raise ValueError(f"rank {rank} refused its input: {message}") from cause


def _encode(facts: dict[str, str], device: torch.device, life: int) -> Tensor:
    most = 96 if len(facts) > 1 else 440  # a refusal may hold quotation marks, which take two bytes each
    text = json.dumps({name: _short(value, most) for name, value in facts.items()}).encode()
    assert len(text) <= _FACTS_BYTES, text
    header = text.ljust(_FACTS_BYTES) + str(life).zfill(_WORD_AT - _FACTS_BYTES).encode()
    header += bytes(_HEADER_BYTES - _WORD_AT)
    return torch.tensor(list(header), dtype=torch.uint8, device=device)


def _short(value: str, most: int) -> str:
    """At most `most` printable characters of ASCII; the last of them tell apart what is too long to show."""
    value = "".join(c if c.isascii() and c.isprintable() else "?" for c in value)
    if len(value) <= most:
        return value
    return value[: most - 16] + hashlib.blake2b(value.encode(), digest_size=8).hexdigest()


def _compare(gathered: Tensor) -> None:
    """Raise where two ranks' headers `[P, bytes]` differ."""
    if _facts_differ(gathered):
        compare(_decode(gathered))


def _facts_differ(gathered: Tensor) -> bool:
    facts = gathered.numpy()[:, :_FACTS_BYTES]  # numpy: half the host time
    return bool((facts != facts[0]).any())


def _decode(gathered: Tensor) -> list[dict[str, str]]:
    """The facts of every rank, from headers `[P, bytes]`."""
    with _foreign():
        return [json.loads(bytes(row).decode()) for row in gathered[:, :_FACTS_BYTES].tolist()]


@contextlib.contextmanager
def _foreign() -> Iterator[None]:
    """Names what it means where headers cannot be read."""
    try:
        yield
    except ValueError:
        raise RuntimeError(
            "a rank of the context-parallel group sent what moba_cp does not understand: another collective of this group ran at "
            "the same time, or the rank has another version of moba_cp"
        ) from None


def compare(facts: list[dict[str, str]]) -> None:
    """Raise where two ranks' facts differ, or a rank refused its input."""
    first = facts[0]
    other = next((rank for rank, of_rank in enumerate(facts) if of_rank != first), None)
    if other is None:
        return
    second = facts[other]
    for rank, of_rank in ((0, first), (other, second)):
        if "refused" in of_rank:
            raise ValueError(f"rank {rank} refused its input: {of_rank['refused']}")
    if first.get("step") != second.get("step"):
        at = [
            f"{f['step']} of call {f['number']}" if "step" in f else "beginning of a new one" for f in (first, second)
        ]
        raise ValueError(
            f"the ranks of the context-parallel group are apart: rank 0 is at the {at[0]}, rank {other} at the {at[1]}"
        )
    names = [name for name in first if first[name] != second.get(name)]
    values = "; ".join(f"{n}: rank 0 has {first[n]}, rank {other} has {second.get(n)}" for n in names)
    raise ValueError(f"the ranks of the context-parallel group disagree on {values}")


def all_facts(group: dist.ProcessGroup, facts: dict[str, str], device: torch.device) -> list[dict[str, str]]:
    """Every rank's facts, for ranks that need not have the same: one all-gather like that of `check`, read at once. On CUDA it
    waits for the communication enqueued before, not for the caller's stream."""
    with SideStream(device, "agreement").alone():
        work, gathered = _gather(group, _encode(facts, device, _state(group).life))
        work.wait()
        copy = HostCopy(gathered)
    return _decode(copy.wait())


def _waiting(group: dist.ProcessGroup, why: str) -> str:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return f"rank {rank} of {size} waited for the other ranks to begin the same MoBA attention call: {why}"
