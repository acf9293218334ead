"""Ranks find out when they run the backward passes of a group's calls in different orders.

What backward sends carries no name, so the gradients of one call would be added to another's. Every call of a group that will
have a backward pass takes the next number, equal on all ranks because their forward passes agree. Ranks compare the numbers:

- on the CPU at the beginning of each call's backward, before anything moves, in a message of the size and form of those that
  begin a call, so that ranks of which one goes on to another call tell each other so;
- on CUDA, where this would cost each layer tenths of a millisecond, once at the end of a backward pass: one all-gather of the
  numbers in their order. The group's first passes read it at once, later ones at the end of the next pass, when the GPU has
  long been there: a steady training step never waits, and all ranks raise at the same point, so that none is left in an
  exchange with a rank that has raised.
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from . import agreement
from .comm import HostCopy, SideStream, named_error, process_group, start_all_gather

AT_ONCE = ("cpu",)
"""Types of devices where numbers are compared at the beginning of each call's backward."""
_SHOWN = 14
"""Numbers of a pass that travel as they are, to name the first difference; a digest stands for all."""
_READ_AT_ONCE = 4
"""Backward passes of a group whose numbers are read when they end; each later pass reads those of the pass before."""


@dataclass
class _Order:
    """What this process remembers of a group's calls.

    Attributes:
        calls: numbers taken.
        passes: by autograd's number of the backward pass under way, the calls whose backward has begun in it, in order.
        ended: backward passes that were compared or will be.
        unread: gathered numbers of the latest pass on their way to the host.
    """

    calls: int = 0
    passes: dict[int, list[int]] = field(default_factory=dict)
    ended: int = 0
    unread: HostCopy | None = None


_orders: weakref.WeakKeyDictionary[dist.ProcessGroup, _Order] = weakref.WeakKeyDictionary()


def take_number(group: dist.ProcessGroup | None) -> int:
    """The number of a call whose forward pass all ranks of `group` (None: the default one) have just agreed on."""
    order = _orders.setdefault(process_group(group), _Order())
    order.calls += 1
    return order.calls


def check(group: dist.ProcessGroup | None, number: int, device: torch.device) -> None:
    """All ranks of `group` (None: the default one) are at the backward of the same call. Called inside a backward pass, by all
    ranks alike.

    Args:
        group: the context-parallel group.
        number: what `take_number` gave the call.
        device: where the group's backend communicates.

    Raises:
        ValueError: on every rank, they are not; on CUDA when the pass ends, or the next one.
        RuntimeError: a rank did not come within the group's timeout.
    """
    group = process_group(group)
    order = _orders.setdefault(group, _Order())
    if device.type in AT_ONCE:
        with _named(group, f"begin the backward of call {number}"):
            facts = agreement.all_facts(group, {"step": "backward", "number": str(number)}, device)
        if any(of_rank.get("step") != "backward" for of_rank in facts):
            agreement.compare(facts)  # a rank went on to another call
        _compare(torch.tensor([[int(of_rank["number"])] for of_rank in facts]))
        return
    task = torch._C._current_graph_task_id()
    if task not in order.passes:
        if len(order.passes) > 8:  # of passes that ended with an error
            order.passes.clear()
        order.passes[task] = []
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _end_of_pass(group, order, task, device))
    order.passes[task].append(number)


def _end_of_pass(group: dist.ProcessGroup, order: _Order, task: int, device: torch.device) -> None:
    numbers = order.passes.pop(task)
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    text = [*numbers[:_SHOWN], *[0] * (_SHOWN - len(numbers)), len(numbers), int.from_bytes(digest, "big")]
    side = SideStream(device, "backward order")
    with side.alone(), _named(group, f"end the backward pass of call {numbers[0]}"):
        gathered, work = _gather(group, torch.tensor([text]).to(device))
        work.wait()
        copy = HostCopy(gathered)
    order.ended += 1
    late, order.unread = order.unread, copy
    if order.ended <= _READ_AT_ONCE:
        late, order.unread = order.unread, None
    if late is not None:
        try:
            _compare(late.wait())
        except ValueError:
            order.unread = None  # the pass that ends now is of the same disorder: one error stands for both
            raise


def _named(group: dist.ProcessGroup, what: str) -> contextlib.AbstractContextManager[None]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return named_error(f"rank {rank} of {size} waited for the other ranks to {what}")


def _gather(group: dist.ProcessGroup, numbers: Tensor) -> tuple[Tensor, dist.Work]:
    """int64 `[1, n]` of every rank: `[P, n]`."""
    gathered = numbers.new_empty(dist.get_world_size(group), numbers.shape[1])
    return gathered, start_all_gather(gathered.view(-1), numbers.view(-1), group)


def _compare(numbers: Tensor) -> None:
    """Raise where two ranks' numbers `[P, n]` differ."""
    different = (numbers != numbers[0]).nonzero()
    if not len(different):
        return
    rank, at = different[0].tolist()
    which = f"rank 0 is at call {int(numbers[0, at])} of the group, rank {rank} at call {int(numbers[rank, at])}"
    if at >= _SHOWN:
        which = f"rank 0 and rank {rank} begin alike at calls {numbers[0, :_SHOWN].tolist()} and differ later"
    raise ValueError(
        f"the ranks of the context-parallel group run backward passes in different orders: {which}. Gradients would be mixed up"
    )
