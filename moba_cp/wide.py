"""Attention where neighbouring ranks split the heads: heads in, the pipeline over wide ranks, heads out.

Heads move in slabs, ranges of each member's kv heads with their q heads. Each slab is an attention problem of its own: the next
one comes in, and the output of the last one goes out, while one is computed. Forward keeps the head-sharded q, k, v and
output, so backward brings the output's gradient in and takes dq, dk and dv out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import pipeline
from .kernels.torch_backend import accumulate_dtype
from .parallel.comm import CommGroup
from .parallel.cost import CallSizes
from .parallel.exchanges import Route
from .parallel.heads import HeadsBack, HeadSplit, HeadTransfer, add_copies, head_groups, head_split, wide_layout
from .parallel.layout import SequenceLayout
from .parallel.splits import Split, choose_split, needs_topology
from .parallel.topology import topology_of

MOST_SLABS = 4
"""Slabs of one call at most: each costs the host one more pass through the pipeline."""
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

    inner: pipeline.Call
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
        kept: for backward: dataclasses and tuples of tensors.
    """

    out: Tensor
    selected: Tensor
    route: Route
    kept: Any


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


def widen(call: pipeline.Call, divided: Division, sizes: CallSizes, returns_selected: bool) -> pipeline.Call | WideCall:
    """`call`, which is one among the sequence ranks, with heads in and out around it where heads are split."""
    if divided.split.size == 1:
        return call
    slabs = slabs_of(divided.heads, divided.layout.most_local_tokens * sizes.dim * sizes.itemsize)
    transfer = HeadTransfer(divided.neighbours, divided.tokens)
    return WideCall(call, transfer, divided.heads, slabs, returns_selected)


def run_forward(call: pipeline.Call | WideCall, q: Tensor, k: Tensor, v: Tensor) -> Done:
    """Forward of a call, whether or not heads are split."""
    if isinstance(call, WideCall):
        return forward(call, q, k, v)
    saved = pipeline.forward(call, q, k, v)
    return Done(saved.out, saved.selected, saved.route, (q, k, v, saved))


def run_backward(call: pipeline.Call | WideCall, kept: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of a call whose forward kept `kept`."""
    if isinstance(call, WideCall):
        return backward(call, kept, dout)
    q, k, v, saved = kept
    return pipeline.backward(call, q, k, v, saved, dout)


def number_of(call: pipeline.Call | WideCall) -> int:
    """The call's number in its group; see `parallel.backward_order`."""
    return call.inner.number if isinstance(call, WideCall) else call.number


def slabs_of(split: HeadSplit, head_bytes: int) -> tuple[Slab, ...]:
    """Slabs of a call whose longest wide rank has `head_bytes` bytes of queries per q head."""
    group = split.q_heads // split.kv_heads
    per_slab = max(1, -(-split.kv_heads // MOST_SLABS), -(-SLAB_BYTES // max(1, group * head_bytes)))
    starts = range(0, split.kv_heads, per_slab)
    ends = [min(start + per_slab, split.kv_heads) for start in starts]
    return tuple(Slab(slice(a, b), slice(a * group, b * group)) for a, b in zip(starts, ends, strict=True))


def forward(call: WideCall, q: Tensor, k: Tensor, v: Tensor) -> Done:
    """Output of the local tokens."""
    split, transfer = call.split, call.transfer
    q, k, v = (pipeline.unit_stride(x) for x in (q, k, v))
    out = HeadsBack(transfer, q.shape[1], v.shape[2], q.dtype, q.device)
    chosen: list[Tensor] = []
    kept = []

    def start(slab: Slab) -> list[Callable[[], Tensor]]:
        return [
            transfer.start_in(q, slab.q, split.q_heads),
            *(transfer.start_in(x, slab.kv, split.kv_heads, split.copies) for x in (k, v)),
        ]

    for slab, inputs in zip(call.slabs, _one_ahead(call, start), strict=True):
        of_q, of_k, of_v = inputs
        saved = pipeline.forward(call.inner, of_q, of_k, of_v)
        out.start(saved.out, slab.q)
        kept.append(SavedSlab(of_q, of_k, of_v, saved))
        if call.returns_selected:
            chosen.append(saved.selected)
    selected = _selected_back(call, chosen) if call.returns_selected else q.new_empty(0, dtype=torch.int32)
    with call.inner.stage("wait for heads out"):
        whole = out.finish()
    return Done(whole, selected, kept[0].saved.route, tuple(kept))


def backward(call: WideCall, slabs: Sequence[SavedSlab], dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the local tokens."""
    split, transfer = call.split, call.transfer
    dout = pipeline.unit_stride(dout)
    first, kv_heads = slabs[0], split.kv_heads * split.size
    dtype = first.k.dtype
    # Copies of a kv head are summed where the tokens are, so each comes back as it was accumulated.
    travels = dtype if split.copies == 1 else accumulate_dtype(dtype)
    dq = HeadsBack(transfer, dout.shape[1], first.q.shape[2], dtype, dout.device)
    dk = HeadsBack(transfer, kv_heads, first.k.shape[2], travels, dout.device)
    dv = HeadsBack(transfer, kv_heads, first.v.shape[2], travels, dout.device)

    def start(slab: Slab) -> list[Callable[[], Tensor]]:
        return [transfer.start_in(dout, slab.q, split.q_heads)]

    for slab, kept, inputs in zip(call.slabs, slabs, _one_ahead(call, start), strict=True):
        of_q, of_k, of_v = pipeline.backward(call.inner, kept.q, kept.k, kept.v, kept.saved, inputs[0])
        dq.start(of_q, slab.q)
        dk.start(of_k, slab.kv)
        dv.start(of_v, slab.kv)
    with call.inner.stage("wait for heads out"):
        return dq.finish(), *(add_copies(back.finish(), split.copies, dtype) for back in (dk, dv))  # type: ignore[return-value]


def _one_ahead(call: WideCall, start: Callable[[Slab], list[Callable[[], Tensor]]]) -> Iterator[list[Tensor]]:
    """What `start` brings for each slab in turn; the next slab is under way before one is waited for."""
    coming: deque[list[Callable[[], Tensor]]] = deque()
    for slab in call.slabs:
        coming.append(start(slab))
        if len(coming) > 1:
            yield _waited(call, coming.popleft())
    yield _waited(call, coming.popleft())


def _waited(call: WideCall, coming: list[Callable[[], Tensor]]) -> list[Tensor]:
    with call.inner.stage("wait for heads in"):
        return [wait() for wait in coming]


def _selected_back(call: WideCall, chosen: Sequence[Tensor]) -> Tensor:
    """The selected blocks `[Hq, T, topk]` of the local tokens; not counted as traffic of the call."""
    quiet = call.transfer.without_traffic()
    q_heads, topk = call.split.q_heads * call.split.size, chosen[0].shape[2]
    back = HeadsBack(quiet, q_heads, topk, torch.int32, chosen[0].device)
    for slab, selected in zip(call.slabs, chosen, strict=True):
        back.start(selected.transpose(0, 1).to(torch.int32).contiguous(), slab.q)
    return back.finish().transpose(0, 1).contiguous()
