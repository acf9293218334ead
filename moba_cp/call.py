"""One attention call on one rank, and how its passes are divided."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from .chunks import Ranges, least_chunk_of_ds, most_at_once, most_keeping_ds, ranges_of, slots_per_row
from .config import MoBAConfig
from .kernels import Backend
from .kernels.sizes import block_size_of_kernels
from .kernels.torch_backend import accumulate_dtype
from .parallel.blocks import RankPlan
from .parallel.comm import CommGroup
from .parallel.exchanges import Work
from .replay import Replays
from .stages import Stages


@dataclass(frozen=True)
class Call:
    """One attention call on one rank: what it is asked to do. What it decides on the way is in its `Route`.

    Attributes:
        config, plan, comm, backend: configuration, this rank's plan, its group, and the primitives of the device.
        requested: the `comm` argument.
        workspace_bytes: most bytes of partial results at once.
        exchange_bytes: most bytes of remote parts kept for several chunks of rows; see `Work.keep_bytes`.
        stage: names the steps in profiles.
        keep_lists: keep routing lists for backward where it has forward's ranges: `4 * topk` bytes per (q head, row).
        number: the call's number in its group; see `parallel.backward_order`.
        rounds: round dk and dv to the dtype of k and v; if not, they stay in the accumulation dtype, for callers who add to them.
        replays: where the passes are recorded; None: they run step by step. Recorded calls select by q and k.
    """

    config: MoBAConfig
    plan: RankPlan
    comm: CommGroup
    backend: Backend
    requested: str
    workspace_bytes: int
    exchange_bytes: int
    stage: Stages
    keep_lists: bool
    number: int
    rounds: bool = True
    replays: Replays | None = None

    @cached_property
    def topk(self) -> int:
        """Slots per row; see `slots_of`."""
        return slots_of(self.config, self.plan)

    @cached_property
    def block_size(self) -> int:
        """As kernels take it; see `block_size_of_kernels`."""
        return block_size_of_kernels(self.config.block_size, self.plan.plan.blocks.longest)

    @cached_property
    def n_blocks(self) -> int:
        """Blocks over all documents."""
        return len(self.plan.plan.blocks)


def slots_of(config: MoBAConfig, plan: RankPlan) -> int:
    """Slots per row, of every rank."""
    return slots_per_row(config.topk, plan.plan.blocks.most_of_a_document)


def work_of(call: Call, ranges: Ranges, q: Tensor, k: Tensor) -> Work:
    """How much work the pass is and how it is divided, for the exchange."""
    rows = call.plan.plan.layout.most_local_tokens * q.shape[1]
    heads = tuple(heads for heads, _ in ranges)
    return Work(rows, heads, len(ranges[0][1]), call.exchange_bytes, accumulate_dtype(k.dtype))


def head_ranges(call: Call, q: Tensor, k: Tensor, v: Tensor, *, backward: bool = False) -> Ranges:
    """Ranges of kv heads, each with its chunks of query rows, so that partial results fit `call.workspace_bytes`.

    Every rank makes the same number of ranges and chunks, whatever it holds, since each starts collectives. Backward chunks
    keep gradients of scores where these fit, on one rank: with several, chunks of rows would bring keys again. Forward has
    backward's ranges where backward takes its lists and all rows of a head are together; else each has its own.

    Args:
        call: the call.
        q, k, v: local queries, keys and values.
        backward: for a backward pass.
    """
    most, heads = call.plan.plan.layout.most_local_tokens, (q.shape[1], k.shape[1])
    # Of partial dq too in a forward pass that keeps lists, so that backward has its ranges and takes them.
    slot_bytes, block_bytes = call.backend.bytes_per_slot(max(q.shape[-1], v.shape[-1]), q.dtype), 0
    if call.keep_lists or backward:
        of_dq, block_bytes = call.backend.dq_bytes(q, v, call.block_size, call.n_blocks)
        slot_bytes = max(slot_bytes, of_dq)
    head_bytes, kv_head_bytes = call.topk * slot_bytes, block_bytes * call.n_blocks
    if call.comm.size == 1 and (call.keep_lists or backward) and most:
        of_head = partial(_kept_ds_bytes, call, q, v, heads[1])
        least = least_chunk_of_ds(most, q.shape[-1] + v.shape[-1])
        at_once, rows = most_keeping_ds(
            of_head, most * heads[0] * head_bytes, least, heads[1], most, call.workspace_bytes
        )
        if at_once and (backward or rows == most):
            return ranges_of(len(q), most, *heads, at_once, rows, keeps_ds=True)
    fitting = most_at_once(most, *heads, head_bytes, call.workspace_bytes, kv_head_bytes)
    return ranges_of(len(q), most, *heads, *fitting)


def _kept_ds_bytes(call: Call, q: Tensor, v: Tensor, kv_heads: int, rows: int) -> int:
    return call.backend.kept_ds_bytes(
        q,
        v,
        rows=rows,
        kv_heads=kv_heads,
        slots=call.topk,
        n_blocks=call.n_blocks,
        block_size=call.block_size,
    )


def is_one_chunk(call: Call, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether all partial results of a pass are in memory together, of forward and of the backward pass that follows: then no
    stream but the caller's is used on one rank. Where backward has one chunk, forward has the same."""
    return head_ranges(call, q, k, v, backward=call.keep_lists)[0][1][0].whole
