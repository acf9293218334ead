"""`fetch`: only the (block, kv head) pairs that some local query selected come over, each once per rank.

One all-to-all for a range of kv heads; a pair is `length x (D + Dv)` elements, and `parallel/messages.py` says where it lies.
Gradients go back the same way in the accumulation dtype and are added in order of rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..comm import CommGroup, SideStream
from ..home import HomeBlocks
from ..messages import Messages, messages
from ..rows import Pairs, pack_pairs
from ..wanted import Wanted, exchange_wanted, home_blocks
from .at_once import AtOnce
from .base import Arrived, Part, Route, Visit, Work, of_heads, unpack


@dataclass
class FetchVisit(Visit):
    """Also: rows of what was sent to each rank, and the pairs in it; gradients come back for these."""

    sent: list[int] = field(default_factory=list)
    pairs: Pairs | None = None


class Fetch(AtOnce):
    """See the module."""

    name = "fetch"
    summary = "selected blocks only, by one all-to-all; any group, pays where routing is correlated"

    def __init__(self, home: HomeBlocks, comm: CommGroup, work: Work) -> None:
        super().__init__(home, comm, work)
        self._wanted: Wanted | None = None
        self._messages: Messages | None = None
        self._side = SideStream(home.k.device, "fetch")

    def route(self, wanted: Callable[[], Tensor], reason: str, known: Wanted | None = None) -> Route:
        """As every exchange; `known` is what `auto` has gathered already."""
        table = known or exchange_wanted(wanted(), self.home.plan, self.comm)
        self._take_up(table)
        return Route(self.name, reason, self.walks, wanted=table)

    def resume(self, route: Route) -> None:
        assert route.wanted is not None
        self._take_up(route.wanted)

    def _take_up(self, wanted: Wanted) -> None:
        """Find where pairs lie in messages, on the side stream. Home keys and masks are ready for it: from here on a range can be
        sent while an earlier one is computed."""
        self._wanted = wanted
        self._side.mark()
        with self._side.use():
            self._messages = messages(wanted, self.comm.rank, self.work.ranges)
        self._side.uses(wanted.packed)

    def start(self, heads: slice) -> FetchVisit:
        return FetchVisit(heads)

    def remote(self, visit: Visit) -> tuple[Part, Tensor]:
        """The pairs of other ranks, packed and sent on the side stream while the local part is computed."""
        assert isinstance(visit, FetchVisit)
        assert self._messages is not None
        heads, side = visit.heads, self._side
        visit.sent, received = self._tokens(heads)
        with side.use():
            _, begin, length = home_blocks(self.home.plan, self.home.k.device)
            visit.pairs = Pairs(self._messages.sent[:, heads], begin, length, self.home.plan.plan.most_rows)
            message = pack_pairs(
                of_heads(self.home.k, heads), of_heads(self.home.v, heads), visit.pairs, sum(visit.sent)
            )
            pending = self.comm.all_to_all(message, visit.sent, received, "fetch keys and values")
            packed = pending.wait()[:, None]
        side.uses(self.home.k, self.home.v)
        start = self._messages.start[heads]
        side.join(side.done(), packed, start)
        return Part(*unpack(packed, self.home.k.shape[-1]), start, "fetch"), packed

    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        assert isinstance(visit, FetchVisit)
        packed, pairs = visit.gradients.pop().packed, visit.pairs
        assert packed is not None
        assert pairs is not None
        received = self._tokens(visit.heads)[1]
        # What was sent is what comes back.
        pending = self.comm.all_to_all(packed.squeeze(1), received, visit.sent, "fetch gradients")

        def finish() -> list[Arrived]:
            arrived = pending.wait()
            if pairs.at.is_cuda:
                pairs.at.record_stream(torch.cuda.current_stream(pairs.at.device))
            return [Arrived(arrived, pairs)]

        return finish

    def _tokens(self, heads: slice) -> tuple[list[int], list[int]]:
        """Tokens that go to and come from each rank for these heads; nothing comes from this rank itself."""
        assert self._wanted is not None, "route or resume comes first"
        sent, received = (tokens[:, heads].sum(1).tolist() for tokens in self._wanted.tokens())
        sent[self.comm.rank] = received[self.comm.rank] = 0
        return sent, received
