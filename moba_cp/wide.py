"""Attention where neighbouring ranks split the heads: heads in, the pipeline over wide ranks, heads out.

Heads move in slabs, ranges of each member's kv heads with their q heads. Each slab is an attention problem of its own: the next
one comes in, and the output of the last one goes out, while one is computed. Forward keeps the head-sharded q, k and v, and the
output of the local tokens. Backward brings the output's gradient in, with one number per row and head that stands for the output
(`Backend.delta`), and takes dq, dk and dv out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import pipeline
from .call import Call
from .kernels.torch_backend import accumulate_dtype
from .parallel.comm import CommGroup
from .parallel.cost import CallSizes
from .parallel.exchanges import Route
from .parallel.heads import (
    HeadsBack,
    HeadSplit,
    HeadTransfer,
    Share,
    add_copies,
    head_groups,
    head_split,
    head_transfer,
    wide_layout,
)
from .parallel.layout import SequenceLayout
from .parallel.splits import Split, choose_split, needs_topology
from .parallel.topology import topology_of
from .saving import put_tensors, taken
from .selection import Routing
from .strides import unit_stride

SLAB_BYTES = 32 << 20
"""A slab's queries on the longest wide rank take at least this many bytes: less would not hide what a slab costs the host."""


@dataclass(frozen=True)
class Slab:
    """A range of each member's kv heads, and of the q heads that read them."""

    kv: slice
    q: slice


@dataclass(frozen=True)
class WideCall:
    """One attention call on one rank of a head group.

    Attributes:
        inner: the call over wide ranks: plan, group and exchange of the sequence.
        transfer: moves heads between the members.
        split: how heads are divided.
        slabs: which heads move together, alike on all ranks.
        returns_selected: the caller wants the selected blocks of its own tokens.
    """

    inner: Call
    transfer: HeadTransfer
    split: HeadSplit
    slabs: tuple[Slab, ...]
    returns_selected: bool


@dataclass(frozen=True)
class SavedSlab:
    """What backward needs of one slab: `[wide tokens, heads of the slab, ...]`, and what the pipeline saved."""

    q: Tensor
    k: Tensor
    v: Tensor
    saved: pipeline.Saved


@dataclass(frozen=True)
class Done:
    """What a forward pass gives.

    Attributes:
        out: `[T, Hq, Dv]`.
        selected: `[Hq, T, topk]`; empty where heads are split and the call does not return it.
        route: what the exchange decided; where heads are split, for the first slab.
        kept, tensors: for backward: dataclasses and tuples, and the tensors that were taken out of them (`saving.taken`).
    """

    out: Tensor
    selected: Tensor
    route: Route
    kept: Any
    tensors: list[Tensor]


@dataclass(frozen=True)
class Division:
    """How a call divides its group.

    Attributes:
        split: the decision.
        heads: how heads are divided.
        whole, neighbours, sequence: this rank's group, the ranks that split heads with it, and those of the same heads.
        layout: over sequence ranks.
        tokens: of each of the neighbours.
    """

    split: Split
    heads: HeadSplit
    whole: CommGroup
    neighbours: CommGroup
    sequence: CommGroup
    layout: SequenceLayout
    tokens: tuple[int, ...]

    @property
    def wide_rank(self) -> int:
        """This rank's number among the sequence ranks."""
        return self.whole.rank // self.split.size


def call_sizes(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, gradients: bool) -> CallSizes:
    """Sizes of a call, for the cost model."""
    return CallSizes(
        layout.cp_size,
        layout.most_local_tokens,
        *(q.shape[1], k.shape[1], q.shape[2], v.shape[2]),
        q.itemsize,
        accumulate_dtype(q.dtype).itemsize,
        gradients,
    )


def divide(
    comm: str,
    head_parallel: int | None,
    group: CommGroup,
    sizes: CallSizes,
    layout: SequenceLayout,
    device: torch.device,
    with_nodes: bool,
) -> Division:
    """Decide over how many ranks heads are split, and make the groups for it; the ranks have agreed on the call.

    Args:
        comm, head_parallel: arguments of the call.
        group: all ranks.
        sizes: of the call.
        layout: of the call.
        device: where its tensors are.
        with_nodes: count bytes between nodes, whether or not these decide anything.

    Raises:
        ValueError: see `choose_split`.
    """
    topology = topology_of(group, device) if with_nodes or needs_topology(comm, head_parallel, sizes) else None
    split = choose_split(comm, head_parallel, sizes, topology)
    whole = CommGroup(group.group, group.size, group.traffic, topology.nodes if topology else ())
    neighbours, sequence = head_groups(whole, split.size, device)
    first = whole.rank // split.size * split.size
    return Division(
        split,
        head_split(sizes.q_heads, sizes.kv_heads, split.size),
        whole,
        neighbours,
        sequence,
        wide_layout(layout, split.size),
        tuple(layout.local_tokens(rank) for rank in range(first, first + split.size)),
    )


def widen(
    call: Call, divided: Division, sizes: CallSizes, device: torch.device, returns_selected: bool
) -> Call | WideCall:
    """`call`, which is one among the sequence ranks, with heads in and out around it where heads are split."""
    if divided.split.size == 1:
        return call
    slabs = slabs_of(divided.heads, divided.layout.most_local_tokens * sizes.dim * sizes.itemsize)
    transfer = head_transfer(divided.neighbours, divided.tokens, device)
    return WideCall(call, transfer, divided.heads, slabs, returns_selected)


def run_forward(call: Call | WideCall, q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Done:
    """Forward of a call, whether or not heads are split; arguments as of `pipeline.forward`."""
    if isinstance(call, WideCall):
        return forward(call, q, k, v, routing)
    kept, tensors = pipeline.forward_taken(call, q, k, v, routing)
    *_, out, saved = kept
    out, selected, route = put_tensors((out, saved.selected, saved.route), tensors)
    return Done(out, selected, route, kept, tensors)


def run_backward(
    call: Call | WideCall, kept: Any, tensors: Sequence[Tensor], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a call whose forward kept `kept` and `tensors`, in the shapes and the dtype of q, k and v; `dout` is
    `[T, Hq, Dv]`."""
    if isinstance(call, WideCall):
        out, slabs = put_tensors(kept, tensors)
        return backward(call, out, slabs, dout)
    return pipeline.backward_taken(call, kept, tensors, dout)


def number_of(call: Call | WideCall) -> int:
    """The call's number in its group; see `parallel.backward_order`."""
    return call.inner.number if isinstance(call, WideCall) else call.number


def slabs_of(split: HeadSplit, head_bytes: int) -> tuple[Slab, ...]:
    """Slabs of a call whose longest wide rank has `head_bytes` bytes of queries per q head.

    A quarter of the heads, half of them, and a quarter: nothing hides how the first slab comes in and how the last one goes out,
    and each slab more costs the host another pass through the pipeline.
    """
    heads, group = split.kv_heads, split.q_heads // split.kv_heads
    least = max(1, -(-SLAB_BYTES // max(1, group * head_bytes)))
    quarter = max(least, -(-heads // 4))
    if heads < 2 * least or heads < 2:
        ends = [heads]
    elif heads - 2 * quarter < 1:
        ends = [heads - heads // 2, heads]
    else:
        ends = [quarter, heads - quarter, heads]
    starts = [0, *ends[:-1]]
    return tuple(Slab(slice(a, b), slice(a * group, b * group)) for a, b in zip(starts, ends, strict=True))


def forward(call: WideCall, q: Tensor, k: Tensor, v: Tensor, routing: Routing) -> Done:
    """Output `[T, Hq, Dv]` of the local tokens; arguments as of `pipeline.forward`. A selection of their rows comes in with the
    heads, and weights go back."""
    split, transfer = call.split, call.transfer
    q, k, v = (unit_stride(x) for x in (q, k, v))
    whole = q.new_empty(*q.shape[:2], v.shape[2])
    out = HeadsBack(transfer, [whole])
    kept, weights = [], []

    def shares(slab: Slab) -> list[Share]:
        return [
            Share(q, slab.q, split.q_heads),
            *(Share(x, slab.kv, split.kv_heads, split.copies) for x in (k, v)),
            *([] if routing.selected is None else [Share(routing.selected.transpose(0, 1), slab.q, split.q_heads)]),
        ]

    for slab, inputs in zip(call.slabs, _one_ahead(call, shares), strict=True):
        of_q, of_k, of_v, *of_selected = inputs
        here = _routing_of_slab(call, of_q, of_selected, routing)
        of_out, saved = pipeline.forward(call.inner, of_q, of_k, of_v, here)
        if here.weights is not None:
            weights.append(here.weights)
        out.start([of_out], [slab.q])
        kept.append(SavedSlab(of_q, of_k, of_v, saved))
    with call.inner.stage("wait for heads out"):
        out.finish()
    selected = q.new_empty(0, dtype=torch.int32)
    if call.returns_selected:
        selected = _rows_back(call, [slab.saved.selected.to(torch.int32) for slab in kept])
    if routing.weights is not None:
        routing.weights.copy_(_rows_back(call, weights))
    return Done(whole, selected, kept[0].saved.route, *taken((whole, tuple(kept))))


def backward(call: WideCall, out: Tensor, slabs: Sequence[SavedSlab], dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the local tokens, in the shapes and the dtype of q, k and v; `out` and `dout` are `[T, Hq, Dv]`."""
    split, transfer = call.split, call.transfer
    dout = unit_stride(dout)
    first, kv_heads = slabs[0], split.kv_heads * split.size
    dtype = first.k.dtype
    travels = gradient_dtype(split, dtype)
    tokens = len(dout)
    dq = dout.new_empty(tokens, dout.shape[1], first.q.shape[2])
    dk, dv = (dout.new_empty(tokens, kv_heads, x.shape[2], dtype=travels) for x in (first.k, first.v))
    back = HeadsBack(transfer, [dq, dk, dv])
    with call.inner.stage("delta"):
        delta = call.inner.backend.delta(out=out, dout=dout).t().unsqueeze(2)
    come_in = _one_ahead(call, lambda slab: [Share(x, slab.q, split.q_heads) for x in (dout, delta)])
    for slab, kept, (of_dout, of_delta) in zip(call.slabs, slabs, come_in, strict=True):
        of_rows = of_delta.squeeze(2).t().contiguous()
        gradients = pipeline.backward(call.inner, kept.q, kept.k, kept.v, kept.saved, of_dout, delta=of_rows)
        back.start(gradients, [slab.q, slab.kv, slab.kv])
    with call.inner.stage("wait for heads out"):
        back.finish()
    return dq, add_copies(dk, split.copies, dtype), add_copies(dv, split.copies, dtype)


def gradient_dtype(split: HeadSplit, dtype: torch.dtype) -> torch.dtype:
    """In what dk and dv of inputs of `dtype` go back: copies of a kv head as they were accumulated, since they are summed where
    the tokens are."""
    return dtype if split.copies == 1 else accumulate_dtype(dtype)


def _one_ahead(call: WideCall, shares: Callable[[Slab], list[Share]]) -> Iterator[list[Tensor]]:
    """What each slab's shares bring, in turn; the next slab is under way before one is waited for."""
    coming: deque[Callable[[], list[Tensor]]] = deque()
    for slab in call.slabs:
        coming.append(call.transfer.start_in(shares(slab)))
        if len(coming) > 1:
            yield _waited(call, coming.popleft())
    yield _waited(call, coming.popleft())


def _waited(call: WideCall, coming: Callable[[], list[Tensor]]) -> list[Tensor]:
    with call.inner.stage("wait for heads in"):
        return coming()


def _routing_of_slab(call: WideCall, q: Tensor, selected: list[Tensor], routing: Routing) -> Routing:
    """The routing of one slab's rows: `q` `[wide tokens, h, D]`, and `selected` `[wide tokens, h, topk]` if there is one."""
    weights = None
    if routing.weights is not None:
        weights = routing.weights.new_empty(q.shape[1], q.shape[0], call.inner.topk)
    return Routing(selected[0].transpose(0, 1) if selected else None, weights=weights)


def _rows_back(call: WideCall, slabs: Sequence[Tensor]) -> Tensor:
    """`[Hq, T, topk]` of the local tokens, of each slab's `[h, wide tokens, topk]`; not counted as traffic of the call."""
    transfer, first = call.transfer.without_traffic(), slabs[0]
    shape = transfer.mine, call.split.q_heads * call.split.size, first.shape[2]
    whole = torch.empty(shape, dtype=first.dtype, device=first.device)
    back = HeadsBack(transfer, [whole])
    for slab, rows in zip(call.slabs, slabs, strict=True):
        back.start([rows.transpose(0, 1).contiguous()], [slab.q])
    back.finish()
    return whole.transpose(0, 1).contiguous()
