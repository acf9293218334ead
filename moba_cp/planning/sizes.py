"""What is predicted: a layer, a cluster, a way to split the one over the other; and the work of the busiest rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..chunks import most_at_once, slots_per_row
from ..config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from ..kernels.sizes import SUM_TILE_BYTES, sums_dq
from ..parallel.balance import CANDIDATE_WORK, KEY_WORK, balanced_cuts, candidates_before, keys_before, pairs_before
from ..parallel.cost import BETWEEN_BYTES_PER_MS, INSIDE_BYTES_PER_MS
from ..parallel.exchanges.registry import EXCHANGES
from ..parallel.heads import head_split
from ..parallel.layout import SequenceLayout

MOST_TOKENS = 1 << 32
"""Below, the (query, key) pairs of a sequence fit 64 bits."""
LAYOUTS = ("zigzag", "balanced", "contiguous")


@dataclass(frozen=True)
class Layer:
    """One attention layer over one sequence.

    Attributes:
        tokens: of the sequence, over all ranks.
        q_heads, kv_heads, head_dim: of the model; D = Dv.
        block_size, topk: of MoBA.
        document: tokens of each packed document; 0: the sequence is one.
        wanted_share: of the blocks a rank could want, how many its rows select: 1 for uniform routing; `MoBAReport.wanted_share`.
        itemsize: bytes of a number; 2 for bf16.

    Raises:
        ValueError: a size is not positive, there are `MOST_TOKENS` tokens or more, or kv heads do not divide q heads.
    """

    tokens: int
    q_heads: int
    kv_heads: int
    block_size: int
    topk: int
    head_dim: int = 128
    document: int = 0
    wanted_share: float = 1.0
    itemsize: int = 2

    def __post_init__(self) -> None:
        for name in ("tokens", "q_heads", "kv_heads", "block_size", "topk", "head_dim", "itemsize"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens >= MOST_TOKENS:
            raise ValueError(f"tokens must be below {MOST_TOKENS}, got {self.tokens}")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"kv heads must divide q heads, got {self.kv_heads} and {self.q_heads}")
        if not 0 <= self.wanted_share <= 1:
            raise ValueError(f"wanted_share must be between 0 and 1, got {self.wanted_share}")
        if self.document and self.tokens % self.document:
            raise ValueError(f"documents of {self.document} tokens do not fill {self.tokens} tokens")

    @property
    def length(self) -> int:
        """Tokens of a document."""
        return self.document or self.tokens

    @property
    def slots(self) -> int:
        """Partial results per row, as the pipeline keeps them."""
        return slots_per_row(self.topk, -(-self.length // self.block_size))

    @property
    def blocks(self) -> int:
        """Of all documents."""
        return self.tokens // self.length * -(-self.length // self.block_size)

    @property
    def sums_dq(self) -> bool:
        """Whether a Hopper GPU sums dq in fp32, or would with blocks as long as the sequence: longer ones mean the same."""
        sizes = {self.block_size, min(self.block_size, self.tokens)}
        return self.itemsize == 2 and any(sums_dq(size, self.head_dim, self.blocks) for size in sizes)

    def q_heads_of(self, head_parallel: int) -> int:
        """q heads of a rank where q heads are split: at least one."""
        return max(1, self.q_heads // head_parallel)

    def kv_heads_of(self, head_parallel: int) -> int:
        """kv heads that a rank works with where q heads are split, copies among them."""
        return max(1, head_split(self.q_heads, self.kv_heads, head_parallel).kv_heads)


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them.

    Attributes:
        gpus, gpus_per_node: in all, and of one host.
        link: GB/s that a GPU receives from GPUs of its node, all of them together.
        fabric: GB/s that a GPU receives from other nodes: its share of the adapters, less protocol.
        memory: GiB of a GPU.

    Raises:
        ValueError: a number is not positive and finite, or nodes are not full.
    """

    gpus: int
    gpus_per_node: int = 8
    link: float = INSIDE_BYTES_PER_MS / 1e6
    fabric: float = BETWEEN_BYTES_PER_MS / 1e6
    memory: float = 80.0

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node", "link", "fabric", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("link", "fabric"):
            if not 1e-3 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name} is in GB/s and must be 0.001 to 1,000,000, got {getattr(self, name)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}")

    @property
    def node(self) -> int:
        """GPUs of a node that take part."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Split:
    """How a layer is spread: heads over `head_parallel` neighbouring ranks, the sequence over the rest.

    Attributes:
        ranks: GPUs.
        head_parallel: U; 1 splits no heads.
        exchange: of keys and values between sequence ranks, a name of `EXCHANGES`; "local" where there is one.
        layout: one of `LAYOUTS`.
        exchange_bytes, workspace_bytes: the arguments of `moba_attention`: most bytes of keys, values and gradients that are kept
            for several chunks of query rows, and of partial results of a chunk.

    Raises:
        ValueError: U does not divide the ranks, the exchange does not fit the number of sequence ranks, or a budget is negative.
    """

    ranks: int
    head_parallel: int = 1
    exchange: str = "local"
    layout: str = "zigzag"
    exchange_bytes: int = DEFAULT_EXCHANGE_BYTES
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES

    def __post_init__(self) -> None:
        for name in ("exchange_bytes", "workspace_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.head_parallel < 1 or self.ranks % self.head_parallel:
            raise ValueError(f"head_parallel must divide {self.ranks} ranks, got {self.head_parallel}")
        if (self.exchange == "local") != (self.sequence_ranks == 1) or self.exchange not in ("local", *EXCHANGES):
            raise ValueError(
                f"exchange must be one of {', '.join(EXCHANGES)} between several sequence ranks and local for one, got "
                f"{self.exchange!r} for {self.sequence_ranks}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")

    @property
    def sequence_ranks(self) -> int:
        """Ranks that split the sequence, S."""
        return self.ranks // self.head_parallel

    @property
    def comm(self) -> str:
        """The argument of `moba_attention`."""
        if self.head_parallel == 1:
            return self.exchange
        return "a2a" if self.exchange == "local" else f"a2a+{self.exchange}"

    @classmethod
    def of_comm(
        cls,
        comm: str,
        ranks: int,
        head_parallel: int,
        layout: str = "zigzag",
        exchange_bytes: int = DEFAULT_EXCHANGE_BYTES,
    ) -> Split:
        """The split that a call with `comm=` makes; "local" and "auto" on one rank."""
        if ranks == 1:
            return cls(1, layout=layout)
        _, _, exchange = comm.rpartition("+")
        if "a2a" not in comm:
            return cls(ranks, 1, exchange, layout, exchange_bytes)
        exchange = "local" if exchange == "a2a" or head_parallel == ranks else exchange
        return cls(ranks, head_parallel, exchange, layout, exchange_bytes)


@dataclass(frozen=True)
class Work:
    """What the busiest rank computes in one forward pass, counted over its rows and q heads.

    Attributes:
        rows: query rows times q heads.
        kv_rows: keys times kv heads that it holds.
        keys: (row, key) pairs that it attends to.
        pairs: (row, block) pairs: partial results.
        scored: (row, candidate block) pairs.
        revisited: keys times kv heads that chunks of query rows after the first one visit again, with sums of their gradients.
    """

    rows: float
    kv_rows: float
    keys: float
    pairs: float
    scored: float
    revisited: float


def busiest(layer: Layer, split: Split) -> Work:
    """Work of the sequence rank that has most to attend to and to score; heads are spread evenly."""
    keys, pairs, scored = _busiest(layer.length, split.sequence_ranks, layer.block_size, layer.topk, split.layout)
    documents, heads = layer.tokens / layer.length, layer.q_heads / split.head_parallel
    tokens = layer.tokens / split.sequence_ranks
    return Work(
        rows=tokens * heads,
        kv_rows=tokens * layer.kv_heads_of(split.head_parallel),
        keys=keys * documents * heads,
        pairs=pairs * documents * heads,
        scored=scored * documents * heads,
        revisited=(ranges(layer, split).chunks - 1) * layer.tokens * layer.kv_heads_of(split.head_parallel),
    )


def moves_keys(layer: Layer, split: Split) -> bool:
    """Whether sequence ranks copy keys, to have those of their home blocks together and in order.

    They do where a block lies on two of them, or where what the ranks of a head group hold, one after another, is not in order.
    """
    length, block_size = layer.length, min(layer.block_size, layer.length)
    cut_as_one = split.layout == "contiguous"  # the packed documents; other layouts cut each alike
    cut_length = layer.tokens if cut_as_one else length
    start, end, rank = _runs(cut_length, split.ranks, block_size, min(layer.topk, length), split.layout)
    start, rank = start[start < end], rank[start < end]
    group = rank // split.head_parallel
    ascending = np.argsort(start)
    cut = (start[ascending][1:] % length % block_size != 0) & (np.diff(group[ascending]) != 0)
    together = np.lexsort((start, rank))
    disordered = (np.diff(start[together]) < 0) & (np.diff(group[together]) == 0)
    # All documents of a rank precede those of the next rank of its group.
    interleaved = cut_length < layer.tokens and np.unique(rank).size > np.unique(group).size
    return bool(cut.any() or disordered.any() or interleaved)


@lru_cache(maxsize=64)
def _runs(length: int, size: int, block_size: int, topk: int, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and rank of the runs of one document. Not to be changed: kept for the next call."""
    if layout == "balanced":
        low, high = (x[:, 0] for x in balanced_cuts(np.array([length]), size, block_size, topk))
        start, end = np.concatenate([low[:-1], high[1:]]), np.concatenate([low[1:], high[:-1]])
        return start, end, np.tile(np.arange(size), 2)
    cuts = (SequenceLayout.zigzag if layout == "zigzag" else SequenceLayout.contiguous)([0, length], size)
    held = cuts.partition.fragments(np.array([0]), np.array([length]))
    return held.start, held.start + held.length, held.rank


@lru_cache(maxsize=4096)
def _busiest(length: int, size: int, block_size: int, topk: int, layout: str) -> tuple[int, int, int]:
    """Keys, pairs and candidates of one document and q head on the busiest rank."""
    block_size, topk = min(block_size, length), min(topk, length)  # larger values mean the same, and do not fit 64 bits
    start, end, rank = _runs(length, size, block_size, topk, layout)
    work = np.zeros((3, size), dtype=np.int64)
    for rank_work, run_work in zip(
        work,
        (
            keys_before(end, block_size, topk) - keys_before(start, block_size, topk),
            pairs_before(end, block_size, topk) - pairs_before(start, block_size, topk),
            candidates_before(end, block_size) - candidates_before(start, block_size),
        ),
        strict=True,
    ):
        np.add.at(rank_work, rank, run_work)
    keys, pairs, scored = work
    most = int(np.argmax(KEY_WORK * keys.astype(float) + CANDIDATE_WORK * scored))  # 64-bit integers could overflow
    return int(keys[most]), int(pairs[most]), int(scored[most])


class Divided(NamedTuple):
    """How a pass is divided so that partial results fit the workspace.

    Attributes:
        ranges: ranges of kv heads.
        most_heads: kv heads of the widest range.
        chunks: chunks of query rows per range.
    """

    ranges: int
    most_heads: int
    chunks: int


def partial_bytes(layer: Layer) -> int:
    """Bytes of the partial results of one row and q head: a vector and a number for each selected block, in fp32 where dq is
    summed."""
    return layer.slots * (layer.head_dim * (4 if layer.sums_dq else layer.itemsize) + 4)


def block_bytes(layer: Layer) -> int:
    """Bytes that partial results take for each block of a kv head, whatever its rows."""
    return SUM_TILE_BYTES if layer.sums_dq else 0


def ranges(layer: Layer, split: Split) -> Divided:
    """Ranges of kv heads and chunks of rows of a sequence rank."""
    tokens = layer.tokens // split.sequence_ranks
    heads, kv_heads = layer.q_heads_of(split.head_parallel), layer.kv_heads_of(split.head_parallel)
    per_range, per_chunk = most_at_once(
        tokens, heads, kv_heads, partial_bytes(layer), split.workspace_bytes, layer.blocks * block_bytes(layer)
    )
    return Divided(-(-kv_heads // per_range), per_range, -(-max(tokens, 1) // per_chunk))
