"""MoBA attention over a context-parallel group, step by step: where `kernels` and `parallel` meet.

home blocks -> centroids -> gate -> routing lists -> transport -> block attention -> merge; backward walks the same parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .chunks import Chunk, Ranges, ranges_of
from .config import MoBAConfig
from .kernels import Backend, KVPart, QueryRows, RoutingLists, query_rows
from .kernels.torch_backend import accumulate_dtype
from .parallel.blocks import HomePlan, RankPlan
from .parallel.comm import CommGroup, SideStream
from .parallel.cost import choose_transport, choose_with_shared_memory
from .parallel.home import HomeBlocks, bring_home, centroid_start, gather_centroids, send_back
from .parallel.peer_memory import can_share
from .parallel.transports import AllGather, Fetch, LocalOnly, Part, PartGradient, Pull, Ring, Transport, of_heads
from .parallel.wanted import Wanted, exchange_wanted
from .stages import Stages

T = TypeVar("T")


@dataclass
class Call:
    """One attention call on one rank: what it is asked to do, and what it decided on the way.

    Attributes:
        config, plan, comm, backend: configuration, this rank's plan, its group, and the primitives of the device.
        requested: the `comm` argument.
        kv_heads: kv heads.
        workspace_bytes: most bytes of partial results at once.
        stage: names the steps in profiles.
        keep_lists: keep routing lists for backward: `4 * topk` bytes a (q head, row).
        transport: the transport in use, once it is known; `requested` unless that is "auto".
        wanted: every rank's wanted pairs, where the transport needs them.
    """

    config: MoBAConfig
    plan: RankPlan
    comm: CommGroup
    backend: Backend
    requested: str
    kv_heads: int
    workspace_bytes: int
    stage: Stages
    keep_lists: bool
    transport: str = ""
    wanted: Wanted | None = field(default=None, repr=False)

    @cached_property
    def topk(self) -> int:
        """Slots a row needs: `config.topk`, but no more than the blocks of the longest document, rounded up to a power
        of two so that packing that differs from step to step compiles few kernels."""
        blocks = self.plan.plan.blocks
        return min(self.config.topk, 1 << (blocks.most_of_a_document - 1).bit_length())


@dataclass(frozen=True)
class Saved:
    """What backward needs of a forward pass, besides its inputs.

    Attributes:
        selected: `[Hq, T, topk]`, of the gate.
        out: `[T, Hq, Dv]`.
        lse: `[Hq, T]`.
        lists: routing lists by chunk (first kv head, first row), if they are kept.
    """

    selected: Tensor
    out: Tensor
    lse: Tensor
    lists: dict[tuple[int, int], RoutingLists]


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Saved:
    """Output, log-sum-exp and selected blocks of the local rows."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    home = bring_home(call.plan, k, v, call.comm)
    rows = device_rows(call.plan, q.device)
    ranges = head_ranges(call, q, k, v)
    shared = share(call, home, ranges)
    selected = select_blocks(call, q, home, rows)
    transport = open_transport(call, home, selected, shared)
    saved = Saved(selected, q.new_empty(*q.shape[:2], v.shape[-1]), call.backend.new_lse(q), {})
    lists = routed_ahead(call, ranges, saved, backward=False)
    for index, (heads, chunks) in enumerate(ranges):
        _prefetch(transport, ranges, index)
        replayed = Replayed(transport.forward(heads)) if transport.resident else None
        for chunk in chunks:
            _forward_chunk(call, chunk, next(lists), q, rows, saved, replayed or transport.forward(heads))
    return saved


def _forward_chunk(
    call: Call, chunk: Chunk, lists: RoutingLists, q: Tensor, rows: QueryRows, saved: Saved, parts: Iterable[Part]
) -> None:
    """Output and log-sum-exp of one chunk; its partial results live no longer than this."""
    here, selected = rows.slice(chunk.rows.start, chunk.rows.stop), chunk.of_heads(saved.selected)
    if call.keep_lists:
        saved.lists[chunk.heads.start, chunk.rows.start] = lists
    partials = call.backend.new_partials(selected, saved.out.shape[-1], q.dtype)
    scale = call.config.scale(q.shape[-1])
    for part in call.stage.taking(parts, "wait for keys and values"):
        with call.stage(f"attend {part.name}"):
            call.backend.attend(chunk.of_rows(q), _kv_part(call, part), lists, here, scale, partials)
    with call.stage("merge"):
        out, lse = chunk.of_rows(saved.out), chunk.of_heads(saved.lse)
        call.backend.merge(partials, selected=selected, out=out, lse=lse)


def backward(call: Call, q: Tensor, k: Tensor, v: Tensor, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the local rows; dk and dv summed over every rank that used them."""
    q, k, v, dout = (unit_stride(x) for x in (q, k, v, dout))
    home = bring_home(call.plan, k, v, call.comm)
    rows = device_rows(call.plan, q.device)
    ranges = head_ranges(call, q, k, v)
    transport = open_transport(call, home, saved.selected, share(call, home, ranges))
    with call.stage("delta"):
        delta = call.backend.delta(out=saved.out, dout=dout)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty(home.k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(home.v.shape, dtype=v.dtype, device=v.device)
    lists = routed_ahead(call, ranges, saved, backward=True)
    in_place = call.comm.size == 1 and all(len(chunks) == 1 for _, chunks in ranges)
    side = SideStream(torch.device("cpu") if in_place else q.device, "gradients")  # in place, nothing is left to add
    finish: Callable[[], None] = lambda: None  # noqa: E731
    for number, (heads, chunks) in enumerate(ranges):
        _prefetch(transport, ranges, number)
        home_dk, home_dv = of_heads(dk, heads), of_heads(dv, heads)
        room_dk, room_dv = _gradient_room(call, home_dk, home_dv, len(chunks))
        replayed = Replayed(transport.backward(heads, room_dk, room_dv)) if transport.resident else None
        for index, chunk in enumerate(chunks):
            # A transport that is not resident gives its remote parts fresh room on every walk.
            written = [room_dk] if replayed is None else [g.dk for g in replayed.kept]
            added_to = {id(x) for x in written} if index else set()
            parts = replayed or transport.backward(heads, room_dk, room_dv)
            _backward_chunk(call, chunk, next(lists), q, dout, delta, rows, saved, parts, added_to, dq)
        # Gradients of one range travel, and are added, while the next is computed.
        finish()
        side.mark()
        arrive = transport.return_gradients(replayed.kept if replayed else [], room_dk, room_dv)
        finish = partial(_finish_range, call, side, arrive, room_dk, room_dv, home_dk, home_dv)
    finish()
    with call.stage("return gradients"):
        side.join(side.done())
    return dq, *send_back(call.plan, dk, dv, call.comm)


def _prefetch(transport: Transport, ranges: Ranges, index: int) -> None:
    """Start what range `index` waits for, and the next range's while this one is computed."""
    for heads, _ in ranges[index : index + 2]:
        transport.prefetch(heads)


def _finish_range(
    call: Call,
    side: SideStream,
    arrive: Callable[[], list[Tensor]],
    room_dk: Tensor,
    room_dv: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add what other ranks return, and round once into `dk`, `dv`: beside the next range, which is enqueued already."""
    if room_dk is dk:  # nothing comes, nothing to round
        return
    with side.use():
        arrived = arrive()
        call.backend.add_gradients(own_dk=room_dk, own_dv=room_dv, arrived=arrived, dk=dk, dv=dv)
    side.uses(room_dk, room_dv, *arrived)


def _backward_chunk(
    call: Call,
    chunk: Chunk,
    lists: RoutingLists,
    q: Tensor,
    dout: Tensor,
    delta: Tensor,
    rows: QueryRows,
    saved: Saved,
    parts: Iterable[PartGradient],
    added_to: set[int],
    dq: Tensor,
) -> None:
    """dq of one chunk, and its share of dk and dv of every part; adds to the gradients whose dk is in `added_to`."""
    here, selected = rows.slice(chunk.rows.start, chunk.rows.stop), chunk.of_heads(saved.selected)
    partials = call.backend.new_dq_partials(selected, q.shape[-1], q.dtype)
    for gradient in call.stage.taking(parts, "wait for keys and values, send gradients"):
        with call.stage(f"attend backward {gradient.part.name}"):
            call.backend.attend_backward(
                _kv_part(call, gradient.part),
                lists,
                here,
                q=chunk.of_rows(q),
                dout=chunk.of_rows(dout),
                lse=chunk.of_heads(saved.lse),
                delta=chunk.of_heads(delta),
                scale=call.config.scale(q.shape[-1]),
                dk=gradient.dk,
                dv=gradient.dv,
                dq_partials=partials,
                accumulate=id(gradient.dk) in added_to,
            )
    with call.stage("merge dq"):
        call.backend.merge_dq(partials, selected=selected, dq=chunk.of_rows(dq))


def routed_ahead(call: Call, ranges: Ranges, saved: Saved, backward: bool) -> Iterator[RoutingLists]:
    """Routing lists of each chunk in turn; on CUDA those of the next chunk are made beside the work of the last.

    Backward takes the lists of forward where they were kept.
    """
    chunks = [chunk for _, of_heads in ranges for chunk in of_heads]
    if len(chunks) == 1 or (backward and saved.lists):
        for chunk in chunks:
            kept = saved.lists.pop((chunk.heads.start, chunk.rows.start), None) if backward else None
            yield kept or _route(call, chunk, saved)
        return
    side = SideStream(saved.selected.device, "routing lists")
    side.mark()
    ahead: deque[tuple[RoutingLists, torch.cuda.Event | None]] = deque()
    for index in range(len(chunks) + 1):
        if index < len(chunks):
            with side.use():
                ahead.append((_route(call, chunks[index], saved), side.done()))
        if index > 0:
            lists, done = ahead.popleft()
            side.join(done, *lists.tensors())
            yield lists
            del lists


def _route(call: Call, chunk: Chunk, saved: Saved) -> RoutingLists:
    selected = chunk.of_heads(saved.selected)
    kv_heads = chunk.heads.stop - chunk.heads.start
    n_blocks, block_size = len(call.plan.plan.blocks), call.config.block_size
    with call.stage("lists"):
        return call.backend.route(selected, n_blocks=n_blocks, kv_heads=kv_heads, block_size=block_size)


def select_blocks(call: Call, q: Tensor, home: HomeBlocks, rows: QueryRows) -> Tensor:
    """Centroids of home blocks, all-gathered; then the gate: `[Hq, T, topk]`."""
    n_blocks = len(call.plan.plan.blocks)
    if call.topk > 1:
        start = centroid_start(call.plan, q.device)
        with call.stage("centroids"):
            local = call.backend.centroids(home.k, start=start, block_size=call.config.block_size)
            centroids = gather_centroids(call.plan, local, call.comm)
    else:
        centroids = q.new_zeros(n_blocks, home.k.shape[1], q.shape[-1])
    with call.stage("gate"):
        return call.backend.select_blocks(q, centroids=centroids, rows=rows, topk=call.topk)


def share(call: Call, home: HomeBlocks, ranges: Ranges) -> Pull | None:
    """Where other ranks will read this one's keys and values: what will put them into shared memory. Knows no selection."""
    plan, device = call.plan.plan, home.k.device
    if call.comm.size == 1:
        return None
    if not call.transport and call.requested != "auto":
        call.transport = call.requested
    if not call.transport and device.type == "cuda" and can_share(call.comm, device):
        call.transport = choose_with_shared_memory(plan, call.kv_heads, _pair_bytes(home))
    return Pull(home, call.comm, [heads for heads, _ in ranges]) if call.transport == Pull.name else None


def _pair_bytes(home: HomeBlocks) -> int:
    """Of one key and its value."""
    return (home.k.shape[-1] + home.v.shape[-1]) * home.k.itemsize


def open_transport(call: Call, home: HomeBlocks, selected: Tensor, shared: Pull | None) -> Transport:
    """The transport asked for, or the one that a rule of `parallel.cost` takes; the same on every rank."""
    if call.comm.size == 1:
        call.transport = LocalOnly.name
        return LocalOnly(home, call.comm)
    n_blocks = len(call.plan.plan.blocks)
    wanted = partial(call.backend.wanted_pairs, selected, n_blocks=n_blocks, kv_heads=call.kv_heads)
    if shared is not None:
        shared.want(wanted())
        return shared
    if call.transport in ("", Fetch.name) and call.wanted is None:
        call.wanted = exchange_wanted(wanted(), call.plan, call.comm)
    if not call.transport:
        assert call.wanted is not None
        call.transport = choose_transport(call.plan.plan, call.wanted.tokens(), call.kv_heads, _pair_bytes(home))
    match call.transport:
        case AllGather.name:
            return AllGather(home, call.comm)
        case Ring.name:
            return Ring(home, call.comm)
        case Fetch.name:
            assert call.wanted is not None
            return Fetch(home, call.comm, call.wanted)
    raise AssertionError(f"unknown transport {call.transport!r} got past validation")


def head_ranges(call: Call, q: Tensor, k: Tensor, v: Tensor) -> Ranges:
    """Ranges of kv heads, each with its chunks of query rows, so that partial results fit `call.workspace_bytes`.

    Every rank makes the same number of ranges and chunks, whatever it holds, since each makes collectives.

    Args:
        call: the call.
        q, k, v: local queries, keys and values.
    """
    width = max(q.shape[-1], v.shape[-1])  # of partial dq and partial outputs, so that backward has forward's chunks
    head_bytes = call.topk * call.backend.bytes_per_slot(width, q.dtype)
    most = call.plan.plan.layout.most_local_tokens
    return ranges_of(len(q), most, q.shape[1], k.shape[1], head_bytes, call.workspace_bytes)


class Replayed(Generic[T]):
    """What a resident transport yields: taken as it arrives the first time, kept for the chunks of rows that follow."""

    def __init__(self, source: Iterator[T]) -> None:
        self._source = source
        self.kept: list[T] = []

    def __iter__(self) -> Iterator[T]:
        yield from self.kept
        for item in self._source:
            self.kept.append(item)
            yield item


def unit_stride(x: Tensor) -> Tensor:
    """`x`, copied only where its last dimension is not dense (an expanded gradient, a transposed input)."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _gradient_room(call: Call, dk: Tensor, dv: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """Where the home blocks' gradients accumulate: in place when each is written once, else in accumulation dtype."""
    if call.comm.size == 1 and chunks == 1:
        return dk, dv
    acc = accumulate_dtype(dk.dtype)
    return torch.empty(dk.shape, dtype=acc, device=dk.device), torch.empty(dv.shape, dtype=acc, device=dv.device)


def _kv_part(call: Call, part: Part) -> KVPart:
    return KVPart(part.k, part.v, part.start, _block_length(call.plan.plan, part.k.device))


@lru_cache(maxsize=64)
def device_rows(plan: RankPlan, device: torch.device) -> QueryRows:
    """Where the rank's rows stand, on the device."""
    return query_rows(plan.block, plan.first_block, plan.position, device)


@lru_cache(maxsize=64)
def _block_length(plan: HomePlan, device: torch.device) -> Tensor:
    return torch.from_numpy(plan.blocks.length.astype(np.int32)).to(device)
