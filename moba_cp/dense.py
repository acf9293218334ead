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

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import checked_scale
from .kernels import dense
from .kernels.torch_backend import accumulate_dtype
from .parallel import agreement, backward_order
from .parallel.comm import CommGroup, Traffic
from .parallel.dense import COMMS, DenseTransport, Shard, equal_documents, transport, visible_pairs
from .parallel.layout import SequenceLayout
from .pipeline import unit_stride
from .stages import Stages
from .tracing import infer_output, without_numbers
from .validation import call_facts, check_comm, check_layout, check_placement, check_tensors, group_size


@torch.compiler.disable
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None = None,
    comm: str = "auto",
    traffic: Traffic | None = None,
) -> Tensor:
    """Full causal attention within each document of the layout. All ranks of the group must make the same call.

    The same call gives the same bits with any `comm`, except for dq on GPUs (see `moba_cp.kernels.dense`).

    Args:
        q: `[T, Hq, D]`, fp64, fp32, bf16 or fp16: this rank's queries in the order of `layout.local_indices(rank)`.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]`, its keys and values; `Hq` must be a multiple of `Hkv`.
        softmax_scale: scale of the logits; None for `D ** -0.5`.
        layout: which rank holds which token.
        group: the ranks of the layout; None for the default group, or for none at all when `layout.cp_size == 1`.
        comm: "ring" (memory for two remote shards, for any number of ranks), "all_gather" (one collective, memory for all
            shards), or "auto", which gathers up to 32 MiB (`moba_cp.parallel.dense.choose_transport`).
        traffic: counts bytes sent and received, those of backward included.

    Returns:
        `[T, Hq, Dv]`; differentiable in q, k and v, with gradients summed over the group.

    Raises:
        TypeError, ValueError: on every rank, before any tensor is sent: an argument of some rank is not as described, or ranks
            disagree.
        RuntimeError: a rank did not take part within the group's timeout.
    """
    try:
        check_layout(layout)
        check_comm(comm, COMMS)
        check_tensors(q, k, v)
        check_placement(q, layout, group)
        softmax_scale = checked_scale(softmax_scale)
    except (TypeError, ValueError) as error:
        if group_size(layout, group) > 1 and not without_numbers(q, k, v):
            agreement.refuse(group, error, q)
        raise
    if without_numbers(q, k, v):
        return infer_output(q, k, v)
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    comm_group = CommGroup(group, layout.cp_size, traffic)
    if comm_group.size > 1:
        gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        facts = call_facts(q, k, v, layout, comm, gradients) | {"attention": "full", "softmax_scale": str(scale)}
        agreement.check(group, facts, q.device)
    number = backward_order.take_number(group) if comm_group.size > 1 else 0
    call = _Call(layout, comm_group, comm, scale, equal_documents(layout), Stages(q.device), number)
    return _CausalAttention.apply(q, k, v, call)


@dataclass(frozen=True)
class _Call:
    """What forward and backward of one call share."""

    layout: SequenceLayout
    comm_group: CommGroup
    comm: str
    scale: float
    steady: bool
    stage: Stages
    number: int

    def transport(self, k: Tensor, v: Tensor) -> DenseTransport:
        return transport(self.comm, self.layout, self.comm_group, Shard(k, v))


class _CausalAttention(torch.autograd.Function):
    """This rank's queries against all shards, one at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> Tensor:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        dtype = accumulate_dtype(q.dtype)
        total = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
        lse = q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype)
        with torch.cuda.device_of(q):  # kernels are launched on the current device
            for source, shard in call.stage.taking(call.transport(k, v).forward(), "dense wait"):
                with call.stage("dense attention"):
                    for pair in visible_pairs(call.layout, call.comm_group.rank, source):
                        rows, keys = pair.queries, pair.keys
                        dense.attend(
                            q[rows],
                            shard.k[keys],
                            shard.v[keys],
                            call.scale,
                            pair.causal,
                            total[rows],
                            lse[:, rows],
                            call.steady,
                        )
        out = total.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        call: _Call = ctx.call
        dout = dout.contiguous()
        if call.comm_group.size > 1:
            backward_order.check(call.comm_group.group, call.number, q.device)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=lse.dtype) for x in (q, k, v))
        with torch.cuda.device_of(q):
            parts = call.transport(k, v).backward(Shard(dk, dv))
            for source, shard, gradient in call.stage.taking(parts, "dense backward wait"):
                with call.stage("dense attention backward"):
                    for pair in visible_pairs(call.layout, call.comm_group.rank, source):
                        rows, keys = pair.queries, pair.keys
                        dense.attend_backward(
                            q[rows],
                            shard.k[keys],
                            shard.v[keys],
                            out[rows],
                            lse[:, rows],
                            dout[rows],
                            call.scale,
                            pair.causal,
                            dq[rows],
                            gradient.k[keys],
                            gradient.v[keys],
                            call.steady,
                        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None
