"""Custom selections: what a call attends to where q and k do not decide it, and what it tells about its selection.

A caller decides in one of two ways. `selection=` lists the blocks of each row. `routing=(q_gate, k_gate)` names other tensors
to score with: block centroids are means of `k_gate`, and MoBA's gate selects the best scored. Block numbers count within the
row's document, from 0. docs/selection.md has the rules, an example, and how to train what selects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import MoBAConfig
from .derivatives import refuse_transforms
from .kernels import Backend, QueryRows, backend_for
from .kernels.torch_backend import accumulate_dtype
from .parallel.blocks import RankPlan
from .validation import INTEGERS, check_dtype, check_tensor


@dataclass(frozen=True)
class Routing:
    """Where the selection of one call on one rank comes from, and where its weights go. All fields None: q and k decide.

    Attributes:
        selected: `[Hq, T, topk]` as of `Backend.select_blocks`: the caller's selection, checked and placed.
        q_gate, k_gate: `[T, Hs, Dg]`, `[T, Hc, Dg]`: what to score with instead of q and k.
        weights: `[Hq, T, topk]`, written: the share of each selected block in its row's attention.
    """

    selected: Tensor | None = None
    q_gate: Tensor | None = None
    k_gate: Tensor | None = None
    weights: Tensor | None = None


BY_Q_AND_K = Routing()


@dataclass(frozen=True, eq=False)
class Selection:
    """The blocks that the rows of one rank attended to.

    Attributes:
        blocks: int32 `[Hq, T, slots]`: block numbers within the row's document, ascending, -1 at the front where there are
            fewer; the last one is the row's own block. `slots` is `topk`, or less where no document has so many blocks; in a
            compiled graph, which serves all layouts, `topk`. It can be passed as `selection=`.
        weights: fp32 (fp64 for fp64 inputs) `[Hq, T, slots]`: the share of each block in the row's attention, 0 for empty
            slots. A row's shares sum to 1 within rounding. No gradient flows through them.
    """

    blocks: Tensor
    weights: Tensor

    @property
    def earlier(self) -> Tensor:
        """bool `[Hq, T, slots]`: slots that hold a block before the row's own."""
        held = self.blocks >= 0
        held[:, :, -1] = False
        return held


def check_routing(
    selection: Tensor | None, routing: tuple[Tensor, Tensor] | None, q: Tensor, k: Tensor, config: MoBAConfig
) -> None:
    """Everything about `selection` and `routing` but the values: types, shapes, dtypes, devices. Reads nothing on a device."""
    if selection is not None and routing is not None:
        raise ValueError("pass selection or routing, not both")
    heads = {"Hq": q.shape[1], "Hkv": k.shape[1], "1": 1}
    allowed = ", ".join(f"{name}{'' if name == '1' else f' ({count})'}" for name, count in heads.items())
    if selection is not None:
        check_tensor("selection", selection)
        refuse_transforms(selection=selection)
        if selection.dtype not in INTEGERS:
            raise TypeError(f"selection must be int16, int32 or int64, got {selection.dtype}")
        _check_place("selection", selection, q)
        if selection.dim() != 3 or selection.shape[1] != q.shape[0] or selection.shape[0] not in heads.values():
            raise ValueError(
                f"selection must have shape [heads, {q.shape[0]} tokens, k] with {allowed} heads, got {tuple(selection.shape)}"
            )
        if not 1 <= selection.shape[2] <= config.topk:
            raise ValueError(f"selection must list 1 to topk ({config.topk}) blocks per row, got {selection.shape[2]}")
    if routing is not None:
        if not isinstance(routing, (tuple, list)) or len(routing) != 2:
            of = f" of {len(routing)}" if isinstance(routing, (tuple, list)) else ""
            raise TypeError(f"routing must be a pair (q_gate, k_gate), got {type(routing).__name__}{of}")
        named = {"q_gate": routing[0], "k_gate": routing[1]}
        for name, x in named.items():
            check_tensor(name, x)
            refuse_transforms(**{name: x})
            check_dtype(name, x)
            _check_place(name, x, q)
            if x.dim() != 3 or x.shape[0] != q.shape[0] or 0 in x.shape[1:]:
                raise ValueError(f"{name} must have shape [{q.shape[0]} tokens, heads, Dg], got {tuple(x.shape)}")
        q_gate, k_gate = routing
        shapes = f"got q_gate {tuple(q_gate.shape)}, k_gate {tuple(k_gate.shape)}"
        if q_gate.dtype != k_gate.dtype:
            raise TypeError(f"q_gate and k_gate must have one dtype, got {q_gate.dtype} and {k_gate.dtype}")
        if q_gate.shape[2] != k_gate.shape[2]:
            raise ValueError(f"q_gate and k_gate must have the same head size, {shapes}")
        if q_gate.shape[1] not in heads.values():
            raise ValueError(f"q_gate must have {allowed} heads, {shapes}")
        if q_gate.shape[1] % k_gate.shape[1]:
            raise ValueError(f"the heads of q_gate must be a multiple of those of k_gate, {shapes}")
        backend_for(q_gate.device, q_gate.dtype).check_sizes(
            dim=q_gate.shape[2], dim_v=q_gate.shape[2], block_size=config.block_size
        )


def _check_place(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be where q is, got {name} on {x.device}, q on {q.device}")


def routing_fact(selection: Tensor | None, routing: tuple[Tensor, Tensor] | None) -> str:
    """What the ranks must have in common about their selections, in at most 60 characters."""
    if selection is not None:
        return f"selection of {selection.shape[0]} heads, k {selection.shape[2]}"
    if routing is None:
        return "by q and k"
    q_gate, k_gate = routing
    dtype = str(q_gate.dtype).removeprefix("torch.")
    return f"gate {q_gate.shape[1]}/{k_gate.shape[1]} heads of {q_gate.shape[2]}, {dtype}"


def make_routing(
    q: Tensor, slots: int, placed: Tensor | None, routing: tuple[Tensor, Tensor] | None, wants_weights: bool
) -> Routing:
    """The `Routing` of a call with `slots` slots per row; `placed` is of `place`, `routing` the argument."""
    q_gate, k_gate = (None, None) if routing is None else (x.detach() for x in routing)
    weights = None
    if wants_weights:
        weights = torch.empty(q.shape[1], q.shape[0], slots, dtype=accumulate_dtype(q.dtype), device=q.device)
    return Routing(placed, q_gate, k_gate, weights)


def made_selection(selected: Tensor, rows: QueryRows, routing: Routing) -> Selection:
    """What `return_selection` gives, after forward has written `routing.weights`."""
    assert routing.weights is not None
    first = rows.first_block[None, :, None]
    return Selection(torch.where(selected >= 0, selected.to(torch.int32) - first, -1), routing.weights)


def place(
    selection: Tensor, q_heads: int, plan: RankPlan, rows: QueryRows, slots: int, backend: Backend, check: bool
) -> Tensor:
    """The caller's selection as `[Hq, T, slots]` of `Backend.select_blocks`.

    Args:
        selection: `[Hq or Hkv or 1, T, k]`, as `check_routing` accepts it.
        q_heads: `Hq`.
        plan, rows: this rank's plan and rows.
        slots: `Call.topk`.
        backend: the primitives of the device.
        check: read whether a row breaks a rule: on CUDA the host waits for the device.

    Raises:
        ValueError: a row breaks a rule, with its values.
    """
    selected, faults = backend.place_selection(selection, rows=rows, n_blocks=len(plan.plan.blocks), slots=slots)
    if check and int(faults) > 0:
        raise ValueError(_fault(selection, plan, int(faults), slots))
    return over_heads(selected, q_heads)


def over_heads(selected: Tensor, q_heads: int) -> Tensor:
    """`[H, T, topk]` for each of `q_heads`, of which `q_heads / H` consecutive ones share a selection."""
    if selected.shape[0] == q_heads:
        return selected
    if selected.shape[0] == 1:
        return selected.expand(q_heads, -1, -1)
    return selected.repeat_interleave(q_heads // selected.shape[0], 0)


def _fault(selection: Tensor, plan: RankPlan, faults: int, slots: int) -> str:
    """Names the first row that breaks a rule, and the rule."""
    listed = selection.cpu().long()
    last = torch.from_numpy(plan.block - plan.first_block)[:, None]
    in_order = listed.sort(2).values
    again = ((in_order[:, :, 1:] == in_order[:, :, :-1]) & (in_order[:, :, 1:] >= 0)).any(2)
    rules = {
        "holds a number below -1": (listed < -1).any(2),
        "holds a block after the row's own": (listed > last).any(2),
        "lists a block twice": again,
        f"lists more than {slots - 1} blocks besides the row's own, which counts in topk": (
            ((listed >= 0) & (listed != last)).sum(2) > slots - 1
        ),
    }
    wrong = torch.stack(list(rules.values()))
    head, row = wrong.any(0).nonzero()[0].tolist()
    broken = next(rule for rule, found in rules.items() if bool(found[head, row]))
    return (
        f"selection {broken}: head {head}, row {row}, whose own block is {int(last[row])} of its document, lists "
        f"{listed[head, row].tolist()} ({faults} rows in all break a rule)"
    )
