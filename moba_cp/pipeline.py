"""MoBA attention over a context-parallel group, step by step: where `kernels` and `parallel` meet.

home blocks -> centroids -> gate -> routing lists -> exchange -> block attention -> merge; backward walks the same parts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .call import Call, head_ranges, work_of
from .chunks import Chunk, Ranges
from .kernels import Backend, KVPart, QueryRows, RoutingLists, backend_for, query_rows
from .kernels.torch_backend import accumulate_dtype
from .parallel.blocks import HomePlan, RankPlan
from .parallel.comm import SideStream
from .parallel.exchanges import (
    Arrived,
    Exchange,
    Part,
    PartGradient,
    Route,
    Visit,
    of_heads,
    open_backward,
    open_forward,
)
from .parallel.home import HomeBlocks, bring_home, centroid_start, gather_centroids, send_back
from .parallel.rows import add_pairs
from .saving import put_tensors, taken
from .selection import Routing, over_heads
from .strides import readable, unit_stride


@dataclass(frozen=True)
class Saved:
    """What backward needs of a forward pass, besides its inputs and its output.

    Attributes:
        lse: `[Hq, T]`.
        selected: `[Hq, T, topk]`, of the gate.
        lists: routing lists of the chunks in turn, if they are kept; else empty.
        route: what the exchange decided.
    """

    lse: Tensor
    selected: Tensor
    lists: tuple[RoutingLists, ...]
    route: Route


def forward(call: Call, q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> tuple[Tensor, Saved]:
    """Output, log-sum-exp and selected blocks of the local rows, which `routing` decides.

    Args:
        call: decided once for forward and backward.
        q, k, v: `[T, Hq, D]`, `[T, Hkv, D]`, `[T, Hkv, Dv]`: the local tokens.
        routing: what selects blocks.

    Returns:
        the output `[T, Hq, Dv]`, and what backward needs beside it.
    """
    if call.replays is None:
        return _forward(call, q, k, v, routing)
    *_, out, saved = put_tensors(*forward_taken(call, q, k, v, routing))
    return out, saved


def forward_taken(call: Call, q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> tuple[Any, list[Tensor]]:
    """`forward`, for autograd: `(q, k, v, output, Saved)` without its tensors, and these; see `saving.taken`."""
    make = lambda: (q, k, v, *_forward(call, q, k, v, routing))  # noqa: E731
    return taken(make()) if call.replays is None else call.replays.forward.run((q, k, v), make)


def _forward(call: Call, q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> tuple[Tensor, Saved]:
    q, k, v = (readable(x) for x in (q, k, v))
    home = bring_home(call.plan, k, v, call.comm)
    rows = device_rows(call.plan, q.device)
    ranges = head_ranges(call, q, k, v)
    opening = open_forward(call.requested, home, call.comm, work_of(call, ranges, q, k))
    selected = select_blocks(call, q, home, rows, routing)
    exchange, route = opening.route(
        partial(call.backend.wanted_pairs, selected, n_blocks=call.n_blocks, kv_heads=k.shape[1])
    )
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), call.backend.new_lse(q)
    lists_of = routed_ahead(call, ranges, selected)
    keep_lists = call.keep_lists and ranges == head_ranges(call, q, k, v, backward=True)
    kept = []
    for visit, (_, chunks) in zip(visits(exchange, ranges), ranges, strict=True):
        for number, chunk in enumerate(chunks):
            lists = next(lists_of)
            if keep_lists:
                kept.append(lists)
            _forward_chunk(
                call, chunk, lists, q, rows, selected, exchange.forward(visit, number), out, lse, routing.weights
            )
            del lists
    return out, Saved(lse, selected, tuple(kept), route)


def _forward_chunk(
    call: Call,
    chunk: Chunk,
    lists: RoutingLists,
    q: Tensor,
    rows: QueryRows,
    selected: Tensor,
    parts: Iterator[Part],
    out: Tensor,
    lse: Tensor,
    weights: Tensor | None,
) -> None:
    """Output and log-sum-exp of one chunk; its partial results live no longer than this."""
    here, chosen = rows.slice(chunk.rows.start, chunk.rows.stop), chunk.of_heads(selected)
    partials = call.backend.new_partials(chosen, out.shape[-1], q.dtype)
    scale = call.config.scale(q.shape[-1])
    for part in call.stage.taking(parts, "wait for keys and values"):
        with call.stage(f"attend {part.name}"):
            call.backend.attend(chunk.of_rows(q), _kv_part(call, part), lists, here, scale, partials)
    with call.stage("merge"):
        call.backend.merge(partials, selected=chosen, out=chunk.of_rows(out), lse=chunk.of_heads(lse))
    if weights is not None:
        found = call.backend.block_weights(partials, selected=chosen)
        chunk.of_heads(weights).copy_(found)


def backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    dout: Tensor,
    *,
    out: Tensor | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the local rows; dk and dv summed over every rank that used them.

    Args:
        call, q, k, v: of the forward pass.
        saved: what it returned beside the output.
        dout: `[T, Hq, Dv]`, the output's gradient.
        out, delta: one of them: the output, or `Backend.delta` of it and `dout`. Recorded calls take the output.

    Returns:
        gradients in the shapes and the dtype of q, k and v.
    """
    if call.replays is None:
        return _backward(call, q, k, v, saved, dout, out, delta)
    assert delta is None
    return backward_taken(call, *taken((q, k, v, out, saved)), dout)


def backward_taken(call: Call, kept: Any, tensors: Sequence[Tensor], dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` of what `forward_taken` gave."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, saved = put_tensors(kept, tensors)
        return _backward(call, q, k, v, saved, dout, out)

    if call.replays is None:
        return make()
    dq, dk, dv = call.replays.backward.run((*tensors, dout), make)[1]
    return dq, dk, dv


def _backward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Saved,
    dout: Tensor,
    out: Tensor | None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, dout = readable(q), readable(k), readable(v), readable(dout)
    home = bring_home(call.plan, k, v, call.comm)
    rows = device_rows(call.plan, q.device)
    ranges = head_ranges(call, q, k, v, backward=True)
    exchange = open_backward(saved.route, home, call.comm, work_of(call, ranges, q, k))
    if delta is None:
        assert out is not None
        with call.stage("delta"):
            delta = call.backend.delta(out=out, dout=dout)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dtype = k.dtype if call.rounds else accumulate_dtype(k.dtype)
    dk = torch.empty(home.k.shape, dtype=dtype, device=k.device)
    dv = torch.empty(home.v.shape, dtype=dtype, device=v.device)
    lists_of = iter(saved.lists) if saved.lists else routed_ahead(call, ranges, saved.selected)
    alone = call.comm.size == 1
    in_place = alone and (dtype == accumulate_dtype(k.dtype) or all(len(of_range) == 1 for _, of_range in ranges))
    side = SideStream(torch.device("cpu") if alone else q.device, "gradients")
    finish: Callable[[], None] = lambda: None  # noqa: E731
    for visit, (heads, chunks) in zip(visits(exchange, ranges), ranges, strict=True):
        home_dk, home_dv = of_heads(dk, heads), of_heads(dv, heads)
        sum_dk, sum_dv = (home_dk, home_dv) if in_place else (_accumulator(home_dk), _accumulator(home_dv))
        for number, chunk in enumerate(chunks):
            parts = exchange.backward(visit, number, sum_dk, sum_dv)
            _backward_chunk(call, chunk, next(lists_of), q, dout, delta, rows, saved, parts, dq)
        # Gradients of one range travel, and are added, while the next range is computed. Without other ranks nothing travels,
        # and sums are rounded at once: a side stream would hold those of every range that the host has enqueued.
        finish()
        side.mark()
        arrive = exchange.reduce(visit)
        if not alone:
            finish = partial(_finish_range, call, side, arrive, sum_dk, sum_dv, home_dk, home_dv)
        elif not in_place:
            _finish_range(call, side, arrive, sum_dk, sum_dv, home_dk, home_dv)
        del sum_dk, sum_dv  # before those of the next range are made
    finish()
    with call.stage("return gradients"):
        side.join(side.done())
    return dq, *send_back(call.plan, dk, dv, call.comm)


def _finish_range(
    call: Call,
    side: SideStream,
    arrive: Callable[[], list[Arrived]],
    sum_dk: Tensor,
    sum_dv: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Add what other ranks return, and round once into `dk`, `dv`: on `side`, with several ranks beside the next range, which is
    enqueued already."""
    with side.use():
        arrived = arrive()
        for part in arrived:
            if part.pairs is not None:
                add_pairs(part.values, part.pairs, sum_dk, sum_dv)
        whole = [part.values for part in arrived if part.pairs is None]
        call.backend.add_gradients(own_dk=sum_dk, own_dv=sum_dv, arrived=whole, dk=dk, dv=dv)
    side.uses(sum_dk, sum_dv, *(part.values for part in arrived))


def _backward_chunk(
    call: Call,
    chunk: Chunk,
    lists: RoutingLists,
    q: Tensor,
    dout: Tensor,
    delta: Tensor,
    rows: QueryRows,
    saved: Saved,
    parts: Iterator[PartGradient],
    dq: Tensor,
) -> None:
    """dq of one chunk, and its share of dk and dv of every part."""
    here, selected = rows.slice(chunk.rows.start, chunk.rows.stop), chunk.of_heads(saved.selected)
    partials = call.backend.new_dq_partials(selected, lists, q, dout, keeps_ds=chunk.keeps_ds)
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
                accumulate=gradient.accumulate,
            )
    with call.stage("merge dq"):
        call.backend.merge_dq(partials, selected=selected, dq=chunk.of_rows(dq))


def visits(exchange: Exchange, ranges: Ranges) -> Iterator[Visit]:
    """A visit per range of kv heads, the next one started before the current one is worked on."""
    started = deque([exchange.start(ranges[0][0])])
    for index in range(len(ranges)):
        if index + 1 < len(ranges):
            started.append(exchange.start(ranges[index + 1][0]))
        yield started.popleft()


def routed_ahead(call: Call, ranges: Ranges, selected: Tensor) -> Iterator[RoutingLists]:
    """Routing lists of each chunk in turn; on CUDA those of the next chunk are made beside the work of the current one."""
    chunks = [chunk for _, of_range in ranges for chunk in of_range]
    if len(chunks) == 1:
        yield _route(call, chunks[0], selected)
        return
    side = SideStream(selected.device, "routing lists")
    side.mark()
    ahead: deque[tuple[RoutingLists, torch.cuda.Event | None]] = deque()
    for index in range(len(chunks) + 1):
        if index < len(chunks):
            with side.use():
                ahead.append((_route(call, chunks[index], selected), side.done()))
        if index > 0:
            lists, done = ahead.popleft()
            side.join(done, *lists.tensors())
            yield lists
            del lists


def _route(call: Call, chunk: Chunk, selected: Tensor) -> RoutingLists:
    kv_heads = chunk.heads.stop - chunk.heads.start
    with call.stage("lists"):
        return call.backend.route(
            chunk.of_heads(selected), n_blocks=call.n_blocks, kv_heads=kv_heads, block_size=call.block_size
        )


def select_blocks(call: Call, q: Tensor, home: HomeBlocks, rows: QueryRows, routing: Routing) -> Tensor:
    """Centroids of home blocks, all-gathered; then the gate: `[Hq, T, topk]`. Nothing of that where the caller selected."""
    if routing.selected is not None:
        return routing.selected
    if routing.q_gate is not None:
        return select_by_gates(call, routing, q.shape[1])
    return _gate(call, call.backend, q, home.k, rows)


def select_by_gates(call: Call, routing: Routing, q_heads: int) -> Tensor:
    """`[Hq, T, topk]` by the scores of `routing.q_gate` and `routing.k_gate`."""
    assert routing.q_gate is not None
    assert routing.k_gate is not None
    q, k = unit_stride(routing.q_gate), unit_stride(routing.k_gate)
    if call.topk > 1:
        k = bring_home(call.plan, k, k[..., :0], call.comm).k
    selected = _gate(call, backend_for(q.device, q.dtype), q, k, device_rows(call.plan, q.device))
    return over_heads(selected, q_heads)


def _gate(call: Call, backend: Backend, q: Tensor, home_k: Tensor, rows: QueryRows) -> Tensor:
    if call.topk > 1:
        start = centroid_start(call.plan, q.device)
        with call.stage("centroids"):
            local = backend.centroids(home_k, start=start, block_size=call.block_size)
            centroids = gather_centroids(call.plan, local, call.comm)
    else:
        centroids = q.new_zeros(call.n_blocks, home_k.shape[1], q.shape[-1])
    with call.stage("gate"):
        return backend.select_blocks(q, centroids=centroids, rows=rows, topk=call.topk)


def _accumulator(gradient: Tensor) -> Tensor:
    """An uninitialized sum for the gradients of home blocks, in the accumulation dtype."""
    return torch.empty(gradient.shape, dtype=accumulate_dtype(gradient.dtype), device=gradient.device)


def _kv_part(call: Call, part: Part) -> KVPart:
    return KVPart(part.k, part.v, part.start, _block_length(call.plan.plan, part.k.device))


def device_rows(plan: RankPlan, device: torch.device) -> QueryRows:
    """Where the rank's rows stand, on the device; kept with the plan."""
    make = lambda: query_rows(plan.block, plan.first_block, plan.position, device)  # noqa: E731
    return plan.plan.memo.get(("query rows", plan.rank, device), make)


def _block_length(plan: HomePlan, device: torch.device) -> Tensor:
    make = lambda: torch.from_numpy(plan.blocks.length.astype(np.int32)).to(device)  # noqa: E731
    return plan.memo.get(("block length", device), make)
