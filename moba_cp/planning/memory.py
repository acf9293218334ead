"""GiB per GPU of one layer's attention, by part: at the peak of forward and backward, and what stays until backward.

Tensors follow from shapes. What exchanges hold at once was counted on two H100s, in units of one range of heads: keys and values
of the kv heads whose partial results fit the workspace together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..chunks import estimated_workspace
from ..parallel.heads import head_split
from ..wide import slabs_of
from .prediction import keeps_parts
from .sizes import Layer, Split, block_bytes, moves_keys, partial_bytes, ranges

GIB = 2.0**30
UNITS = {"ring": 15.5, "pull": 14.0, "fetch": 10.0, "all_gather": 10.5}
"""Bytes that an exchange holds, in bf16 keys and values of one range of one rank: parts that arrive, their gradients in fp32,
sums of this rank's own, and the range before and after. `fetch` holds every other rank's part at once, and `all_gather` every
rank's. Of two H200 (docs/results/scaling.json); how they grow with more ranks is by construction."""

KEPT_UNITS = 3.0
"""The same of each further part that `ring` and `pull` keep for several chunks of query rows: its keys and values, and their
gradients in fp32. One part is in `UNITS`."""


@dataclass(frozen=True)
class Memory:
    """GiB of one GPU.

    Attributes:
        parts: at the peak of backward, by part.
        saved: what one layer keeps from forward to backward, where nothing is recomputed.
    """

    parts: dict[str, float]
    saved: float

    @property
    def peak(self) -> float:
        """GiB, the sum of `parts`."""
        return sum(self.parts.values())


def memory(layer: Layer, split: Split) -> Memory:
    """Of attention alone: projections, weights, optimizer and other layers come on top."""
    local = layer.tokens / split.ranks
    row = layer.head_dim * layer.itemsize
    q, kv = local * layer.q_heads * row, local * layer.kv_heads * row
    wide_tokens = layer.tokens // split.sequence_ranks
    heads, kv_heads = layer.q_heads_of(split.head_parallel), layer.kv_heads_of(split.head_parallel)
    rows = wide_tokens * heads
    blocks = -(-layer.tokens // layer.block_size)
    selected = rows * layer.slots * (2 if blocks < 1 << 15 else 4)
    lists = rows * layer.slots * 4
    sums = rows * 4
    together = _heads_together(layer, split, wide_tokens)
    parts = {
        "q, k, v and the output": 2 * q + 2 * kv,
        "gradients": 2 * q + 2 * kv,
        "selection and routing lists": selected + lists + 2 * sums,
        "centroids": blocks * kv_heads * row,
        "workspace": _workspace(layer, split, *together),
    }
    kept = q + 2 * kv
    if split.head_parallel > 1:
        wide_kv = wide_tokens * kv_heads * row
        kept = q + 2 * wide_kv  # in place of q, k, v
        parts["tensors split by heads"] = kept + 2 * q + 2 * wide_kv
        parts["memory for heads in and out"] = _shared_for_heads(layer, split, wide_tokens, *together)
    if split.sequence_ranks > 1:
        unit = wide_tokens * min(ranges(layer, split).most_heads, together[1]) * 2 * row
        at_once = {"fetch": split.sequence_ranks - 1, "all_gather": split.sequence_ranks}.get(split.exchange, 1)
        parts["exchange"] = UNITS[split.exchange] * unit * at_once
        if keeps_parts(layer, split):
            parts["parts kept for chunks of rows"] = KEPT_UNITS * unit * (split.sequence_ranks - 2)
        if split.exchange == "pull":
            parts["memory that other ranks read"] = wide_tokens * kv_heads * 2 * row
        if moves_keys(layer, split):  # keys and values, and their gradients
            parts["home blocks"] = wide_tokens * kv_heads * 2 * row * (1 + _gradients_per_number(layer, split))
    saved = kept + q + selected + lists + sums  # the output where its tokens are
    return Memory({name: bytes_ / GIB for name, bytes_ in parts.items()}, saved / GIB)


def _workspace(layer: Layer, split: Split, q_heads: int, kv_heads: int) -> int:
    """Partial results of heads that are computed together, with what backward keeps beside them where a rank has the whole
    sequence."""
    if split.sequence_ranks > 1:
        rows = layer.tokens // split.sequence_ranks * q_heads
        tiles = layer.blocks * block_bytes(layer)  # of a kv head, the least that is taken
        return max(tiles, min(split.workspace_bytes, rows * partial_bytes(layer) + kv_heads * tiles))
    return estimated_workspace(
        rows=layer.tokens, slots=layer.slots, q_heads=q_heads, kv_heads=kv_heads, dim=layer.head_dim,
        block_size=layer.block_size, blocks=layer.blocks, slot_bytes=partial_bytes(layer) // layer.slots,
        block_bytes=block_bytes(layer), workspace_bytes=split.workspace_bytes, keeps_ds=layer.itemsize == 2,
    )  # fmt: skip


def _shared_for_heads(layer: Layer, split: Split, wide_tokens: int, q_heads: int, kv_heads: int) -> float:
    """Bytes of the buffers through which heads move inside a node: for two of the largest slabs each, q, k, v and dq, dk,
    dv."""
    q, kv = (wide_tokens * heads * layer.head_dim * layer.itemsize for heads in (q_heads, kv_heads))
    return 2 * (q + 2 * kv) + 2 * (q + 2 * kv * _gradients_per_number(layer, split))


def _heads_together(layer: Layer, split: Split, wide_tokens: int) -> tuple[int, int]:
    """q heads and kv heads of a rank that are computed together: all, or where heads are split, those of the largest slab."""
    if split.head_parallel == 1:
        return layer.q_heads, layer.kv_heads
    of = head_split(layer.q_heads, layer.kv_heads, split.head_parallel)
    slabs = slabs_of(of, wide_tokens * layer.head_dim * layer.itemsize)
    return max((x.q.stop - x.q.start, x.kv.stop - x.kv.start) for x in slabs)


def _gradients_per_number(layer: Layer, split: Split) -> float:
    """Bytes of a gradient of a key or value over those of the number: in fp32 where several ranks have the same kv head."""
    of = head_split(layer.q_heads, layer.kv_heads, split.head_parallel)
    return 1 if of.copies == 1 else 4 / layer.itemsize
