"""All exchanges by name, and which one a call takes: `comm=`, error texts, documentation and tests come from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..comm import CommGroup
from ..cost import choose_transport, choose_with_shared_memory
from ..home import HomeBlocks
from ..peer_memory import can_share
from ..wanted import exchange_wanted
from .all_gather import AllGather
from .base import Exchange, LocalOnly, Route, Work
from .fetch import Fetch
from .pull import Pull
from .ring import Ring

EXCHANGES: dict[str, type[Exchange]] = {exchange.name: exchange for exchange in (AllGather, Ring, Fetch, Pull)}
"""Exchanges between ranks, by name."""

FLAT_COMMS = ("auto", *EXCHANGES)
"""Values of `comm` that split no heads."""


class Opening(Protocol):
    """A pass that has begun before routing is known."""

    def route(self, wanted: Callable[[], Tensor]) -> tuple[Exchange, Route]:
        """The exchange of this call, ready for its first range, and the handle that backward needs; see `Exchange.route`."""


def open_forward(comm_name: str, home: HomeBlocks, comm: CommGroup, work: Work) -> Opening:
    """Begin the exchange that `comm_name`, one of `FLAT_COMMS`, stands for; what needs no routing starts here.

    `auto` decides before the gate where GPUs can read each other's memory; otherwise from what the ranks want, after it.
    """
    if comm.size == 1:
        return _Opened(LocalOnly(home, comm, work), "one rank")
    if comm_name != "auto":
        return _Opened(EXCHANGES[comm_name](home, comm, work), f"comm={comm_name!r}")
    device = home.k.device
    if device.type == "cuda" and can_share(comm, device):
        name = choose_with_shared_memory(home.plan.plan, work.rows, home.k.shape[1], _pair_bytes(home))
        return _Opened(
            EXCHANGES[name](home, comm, work),
            "auto: these GPUs read each other's memory; by their work and the size of what they hold",
        )
    return _ByRouting(home, comm, work)


def open_backward(route: Route, home: HomeBlocks, comm: CommGroup, work: Work) -> Exchange:
    """The exchange that forward used, resumed."""
    exchange = LocalOnly if route.name == LocalOnly.name else EXCHANGES[route.name]
    opened = exchange(home, comm, work)
    opened.resume(route)
    return opened


@dataclass(frozen=True)
class _Opened:
    """The choice is made."""

    exchange: Exchange
    reason: str

    def route(self, wanted: Callable[[], Tensor]) -> tuple[Exchange, Route]:
        return self.exchange, self.exchange.route(wanted, self.reason)


@dataclass(frozen=True)
class _ByRouting:
    """`auto` without shared memory: the choice depends on what the ranks want."""

    home: HomeBlocks
    comm: CommGroup
    work: Work

    def route(self, wanted: Callable[[], Tensor]) -> tuple[Exchange, Route]:
        known = exchange_wanted(wanted(), self.home.plan, self.comm)
        walks = Ring(self.home, self.comm, self.work).walks[0]
        kv_heads, pair_bytes = self.home.k.shape[1], _pair_bytes(self.home)
        name = choose_transport(self.home.plan.plan, known.remote_tokens(), kv_heads, pair_bytes, walks)
        reason = "auto: no shared memory; by the share of the others' blocks that is wanted, and by the size of what they hold"
        if name == Fetch.name:
            fetch = Fetch(self.home, self.comm, self.work)
            return fetch, fetch.route(wanted, reason, known)
        exchange = EXCHANGES[name](self.home, self.comm, self.work)
        return exchange, exchange.route(wanted, reason)


def _pair_bytes(home: HomeBlocks) -> int:
    """Bytes of one key and its value."""
    return (home.k.shape[-1] + home.v.shape[-1]) * home.k.itemsize
