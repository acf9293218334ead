"""Attention as operators of `torch.library`, for graphs: `torch.compile`, AOTAutograd, `torch.export`.

Eager calls do not come here. What autograd saves between the two operators is tensors only, of shapes known when the graph is
made: q, k, v, the output, its log-sum-exps (fp32, or fp64), and the selected blocks (int32, `topk` slots). The rest, routing
lists above all, is attached to the memory of the selected blocks (`attached.py`); backward makes it again where that memory was
not kept. A graph keeps 4 bytes per slot of blocks and 4 of lists, an eager call 2 and 4.

==========  ============================================================================================================
operator    what it does
==========  ============================================================================================================
attention   checks its arguments, agrees with the other ranks, and runs `pipeline.forward`
attention_backward  runs `pipeline.backward` from what `attention` returned
==========  ============================================================================================================
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d

from . import pipeline
from .attached import attach, attached
from .call import Call
from .config import MoBAConfig
from .derivatives import SavedTensors, can_refuse, first_derivative_only
from .kernels import backend_for
from .kernels.torch_backend import accumulate_dtype
from .parallel import backward_order
from .parallel.blocks import home_plan, rank_plan
from .parallel.comm import CommGroup
from .parallel.exchanges import EXCHANGES, Route
from .parallel.exchanges.base import LocalOnly
from .parallel.exchanges.fetch import Fetch
from .parallel.exchanges.pull import Pull
from .parallel.layout import SequenceLayout
from .parallel.outside_graphs import outside_graphs
from .parallel.plan_cache import PLANS, Memo
from .parallel.wanted import exchange_wanted
from .precision import as_given
from .prepare import prepare
from .selection import made_selection
from .stages import Stages
from .strides import unit_stride
from .tracing import is_captured
from .validation import check_longest, check_tensors

_EXCHANGES = (LocalOnly.name, *EXCHANGES)
"""Exchanges by the number that stands for them in a route tensor."""
_ROUTE_NUMBERS = 6
"""Of a route tensor: exchange, walks forward and backward, number of the call in its group, key of the layout (two)."""

_LIBRARY = torch.library.Library("moba_cp", "FRAGMENT")


def _define(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function becomes the operator `moba_cp::<name>` for CPU and CUDA tensors; `register_fake` and
    `register_autograd` follow. `torch.library.custom_op` does the same in more layers of Python, which each call passes."""

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        outside = outside_graphs(function)
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, outside, key)
        return function

    return define


@_define("attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Tensor,
    selection: Tensor | None,
    q_gate: Tensor | None,
    k_gate: Tensor | None,
    block_size: int,
    topk: int,
    softmax_scale: float | None,
    group: str,
    comm: str,
    check_selection: bool,
    return_selection: bool,
    gradients: bool,
    workspace_bytes: int,
    exchange_bytes: int,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moba_attention`. Arguments that are not listed here are its, and those of `MoBAConfig`.

    Args:
        q_gate, k_gate: `routing`; both or neither.
        layout: int64, `SequenceLayout.description`; with `max_seqlen`, the `cu_seqlens` of `moba_attn_varlen` instead.
        group: name of the process group; empty for the default one, or for none.
        gradients: whether `attention_backward` will follow.

    Returns:
        out `[T, Hq, Dv]` in the dtype of `q`; for backward, or empty: log-sum-exps `[Hq, T]`, fp32 (fp64 for fp64), and selected
        blocks `[Hq, T, topk]`, int32; for `return_selection`, or empty: blocks, int32, and weights, as log-sum-exps,
        `[Hq, T, topk]`; a route tensor on the host, int64 `[6]` (`_ROUTE_NUMBERS`).

    Raises:
        TypeError, ValueError, RuntimeError: as `moba_attention`.
    """
    config = MoBAConfig(block_size, topk, softmax_scale)
    key, made = _layout_of(layout, max_seqlen)
    captured = is_captured(q)
    routing = None
    if q_gate is not None or k_gate is not None:
        routing = cast(tuple[Tensor, Tensor], (q_gate, k_gate))  # one alone is refused like any other bad routing
    prepared = prepare(
        q, k, v, config, made, _group_of(group), comm=comm, head_parallel=1, selection=selection,
        check_selection=check_selection, routing=routing, return_selection=return_selection, return_report=False,
        workspace_bytes=workspace_bytes, exchange_bytes=exchange_bytes, gradients=gradients,
    )  # fmt: skip
    assert prepared is not None, "operators run on tensors that hold numbers"
    call, source = prepared.inner, prepared.routing
    if captured:  # a CUDA graph keeps its memory for good, and its replays make lists at no cost to the host
        call = replace(call, keep_lists=False)
    with torch.cuda.device_of(q), as_given(q):
        out, saved = pipeline.forward(call, q, k, v, source)
        if gradients:
            lse, selected = saved.lse, _at_the_end(saved.selected, topk, -1, torch.int32)
        else:
            lse, selected = _nothing_saved(q)
        if not return_selection:
            blocks, weights = _nothing_selected(q)
        else:
            found = made_selection(saved.selected, pipeline.device_rows(call.plan, q.device), source)
            blocks = _at_the_end(found.blocks, topk, -1, found.blocks.dtype)
            weights = _at_the_end(found.weights, topk, 0, found.weights.dtype)
    route = _route_tensor(saved.route, call.number, key)
    if call.keep_lists:
        attach(selected, route, call, saved)
    return out, lse, selected, blocks, weights, route


@torch.library.register_fake("moba_cp::attention", lib=_LIBRARY)
def _(
    q: Tensor, k: Tensor, v: Tensor, layout: Tensor, selection: Tensor | None, q_gate: Tensor | None,
    k_gate: Tensor | None, block_size: int, topk: int, softmax_scale: float | None, group: str, comm: str,
    check_selection: bool, return_selection: bool, gradients: bool, workspace_bytes: int, exchange_bytes: int,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # Of what is refused while a graph is recorded, other ranks would not hear. Tensors on meta meet no other check.
    if not isinstance(q, FakeTensor):
        check_tensors(q, k, v)
    tokens, q_heads = q.shape[:2]
    (lse, selected), (blocks, weights) = _nothing_saved(q), _nothing_selected(q)
    if gradients:
        lse = q.new_empty(q_heads, tokens, dtype=accumulate_dtype(q.dtype))
        selected = q.new_empty(q_heads, tokens, topk, dtype=torch.int32)
    if return_selection:
        blocks = q.new_empty(q_heads, tokens, topk, dtype=torch.int32)
        weights = q.new_empty(q_heads, tokens, topk, dtype=accumulate_dtype(q.dtype))
    route = torch.empty(_ROUTE_NUMBERS, dtype=torch.int64, device="cpu")
    return q.new_empty(tokens, q_heads, v.shape[-1]), lse, selected, blocks, weights, route


@_define("attention_backward")
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    layout: Tensor,
    route: Tensor,
    block_size: int,
    topk: int,
    softmax_scale: float | None,
    group: str,
    comm: str,
    workspace_bytes: int,
    exchange_bytes: int,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the shapes and dtypes of q, k, v, from what `attention` took and returned; all ranks call it together.

    Args:
        dout: `[T, Hq, Dv]`, the gradient of `out`.
        q, k, v, layout, block_size, topk, softmax_scale, group, comm, workspace_bytes, exchange_bytes, max_seqlen: as for
            `attention`.
        out, lse, selected, route: its results, with `gradients=True`.

    Raises:
        ValueError: ranks run backward passes in different orders.
        RuntimeError: a rank did not take part within the group's timeout.
    """
    left = attached(selected, route)
    if left is None:
        config = MoBAConfig(block_size, topk, softmax_scale)
        call = _call_again(q, layout, route, config, group, comm, workspace_bytes, exchange_bytes, max_seqlen)
    else:
        call = left.call
    if call.comm.size > 1:
        with backward_order.check(call.comm.group, call.number, dout.device, hooks=""):
            pass  # torch has read what the graph saved
    with torch.cuda.device_of(q), as_given(dout):
        chosen = selected if call.topk == topk else selected[:, :, topk - call.topk :].contiguous()
        known = _route_again(call, route, chosen, k.shape[1]) if left is None else left.route
        lists = () if left is None else left.lists
        saved = pipeline.Saved(lse, chosen, lists, known)
        # What a graph saved may come back in other strides.
        dq, dk, dv = pipeline.backward(call, q, k, v, saved, dout, out=unit_stride(out))
    return dq, dk.contiguous(), dv.contiguous()  # both may be views of one tensor


@torch.library.register_fake("moba_cp::attention_backward", lib=_LIBRARY)
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, selected: Tensor, layout: Tensor,
    route: Tensor, block_size: int, topk: int, softmax_scale: float | None, group: str, comm: str, workspace_bytes: int,
    exchange_bytes: int, max_seqlen: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, layout, _, _, _, *rest = inputs
    block_size, topk, scale, group, comm, _, _, gradients, workspace_bytes, exchange_bytes, max_seqlen = rest
    out, lse, selected, _, _, route = output
    ctx.gradients = gradients
    ctx.rest = (block_size, topk, scale, group, comm, workspace_bytes, exchange_bytes, max_seqlen)
    ctx.save_for_backward(q, k, v, out, lse, selected, layout, route)
    can_refuse(ctx, (q, k, v), (q, k, v))


@first_derivative_only
def _backward(ctx: Any, saved: SavedTensors, dout: Tensor, *no_gradient: object) -> tuple[Tensor | None, ...]:
    if not ctx.gradients:
        raise RuntimeError("moba_cp::attention was called with gradients=False, so it has no backward")
    gradients = torch.ops.moba_cp.attention_backward(dout, *saved(), *ctx.rest)
    return *gradients, *(None,) * 15


torch.library.register_autograd("moba_cp::attention", _backward, setup_context=_save, lib=_LIBRARY)


def _nothing_saved(q: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and selected blocks where no backward follows."""
    return q.new_empty(0, 0, dtype=accumulate_dtype(q.dtype)), q.new_empty(0, 0, 0, dtype=torch.int32)


def _nothing_selected(q: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and weights where nobody asked for them."""
    return q.new_empty(0, 0, 0, dtype=torch.int32), q.new_empty(0, 0, 0, dtype=accumulate_dtype(q.dtype))


def _at_the_end(x: Tensor, slots: int, fill: int, dtype: torch.dtype) -> Tensor:
    """`x` `[H, T, n]` as contiguous `[H, T, slots]` of `dtype`, filled up at the front; `x` itself where it is that already."""
    missing = slots - x.shape[2]
    if not missing:
        return x.to(dtype).contiguous()  # `to` returns an expanded tensor of that dtype as it is
    padded = x.new_full((*x.shape[:2], slots), fill, dtype=dtype)
    padded[:, :, missing:] = x
    return padded


def _layout_of(layout: Tensor, max_seqlen: int | None) -> tuple[tuple[int, int], SequenceLayout]:
    """The layout that the argument `layout` stands for, and the key under which it is kept."""
    if max_seqlen is None:
        array = layout.numpy()
        key = _key(array)
        return key, _kept(key).get("layout", lambda: SequenceLayout.from_description(array))
    made = SequenceLayout.contiguous(layout.cpu(), 1)
    check_longest(max_seqlen, made)
    key = _key(made.description)
    return key, _kept(key).get("layout", lambda: made)


def _known_layout(key: tuple[int, int], layout: Tensor, max_seqlen: int | None) -> SequenceLayout:
    """The layout of a forward pass; made of `layout` again where it has been dropped meanwhile."""

    def make() -> SequenceLayout:
        if max_seqlen is not None:
            return SequenceLayout.contiguous(layout.cpu(), 1)
        return SequenceLayout.from_description(layout.numpy())

    return _kept(key).get("layout", make)


def _key(description: np.ndarray) -> tuple[int, int]:
    first, second = struct.unpack("qq", hashlib.blake2b(description.tobytes(), digest_size=16).digest())
    return first, second


def _kept(key: tuple[int, int]) -> Memo:
    """Where the layout with this key is kept: like plans, the latest ones, and counted."""
    return PLANS.get(("layout of a graph", key), Memo)


def _group_of(name: str) -> dist.ProcessGroup | None:
    return distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]


def _route_tensor(route: Route, number: int, key: tuple[int, int]) -> Tensor:
    numbers = (_EXCHANGES.index(route.name), *route.walks, number, *key)
    return torch.from_numpy(np.array(numbers, dtype=np.int64))  # a third of the time of `torch.tensor`


def _call_again(
    q: Tensor, layout: Tensor, route: Tensor, config: MoBAConfig, group: str, comm: str, workspace_bytes: int,
    exchange_bytes: int, max_seqlen: int | None,
) -> Call:  # fmt: skip
    """The call of a forward pass that left nothing but tensors."""
    *_, number, first, second = route.tolist()
    made = _known_layout((first, second), layout, max_seqlen)
    comm_group = CommGroup(_group_of(group), made.cp_size)
    return Call(
        config=config,
        plan=rank_plan(home_plan(made, config.block_size), comm_group.rank),
        comm=comm_group,
        backend=backend_for(q.device, q.dtype),
        requested=comm,
        workspace_bytes=workspace_bytes,
        exchange_bytes=exchange_bytes,
        stage=Stages(q.device),
        keep_lists=False,
        number=number,
    )


def _route_again(call: Call, route: Tensor, selected: Tensor, kv_heads: int) -> Route:
    """The route of such a forward pass, with what its exchange asks for made again."""
    index, *both = route.tolist()[:3]
    name, walks = _EXCHANGES[index], (both[0], both[1])
    if name not in (Fetch.name, Pull.name):
        return Route(name, "", walks)
    mine = call.backend.wanted_pairs(selected, n_blocks=call.n_blocks, kv_heads=kv_heads)
    if name == Pull.name:
        return Route(name, "", walks, mine=mine.view(torch.uint8))
    return Route(name, "", walks, wanted=exchange_wanted(mine, call.plan, call.comm))
