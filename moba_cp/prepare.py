"""What comes before the pipeline in a call of attention: checks, agreement of ranks, plans, a selection that is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from . import pipeline, wide
from .call import Call, is_one_chunk, slots_of
from .config import MoBAConfig
from .derivatives import refuse_transforms, refuse_transforms_around
from .kernels import backend_for
from .parallel import agreement, backward_order
from .parallel.blocks import home_plan, rank_plan
from .parallel.comm import CommGroup
from .parallel.cost import CallSizes
from .parallel.exchanges import EXCHANGES
from .parallel.layout import SequenceLayout
from .parallel.plan_cache import PLANS
from .parallel.topology import host
from .precision import as_given
from .replay import Replays
from .selection import BY_Q_AND_K, Routing, check_routing, make_routing, place, routing_fact
from .stages import Stages, is_timed
from .tracing import is_captured, without_numbers
from .validation import RefusedTogether, call_facts, check_call, check_can_be_saved, check_capture, check_flags


def needs_gradients(*tensors: Tensor) -> bool:
    """Whether there will be a backward pass."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors if isinstance(x, Tensor))


@dataclass(frozen=True)
class Prepared:
    """A call that is checked, agreed on and planned.

    Attributes:
        layout: of the call.
        inner: the call among ranks of the same heads.
        call: the same, with heads in and out around it where heads are split.
        routing: where the selection of this rank's tokens comes from.
        divided, sizes: how the group is divided, and the sizes of the call.
    """

    layout: SequenceLayout
    inner: Call
    call: Call | wide.WideCall
    routing: Routing
    divided: wide.Division
    sizes: CallSizes

    @cached_property
    def flat(self) -> Call:
        """The call as if no heads were split."""
        whole = self.divided.whole
        plan = rank_plan(home_plan(self.layout, self.inner.config.block_size), whole.rank)
        return replace(self.inner, plan=plan, comm=whole)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
    *,
    comm: str,
    head_parallel: int | None,
    selection: Tensor | None,
    check_selection: bool,
    routing: tuple[Tensor, Tensor] | None,
    return_selection: bool,
    return_report: bool,
    workspace_bytes: int,
    exchange_bytes: int,
    gradients: bool,
) -> Prepared | None:
    """Check the arguments of `moba_attention`, agree with the other ranks, and plan; None where tensors hold no numbers.

    A plain call on one rank is prepared once: later calls with equal arguments, and tensors of equal shapes, dtype and device,
    find it beside their plan.

    Args:
        gradients: whether there will be a backward pass. The others are those of `moba_attention`.
    """
    numbers = (workspace_bytes, exchange_bytes, 1 if head_parallel is None else head_parallel)
    known = (
        selection is routing is None
        and return_selection is return_report is False
        and isinstance(check_selection, bool)
        # Exact classes: other values may equal valid ones, and would be found instead of refused.
        and layout.__class__ is SequenceLayout
        and config.__class__ is MoBAConfig
        and comm.__class__ is str
        and all(x.__class__ is int for x in numbers)
        and all(_is_plain(x) for x in (q, k, v))
        and layout.cp_size == 1
        and not (gradients and any(x.is_inference() for x in (q, k, v)))
        and (group is None or (isinstance(group, dist.ProcessGroup) and group.size() == 1))
        and not (without_numbers(q, k, v) or is_captured(q) or is_timed())
    )
    if known:
        refuse_transforms(q=q, k=k, v=v)
        refuse_transforms_around()
        group = None  # a kept call must not hold it
        plan = home_plan(layout, config.block_size)
        tensors = tuple((x.shape, x.dtype, x.device) for x in (q, k, v))
        name = ("call on one rank", config, comm, numbers, gradients, tensors)
        where = ((layout, config.block_size, plan.keeps_rows), plan, name)
        found: Prepared | None = PLANS.kept_beside(*where)
        if found is not None:
            return found
    inferred = without_numbers(q, k, v)
    with RefusedTogether(layout, group, q, k, v):
        check_flags(check_selection=check_selection, return_selection=return_selection, return_report=return_report)
        check_call(
            q, k, v, config, layout, group, comm=comm, head_parallel=head_parallel, workspace_bytes=workspace_bytes,
            exchange_bytes=exchange_bytes,
        )  # fmt: skip
        check_can_be_saved(gradients, q=q, k=k, v=v)
        if selection is not None or routing is not None:
            check_routing(selection, routing, q, k, config)
        refuse_transforms_around()
        if inferred:
            if return_report or return_selection:
                raise ValueError(
                    "return_report=True and return_selection=True need tensors that hold numbers, got tensors under tracing or "
                    "on meta"
                )
            return None
        capturing = is_captured(q)
        check_capture(capturing, layout)
        if layout.cp_size > 1:
            whole_heads = comm in EXCHANGES and head_parallel is None  # as a compiled call, which always says 1
            facts = call_facts(q, k, v, layout, comm, gradients) | {
                "config": repr(config),
                "routing": routing_fact(selection, routing),
                "return_selection": str(return_selection),
                "return_report": str(return_report),
                "workspace_bytes": str(workspace_bytes),
                "exchange_bytes": str(exchange_bytes),
                "head_parallel": "1" if whole_heads else str(head_parallel),
            }
            node = host()  # refused here, if it cannot be told to the others
            if comm in EXCHANGES and EXCHANGES[comm].same_host:
                facts[f"host ({comm} is for ranks of one)"] = node
        placed = None if selection is None else _place(selection, q, config, layout, group, check_selection)
    comm_group = CommGroup(group, layout.cp_size)
    if comm_group.size > 1:
        agreement.check(group, facts, q.device)
    number = backward_order.take_number(group) if comm_group.size > 1 else 0
    sizes = wide.call_sizes(q, k, v, layout, gradients)
    divided = wide.divide(comm, head_parallel, comm_group, sizes, layout, q.device, return_report)
    call = Call(
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
    if known and call.backend.NAME == "triton" and is_one_chunk(call, q, k, v):
        call = replace(call, replays=Replays())
    if capturing:  # replays read the plan's tensors
        PLANS.keep(call.plan.plan)
    source = BY_Q_AND_K
    if placed is not None or routing is not None or return_selection:
        source = make_routing(q, call.topk, placed, routing, return_selection)
    around = wide.widen(call, divided, sizes, q.device, return_report or return_selection)
    prepared = Prepared(layout, call, around, source, divided, sizes)
    if source.q_gate is not None and divided.split.size > 1:
        # Gates have heads of their own number: each rank selects for its own tokens, and the selection travels with the heads.
        with torch.no_grad(), torch.cuda.device_of(q), as_given(q):
            selected = pipeline.select_by_gates(prepared.flat, source, q.shape[1])
        prepared = replace(prepared, routing=replace(source, selected=selected, q_gate=None, k_gate=None))
    return PLANS.beside(*where, lambda: prepared) if known else prepared


def _is_plain(x: object) -> bool:
    """Whether `x` is a dense tensor, of no class of its own."""
    plain = x.__class__ is Tensor or x.__class__ is torch.nn.Parameter
    return plain and isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def _place(
    selection: Tensor,
    q: Tensor,
    config: MoBAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
    check: bool,
) -> Tensor:
    """The caller's selection, checked if asked for, before any collective."""
    plan = rank_plan(home_plan(layout, config.block_size), dist.get_rank(group) if layout.cp_size > 1 else 0)
    rows, slots = pipeline.device_rows(plan, q.device), slots_of(config, plan)
    with torch.no_grad(), torch.cuda.device_of(q):
        return place(selection, q.shape[1], plan, rows, slots, backend_for(q.device, q.dtype), check)
