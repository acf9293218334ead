"""The rules behind `comm="auto"`: bytes a rank would receive by each transport, and which one that makes the best."""

from __future__ import annotations

import numpy as np

from .blocks import HomePlan

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
"""Where GPUs can read each other's memory, `pull` is taken when all remote keys and values of a rank are more than this, and
`all_gather` otherwise. `pull` costs the host about 1 ms more a call, which longer work hides; then it was the fastest or within
a few percent of it in every case of docs/results/layer.json."""


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


def choose_with_shared_memory(plan: HomePlan, kv_heads: int, pair_bytes: int) -> str:
    """`auto` where GPUs can read each other's memory: by the plan alone, so the host waits for nothing.

    Args:
        plan, kv_heads, pair_bytes: as for `choose_transport`.

    Returns:
        `"pull"`, or `"all_gather"` where the others hold at most `PULL_BYTES`.
    """
    return "pull" if _remote_bytes(plan, kv_heads, pair_bytes) > PULL_BYTES else "all_gather"


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
