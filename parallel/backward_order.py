"""Ranks find out when they run the backward passes of a group's calls in different orders.

What backward sends carries no name, so the gradients of one call would be added to another's. Every call of a group takes the
next number, equal on all ranks because their forward passes agree. Ranks compare the numbers:

- at the beginning of each call's backward, before anything moves: on the CPU always, elsewhere in a group's first rounds (a
  round is calls, then backward passes). The message has the size and form of those that begin a call, so ranks of which one
  goes on to another call tell each other so;
- later, on CUDA, where that would cost each layer tenths of a millisecond, by a digest of all numbers so far. The message that
  begins every call carries it, so no collective is added. Ranks read the first digest after new backward passes, at a
  backward that begins at least `_CALLS_BETWEEN` calls later: the GPU has then been at that message as a rule, and no host
  waits. A group with two calls or more per round so finds a disorder in the next round's backward, with one call in the
  round after. The backward passes of a program's last round are not compared.

All ranks raise at the same point, in a backward before it sends anything, so none is left in an exchange.

A number joins the digest when its backward begins, on the thread that then starts the exchange. So digests follow the order of
the group's collectives, which a valid program runs alike on all ranks. Ends of passes, threads, nested passes (checkpointing)
and passes that fail do not count: they cannot raise a false alarm. A call that reentrant checkpointing or a compiled graph
recomputes takes a new number, so swapped passes over such calls are not told apart. Such calls are part of their backward pass:
they begin no round, and nobody reads their message. A host that read it would wait for the GPU at every layer.

Numbers in what backward exchanges would reach the host no earlier, and every exchange (ring, all-to-all, reads of other ranks'
memory, full attention, heads) would have to carry them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from . import agreement
from .comm import HostCopy, SideStream, named_error, process_group, start_all_gather, weakly

AT_ONCE = ("cpu",)
"""Types of devices where numbers are always compared at the beginning of each call's backward."""
_ROUNDS_AT_ONCE = 4
"""A group's first rounds, and those after an error, in which numbers are compared so on every device."""
_CALLS_BETWEEN = 2
"""Calls and backward passes between a message with a digest and the backward that reads it, the latter included."""
_SHOWN = 256
"""Numbers since the last comparison that a rank remembers, to name the first difference."""
_PRIME, _BASE = 2**61 - 1, 0x123456789ABCDEF
"""Of the digest: a polynomial in `_BASE` whose coefficients are the numbers, modulo `_PRIME`."""


@dataclass
class _Told:
    """A message whose digests have not been read.

    Attributes:
        headers: of all ranks.
        call: its number.
        at: `_Order.events` at its call.
        numbers: how many of `_Order.numbers` the digest covers.
    """

    headers: HostCopy
    call: int
    at: int
    numbers: int


@dataclass
class _Order:
    """What this process remembers of a group's calls.

    Attributes:
        calls: numbers taken.
        events: calls outside of backward passes, and backward passes of calls, so far.
        rounds: complete ones.
        in_backward: whether the latest event was a backward.
        digest: of the numbers compared late, in order.
        numbers: the first `_SHOWN` of them that no digest read so far covers.
        untold: whether some of them are in no message.
        told: the message to read next.
    """

    calls: int = 0
    events: int = 0
    rounds: int = 0
    in_backward: bool = False
    digest: int = 0
    numbers: list[int] = field(default_factory=list)
    untold: bool = False
    told: _Told | None = None


_orders: weakref.WeakKeyDictionary[dist.ProcessGroup, _Order] = weakref.WeakKeyDictionary()


def _order(group: dist.ProcessGroup) -> _Order:
    return _orders.get(group) or _orders.setdefault(group, _Order())


def take_number(group: dist.ProcessGroup | None) -> int:
    """The number of a call whose forward pass all ranks of `group` (None: the default one) have just agreed on."""
    group = process_group(group)
    order = _order(group)
    order.calls += 1
    if torch._C._current_graph_task_id() != -1:  # recomputed inside a backward pass
        return order.calls
    order.events += 1
    order.rounds += order.in_backward
    order.in_backward = False
    if order.untold and order.told is None:
        order.told = _Told(agreement.latest_headers(group), order.calls, order.events, len(order.numbers))
        order.untold = False
    return order.calls


def check(
    group: dist.ProcessGroup | None, number: int, device: torch.device, *, hooks: str
) -> contextlib.AbstractContextManager[None]:
    """All ranks of `group` (None: the default one) are at the backward of the same call. Called by all ranks alike, right before
    the first collective of that backward.

    Args:
        group: the context-parallel group.
        number: what `take_number` gave the call.
        device: where the group's backend communicates.
        hooks: name of the hooks that give back what forward saved, empty for none. Those of checkpointing compute the call
            again, for which other ranks are needed.

    Returns:
        A context in which to read what forward saved, on every rank. Where ranks are known to differ in `hooks`, a rank that
        computes the call again there raises, and so do the others.

    Raises:
        ValueError: on every rank: they are not; or, on CUDA, were not in an earlier backward (see above), or a CUDA graph is
            capturing the backward.
        RuntimeError: a rank did not come within the group's timeout.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            f"a CUDA graph can capture a backward pass on one rank, got call {number} of a group: ranks agree on the host"
        )
    group = process_group(group)
    order = _order(group)
    order.events += 1
    order.in_backward = True
    if _compares_at_once(order, device):
        with _named(group, f"begin the backward of call {number}"):
            mine = {"step": "backward", "number": str(number), "hooks": hooks}
            facts = agreement.all_facts(group, mine, device)
        if any(of_rank.get("step") != "backward" for of_rank in facts):
            agreement.compare(facts)  # a rank went on to another call
        _compare(torch.tensor([[int(of_rank["number"])] for of_rank in facts], device="cpu"))
        alike = all(of_rank["hooks"] == hooks for of_rank in facts)
        return contextlib.nullcontext() if alike else _read_apart(group, device)
    if order.told is not None and order.events - order.told.at >= _CALLS_BETWEEN:
        _read(group, order, order.told, device)
    order.digest = (order.digest * _BASE + number) % _PRIME
    agreement.tell(group, order.digest)
    order.untold = True
    if len(order.numbers) < _SHOWN:
        order.numbers.append(number)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _read_apart(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Where hooks give back what some ranks saved, not what others did: a hook may offload, but not compute a call again. All
    ranks learn if one fails."""
    failure: Exception | None = None
    try:
        with agreement.no_calls(group):
            yield
    except Exception as error:
        failure = error
    told = {} if failure is None else {"refused": f"{type(failure).__name__}: {failure}"}
    with _named(group, "read what forward saved"):
        facts = agreement.all_facts(group, told, device)
    if failure is not None:
        raise failure
    agreement.compare(facts)


def _compares_at_once(order: _Order, device: torch.device) -> bool:
    return device.type in AT_ONCE or order.rounds < _ROUNDS_AT_ONCE


class BackwardRefusedTogether:
    """Context in which what one rank refuses before `check` (RuntimeError), all ranks of the group raise there, if they compare
    numbers at once; else they wait for it. Nothing that communicates may run inside.

    Args:
        group, device: as for `check`.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = weakly(group), device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError):
            return
        group = process_group(self._group())
        order = _order(group)
        if not _compares_at_once(order, self._device):
            return
        order.events += 1
        order.in_backward = True
        with contextlib.suppress(RuntimeError):  # the others do not come: this rank's own error is raised
            agreement.all_facts(group, {"refused": f"{type(error).__name__}: {error}"}, self._device)


def _read(group: dist.ProcessGroup, order: _Order, told: _Told, device: torch.device) -> None:
    """Compare the digests of a message; where they differ, forget what was not compared and name the first difference."""
    with _named(group, f"begin call {told.call}"):
        digests = agreement.words(told.headers.wait())
    order.told = None
    if digests is None:  # the ranks disagreed on that call, which is reported as such; the next message tells the same
        order.untold = True
        return
    if digests == digests[:1] * len(digests):
        del order.numbers[: told.numbers]
        return
    mine = order.numbers[: told.numbers]
    _orders[group] = _Order(calls=order.calls)
    agreement.tell(group, 0)
    with SideStream(device, "agreement").alone(), _named(group, "name the calls whose backward they ran"):
        numbers = torch.tensor([*mine, *[0] * (_SHOWN - len(mine))], device=device)
        gathered = numbers.new_empty(dist.get_world_size(group), _SHOWN)
        start_all_gather(gathered.view(-1), numbers, group).wait()
        copy = HostCopy(gathered)
    _compare(copy.wait())
    raise ValueError(_DIFFERENT.format(f"their first {_SHOWN} are alike since the last comparison, later ones differ"))


def _named(group: dist.ProcessGroup, what: str) -> contextlib.AbstractContextManager[None]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return named_error(f"rank {rank} of {size} waited for the other ranks to {what}")


_DIFFERENT = (
    "the ranks of the context-parallel group run backward passes in different orders: {}. Gradients would be mixed up"
)


def _compare(numbers: Tensor) -> None:
    """Raise where two ranks' numbers `[P, n]` differ."""
    different = (numbers != numbers[0]).nonzero()
    if len(different):
        rank, at = different[0].tolist()
        first, other = (f"call {n}" if n else "none" for n in (int(numbers[0, at]), int(numbers[rank, at])))
        raise ValueError(_DIFFERENT.format(f"rank 0 is at {first} of the group, rank {rank} at {other}"))
