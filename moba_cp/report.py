"""What one attention call routed and moved: made only when asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .call import Call
from .parallel.comm import Traffic, named_error
from .parallel.cost import CallSizes, visible_tokens
from .parallel.exchanges import Route
from .parallel.splits import Split

MOST_WANTED = 10
"""How many of the most-wanted blocks a report names."""


@dataclass(frozen=True, eq=False)
class MoBAReport:
    """Routing and traffic of one call. Figures are of the whole group unless they say "this rank".

    Where heads are split, routing figures are still those of each rank's own tokens: what any exchange of keys and values would
    have to bring there.

    Attributes:
        transport: how keys and values travelled: "local", or a value of `comm` other than "auto".
        head_parallel: how many ranks split heads; 1 where none do.
        reason: why this transport and this split of heads.
        walks: how often each of their bytes crosses the wire in forward, and in backward: 1, or the number of groups of rows
            where `exchange_bytes` is too small to keep them.
        once_bytes: the least `exchange_bytes` with which they would cross once in forward, and in backward; 0 where they do with
            any.
        traffic: collectives and bytes of this rank by stage, and which of these came from other nodes; the backward pass adds
            its own when it runs. The report's own collectives are not in it, nor the small messages by which ranks agree on the
            call and find out which nodes they are on. Heads travel as "heads in" and "heads out".
        lower_bound_bytes: int64 `[P]`, fewest bytes of keys and values each rank must receive in forward for this
            routing: each wanted (block, kv head) pair that is at home elsewhere, once.
        visible_bytes: int64 `[P]`, the same if every block a rank can see were wanted.
        wanted_share: wanted remote pairs over visible remote pairs, by bytes; 0 where no remote block is visible.
        distance_histogram: int64 `[buckets]`, how many (row, q head, block) selections lie how many blocks back. Bucket
            0 is the own block; bucket i > 0 is `2 ** (i - 1) <= distance < 2 ** i`.
        entropy: mean over documents, weighted by their selections, of the entropy in nats of which block is selected,
            over the log of the number of blocks; own blocks left out. 1: all blocks alike; 0: one block takes all.
        most_wanted: up to `MOST_WANTED` (10) pairs (block number, rows x q heads that selected it as an earlier block), the
            most wanted first.
        attended_keys: int64 `[P]`, (query row, q head, key) triples each rank computes.
        imbalance: the largest of `attended_keys` over their mean; 1 is balanced.
        selected: int32 `[Hq, T, slots]`, this rank's selected blocks, ascending, -1 for none; `slots` is `topk`, or less where no
            document has so many blocks.
        token_numbers: int64 `[T]`, global numbers of this rank's tokens, on the host.
        block_size: tokens per block.
        n_blocks: blocks over all documents.
        layout_digest: `SequenceLayout.digest` of the call's layout.
    """

    transport: str
    head_parallel: int
    reason: str
    walks: tuple[int, int]
    once_bytes: tuple[int, int]
    traffic: Traffic
    lower_bound_bytes: np.ndarray
    visible_bytes: np.ndarray
    wanted_share: float
    distance_histogram: np.ndarray
    entropy: float
    most_wanted: list[tuple[int, int]]
    attended_keys: np.ndarray
    imbalance: float
    selected: Tensor = field(repr=False)
    token_numbers: Tensor = field(repr=False)
    block_size: int
    n_blocks: int
    layout_digest: bytes = field(repr=False)


@torch.no_grad()
def make_report(call: Call, split: Split, route: Route, selected: Tensor, sizes: CallSizes) -> MoBAReport:
    """The report of a call whose forward has run; all ranks of the group make it together.

    Args:
        call: the call as one over the whole group, whether or not heads were split.
        split: over how many ranks heads were split.
        route: what its exchange decided.
        selected: `[Hq, T, slots]`, what the gate chose for this rank's own tokens.
        sizes: of the call.
    """
    kv_heads, pair_bytes = sizes.kv_heads, (sizes.dim + sizes.dim_v) * sizes.itemsize
    plan, blocks, selected = call.plan.plan, call.plan.plan.blocks, selected.to(torch.int32)
    wanted = call.backend.wanted_pairs(selected, n_blocks=len(blocks), kv_heads=kv_heads).cpu().numpy()
    remote = plan.home != call.plan.rank
    bound = int((wanted * blocks.length)[:, remote].sum()) * pair_bytes
    visible = np.delete(visible_tokens(plan, call.plan.rank), call.plan.rank).sum() * kv_heads * pair_bytes

    counts, histogram, keys = _local_counts(call, selected)
    counts, histogram, of_rank = _over_ranks(call, counts, histogram, np.array([keys, bound, visible]), selected.device)
    keys_of_rank, bounds, visible_of_rank = of_rank
    top = np.argsort(-counts, kind="stable")[:MOST_WANTED]
    mean = keys_of_rank.mean()
    return MoBAReport(
        transport=split.transport(route.name),
        head_parallel=split.size,
        reason="; ".join(filter(None, (split.reason, route.reason))),
        walks=route.walks,
        once_bytes=route.once_bytes,
        traffic=call.comm.traffic,
        lower_bound_bytes=bounds,
        visible_bytes=visible_of_rank,
        wanted_share=float(bounds.sum() / visible_of_rank.sum()) if visible_of_rank.sum() else 0.0,
        distance_histogram=histogram,
        entropy=_entropy(counts, blocks.first_of_document),
        most_wanted=[(int(b), int(counts[b])) for b in top if counts[b]],
        attended_keys=keys_of_rank,
        imbalance=float(keys_of_rank.max() / mean) if mean else 1.0,
        selected=selected,
        token_numbers=plan.layout.local_indices(call.plan.rank),
        block_size=call.config.block_size,
        n_blocks=len(blocks),
        layout_digest=plan.layout.digest,
    )


def _local_counts(call: Call, selected: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """This rank's selections by block (without own blocks) and by distance, and the keys they attend to."""
    n_blocks = len(call.plan.plan.blocks)
    own = torch.from_numpy(call.plan.block).to(selected.device)
    distance = own[None, :, None] - selected
    earlier = (selected >= 0) & (distance > 0)
    counts = torch.bincount(selected[earlier], minlength=n_blocks).cpu().numpy()
    buckets = 2 + math.ceil(math.log2(max(n_blocks, 2)))
    bucket = torch.frexp(distance[earlier].to(torch.float64)).exponent  # 2 ** (e - 1) <= distance < 2 ** e
    histogram = torch.bincount(bucket, minlength=buckets).cpu().numpy()
    q_heads = selected.shape[0]
    histogram[0] = q_heads * own.numel()
    own_keys = q_heads * int((call.plan.position + 1).sum())
    return counts, histogram, int(earlier.sum()) * call.config.block_size + own_keys


def _over_ranks(
    call: Call, counts: np.ndarray, histogram: np.ndarray, mine: np.ndarray, device: torch.device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over ranks of `counts` and `histogram`, and every rank's `mine` `[n]` as `[n, P]`: one all-reduce of int64, to which
    each rank adds its own numbers in places of their own. It is not in the call's traffic."""
    comm = call.comm
    every = np.zeros((mine.size, comm.size), dtype=np.int64)
    every[:, comm.rank] = mine
    numbers = torch.from_numpy(np.concatenate([counts, histogram, every.ravel()]).astype(np.int64)).to(device)
    if comm.size > 1:
        with named_error(f"rank {comm.rank} of {comm.size} waited for the all-reduce of the report"):
            dist.all_reduce(numbers, group=comm.group)
    counts, histogram, gathered = np.split(numbers.cpu().numpy(), [counts.size, counts.size + histogram.size])
    return counts, histogram, gathered.reshape(mine.size, comm.size)


def _entropy(counts: np.ndarray, first_of_document: np.ndarray) -> float:
    """Normalised selection entropy of each document, weighted by its selections; see `MoBAReport.entropy`."""
    total, weighted = 0, 0.0
    for first in np.unique(first_of_document):
        of_document = counts[first_of_document == first]
        chosen = int(of_document.sum())
        if chosen == 0 or of_document.size < 2:
            continue
        share = of_document[of_document > 0] / chosen
        weighted += chosen * float(-(share * np.log(share)).sum() / math.log(of_document.size))
        total += chosen
    return weighted / total if total else 0.0
