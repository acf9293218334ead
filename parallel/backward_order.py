"""Ranks find out when they run the backward passes of a group's calls in different orders.

What backward sends carries no name, so the gradients of one call would be added to another's. Every call of a group that will
have a backward pass takes the next number, equal on all ranks because their forward passes agree; backward begins with one
all-gather of its number.

On CUDA, reading the numbers at once would stall the host until the slowest rank comes. It is read at once only where backward
runs at a distance from the latest call that was not seen before; otherwise when it has arrived, at the latest by the next call.
A steady training step repeats its distances, so it never waits.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import SideStream, named_error, process_group, start_all_gather


@dataclass
class _Order:
    """What this process remembers of a group's calls."""

    calls: int = 0
    distances: set[int] = field(default_factory=set)
    unread: list[tuple[torch.cuda.Event, Tensor]] = field(default_factory=list)


_orders: weakref.WeakKeyDictionary[dist.ProcessGroup, _Order] = weakref.WeakKeyDictionary()


def take_number(group: dist.ProcessGroup | None) -> int:
    """The number of a call whose forward pass all ranks of `group` (None: the default one) have just agreed on.

    Raises:
        ValueError: an earlier backward pass ran in different orders.
    """
    order = _orders.setdefault(process_group(group), _Order())
    _read_arrived(order)
    order.calls += 1
    return order.calls


def check(group: dist.ProcessGroup | None, number: int, device: torch.device) -> None:
    """All ranks of `group` (None: the default one) are at the backward pass of the same call; all call alike.

    Args:
        group: the context-parallel group.
        number: what `take_number` gave the call.
        device: where the group's backend communicates.

    Raises:
        ValueError: on every rank, they are not; or they were not in an earlier backward pass.
        RuntimeError: a rank did not come within the group's timeout.
    """
    group = process_group(group)
    order = _orders.setdefault(group, _Order())
    _read_arrived(order)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    describe = f"rank {rank} of {size} waited for the other ranks to begin the backward pass of call {number}"
    if device.type != "cuda":
        with named_error(describe):
            gathered, work = _gather(group, torch.tensor([number]))
            work.wait()
        _compare(gathered)
        return
    side = SideStream(device, "backward order")
    with side.alone(), named_error(describe):
        gathered, work = _gather(group, torch.full((1,), number, device=device))
        work.wait()
        host = torch.empty(gathered.shape, dtype=gathered.dtype, pin_memory=True)
        host.copy_(gathered, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    distance = order.calls - number
    if distance in order.distances:
        order.unread.append((event, host))
        return
    order.distances.add(distance)
    event.synchronize()
    _compare(host)


def _gather(group: dist.ProcessGroup, number: Tensor) -> tuple[Tensor, dist.Work]:
    gathered = number.new_empty(dist.get_world_size(group))
    return gathered, start_all_gather(gathered, number, group)


def _read_arrived(order: _Order) -> None:
    """Compare the numbers of earlier backward passes that have arrived by now."""
    while order.unread and order.unread[0][0].query():
        _compare(order.unread.pop(0)[1])


def _compare(numbers: Tensor) -> None:
    """Raise where two ranks' numbers `[P]` differ."""
    different = (numbers != numbers[0]).nonzero()
    if len(different):
        rank = int(different[0])
        raise ValueError(
            "the ranks of the context-parallel group run backward passes in different orders: rank 0 is at call "
            f"{int(numbers[0])} of the group, rank {rank} at call {int(numbers[rank])}. Gradients would be mixed up"
        )
