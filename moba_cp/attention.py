"""The public attention functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import pipeline, wide
from .call import Call
from .compiled import can_be_traced, compiled_attention, compiled_varlen, fits_a_graph, fits_the_schema
from .config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES, MoBAConfig
from .derivatives import SavedTensors, can_refuse, first_derivative_only, no_forward_mode
from .parallel import backward_order
from .parallel.comm import CommGroup, process_group_of
from .parallel.exchanges import Route
from .parallel.layout import SequenceLayout
from .parallel.outside_graphs import outside_graphs
from .precision import as_given
from .prepare import needs_gradients, prepare
from .report import MoBAReport, make_report
from .selection import Routing, Selection, made_selection
from .tracing import infer_output, without_numbers
from .validation import check_longest, check_tensors


class _Options(TypedDict, total=False):
    """Keyword arguments of `moba_attention` that do not change what it returns."""

    group: dist.ProcessGroup | DeviceMesh | None
    comm: str
    head_parallel: int | None
    selection: Tensor | None
    check_selection: bool
    routing: tuple[Tensor, Tensor] | None
    workspace_bytes: int
    exchange_bytes: int


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    return_selection: Literal[False] = ...,
    return_report: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    return_selection: Literal[True],
    return_report: Literal[False] = ...,
    **options: Unpack[_Options],
) -> tuple[Tensor, Selection]: ...


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    return_selection: Literal[False] = ...,
    return_report: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, MoBAReport]: ...


@overload
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    return_selection: Literal[True],
    return_report: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Selection, MoBAReport]: ...


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    comm: str = "auto",
    head_parallel: int | None = None,
    selection: Tensor | None = None,
    check_selection: bool = True,
    routing: tuple[Tensor, Tensor] | None = None,
    return_selection: bool = False,
    return_report: bool = False,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    exchange_bytes: int = DEFAULT_EXCHANGE_BYTES,
) -> Tensor | tuple[Tensor, Selection] | tuple[Tensor, MoBAReport] | tuple[Tensor, Selection, MoBAReport]:
    """Mixture of Block Attention over the ranks of a context-parallel group; differentiable in q, k and v.

    Each rank passes the tokens that `layout` gives it and gets their output; backward gives the full gradient of its own
    q, k and v, summed over every rank that used them and never divided by the group's size. The result does not depend on
    the layout, the number of ranks or `comm`. All ranks of the group must make the same call.

    A NaN or infinity in a key or value reaches the rows that select its block and no others; inside a row's own block, also
    one of a later token may reach it (0 times NaN). A NaN score ranks above every number.

    `torch.compile` and `torch.export` put the call into the graph as one operator, with new layouts and numbers of tokens at no
    new compilation (`moba_cp.operators`). The graph breaks at the call for
    `return_report`, for a `topk` above 128, and where `comm` or `head_parallel` split heads, which "auto" does not in graphs.
    Tensors without numbers (`FakeTensorMode`, the meta device) give an output
    without numbers: arguments are checked, nothing is sent.

    Args:
        q: `[T, Hq, D]`, fp64, fp32, bf16 or fp16; `T` is the number of local tokens, in the layout's order.
        k: `[T, Hkv, D]`; `Hq` is a multiple of `Hkv`. RoPE and any normalisation are applied already.
        v: `[T, Hkv, Dv]`.
        config: block size, top-k and scale.
        layout: which rank holds which tokens.
        group: the context-parallel group, or a `DeviceMesh` of one dimension; None for the default group, or for none at all
            when `layout.cp_size == 1`.
        comm: how keys and values travel: "all_gather", "ring", "fetch" (selected blocks only, by all-to-all), "pull"
            (selected blocks, read out of the other ranks' memory; for ranks of one host). "a2a" splits heads over all ranks
            instead: an all-to-all gives each rank all tokens of its share of the q heads, which the number of ranks must
            divide. "a2a+ring", "a2a+fetch", "a2a+all_gather" and "a2a+pull" split heads over neighbouring ranks of a node,
            and move keys and values between ranks of equal heads. "auto" takes one of all these by the rules in
            `moba_cp.parallel.cost`.
        head_parallel: how many neighbouring ranks split heads; divides `Hq` and the ranks of the layout. None: with "a2a" all
            ranks, with "a2a+..." as many ranks of a node as `Hq` allows, with "auto" what the model there says.
        selection: what each row attends to, instead of what the gate would choose: int16, int32 or int64
            `[Hq or Hkv or 1, T, k]` with `k <= topk`, block numbers within the row's document, -1 for none, in any order. The
            row's own block is always attended to, listed or not, and counts in `topk`. Blocks after it, numbers below -1 and
            blocks listed twice are refused.
        check_selection: read whether `selection` breaks a rule. On CUDA the host waits for the device, once per call. With
            False nothing waits, and what breaks a rule counts as -1: no row reads what it may not see.
        routing: `(q_gate, k_gate)`, what to score with instead of q and k: `[T, Hq or Hkv or 1, Dg]` and `[T, Hc, Dg]`, where
            `Hc` divides the heads of `q_gate`. Blocks are scored by `<q_gate, mean of k_gate over the block>`. No gradient
            flows to them; `block_scores` is for training them.
        return_selection: also return a `Selection`: the selected blocks and their shares of attention.
        return_report: also return a `MoBAReport` of routing and traffic; costs a few small collectives.
        workspace_bytes: most bytes of partial results in memory at once; kv heads, then query rows, are processed in
            groups to stay under it. At least one kv head and 128 rows are processed together. Long calls of one rank on
            Hopper, with blocks of 256, 384 or 512 tokens, keep gradients of scores for a faster backward pass where they fit too.
        exchange_bytes: where query rows are processed in several groups, "ring" and "pull" keep the remote keys and values
            (in backward also their gradients) of a range of kv heads for all of them, up to this many bytes. Beyond, these
            travel once per group of rows; `MoBAReport.walks` tells.

    Returns:
        `[T, Hq, Dv]` in the dtype of `q`; then the selection and the report, if asked for.

    Raises:
        TypeError, ValueError: an argument is not as said, on the rank that passed it and on the others as well, before
            any tensor is sent; or the ranks disagree on layout, config, dtype, shapes, comm, `head_parallel`, whether gradients
            are wanted, where selections come from, `return_selection`, `return_report`, `workspace_bytes` or
            `exchange_bytes`; or "a2a+pull" is asked for, and ranks of equal heads are on several nodes.
        RuntimeError: a rank did not take part within the group's timeout; or "pull" is asked for, and the ranks cannot
            share memory.
    """
    ranks = process_group_of(group)
    if torch.compiler.is_compiling():
        plain = fits_the_schema(
            (q, k, v), (check_selection, return_selection, return_report), (workspace_bytes, exchange_bytes)
        )
        plain = plain and can_be_traced(config, layout, ranks, comm, head_parallel, selection, routing)
        if return_report or not plain or not fits_a_graph(config.topk, comm, head_parallel):
            return _outside_the_graph(
                q, k, v, config, layout=layout, group=ranks, comm=comm, head_parallel=head_parallel, selection=selection,
                check_selection=check_selection, routing=routing, return_selection=return_selection,
                return_report=return_report, workspace_bytes=workspace_bytes, exchange_bytes=exchange_bytes,
            )  # fmt: skip
        return compiled_attention(
            q, k, v, config, layout.described, ranks, comm, selection, check_selection, routing, return_selection,
            workspace_bytes, exchange_bytes,
        )  # fmt: skip
    prepared = prepare(
        q, k, v, config, layout, ranks, comm=comm, head_parallel=head_parallel, selection=selection,
        check_selection=check_selection, routing=routing, return_selection=return_selection, return_report=return_report,
        workspace_bytes=workspace_bytes, exchange_bytes=exchange_bytes, gradients=needs_gradients(q, k, v),
    )  # fmt: skip
    if prepared is None:
        return infer_output(q, k, v)
    whole, mark = prepared.divided.whole, prepared.layout.mark
    out, selected, route = _MoBAFunction.apply(q, k, v, prepared.call, prepared.routing, whole, mark)
    results: list[Any] = [out]
    if return_selection:
        rows = pipeline.device_rows(prepared.flat.plan, q.device)
        results.append(made_selection(selected, rows, prepared.routing))
    if return_report:
        results.append(make_report(prepared.flat, prepared.divided.split, route, selected, prepared.sizes))
    return out if len(results) == 1 else tuple(results)


_outside_the_graph: Callable[..., Any] = outside_graphs(moba_attention)  # any overload


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
        q: `[T, Hq, D]`, fp64, fp32, bf16 or fp16.
        k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]`; `Hq` is a multiple of `Hkv`.
        cu_seqlens: int `[documents + 1]`, on any device (reading it from a GPU waits for the GPU).
        max_seqlen: the longest document, in tokens; must be what `cu_seqlens` says or more.
        moba_chunk_size: `block_size`.
        moba_topk: `topk`, own block counted. 1 is attention within the own block.

    Returns:
        `[T, Hq, Dv]` in the dtype of `q`.

    Raises:
        TypeError, ValueError: an argument is not as said.
    """
    if torch.compiler.is_compiling():
        plain = fits_the_schema((q, k, v, cu_seqlens), (), (max_seqlen, moba_chunk_size, moba_topk))
        if not plain or not fits_a_graph(moba_topk):
            return _varlen_outside_the_graph(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk)
        return compiled_varlen(q, k, v, cu_seqlens, max_seqlen, moba_chunk_size, moba_topk)
    check_tensors(q, k, v)
    config = MoBAConfig(block_size=moba_chunk_size, topk=moba_topk)
    if without_numbers(q, k, v) and without_numbers(cu_seqlens):
        return infer_output(q, k, v)  # the lengths are not known either
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.is_meta:
        raise TypeError("cu_seqlens must hold numbers, got a tensor on the meta device")
    on_host = cu_seqlens.cpu() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    layout = SequenceLayout.contiguous(on_host, 1)
    check_longest(max_seqlen, layout)
    return moba_attention(q, k, v, config, layout=layout)


_varlen_outside_the_graph = outside_graphs(moba_attn_varlen)


class _MoBAFunction(torch.autograd.Function):
    """Forward and backward of the pipeline as one autograd function; also gives the selected blocks and the route."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call | wide.WideCall,
        routing: Routing,
        group: CommGroup,
        mark: Tensor,
    ) -> tuple[Tensor, Tensor, Route]:
        with torch.cuda.device_of(q), as_given(q):  # kernels are launched on the current device
            done = wide.run_forward(call, q, k, v, routing)
        ctx.call, ctx.group, ctx.kept = call, group, done.kept
        if group.size > 1:
            ctx.together = backward_order.BackwardRefusedTogether(group.group, q.device)
        ctx.save_for_backward(*done.tensors, mark)
        can_refuse(ctx, (q, k, v), done.tensors)
        ctx.mark_non_differentiable(done.selected)
        return done.out, done.selected, done.route

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: SavedTensors, dout: Tensor, *no_gradient: object) -> tuple[Tensor | None, ...]:
        group: CommGroup = ctx.group
        reading: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if group.size > 1:
            number = wide.number_of(ctx.call)
            reading = backward_order.check(group.group, number, dout.device, hooks=ctx.hooks)
        with reading:
            tensors = saved()
        with as_given(dout):
            gradients = wide.run_backward(ctx.call, ctx.kept, tensors[:-1], dout)
        return *gradients, None, None, None, None

    jvp = staticmethod(no_forward_mode)
