"""Full causal attention over a context-parallel group, for layers that do not use MoBA. Needs neither Megatron nor Transformer
Engine.

Each rank's keys and values travel as one whole shard. Torch's fused attention computes each pair of shards, and the results merge
by log-sum-exp (`moba_cp.kernels.dense`). In backward, the gradients of a shard return in fp32 (`moba_cp.parallel.dense`). Shards
are split where documents and runs of tokens end, so every layout works. Under a zigzag layout, ranks have equal work. No
`tokens x tokens` mask exists, and with `ring` no rank ever holds all keys and values.

A document takes at least one kernel per pair of ranks that hold some of it: with thousands of short documents, launches of small
kernels dominate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .config import checked_scale
from .derivatives import (
    SavedTensors,
    can_refuse,
    first_derivative_only,
    no_forward_mode,
    refuse_transforms,
    refuse_transforms_around,
)
from .kernels import dense
from .kernels.torch_backend import accumulate_dtype
from .parallel import agreement, backward_order
from .parallel.comm import CommGroup, Traffic, process_group_of
from .parallel.dense import COMMS as FLAT_COMMS
from .parallel.dense import DenseTransport, Pair, Shard, equal_documents, transport, visible_pairs
from .parallel.layout import SequenceLayout
from .parallel.outside_graphs import outside_graphs
from .parallel.splits import check_split
from .parallel.topology import host
from .prepare import needs_gradients
from .stages import Stages
from .strides import unit_stride
from .tracing import infer_output, is_captured, without_numbers
from .validation import (
    RefusedTogether,
    call_facts,
    check_can_be_saved,
    check_capture,
    check_comm,
    check_layout,
    check_placement,
    check_tensors,
)
from .wide import call_sizes
from .wide_dense import COMMS as WIDE_COMMS
from .wide_dense import WideDense, wide_dense
from .wide_dense import backward as wide_dense_backward
from .wide_dense import forward as wide_dense_forward

COMMS = (*FLAT_COMMS, *WIDE_COMMS)
"""Values of `comm` of full attention."""


@outside_graphs
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    comm: str = "auto",
    head_parallel: int | None = None,
    traffic: Traffic | None = None,
) -> Tensor:
    """Full causal attention within each document of the layout. All ranks of the group must make the same call.

    The same call gives the same bits with any `comm` that splits no heads, except for dq on GPUs (see `moba_cp.kernels.dense`).

    Args:
        q: `[T, Hq, D]`, fp64, fp32, bf16 or fp16: this rank's queries in the order of `layout.local_indices(rank)`.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]`, its keys and values; `Hq` must be a multiple of `Hkv`.
        softmax_scale: scale of the logits; None for `D ** -0.5`.
        layout: which rank holds which token.
        group: the ranks of the layout, or a `DeviceMesh` of one dimension; None for the default group, or for none at all when
            `layout.cp_size == 1`.
        comm: "ring" (memory for two shards of keys and values, whatever the number of ranks), "all_gather" (one collective;
            memory for all of them), "a2a" (heads are split over all ranks, so each computes whole sequences of its heads),
            "a2a+ring", "a2a+all_gather" (heads over ranks of a node, keys and values between), or "auto", which gathers up to
            32 MiB and beyond takes what receives the fewest bytes (`moba_cp.wide_dense.choose_heads`).
        head_parallel: ranks that split heads, as in `moba_attention`.
        traffic: counts what is sent and received, also by the backward pass.

    Returns:
        `[T, Hq, Dv]`; differentiable in q, k and v, with gradients summed over the group.

    Raises:
        TypeError, ValueError: on every rank, before any tensor is sent: an argument of some rank is not as described, ranks
            disagree, or a CUDA graph is capturing a call over several ranks.
        RuntimeError: a rank did not take part within the group's timeout.
    """
    group = process_group_of(group)
    with RefusedTogether(layout, group, q, k, v):
        check_layout(layout)
        check_comm(comm, COMMS)
        check_tensors(q, k, v)
        refuse_transforms(q=q, k=k, v=v)
        refuse_transforms_around()
        check_placement(q, layout, group)
        check_split(comm, head_parallel, q.shape[1], layout.cp_size)
        softmax_scale = checked_scale(softmax_scale)
        if traffic is not None and not isinstance(traffic, Traffic):
            raise TypeError(f"traffic must be a Traffic or None, got {type(traffic).__name__}")
        check_capture(is_captured(q), layout)
        check_can_be_saved(needs_gradients(q, k, v), q=q, k=k, v=v)
        if layout.cp_size > 1:
            host()  # refused here, if it cannot be told to the others
    if without_numbers(q, k, v):
        return infer_output(q, k, v)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    comm_group, wide, number = CommGroup(group, layout.cp_size, traffic), None, 0
    if comm_group.size > 1:
        gradients = needs_gradients(q, k, v)
        facts = call_facts(q, k, v, layout, comm, gradients) | {
            "attention": "full",
            "softmax_scale": str(scale),
            "head_parallel": str(head_parallel),
        }
        agreement.check(group, facts, q.device)
        number = backward_order.take_number(group)
        sizes = call_sizes(q, k, v, layout, gradients)
        wide = wide_dense(comm, head_parallel, comm_group, sizes, layout, q.device)
    passes_on = comm_group
    if wide is not None:
        layout, passes_on, comm = wide.layout, wide.sequence, wide.exchange
    elif comm in WIDE_COMMS:  # one rank
        comm = "auto"
    call = _Call(layout, passes_on, comm, scale, equal_documents(layout), Stages(q.device), number, comm_group, wide)
    return _CausalAttention.apply(q, k, v, call)


@dataclass(frozen=True)
class _Call:
    """What forward and backward of one call share.

    Attributes:
        layout, comm_group, comm: of what passes keys and values on: all ranks, or the sequence ranks where heads are split.
        scale: of the logits.
        steady: see `moba_cp.kernels.dense`.
        stage: names the steps in profiles.
        number: the call's number in its group.
        whole: all ranks.
        wide: how heads move, if they are split.
    """

    layout: SequenceLayout
    comm_group: CommGroup
    comm: str
    scale: float
    steady: bool
    stage: Stages
    number: int
    whole: CommGroup
    wide: WideDense | None = None

    def transport(self, k: Tensor, v: Tensor) -> DenseTransport:
        return transport(self.comm, self.layout, self.comm_group, Shard(k, v))


class _CausalAttention(torch.autograd.Function):
    """All pairs of this rank's queries with one shard after the other, with heads in and out around it where they are split."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        inputs = (q, k, v)
        q, k, v = (unit_stride(x) for x in (q, k, v))
        ctx.call = call
        if call.whole.size > 1:
            ctx.together = backward_order.BackwardRefusedTogether(call.whole.group, q.device)
        if call.wide is not None:
            out, saved = wide_dense_forward(call.wide, partial(_attend, call), q, k, v)
        else:
            out, lse = _attend(call, q, k, v)
            saved = (q, k, v, out, lse)
        ctx.save_for_backward(*saved)
        can_refuse(ctx, inputs, saved)
        return out

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: SavedTensors, dout: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        dout = dout.contiguous()
        reading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if call.whole.size > 1:
            reading = backward_order.check(call.whole.group, call.number, dout.device, hooks=ctx.hooks)
        with reading:
            tensors = saved()
        if call.wide is not None:
            return *wide_dense_backward(call.wide, partial(_attend_backward, call), tensors, dout), None
        q, k, v, out, lse = tensors
        gradients = _attend_backward(call, q, k, v, out, lse, dout)
        return *(x.to(dout.dtype) for x in gradients), None

    jvp = staticmethod(no_forward_mode)


def _attend(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the queries that this rank computes."""
    dtype = accumulate_dtype(q.dtype)
    total = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype)
    with torch.cuda.device_of(q):  # kernels are launched on the current device
        for pair, (part,) in _pairs(call, call.transport(k, v).forward(), "dense wait", "dense attention"):
            rows = pair.queries
            dense.attend(q[rows], part.k, part.v, call.scale, pair.causal, total[rows], lse[:, rows], call.steady)
    return total.to(q.dtype), lse


def _attend_backward(
    call: _Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the dtype of sums."""
    dq, dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
    with torch.cuda.device_of(q):
        parts = call.transport(k, v).backward(Shard(dk, dv))
        for pair, (part, gradient) in _pairs(call, parts, "dense backward wait", "dense attention backward"):
            rows = pair.queries
            dense.attend_backward(
                q[rows], part.k, part.v, out[rows], lse[:, rows], dout[rows], call.scale, pair.causal, dq[rows], gradient.k,
                gradient.v, call.steady,
            )  # fmt: skip
    return dq, dk, dv


def _pairs(
    call: _Call, shards: Iterator[tuple[int, *tuple[Shard, ...]]], waits: str, works: str
) -> Iterator[tuple[Pair, tuple[Shard, ...]]]:
    """Each pair of rows and keys that see each other, with its keys of each of `shards` (rank, keys and values, gradients).

    Args:
        call: the call.
        shards: of `DenseTransport`.
        waits, works: stages of profiles: taking a shard, and what the caller does with its pairs.
    """
    for source, *of_source in call.stage.taking(shards, waits):
        with call.stage(works):
            for pair in visible_pairs(call.layout, call.comm_group.rank, source):
                yield pair, tuple(Shard(shard.k[pair.keys], shard.v[pair.keys]) for shard in of_source)
