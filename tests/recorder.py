"""Writes down every torch.distributed call of a rank, with its bytes, independently of the library's own counting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from moba_cp.kernels import torch_backend
from moba_cp.parallel.comm import Pending

_GATHERS = ("all_gather_into_tensor", "all_gather_single")
_OTHERS = (
    "all_gather",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "irecv",
    "isend",
    "recv",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@dataclass(frozen=True)
class Started:
    """A collective that this rank started. `sent` and `received` are bytes to and from other ranks."""

    name: str
    sent: int
    received: int


@contextlib.contextmanager
def recorded(steps: bool = False) -> Iterator[list]:
    """The collectives started inside, as `Started`; with `steps` also "compute" (a part handed to block attention or its
    backward) and "wait" (for a collective) where they happen."""
    events: list = []

    def bytes_of(x: Tensor) -> int:
        return x.numel() * x.itemsize

    def all_gather(original: Callable) -> Callable:
        def call(output: Tensor, x: Tensor, *args, **kwargs):
            others = dist.get_world_size(kwargs.get("group")) - 1
            events.append(Started("all_gather", bytes_of(x) * others, bytes_of(x) * others))
            return original(output, x, *args, **kwargs)

        return call

    def all_to_all(original: Callable) -> Callable:
        def call(output: Tensor, x: Tensor, receive: list[int], send: list[int], *, group, async_op):
            rank = dist.get_rank(group)
            sizes = (sum(send) - send[rank], sum(receive) - receive[rank])
            assert (sum(send), sum(receive)) == (bytes_of(x), bytes_of(output))
            events.append(Started("all_to_all", *sizes))
            return original(output, x, receive, send, group=group, async_op=async_op)

        return call

    def shift(original: Callable) -> Callable:
        def call(operations: list[dist.P2POp]):
            sent = sum(bytes_of(o.tensor) for o in operations if o.op is send)
            received = sum(bytes_of(o.tensor) for o in operations if o.op is receive)
            events.append(Started("shift", sent, received))
            with mock.patch.object(dist, "isend", send), mock.patch.object(dist, "irecv", receive):
                return original(operations)

        return call

    def noted(name: str) -> Callable:
        def wrapper(original: Callable) -> Callable:
            def call(*args, **kwargs):
                events.append(name)
                return original(*args, **kwargs)

            return call

        return wrapper

    send, receive = dist.isend, dist.irecv
    wrappers = [(dist, name, all_gather) for name in _GATHERS if hasattr(dist, name)]
    wrappers += [(dist, "all_to_all_single", all_to_all), (dist, "batch_isend_irecv", shift)]
    wrappers += [(dist, name, noted(name)) for name in _OTHERS if name not in ("isend", "irecv")]
    if steps:
        wrappers += [(torch_backend, name, noted("compute")) for name in ("attend", "attend_backward")]
        wrappers += [(Pending, "wait", noted("wait"))]
    with contextlib.ExitStack() as stack:
        for owner, name, wrapper in wrappers:
            stack.enter_context(mock.patch.object(owner, name, wrapper(getattr(owner, name))))
        yield events
