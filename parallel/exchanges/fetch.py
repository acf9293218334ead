"""`fetch`: only the (block, kv head) pairs that some local query selected come over, each once per rank.

One all-to-all for a range of kv heads; a pair is `length x (D + Dv)` elements. Messages are in order of (kv head, block), which
both sides know from the gathered masks, so no addresses travel. Gradients go back the same way in the accumulation dtype
and are added in order of rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..comm import CommGroup, Pending, SideStream
from ..home import HomeBlocks, blocks_by_home
from ..rows import pack
from ..wanted import Wanted, exchange_wanted, home_and_length, home_blocks
from .at_once import AtOnce
from .base import Arrived, Part, Route, Visit, Work, unpack


@dataclass
class FetchVisit(Visit):
    """Also: int64, rows of what was sent to each rank in turn, and their numbers; gradients come back for these."""

    rows: Tensor | None = None
    sent: list[int] = field(default_factory=list)


class Fetch(AtOnce):
    """See the module."""

    name = "fetch"
    summary = "selected blocks only, by one all-to-all; any group, pays where routing is correlated"

    def __init__(self, home: HomeBlocks, comm: CommGroup, work: Work) -> None:
        super().__init__(home, comm, work)
        self._wanted: Wanted | None = None
        self._side = SideStream(home.k.device, "fetch")

    @property
    def wanted(self) -> Wanted:
        assert self._wanted is not None, "route or resume comes first"
        return self._wanted

    def route(self, wanted: Callable[[], Tensor], reason: str, known: Wanted | None = None) -> Route:
        """As every exchange; `known` is what `auto` has gathered already."""
        self._wanted = known or exchange_wanted(wanted(), self.home.plan, self.comm)
        self._side.mark()  # home keys and masks are ready: a range can be sent while an earlier one is computed
        return Route(self.name, reason, self.walks, wanted=self._wanted)

    def resume(self, route: Route) -> None:
        self._wanted = route.wanted
        self._side.mark()

    def start(self, heads: slice) -> FetchVisit:
        return FetchVisit(heads)

    def remote(self, visit: Visit) -> tuple[Part, Tensor]:
        """The pairs of other ranks, packed and sent on the side stream while the local part is computed."""
        assert isinstance(visit, FetchVisit)
        heads, side = visit.heads, self._side
        visit.sent, received = self._tokens(heads)
        with side.use():
            pending = self._send(visit, received)
            start = self._start_rows(heads)
            packed = pending.wait()[:, None]
        assert visit.rows is not None
        side.uses(self.home.k, self.home.v)
        side.join(side.done(), packed, start, visit.rows)
        return Part(*unpack(packed, self.home.k.shape[-1]), start, "fetch"), packed

    def reduce(self, visit: Visit) -> Callable[[], list[Arrived]]:
        assert isinstance(visit, FetchVisit)
        packed, rows, sent = visit.gradients.pop().packed, visit.rows, visit.sent
        assert packed is not None
        assert rows is not None
        received = self._tokens(visit.heads)[1]
        # What was sent is what comes back.
        pending = self.comm.all_to_all(packed.squeeze(1), received, sent, "fetch gradients")

        def finish() -> list[Arrived]:
            arrived = pending.wait()
            if rows.is_cuda:
                rows.record_stream(torch.cuda.current_stream(rows.device))
            # Per source rank: a rank wants a pair once, so a row occurs once in what it returns.
            sources = zip(arrived.split(sent), rows.split(sent), strict=True)
            return [Arrived(values, index) for values, index in sources if len(index)]

        return finish

    def _tokens(self, heads: slice) -> tuple[list[int], list[int]]:
        """Tokens that go to and come from each rank for these heads; nothing comes from this rank itself."""
        sent, received = (tokens[:, heads].sum(1).tolist() for tokens in self.wanted.tokens())
        sent[self.comm.rank] = received[self.comm.rank] = 0
        return sent, received

    def _send(self, visit: FetchVisit, received: list[int]) -> Pending:
        heads = visit.heads
        visit.rows = rows = self._rows_to_send(heads, visit.sent)
        n_heads = heads.stop - heads.start
        if n_heads < self.home.k.shape[1]:
            rows = rows // n_heads * self.home.k.shape[1] + heads.start + rows % n_heads
        packed = pack(take_rows(self.home.k, rows)[:, None], take_rows(self.home.v, rows)[:, None])
        return self.comm.all_to_all(packed[:, 0], visit.sent, received, "fetch keys and values")

    def _rows_to_send(self, heads: slice, sent: list[int]) -> Tensor:
        """int64: home token x heads at work + head, of every key to send, by (destination, kv head, block)."""
        device, rank = self.home.k.device, self.comm.rank
        mine, begin, length = home_blocks(self.home.plan, device)
        wanted = self.wanted.of_blocks(mine, heads)  # [P, H, home blocks]
        wanted[rank] = False
        n_heads, n_blocks = wanted.shape[1:]
        keys = torch.where(wanted, length, 0).flatten()
        total = sum(sent)
        pair = torch.repeat_interleave(torch.arange(keys.numel(), device=device), keys, output_size=total)
        offset = torch.arange(total, device=device) - (torch.cumsum(keys, 0) - keys)[pair]
        token = begin[pair % n_blocks] + offset
        return token * n_heads + pair // n_blocks % n_heads

    def _start_rows(self, heads: slice) -> Tensor:
        """int32 `[H, n_blocks]`: row of each fetched pair's first key among the keys received; -1 for the others.

        A source sends its pairs by (kv head, block), so a pair begins where its (source, head) begins, after the pairs of
        lower blocks.
        """
        device, rank, size = self.home.k.device, self.comm.rank, self.comm.size
        plan = self.home.plan.plan
        wanted = self.wanted.of_rank(rank, heads)
        source, length = home_and_length(plan, device)
        order = blocks_by_home(plan, device)
        remote = wanted & (source != rank)
        keys = torch.where(remote, length, 0)
        by_source = torch.zeros(keys.shape[0], size, dtype=torch.int64, device=device).index_add_(1, source, keys)
        in_order = keys[:, order]
        before = torch.empty_like(keys)
        before[:, order] = (
            torch.cumsum(in_order, 1) - in_order
        )  # of the head: pairs of lower sources, then of lower blocks
        sent_first = torch.cumsum(by_source, 1) - by_source  # of the head: pairs of lower sources
        flat = by_source.T.flatten()
        begins = (torch.cumsum(flat, 0) - flat).view(size, -1).T  # of each (head, source) among the keys received
        start = before + (begins - sent_first)[:, source]
        return torch.where(remote, start, -1).to(torch.int32)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `token * H + head` of `[N, H, D]`: `[len(rows), D]`. Whole rows by one index, where they lie one after another."""
    n_heads = x.shape[1]
    if x.is_contiguous():
        return x.view(-1, x.shape[2]).index_select(0, rows)
    return x[rows // n_heads, rows % n_heads]
