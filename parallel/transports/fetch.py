"""`fetch`: only the (block, kv head) pairs that some local query selected come over, each once for a rank.

One all-to-all for a range of kv heads; a pair is `length x (D + Dv)` elements. Messages are in order of (kv head, block), which
both sides know from the gathered masks, so no addresses travel. Gradients go back the same way in the accumulation dtype
and are added in order of rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ..blocks import HomePlan
from ..comm import CommGroup, Pending, SideStream
from ..home import HomeBlocks
from ..rows import pack
from ..wanted import Wanted, home_and_length
from .base import Part, PartGradient, Transport, gradient_of, unpack


class Fetch(Transport):
    """See the module."""

    name = "fetch"

    def __init__(self, home: HomeBlocks, comm: CommGroup, wanted: Wanted) -> None:
        super().__init__(home, comm)
        self.wanted = wanted
        self._side = SideStream(home.k.device, "fetch")
        self._side.mark()  # home keys and masks are ready here, so a range of heads can be sent while an earlier one is computed

    def forward(self, heads: slice) -> Iterator[Part]:
        for gradient in self._parts(heads, None, None):
            yield gradient.part

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        yield from self._parts(heads, dk, dv)

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> Callable[[], list[Tensor]]:
        heads, packed = self._heads, gradients[1].packed
        assert packed is not None
        sent, received = self._tokens(heads)
        pending = self.comm.all_to_all(packed.squeeze(1), received, sent, "fetch gradients")
        rows = self._rows  # what was sent is what comes back

        def finish() -> list[Tensor]:
            arrived = pending.wait()
            if rows.is_cuda:
                rows.record_stream(torch.cuda.current_stream(rows.device))
            width, begin = dk.shape[-1], 0
            flat_dk, flat_dv = dk.view(-1, width), dv.view(-1, dv.shape[-1])
            for count in sent:  # a rank wants a pair once, so a row occurs once in what it returns
                index = rows[begin : begin + count]
                flat_dk.index_add_(0, index, arrived[begin : begin + count, :width])
                flat_dv.index_add_(0, index, arrived[begin : begin + count, width:])
                begin += count
            return []

        return finish

    def _parts(self, heads: slice, dk: Tensor | None, dv: Tensor | None) -> Iterator[PartGradient]:
        """Local part first; the pairs of others are packed and sent on the side stream while it is computed."""
        self._heads = heads
        side = self._side
        local = self.local_part(heads)
        none = local.k[:0]
        yield PartGradient(local, none if dk is None else dk, none if dv is None else dv)
        sent, received = self._tokens(heads)
        with side.use():
            pending = self._start(heads, sent, received)
            start = self._start_rows(heads)
            packed = pending.wait()
        side.uses(self.home.k, self.home.v)
        side.join(side.done(), packed, start, self._rows)
        remote = Part(*unpack(packed[:, None], local.k.shape[-1]), start, "fetch")
        yield PartGradient(remote, none, none) if dk is None else gradient_of(remote, packed[:, None])

    def _tokens(self, heads: slice) -> tuple[list[int], list[int]]:
        """Tokens that go to and come from each rank for these heads; nothing comes from this rank itself."""
        tokens = self.wanted.tokens()[:, :, heads].sum(2)
        rank = self.comm.rank
        sent, received = tokens[:, rank].tolist(), tokens[rank].tolist()
        sent[rank] = received[rank] = 0
        return sent, received

    def _start(self, heads: slice, sent: list[int], received: list[int]) -> Pending:
        self._rows = rows = self._rows_to_send(heads, sent)
        n_heads = heads.stop - heads.start
        if n_heads < self.home.k.shape[1]:
            rows = rows // n_heads * self.home.k.shape[1] + heads.start + rows % n_heads
        packed = pack(take_rows(self.home.k, rows)[:, None], take_rows(self.home.v, rows)[:, None])
        return self.comm.all_to_all(packed[:, 0], sent, received, "fetch keys and values")

    def _rows_to_send(self, heads: slice, sent: list[int]) -> Tensor:
        """int64: home token x heads at work + head, of every key to send, by (destination, kv head, block)."""
        device, rank = self.home.k.device, self.comm.rank
        plan = self.home.plan.plan
        mine, length = _home_length(plan, rank, device)
        wanted = self.wanted.masks[:, heads] & mine  # [P, H, n_blocks]
        wanted[rank] = False
        n_heads, n_blocks = wanted.shape[1:]
        keys = torch.where(wanted, length, 0).flatten()
        total = sum(sent)
        pair = torch.repeat_interleave(torch.arange(keys.numel(), device=device), keys, output_size=total)
        offset = torch.arange(total, device=device) - (torch.cumsum(keys, 0) - keys)[pair]
        token = self.home.start.long()[pair % n_blocks] + offset
        return token * n_heads + pair // n_blocks % n_heads

    def _start_rows(self, heads: slice) -> Tensor:
        """int32 `[H, n_blocks]`: row of each fetched pair's first key among the keys received; -1 for the others."""
        device, rank, size = self.home.k.device, self.comm.rank, self.comm.size
        plan = self.home.plan.plan
        wanted = self.wanted.masks[rank, heads]
        n_heads, n_blocks = wanted.shape
        source, length = home_and_length(plan, device)
        remote = wanted & (source != rank)
        # By (source, kv head, block), as each source sends them.
        by_source = torch.zeros(size, n_heads, n_blocks, dtype=torch.int64, device=device)
        by_source.scatter_(0, source.expand(1, n_heads, -1), torch.where(remote, length, 0)[None])
        first = (torch.cumsum(by_source.flatten(), 0) - by_source.flatten()).view_as(by_source)
        start = first.gather(0, source.expand(1, n_heads, -1))[0]
        return torch.where(remote, start, -1).to(torch.int32)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows `token * H + head` of `[N, H, D]`: `[len(rows), D]`. Whole rows by one index, where they lie one after another."""
    n_heads = x.shape[1]
    if x.is_contiguous():
        return x.view(-1, x.shape[2]).index_select(0, rows)
    return x[rows // n_heads, rows % n_heads]


@lru_cache(maxsize=64)
def _home_length(plan: HomePlan, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks are at home on `rank` (bool `[n_blocks]`) and the lengths of all (int64 `[n_blocks]`)."""
    home, length = home_and_length(plan, device)
    return home == rank, length
