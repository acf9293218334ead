"""Which `comm` splits heads, over how many ranks, and what moves keys and values among the sequence ranks that are left."""

from __future__ import annotations

from dataclasses import dataclass

from .cost import CallSizes, choose_head_parallel
from .exchanges.base import LocalOnly
from .exchanges.registry import EXCHANGES, FLAT_COMMS
from .topology import Topology

HEADS = "a2a"
"""Heads over all ranks of the group; with `+` and the name of an exchange, over ranks of a node, and that exchange between."""
HYBRIDS = {f"{HEADS}+{name}": name for name in EXCHANGES}
COMMS = (*FLAT_COMMS, HEADS, *HYBRIDS)
"""Values of `comm`."""


@dataclass(frozen=True)
class Split:
    """How one call divides its group.

    Attributes:
        size: ranks over which heads are split, U.
        exchange: what moves keys and values among sequence ranks: a value of `registry.FLAT_COMMS`.
        reason: why, for people to read; empty where the exchange alone decides.
        asked: the value of `comm` that named the split; empty where none did.
    """

    size: int
    exchange: str
    reason: str
    asked: str = ""

    def transport(self, exchange: str) -> str:
        """The value of `comm` that stands for this split and the exchange in use."""
        if self.asked or self.size == 1:
            return self.asked or exchange
        return HEADS if exchange == LocalOnly.name else f"{HEADS}+{exchange}"


def check_split(comm: str, head_parallel: int | None, q_heads: int | None, cp_size: int) -> None:
    """`head_parallel` fits `comm`, the heads (None: not known yet) and the group's size, as far as one rank can tell.

    Raises:
        TypeError, ValueError: it does not.
    """
    if head_parallel is not None:
        if isinstance(head_parallel, bool) or not isinstance(head_parallel, int):
            raise TypeError(f"head_parallel must be an int or None, got {head_parallel!r}")
        if head_parallel < 1:
            raise ValueError(f"head_parallel must be at least 1, got {head_parallel}")
        if comm in EXCHANGES and head_parallel > 1:
            raise ValueError(
                f"comm={comm!r} does not split heads, got head_parallel={head_parallel}; "
                f"{HEADS + '+' + comm!r} splits heads over that many ranks and moves keys and values between them by {comm}"
            )
    size = head_parallel or (cp_size if comm == HEADS else 1)
    if cp_size % size:
        raise ValueError(f"head_parallel must divide the {cp_size} ranks of the layout, got {size}")
    if q_heads is not None and q_heads % size:
        what = f"head_parallel={size}" if head_parallel else f"comm={HEADS!r} on {cp_size} ranks"
        raise ValueError(
            f"{what} needs q heads that {size} divides, got {q_heads}; 'a2a+ring' and the like split them as far as they go"
        )
    if comm == HEADS and size != cp_size:
        raise ValueError(
            f"comm={HEADS!r} splits heads over all {cp_size} ranks, got head_parallel={size}; name what moves keys and values "
            f"between head groups: {', '.join(HYBRIDS)}"
        )


def needs_topology(comm: str, head_parallel: int | None, sizes: CallSizes) -> bool:
    """Whether the nodes of the group decide something; alike on all ranks."""
    asked = comm == HEADS or comm in HYBRIDS or head_parallel is not None
    return comm not in EXCHANGES and (asked or sizes.splits_may_pay)


def choose_split(comm: str, head_parallel: int | None, sizes: CallSizes, topology: Topology | None) -> Split:
    """The split of a call; every rank decides alike.

    Args:
        comm, head_parallel: arguments that passed `check_split`.
        sizes: of the call.
        topology: nodes of the group; None where `needs_topology` says so.

    Raises:
        ValueError: the exchange serves ranks of one node, and ranks of equal heads are on several.
    """
    if topology is None or comm in EXCHANGES:
        return Split(1, comm, "")
    if comm == "auto":
        size, reason = choose_head_parallel(sizes, topology, head_parallel)
        return Split(size, comm, reason)
    if comm == HEADS:
        return Split(sizes.cp_size, LocalOnly.name, f"comm={comm!r}", comm)
    size = head_parallel or topology.splits(sizes.q_heads)[-1]
    by = f"head_parallel={head_parallel}" if head_parallel else "as many ranks of a node as heads allow"
    split = Split(size, HYBRIDS[comm], f"comm={comm!r}, heads over {size} ranks: {by}", comm)
    for first in range(size if EXCHANGES[split.exchange].same_host else 0):
        ranks = range(first, sizes.cp_size, size)
        if not topology.inside_one(ranks):
            nodes = ", ".join(f"rank {rank} on node {topology.nodes[rank]}" for rank in ranks)
            raise ValueError(
                f"comm={comm!r} needs sequence ranks of one node, got {nodes} (head_parallel={size}); "
                f"'a2a+ring', 'a2a+fetch' and 'a2a+all_gather' go between nodes"
            )
    return split
