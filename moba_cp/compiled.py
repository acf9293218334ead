"""Calls of attention under `torch.compile` and `torch.export`: what is traced, down to the operators of `operators.py`.

Objects stay out of the graph. A layout enters as an int64 tensor (`SequenceLayout.described`), a group by its name, a
configuration as numbers. So a graph serves every layout and number of tokens. Arguments are checked when the operator runs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from .config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES, MoBAConfig
from .parallel.splits import HEADS
from .prepare import needs_gradients
from .selection import Selection

_MOST_INT = 1 << 63
"""What an integer argument of an operator must be less than."""
MOST_SLOTS = 128
"""Largest `topk` of a call inside a graph: saved blocks have `topk` slots there, however few blocks a document has."""


def fits_a_graph(topk: int, comm: str = "auto", head_parallel: int | None = None) -> bool:
    """Whether such a call can be part of a graph. What is saved of a call that splits heads has sizes that its layout decides."""
    return topk <= MOST_SLOTS and not comm.startswith(HEADS) and head_parallel in (None, 1)


def fits_the_schema(tensors: Iterable[object], flags: Iterable[object], numbers: Iterable[object]) -> bool:
    """Whether arguments are of the types that the operator's schema names. It would convert others, or refuse them on one rank
    alone, while the graph is recorded."""
    return are_tensors(*tensors) and all(isinstance(x, bool) for x in flags) and all(map(_is_number, numbers))


def are_tensors(*values: object) -> bool:
    """Whether all are tensors."""
    return all(isinstance(x, Tensor) for x in values)


def _is_number(x: object) -> bool:
    """Whether an operator takes it as an integer. Nothing is asked of an integer that only running the graph will know."""
    if isinstance(x, torch.SymInt):
        return True
    if not isinstance(x, int) or isinstance(x, bool):
        return False
    # Loads slowly, and is there while a graph is recorded.
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return bool(guard_or_true(x < _MOST_INT)) and bool(guard_or_true(x >= -_MOST_INT))


def can_be_traced(
    config: object,
    layout: object,
    group: object,
    comm: object,
    head_parallel: object,
    selection: object,
    routing: object,
) -> bool:
    """Whether the other arguments of `moba_attention` are of types that tracing may look into. Others it would refuse on one
    rank alone."""
    return (
        isinstance(config, MoBAConfig)
        and hasattr(layout, "described")
        and (group is None or isinstance(group, dist.ProcessGroup))
        and isinstance(comm, str)
        and (head_parallel is None or _is_number(head_parallel))
        and (selection is None or isinstance(selection, Tensor))
        and (routing is None or (isinstance(routing, (tuple, list)) and len(routing) == 2 and are_tensors(*routing)))
    )


def compiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    described: Tensor,
    group: dist.ProcessGroup | None,
    comm: str,
    selection: Tensor | None,
    check_selection: bool,
    routing: tuple[Tensor, Tensor] | None,
    return_selection: bool,
    workspace_bytes: int,
    exchange_bytes: int,
) -> Tensor | tuple[Tensor, Selection]:
    """`moba_attention` with `layout.described`, as a graph records it."""
    q_gate, k_gate = (None, None) if routing is None else (x.detach() for x in routing)
    gradients = needs_gradients(q, k, v)
    out, _, _, blocks, weights, _ = torch.ops.moba_cp.attention(
        q, k, v, described, selection, q_gate, k_gate, config.block_size, config.topk,
        config.softmax_scale, "" if group is None else group.group_name, comm, check_selection, return_selection, gradients,
        workspace_bytes, exchange_bytes, None,
    )  # fmt: skip
    return (out, Selection(blocks, weights.detach())) if return_selection else out


def compiled_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, block_size: int, topk: int
) -> Tensor:
    """`moba_attn_varlen` as a graph records it."""
    return torch.ops.moba_cp.attention(
        q, k, v, cu_seqlens, None, None, None, block_size, topk, None, "", "auto", True, False, needs_gradients(q, k, v),
        DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES, max_seqlen,
    )[0]  # fmt: skip
