"""Which global token each row of a Megatron tensor is: Megatron's slicing rules as a :class:`moba_cp.SequenceLayout`.

Megatron hands every rank of a context-parallel group its share of a micro-batch in one of two shapes.

SBHD, ``[s / cp, b, heads, d]``: every sequence is cut into ``2 * cp`` equal chunks, rank ``r`` holds ``r`` and
``2 * cp - 1 - r``. With ``cp = 2`` and one sequence of 8 tokens::

    rank 0: 0 1 . . . . 6 7
    rank 1: . . 2 3 4 5 . .

THD, ``[t / cp, heads, d]``: sequences are packed one after the other. ``cu_seqlens`` stay global; entries that repeat the
total length stand for absent sequences. A pack may be cut in four ways. With ``cp = 2`` and sequences of 4 and 8 tokens,
rank 0 holds::

    "zigzag"           0 . . 3 | 4 5 . . . . 10 11    every sequence like the one above (Megatron's rule)
    "zigzag_pack"      0 1 2 . | . . . . . 9 10 11    the pack, as if it were one sequence
    "contiguous"       0 1 . . | 4 5 6 7 . . . .      one run of every sequence
    "contiguous_pack"  0 1 2 3 | 4 5 . . . . . .      one run of the pack

The tensors look the same in all four. :mod:`moba_cp.megatron.partition` decides which it is, or refuses.

All of them become packed documents. Row ``i`` of the local tensor is token ``layout.local_indices(rank)[i]``.
"""

from __future__ import annotations

from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch

from moba_cp import SequenceLayout
from moba_cp.parallel.partition import Chunked
from moba_cp.parallel.plan_cache import PLANS, Memo

PARTITIONS = ("zigzag", "contiguous")
"""How one sequence is cut."""
WHOLE_PACK = "_pack"
PACKED_PARTITIONS = (*PARTITIONS, *(name + WHOLE_PACK for name in PARTITIONS))
"""How a pack is cut: sequence by sequence, or as if it were one sequence."""


def sbhd_layout(local_length: int, batch: int, cp_size: int, partition: str = "zigzag") -> SequenceLayout:
    """Layout of a micro-batch of ``batch`` equally long sequences, read batch-major (sequence 0 first).

    Args:
        local_length: tokens of one sequence held by one rank (``s / cp``).
        batch: sequences in the micro-batch.
        cp_size: ranks of the context-parallel group.
        partition: ``"zigzag"`` or ``"contiguous"``.

    Raises:
        ValueError: a zigzag share that is not two equal chunks.
    """
    if partition == "zigzag" and cp_size > 1 and local_length % 2:
        raise ValueError(
            f"each rank holds {local_length} tokens of a sequence, which is not two equal chunks: with "
            f"cp={cp_size} the sequence length must be a multiple of {2 * cp_size}"
        )
    length = local_length * cp_size
    return packed_layout(tuple(length * i for i in range(batch + 1)), None, cp_size, partition)


def packed_layout(
    cu_seqlens: tuple[int, ...], cu_seqlens_padded: tuple[int, ...] | None, cp_size: int, partition: str = "zigzag"
) -> SequenceLayout:
    """Layout of packed sequences; padding becomes documents of its own, so that nothing ever attends to it.

    Args:
        cu_seqlens: cumulative true lengths, ``n + 1`` host integers from 0; trailing repeats are empty sequences.
        cu_seqlens_padded: cumulative padded lengths, or None if there is no padding.
        cp_size: ranks of the context-parallel group.
        partition: one of :data:`PACKED_PARTITIONS`.

    Raises:
        ValueError: numbers that do not describe packed sequences, or lengths that cannot be cut into equal parts.
    """
    padded = cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded
    _check_cumulative(cu_seqlens, padded)
    cut = padded if partition in PARTITIONS else (0, padded[-1])
    if cp_size > 1:
        _check_equal_parts(cut, cp_size, partition)
    lengths = blake2b(np.array([cu_seqlens, padded], dtype=np.int64).tobytes()).digest()
    make = lambda: _packed_layout(cu_seqlens, padded, cut, cp_size, partition)  # noqa: E731
    return PLANS.get(("layout of a pack", lengths, cp_size, partition), Memo).get("layout", make)


def _packed_layout(
    cu_seqlens: tuple[int, ...], padded: tuple[int, ...], cut: tuple[int, ...], cp_size: int, partition: str
) -> SequenceLayout:
    """Of lengths that are checked. `cut`: what the rule cuts into equal parts, `padded` or the whole pack."""
    rule = partition.removesuffix(WHOLE_PACK)
    ends = np.array(padded)
    true_ends = ends[:-1] + np.diff(np.array(cu_seqlens))
    documents = np.unique(np.concatenate([[0], true_ends, ends[1:]])).tolist()
    if rule == "zigzag" and padded == cu_seqlens:  # the rule itself, which lists no rank's runs
        return SequenceLayout.zigzag(documents, cp_size, per_document=rule == partition)
    chunks = Chunked(np.unique(np.array(cut)), cp_size, mirrored=rule == "zigzag")
    return SequenceLayout.from_runs([chunks.runs(rank) for rank in range(cp_size)], documents)


def host_integers(values: torch.Tensor) -> tuple[int, ...]:
    """Values of a one-dimensional integer tensor, on the host. For a GPU tensor this waits for the GPU.

    Raises:
        ValueError: another shape or dtype, or no entry.
    """
    if values.dim() != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise ValueError(
            f"cumulative lengths must be a one-dimensional integer tensor, got {values.dtype} of shape "
            f"{tuple(values.shape)}"
        )
    if not values.numel():
        raise ValueError("cumulative lengths must start at 0, got an empty tensor")
    return tuple(values.tolist())


def _check_cumulative(true: tuple[int, ...], padded: tuple[int, ...]) -> None:
    if len(true) != len(padded):
        raise ValueError(f"cu_seqlens has {len(true)} entries but its padded form has {len(padded)}")
    for name, cumulative in (("cu_seqlens", true), ("cu_seqlens_padded", padded)):
        if not cumulative or cumulative[0] != 0 or any(b < a for a, b in pairwise(cumulative)):
            raise ValueError(f"{name} must start at 0 and never decrease, got {list(cumulative)}")
    for index, ((a, b), (p, e)) in enumerate(zip(pairwise(true), pairwise(padded), strict=True)):
        if b - a > e - p:
            raise ValueError(f"sequence {index} has {b - a} tokens but only {e - p} with padding")


def _check_equal_parts(cut: tuple[int, ...], cp_size: int, partition: str) -> None:
    parts = cp_size if partition.startswith("contiguous") else 2 * cp_size
    for index, (start, end) in enumerate(pairwise(cut)):
        if (end - start) % parts:
            what = "the pack" if partition.endswith(WHOLE_PACK) else f"packed sequence {index}"
            raise ValueError(
                f"{what} holds {end - start} tokens with padding; with cp={cp_size} a partition of {partition!r} cuts it "
                f"into {parts} equal chunks, so it must be padded to a multiple of {parts}"
            )
