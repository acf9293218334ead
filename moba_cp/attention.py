"""The public attention functions."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import pipeline, wide
from .config import MoBAConfig
from .kernels import backend_for
from .parallel import agreement, backward_order
from .parallel.blocks import home_plan, rank_plan
from .parallel.comm import CommGroup
from .parallel.exchanges import EXCHANGES, Route
from .parallel.layout import SequenceLayout
from .parallel.topology import host
from .precision import as_given
from .report import MoBAReport, make_report
from .saving import put_tensors, take_tensors
from .stages import Stages
from .tracing import infer_output, without_numbers
from .validation import call_facts, check_call, check_tensors, group_size

DEFAULT_WORKSPACE_BYTES = 1280 << 20
"""Default of `workspace_bytes`: 1.25 GiB, which holds 128K tokens of a group of four q heads at topk 8 and D 128."""

DEFAULT_EXCHANGE_BYTES = 4 << 30
"""Default of `exchange_bytes`: 4 GiB, which holds one kv head of 2.7M remote tokens with its gradients at D = Dv = 128."""


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None = ...,
    comm: str = ...,
    head_parallel: int | None = ...,
    return_report: Literal[False] = ...,
    workspace_bytes: int = ...,
    exchange_bytes: int = ...,
) -> Tensor: ...


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None = ...,
    comm: str = ...,
    head_parallel: int | None = ...,
    return_report: Literal[True],
    workspace_bytes: int = ...,
    exchange_bytes: int = ...,
) -> tuple[Tensor, MoBAReport]: ...


@torch.compiler.disable
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None = None,
    comm: str = "auto",
    head_parallel: int | None = None,
    return_report: bool = False,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    exchange_bytes: int = DEFAULT_EXCHANGE_BYTES,
) -> Tensor | tuple[Tensor, MoBAReport]:
    """Mixture of Block Attention over the ranks of a context-parallel group; differentiable in q, k and v.

    Each rank passes the tokens that `layout` gives it and gets their output; backward gives the full gradient of its own
    q, k and v, summed over every rank that used them and never divided by the group's size. The result does not depend on
    the layout, the number of ranks or `comm`. All ranks of the group must make the same call.

    A NaN or infinity in a key or value reaches the rows that select its block and no others; inside a row's own block, also
    one of a later token may reach it (0 times NaN). A NaN score ranks above every number.

    `torch.compile` breaks the graph at the call. Tensors without numbers (`FakeTensorMode`, the meta device) give an output
    without numbers: arguments are checked, nothing is sent.

    Args:
        q: `[T, Hq, D]`, fp64, fp32, bf16 or fp16; `T` is the number of local tokens, in the layout's order.
        k: `[T, Hkv, D]`; `Hq` is a multiple of `Hkv`. RoPE and any normalisation are applied already.
        v: `[T, Hkv, Dv]`.
        config: block size, top-k and scale.
        layout: which rank holds which tokens.
        group: the context-parallel group; None for the default group, or for none at all when `layout.cp_size == 1`.
        comm: how keys and values travel: "all_gather", "ring", "fetch" (selected blocks only, by all-to-all), "pull"
            (selected blocks, read out of the other ranks' memory; for ranks of one host), or "auto", which takes one of
            these by the rules in `moba_cp.parallel.cost`: of long sequences pull, where GPUs can access each other's memory.
            "a2a" splits heads over all ranks instead: an all-to-all gives each rank all tokens of its share of the q heads,
            which the number of ranks must divide. "a2a+ring", "a2a+fetch", "a2a+all_gather" and "a2a+pull" split heads
            over neighbouring ranks of a node, and move keys and values between ranks of equal heads.
        head_parallel: how many neighbouring ranks split heads; divides `Hq` and the ranks of the layout. None: with "a2a" all
            ranks, with "a2a+..." as many ranks of a node as `Hq` allows, with "auto" what takes least time on the wire.
        return_report: also return a `MoBAReport` of routing and traffic; costs a few small collectives.
        workspace_bytes: most bytes of partial results in memory at once; kv heads, then query rows, are processed in
            groups to stay under it. At least one kv head and 128 rows are processed together.
        exchange_bytes: where query rows are processed in several groups, "ring" and "pull" keep the remote keys and values
            (in backward also their gradients) of a range of kv heads for all of them, up to this many bytes. Beyond, these
            travel once per group of rows; `MoBAReport.walks` tells.

    Returns:
        `[T, Hq, Dv]` in the dtype of `q`, and the report if asked for.

    Raises:
        TypeError, ValueError: an argument is not as said, on the rank that passed it and on the others as well, before
            any tensor is sent; or the ranks disagree on layout, config, dtype, shapes, comm, whether gradients are wanted,
            `return_report`, `workspace_bytes` or `head_parallel`; or "a2a+pull" is asked for, and ranks of equal heads are on
            several nodes.
        RuntimeError: a rank did not take part within the group's timeout; or "pull" is asked for, and the ranks cannot
            share memory.
    """
    if without_numbers(q, k, v):
        check_call(q, k, v, config, layout, group, comm, return_report, workspace_bytes, exchange_bytes, head_parallel)
        if return_report:
            raise ValueError("return_report=True needs tensors that hold numbers, got tensors under tracing or on meta")
        return infer_output(q, k, v)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v) if isinstance(x, Tensor))
    try:
        check_call(q, k, v, config, layout, group, comm, return_report, workspace_bytes, exchange_bytes, head_parallel)
        if layout.cp_size > 1:
            facts = call_facts(q, k, v, layout, comm, gradients) | {
                "config": repr(config),
                "return_report": str(return_report),
                "workspace_bytes": str(workspace_bytes),
                "exchange_bytes": str(exchange_bytes),
                "head_parallel": str(head_parallel),
            }
            if comm in EXCHANGES and EXCHANGES[comm].same_host:
                facts[f"host ({comm} is for ranks of one)"] = host()
    except (TypeError, ValueError) as error:
        if group_size(layout, group) > 1:
            agreement.refuse(group, error, q)
        raise
    comm_group = CommGroup(group, layout.cp_size)
    if comm_group.size > 1:
        agreement.check(group, facts, q.device)
    number = backward_order.take_number(group) if comm_group.size > 1 else 0
    sizes = wide.call_sizes(q, k, v, layout, gradients)
    divided = wide.divide(comm, head_parallel, comm_group, sizes, layout, q.device, return_report)
    call = pipeline.Call(
        config=config,
        plan=rank_plan(home_plan(divided.layout, config.block_size, divided.split.size > 1), divided.wide_rank),
        comm=divided.sequence,
        backend=backend_for(q.device, q.dtype),
        requested=divided.split.exchange,
        workspace_bytes=workspace_bytes,
        exchange_bytes=exchange_bytes,
        stage=Stages(q.device),
        keep_lists=gradients,
        number=number,
        rounds=divided.heads.copies == 1,
    )
    out, selected, route = _MoBAFunction.apply(
        q, k, v, wide.widen(call, divided, sizes, q.device, return_report), divided.whole
    )
    if return_report:
        flat = replace(call, plan=rank_plan(home_plan(layout, config.block_size), comm_group.rank), comm=divided.whole)
        return out, make_report(flat, divided.split, route, selected, sizes)
    return out


@torch.compiler.disable
def moba_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    moba_chunk_size: int,
    moba_topk: int,
) -> Tensor:
    """Drop-in for the function of that name in MoonshotAI/MoBA, on one device.

    Args:
        q: `[T, Hq, D]`.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]`.
        cu_seqlens: int `[documents + 1]`, on any device (reading it from a GPU waits for the GPU).
        max_seqlen: the longest document, in tokens; must be what `cu_seqlens` says or more.
        moba_chunk_size: `block_size`.
        moba_topk: `topk`, own block counted. 1 is attention within the own block.

    Returns:
        `[T, Hq, Dv]`.

    Raises:
        TypeError, ValueError: an argument is not as said.
    """
    check_tensors(q, k, v)
    config = MoBAConfig(block_size=moba_chunk_size, topk=moba_topk)
    if without_numbers(q, k, v) and without_numbers(cu_seqlens):
        return infer_output(q, k, v)  # the lengths are not known either
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.is_meta:
        raise TypeError("cu_seqlens must hold numbers, got a tensor on the meta device")
    on_host = cu_seqlens.cpu() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    layout = SequenceLayout.contiguous(on_host, 1)
    boundaries = layout.cu_seqlens
    longest = max((b - a for a, b in zip(boundaries[:-1], boundaries[1:], strict=True)), default=0)
    try:
        max_seqlen = operator.index(max_seqlen)
    except TypeError as error:
        raise TypeError(f"max_seqlen must be an int, got {max_seqlen!r}") from error
    if max_seqlen < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens has a document of {longest} tokens")
    return moba_attention(q, k, v, config, layout=layout)


class _MoBAFunction(torch.autograd.Function):
    """Forward and backward of the pipeline as one autograd function; also gives the selected blocks and the route."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: pipeline.Call | wide.WideCall, group: CommGroup
    ) -> tuple[Tensor, Tensor, Route]:
        with torch.cuda.device_of(q), as_given(q):  # kernels are launched on the current device
            done = wide.run_forward(call, q, k, v)
        tensors: list[Tensor] = []
        ctx.call, ctx.group, ctx.kept = call, group, take_tensors(done.kept, tensors)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(done.selected)
        return done.out, done.selected, done.route

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *no_gradient: object) -> tuple[Tensor | None, ...]:
        group: CommGroup = ctx.group
        if group.size > 1:
            backward_order.check(group.group, wide.number_of(ctx.call), dout.device)
        with as_given(dout):
            gradients = wide.run_backward(ctx.call, put_tensors(ctx.kept, ctx.saved_tensors), dout)
        return *gradients, None, None
