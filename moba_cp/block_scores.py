"""Scores of selected blocks with gradients to what scores them: the hook by which an indexer is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .config import MoBAConfig
from .derivatives import SavedTensors, first_derivative_only, refuse_transforms, refuse_transforms_around
from .kernels.torch_backend import accumulate_dtype
from .parallel import agreement, backward_order
from .parallel.blocks import home_plan, rank_plan
from .parallel.comm import named_error, process_group_of, weakly
from .parallel.layout import SequenceLayout
from .parallel.outside_graphs import outside_graphs
from .prepare import needs_gradients
from .tracing import is_captured, without_numbers
from .validation import (
    INTEGERS,
    RefusedTogether,
    check_can_be_saved,
    check_config,
    check_dtype,
    check_layout,
    check_placement,
    check_tensor,
    gradients_fact,
)


@outside_graphs
def block_scores(
    q_gate: Tensor,
    k_gate: Tensor,
    blocks: Tensor,
    config: MoBAConfig,
    *,
    layout: SequenceLayout,
    group: dist.ProcessGroup | DeviceMesh | None = None,
) -> Tensor:
    """Routing scores `<q_gate, mean of k_gate over the block>` of some blocks per row; differentiable in both.

    `moba_attention(routing=(q_gate, k_gate), return_selection=True)` selects by the same scores, but gives no gradient for them.
    The means here are fp32 and not rounded, so scores of bf16 gates may differ from the gate's in the last bits.

    `torch.compile` breaks the graph once, at the call.

    All ranks of the group call it together, and run its backward together: each adds up the block sums of all ranks,
    `n_blocks * Hc * Dg` numbers, by one all-reduce. Gathered means take `Hs * T * n * Dg` numbers until backward, and
    their products with `q_gate` as many for a moment.

    Args:
        q_gate: `[T, Hs, Dg]`, fp64, fp32, bf16 or fp16, of this rank's tokens.
        k_gate: `[T, Hc, Dg]`; `Hs` is a multiple of `Hc`.
        blocks: int16, int32 or int64 `[Hs, T, n]`, block numbers within the row's document, up to its own block, as
            `Selection.blocks` has them; -1 for none.
        config: its block size counts.
        layout, group: as for `moba_attention`.

    Returns:
        `[Hs, T, n]`, fp32 (fp64 for fp64 inputs): the scores; 0 where `blocks` is -1, and for a row's own block, which no score
        decides about.

    Tensors without numbers (`FakeTensorMode`, the meta device) give scores without numbers: shapes are checked, nothing is sent.

    Raises:
        TypeError, ValueError: an argument is not as said, a CUDA graph is capturing the call, or the ranks disagree on sizes,
            layout or whether `k_gate` gets a gradient; on every rank.
    """
    ranks, inferred = process_group_of(group), without_numbers(q_gate, k_gate, blocks)
    with RefusedTogether(layout, ranks, q_gate, k_gate, blocks):
        _check(q_gate, k_gate, blocks, config, layout, ranks)
        if not inferred:
            if is_captured(q_gate):
                raise ValueError(
                    "a CUDA graph cannot capture block_scores: the values of blocks are checked on the host"
                )
            _check_values(blocks, config, layout, ranks)
        check_can_be_saved(needs_gradients(q_gate, k_gate), q_gate=q_gate, k_gate=k_gate)
    if inferred:
        like = q_gate.to(accumulate_dtype(q_gate.dtype)).sum(2).t()[:, :, None] + k_gate.sum()
        return like.expand(blocks.shape)
    number = 0
    if layout.cp_size > 1:
        facts = {
            "function": "block_scores",
            "layout": f"{layout.digest.hex()} {layout!r}",
            "k_gate": f"{k_gate.shape[1]} heads of {k_gate.shape[2]}, {k_gate.dtype} on {k_gate.device.type}",
            "block_size": str(config.block_size),
            "gradient of k_gate": gradients_fact(torch.is_grad_enabled() and k_gate.requires_grad),
        }
        agreement.check(ranks, facts, q_gate.device)
        number = backward_order.take_number(ranks)
    plan = rank_plan(home_plan(layout, config.block_size), dist.get_rank(ranks) if layout.cp_size > 1 else 0)
    acc, table = accumulate_dtype(q_gate.dtype), plan.plan.blocks
    own, first = (torch.from_numpy(x).to(q_gate.device) for x in (plan.block, plan.first_block))
    sums = k_gate.new_zeros(len(table), *k_gate.shape[1:], dtype=acc).index_add(0, own, k_gate.to(acc))
    if layout.cp_size > 1:
        sums = _SumOverRanks.apply(sums, ranks, number)
    means = sums / torch.from_numpy(table.length).to(q_gate.device, acc)[:, None, None]
    # One more, of zeros, for entries that do not count: no NaN of a block comes back from them, and none of a row goes to one.
    means = torch.cat([means, means.new_zeros(1, *means.shape[1:])])
    place = blocks.long() + first[:, None]
    counted = (blocks >= 0) & (place < own[:, None])
    head = torch.arange(q_gate.shape[1], device=q_gate.device) // (q_gate.shape[1] // k_gate.shape[1])
    row = place.masked_fill(~counted, len(table)) * k_gate.shape[1] + head[:, None, None]
    # Its backward adds in one order on any device; that of indexing does not on the CPU, that of index_select on none.
    gathered = torch.nn.functional.embedding(row, means.flatten(0, 1))  # [Hs, T, n, Dg]
    # Not a matrix product: autocast would round its operands, also those of its backward pass.
    scores = (q_gate.to(acc).transpose(0, 1)[:, :, None] * gathered).sum(-1)
    return scores.masked_fill(~counted, 0)


def _check(
    q_gate: Tensor,
    k_gate: Tensor,
    blocks: Tensor,
    config: MoBAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
) -> None:
    check_config(config)
    check_layout(layout)
    for name, x in (("q_gate", q_gate), ("k_gate", k_gate), ("blocks", blocks)):
        check_tensor(name, x)
        refuse_transforms(**{name: x})
        if x.dim() != 3:
            raise ValueError(f"{name} must have three dimensions, got shape {tuple(x.shape)}")
    for name, x in (("q_gate", q_gate), ("k_gate", k_gate)):
        check_dtype(name, x)
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must have at least one head and a head size of at least 1, got {tuple(x.shape)}")
    if q_gate.dtype != k_gate.dtype:
        raise TypeError(f"q_gate and k_gate must have one dtype, got {q_gate.dtype} and {k_gate.dtype}")
    if blocks.dtype not in INTEGERS:
        raise TypeError(f"blocks must be int16, int32 or int64, got {blocks.dtype}")
    if not q_gate.device == k_gate.device == blocks.device:
        where = f"got q_gate {q_gate.device}, k_gate {k_gate.device}, blocks {blocks.device}"
        raise ValueError(f"q_gate, k_gate and blocks must be on one device, {where}")
    tokens, heads, dim = q_gate.shape
    shapes = f"got q_gate {tuple(q_gate.shape)}, k_gate {tuple(k_gate.shape)}, blocks {tuple(blocks.shape)}"
    if k_gate.shape[0] != tokens or k_gate.shape[2] != dim or heads % k_gate.shape[1]:
        raise ValueError(f"k_gate must have q_gate's tokens and head size, and heads that divide q_gate's, {shapes}")
    if blocks.shape[:2] != (heads, tokens):
        raise ValueError(f"blocks must have shape [heads of q_gate, tokens, n], {shapes}")
    refuse_transforms_around()
    check_placement(q_gate, layout, group)


def _check_values(blocks: Tensor, config: MoBAConfig, layout: SequenceLayout, group: dist.ProcessGroup | None) -> None:
    """No block is after its row's own. Reads the device."""
    last = rank_plan(home_plan(layout, config.block_size), dist.get_rank(group) if layout.cp_size > 1 else 0)
    own = torch.from_numpy(last.block - last.first_block).to(blocks.device)
    wrong = (blocks < -1) | (blocks > own[:, None])
    if bool(wrong.any()):
        head, row, slot = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"blocks must be -1 or a block up to the row's own: head {head}, row {row}, whose own block is {int(own[row])} of "
            f"its document, has {int(blocks[head, row, slot])}"
        )


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group, on each of them; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, number: int) -> Tensor:
        ctx.group, ctx.number = weakly(group), number
        ctx.together = backward_order.BackwardRefusedTogether(group, x.device)
        ctx.linked = True  # linear: its gradient depends on the incoming one only
        return _summed(x, group)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, saved: SavedTensors, gradient: Tensor) -> tuple[Tensor, None, None]:
        with backward_order.check(ctx.group(), ctx.number, gradient.device, hooks=""):
            pass  # nothing is saved
        return _summed(gradient, ctx.group()), None, None


def _summed(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    x = x.contiguous().clone()
    with named_error("waited for the all-reduce of block_scores"):
        dist.all_reduce(x, group=group)
    return x
