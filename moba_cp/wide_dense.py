"""Full causal attention where neighbouring ranks split the heads: heads in, attention over whole ranges of tokens, heads out.

What a head group holds together is put in the order of positions, so one kernel computes a whole sequence where the group is all
ranks. Elsewhere the sequence ranks pass keys and values on as without head groups. Forward keeps the head-sharded tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .parallel.comm import CommGroup
from .parallel.cost import GATHER_BYTES, CallSizes
from .parallel.heads import HeadsBack, HeadSplit, HeadTransfer, Share, add_copies, head_transfer
from .parallel.layout import SequenceLayout
from .parallel.partition import merge_adjacent, partition_of
from .parallel.plan_cache import PLANS, Memo
from .parallel.splits import HEADS
from .parallel.topology import topology_of
from .strides import unit_stride
from .wide import divide, gradient_dtype

COMMS = (HEADS, f"{HEADS}+ring", f"{HEADS}+all_gather")
"""Values of `comm` of full attention that split heads."""
Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
AttendBackward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class WideDense:
    """How one call moves heads.

    Attributes:
        transfer: over the head group.
        heads: how heads are divided.
        sequence: the ranks of the same heads.
        layout: over sequence ranks, each in the order of positions.
        order: position order of this group's tokens, or None where they are in order.
        back: its inverse.
        exchange: what moves keys and values among sequence ranks: "ring", "all_gather" or "auto".
    """

    transfer: HeadTransfer
    heads: HeadSplit
    sequence: CommGroup
    layout: SequenceLayout
    order: Tensor | None
    back: Tensor | None
    exchange: str


def wide_dense(
    comm: str,
    head_parallel: int | None,
    group: CommGroup,
    sizes: CallSizes,
    layout: SequenceLayout,
    device: torch.device,
) -> WideDense | None:
    """The head group of a call, or None where heads are not split; every rank decides alike.

    Args:
        comm: one of `COMMS`, or "auto", which decides by bytes (`choose_heads`); other values split nothing.
        head_parallel: ranks of a head group; None: as in `moba_attention`.
        group: all ranks, which have agreed on the call.
        sizes: of the call.
        layout: of the call.
        device: where its tensors are.
    """
    if group.size == 1 or (comm != "auto" and comm not in COMMS):
        return None
    exchange = "auto"
    if comm == "auto":
        if head_parallel is None and not may_pay(sizes):
            return None
        size = head_parallel or choose_heads(sizes, topology_of(group, device).splits(sizes.q_heads))
        if size == 1:
            return None
        comm, head_parallel = (HEADS, None) if size == group.size else (f"{HEADS}+ring", size)
    elif comm != HEADS:
        exchange = comm.removeprefix(f"{HEADS}+")
    divided = divide(comm, head_parallel, group, sizes, layout, device, False)
    if divided.split.size == 1:
        return None
    ordered = in_order(divided.layout, divided.wide_rank)
    transfer = head_transfer(divided.neighbours, divided.tokens, device)
    order, back = ordered.tensors(device)
    return WideDense(transfer, divided.heads, divided.sequence, ordered.layout, order, back, exchange)


def may_pay(sizes: CallSizes) -> bool:
    """Whether keys and values are more than what is gathered at once."""
    tokens = sizes.tokens * sizes.cp_size
    return tokens * sizes.kv_heads * (sizes.dim + sizes.dim_v) * sizes.itemsize > GATHER_BYTES


def choose_heads(sizes: CallSizes, splits: tuple[int, ...]) -> int:
    """The split that receives the fewest bytes: heads in and out grow with ``(U - 1) / U``, keys and values (in backward again,
    with fp32 gradients) with ``P / U - 1``. Ties go to the smaller one."""
    kv = sizes.kv_heads * (sizes.dim + sizes.dim_v)
    moved = sizes.q_heads * (sizes.dim + sizes.dim_v)
    times = 1 + sizes.gradient_itemsize / sizes.itemsize + 1 if sizes.gradients else 1

    def received(size: int) -> float:
        copies = max(1.0, size / sizes.kv_heads)  # of kv heads that several members need
        heads = (moved + kv * copies) * (size - 1) / size * (2 if sizes.gradients else 1)
        return heads + kv * copies * times * (sizes.cp_size / size - 1)

    return min(splits, key=lambda size: (received(size), size))


@dataclass(frozen=True, eq=False)
class _InOrder:
    """As the plan cache keeps it: the layout over sequence ranks with each rank's tokens in the order of positions, and one
    rank's tokens in that order, int32; None where they are in order."""

    layout: SequenceLayout
    order: np.ndarray | None
    memo: Memo = field(default_factory=Memo, repr=False)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The order and its inverse on the device."""
        order = self.order
        if order is None:
            return None, None

        def make() -> tuple[Tensor, Tensor]:
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order), dtype=np.int32)
            return torch.from_numpy(order).to(device), torch.from_numpy(inverse).to(device)

        return self.memo.get(device, make)


def in_order(layout: SequenceLayout, wide_rank: int) -> _InOrder:
    """See `_InOrder`; kept in `plan_cache.PLANS`.

    Args:
        layout: over sequence ranks.
        wide_rank: this rank's number among them.
    """

    def make() -> _InOrder:
        held = [layout.runs_of(rank) for rank in range(layout.cp_size)]
        runs = [merge_adjacent(of_rank[np.argsort(of_rank[:, 0])]) for of_rank in held]
        places = layout.local_indices(wide_rank).numpy()
        order = np.argsort(places, kind="stable").astype(np.int32)
        same = bool((np.diff(places) > 0).all())
        cu_seqlens = layout.cu_seqlens_array
        return _InOrder(SequenceLayout(cu_seqlens, partition_of(runs, cu_seqlens)), None if same else order)

    return PLANS.get(("in order", layout, wide_rank), make)


def forward(call: WideDense, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output `[T, Hq, Dv]` of this rank's tokens, and what backward needs."""
    split = call.heads
    shares = [
        Share(unit_stride(x), slice(0, count), count, copies)
        for x, count, copies in (
            (q, split.q_heads, 1),
            (k, split.kv_heads, split.copies),
            (v, split.kv_heads, split.copies),
        )
    ]
    wide = [_ordered(x, call.order) for x in call.transfer.start_in(shares)()]
    out, lse = attend(*wide)
    whole = q.new_empty(*q.shape[:2], v.shape[2])
    back = HeadsBack(call.transfer, [whole])
    back.start([_ordered(out, call.back)], [slice(0, split.q_heads)])
    back.finish()
    return whole, (*wide, out, lse)


def backward(
    call: WideDense, attend_backward: AttendBackward, saved: tuple[Tensor, ...], dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's tokens, in the shapes and the dtype of q, k and v; `dout` is `[T, Hq, D]`."""
    split = call.heads
    q, k, v, out, lse = saved
    share = Share(unit_stride(dout), slice(0, split.q_heads), split.q_heads)
    (come,) = call.transfer.start_in([share])()
    gradients = attend_backward(q, k, v, out, lse, _ordered(come, call.order))
    travels = gradient_dtype(split, q.dtype)
    parts = [_ordered(x, call.back).to(dtype) for x, dtype in zip(gradients, (q.dtype, travels, travels))]
    ranges = [slice(0, split.q_heads), *2 * [slice(0, split.kv_heads)]]
    wholes = [
        dout.new_empty(len(dout), split.size * of.stop, part.shape[2], dtype=part.dtype)
        for part, of in zip(parts, ranges)
    ]
    back = HeadsBack(call.transfer, wholes)
    back.start(parts, ranges)
    back.finish()
    dq, dk, dv = wholes
    return dq, add_copies(dk, split.copies, q.dtype), add_copies(dv, split.copies, q.dtype)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x.contiguous() if order is None else x.index_select(0, order)
