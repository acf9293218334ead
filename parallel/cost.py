"""The rules behind `comm="auto"`: bytes a rank would receive by each transport, and which one that makes the best.

First, over how many ranks heads are split (`choose_head_parallel`); then which exchange moves keys and values among the sequence
ranks that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .blocks import HomePlan
from .heads import head_split
from .topology import Topology

FETCH_SHARE = 0.75
"""`fetch` is taken when the rank that receives most receives at most this share of what `ring` brings every rank.

`ring` needs no packing by row, no metadata and hides every step but the first behind computation; `fetch` hides one
all-to-all behind the local part. With independent random routing the union of wanted blocks is nearly everything visible,
and whole parts in a ring are the better way to move everything.
"""

GATHER_BYTES = 32 << 20
"""`all_gather` is taken when all remote keys and values of a rank are at most this many bytes: one collective instead of
`P - 1` steps, each of which costs about 0.1 ms of latency, as long as 32 MiB take on a 300 GB/s link."""

PULL_BYTES = 256 << 20
"""Where GPUs can read each other's memory, `pull` is taken when all remote keys and values of a rank are more than this, or when
the rank has at least `PULL_ROWS`, and `all_gather` otherwise. `pull` costs the host about 1 ms more per call, which longer work
hides; then it was the fastest or within a few percent of it in every case of docs/results/layer.json."""

PULL_ROWS = 1 << 20
"""Query rows of a rank, over all q heads of the pass, that are long work however few bytes the keys of few kv heads have: NCCL's
kernels take multiprocessors from attention, copies of `pull` do not. Training by both: docs/results.md, "Every exchange"."""

SPLIT_BYTES = 256 << 20
"""Heads are split by `auto` where all remote keys and values of a rank are more than this. Below, collectives' latency and the
host's time decide, and a split needs more of both."""

INSIDE_BYTES_PER_MS, BETWEEN_BYTES_PER_MS = 300e6, 40e6
"""What a GPU receives inside a node (all-to-all over NVLink of H100s: 295 GB/s measured) and between nodes (one adapter of 400
Gb/s per GPU, less what protocols take)."""

HEADS_EXPOSED = 0.85
"""Exposed time of heads in and out over their time on the wire, inside a node, where they move through memory. Measured as what
calls took longer than one GPU with the same work: forward+backward, ms (over time on the wire):

    GPUs     tokens per GPU  heads  (B, k)    heads split           pull
    2 H200   128K            16/16  128, 8    7.3 (1.02)            7.4 (0.51)    docs/results/scaling.json
    2 H200   128K            16/16  512, 8    6.2 (0.86)            8.8 (0.61)
    2 H200   128K            16/16  4096, 12  12.8                  46.7; 20.8 in a balanced layout
    2 H200   512K            32/8   128, 8    27.9 (0.78)           25.2 (0.88)
    2 H200   512K            32/8   512, 8    25.4 (0.71)           25.1 (0.88)
    4 H100   128K            16/16  128, 8    21.3 (2.0)            37.4 (0.9)    a prototype by NCCL that overlapped nothing
    4 H100   128K            16/16  512, 8    20.6 (1.9)            24.6 (0.6)
    4 H100   256K            32/8   128, 8    41 (1.5)              70 (1.6)

Time among sequence ranks hides behind the local part, so the exposed share grows with their number, and so does what ranks wait
for each other: `sequence_exposed` is 0.5 for two, 1.5 for four and more. The model has no term for attention that a layout
divides unevenly, and none for keys and values that travel once per chunk of rows.
"""

HEADS_EXPOSED_BY_NCCL = 1.6
"""The same between nodes, where NCCL takes multiprocessors from attention: of its all-to-all on two H200."""


@dataclass(frozen=True)
class CallSizes:
    """What the model knows of a call, alike on all ranks.

    Attributes:
        cp_size: ranks of the group, P.
        tokens: tokens of the longest rank.
        q_heads, kv_heads, dim, dim_v: of the inputs.
        itemsize, gradient_itemsize: bytes of a number of the inputs, and of what gradients are accumulated in.
        gradients: whether a backward pass follows.
    """

    cp_size: int
    tokens: int
    q_heads: int
    kv_heads: int
    dim: int
    dim_v: int
    itemsize: int
    gradient_itemsize: int
    gradients: bool

    @property
    def splits_may_pay(self) -> bool:
        """Whether the call is large enough for `auto` to split heads."""
        return self.cp_size > 1 and self.sequence_bytes(1, gradients=False) > SPLIT_BYTES

    def head_bytes(self, size: int) -> float:
        """Bytes a GPU receives for heads in and out where they are split over `size` ranks: q, k, v in, the output out; in
        backward its gradient in, with `Backend.delta`, and dq, dk, dv out."""
        width, split = self.dim + self.dim_v, head_split(self.q_heads, self.kv_heads, size)
        kv_heads = split.kv_heads * size
        forward = (self.q_heads + kv_heads) * width * self.itemsize
        returned = self.itemsize if split.copies == 1 else self.gradient_itemsize
        backward = (self.q_heads * self.itemsize + kv_heads * returned) * width + self.q_heads * self.gradient_itemsize
        return self.tokens * (forward + backward * self.gradients) * (size - 1) / size

    def sequence_bytes(self, size: int, gradients: bool) -> float:
        """Bytes a GPU receives of keys and values of all other sequence ranks, if all are wanted; with `gradients` also those of
        the backward pass: keys and values again, and their gradients."""
        kv_heads = head_split(self.q_heads, self.kv_heads, size).kv_heads
        pair = 2 * self.itemsize + self.gradient_itemsize if gradients else self.itemsize
        return (self.cp_size // size - 1) * self.tokens * size * kv_heads * (self.dim + self.dim_v) * pair

    def milliseconds(self, size: int, topology: Topology) -> float:
        """Exposed communication of a call whose heads are split over `size` neighbours, by `HEADS_EXPOSED` and
        `sequence_exposed`."""
        groups = [range(first, self.cp_size, size) for first in range(size)]
        members = [range(first, first + size) for first in range(0, self.cp_size, size)]
        heads_inside, sequence_inside = (all(map(topology.inside_one, ranks)) for ranks in (members, groups))
        heads, sequence = (
            INSIDE_BYTES_PER_MS if inside else BETWEEN_BYTES_PER_MS for inside in (heads_inside, sequence_inside)
        )
        heads_exposed = HEADS_EXPOSED if heads_inside else HEADS_EXPOSED_BY_NCCL
        exposed = sequence_exposed(self.cp_size // size) * self.sequence_bytes(size, self.gradients)
        return heads_exposed * self.head_bytes(size) / heads + exposed / sequence


def sequence_exposed(ranks: int) -> float:
    """Exposed time of an exchange of keys and values among so many ranks, over its time on the wire: see `HEADS_EXPOSED`."""
    return min(1.5, (ranks - 1) / 2)


def choose_head_parallel(sizes: CallSizes, topology: Topology, asked: int | None) -> tuple[int, str]:
    """Over how many ranks `auto` splits heads, and why: none, or as many of a node as heads allow, whichever exposes less
    communication. Splits in between are for `head_parallel`: none has been measured.

    Args:
        sizes: of the call.
        topology: nodes of the group.
        asked: the `head_parallel` argument, which decides where it is given.
    """
    if asked is not None:
        return asked, f"auto: head_parallel={asked}"
    if not sizes.splits_may_pay:
        return 1, ""
    cost = {size: sizes.milliseconds(size, topology) for size in {1, topology.splits(sizes.q_heads)[-1]}}
    best = min(cost, key=lambda size: (cost[size], size))
    shown = ", ".join(f"{size}: {ms:.2f}" for size, ms in sorted(cost.items()))
    return (
        best,
        f"auto: heads over {best} ranks; model's ms of exposed communication by ranks that split heads: {shown}",
    )


def visible_tokens(plan: HomePlan, rank: int) -> np.ndarray:
    """int64 `[P]`, by home: keys in blocks that start no later than a token of the same document that `rank` holds. No routing
    can make the rank want more than that."""
    n_blocks, first = len(plan.blocks), plan.blocks.first_of_document
    seen = np.full(n_blocks, -1)
    held = plan.pieces(rank).block
    np.maximum.at(seen, first[held], held)  # the last block of each document that the rank holds a token of
    visible = np.arange(n_blocks) <= seen[first]
    tokens = np.bincount(plan.home[visible], weights=plan.blocks.length[visible], minlength=plan.layout.cp_size)
    return tokens.astype(np.int64)


def choose_with_shared_memory(plan: HomePlan, rows: int, kv_heads: int, pair_bytes: int) -> str:
    """`auto` where GPUs can read each other's memory: by the plan alone, so the host waits for nothing.

    Args:
        plan, kv_heads, pair_bytes: as for `choose_transport`.
        rows: query rows of the longest rank, over all q heads.

    Returns:
        `"pull"`, or `"all_gather"` where there are fewer than `PULL_ROWS` and the others hold at most `PULL_BYTES`.
    """
    long = rows >= PULL_ROWS or _remote_bytes(plan, kv_heads, pair_bytes) > PULL_BYTES
    return "pull" if long else "all_gather"


def choose_transport(plan: HomePlan, remote: np.ndarray, kv_heads: int, pair_bytes: int, ring_walks: int = 1) -> str:
    """`auto` where ranks cannot read each other's memory; every rank decides alike.

    Args:
        plan: where the blocks are.
        remote: int64 `[P]`, tokens of the pairs that each rank wants and that are at home elsewhere, over all kv heads.
        kv_heads: kv heads.
        pair_bytes: bytes of one key and one value.
        ring_walks: how often keys and values would go round the ring: more than once where there are several chunks of
            query rows, and parts are too large to keep for all of them.

    Returns:
        `"fetch"` where the busiest rank wants at most `FETCH_SHARE` of what `ring` would bring it; else `"all_gather"`
        where the others hold at most `GATHER_BYTES`; else `"ring"`.
    """
    everything = _remote_bytes(plan, kv_heads, pair_bytes)
    if remote.max(initial=0) * pair_bytes <= FETCH_SHARE * everything * ring_walks:
        return "fetch"
    return "all_gather" if everything <= GATHER_BYTES else "ring"


def _remote_bytes(plan: HomePlan, kv_heads: int, pair_bytes: int) -> int:
    """Keys and values that the others hold, for the rank that holds least."""
    return int(plan.home_tokens.sum() - plan.home_tokens.min()) * kv_heads * pair_bytes
