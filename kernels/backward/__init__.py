"""Backward of block attention: dK, dV and partial dq.

One program owns the dK and dV of a tile of one block's keys and walks the rows that selected the block, in list order, so sums
have the same bits every time. The partial dq of a (row, block) goes to the row's slot: from the same program where one tile of
keys holds a whole block, else from a second kernel in which rows stay on chip and keys stream. Where memory allows, the first
one keeps the gradients of scores, and the second one has two products less to compute (`DqPartials.place`). With large blocks,
the programs of a block's tiles of keys add to sums of dq instead (`DqPartials.sums`).

A bin (kv head, block) that very many rows selected would keep one program busy long after the others. Such bins are cut into
segments (`segments.py`). Files: `portable.py` and `sm90.py` launch, `*_kernels.py` and `*_sm90.py` hold the kernels;
`..dispatch` chooses.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import SM90, choose_variant
from ..sizes import ITEM_ROWS, SUM_ROWS, can_keep_ds, sums_dq, tiles_of_sums
from ..types import DqPartials, KVPart, ListShape, QueryRows, RoutingLists
from . import portable
from .call import Call
from .deltas import delta
from .segments import find_segments, segment_count

__all__ = ["attend_backward", "delta"]


def attend_backward(
    part: KVPart, lists: RoutingLists, rows: QueryRows, *, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor,
    scale: float, dk: Tensor, dv: Tensor, dq_partials: DqPartials, accumulate: bool, variant: str | None = None,
) -> None:  # fmt: skip
    """Gradients of `attend` followed by `merge`, one part at a time; see `backend.Backend.attend_backward`.

    Args:
        lse, delta: fp32 `[Hq, T]`, `lse` in base 2; any strides.
        variant: "portable", or "sm90" where it serves; by default the fastest.

    Raises:
        ValueError: see `dispatch.choose_variant`; partial dq whose slots are not evenly spaced, or, for Hopper kernels, not
            multiples of 16 elements apart or with rows `sizes.MOST_REACH` elements apart; or partial dq for kept gradients of
            scores, or sums, which only the Hopper kernels for some blocks of several tiles make.
    """
    shape = lists.shape
    if shape.n_bins == 0 or part.k.shape[0] == 0:
        return
    variant = choose_variant(q, part, lists, dout, requested=variant)
    if dq_partials.sums:
        _check_sums(dq_partials, shape, q.shape[2], variant)
    elif dq_partials.place is not None:
        items = (lists.item_bin.numel(), shape.block_size, ITEM_ROWS)
        if variant != SM90 or not can_keep_ds(shape.block_size):
            raise ValueError(
                f"gradients of scores are not kept by variant {variant!r} for blocks of {shape.block_size} keys"
            )
        if dq_partials.dq.shape != items or shape.rows_per_item != ITEM_ROWS:
            raise ValueError(f"gradients of scores need {items}, those of the lists, got {tuple(dq_partials.dq.shape)}")
    n_segments = segment_count(q.shape[0], shape)
    segment_bin = find_segments(lists.pointer, n_segments, shape.block_size) if n_segments else lists.pointer
    call = Call(
        part, lists, rows, q, dout, lse, delta, scale, dk, dv, dq_partials.dq, accumulate, n_segments, segment_bin,
        dq_partials.place, dq_partials.sums,
    )  # fmt: skip
    if variant == SM90:
        from . import sm90  # Gluon is experimental: imported only where it runs

        sm90.launch(call)
    else:
        portable.launch(call)


def _check_sums(partials: DqPartials, shape: ListShape, dim: int, variant: str) -> None:
    assert partials.place is not None
    if variant != SM90 or not sums_dq(shape.block_size, dim, shape.n_blocks):
        raise ValueError(f"dq is not summed by variant {variant!r} for blocks of {shape.block_size} keys and D {dim}")
    least = tiles_of_sums(partials.place.numel(), shape.n_bins)
    if partials.dq.shape[0] < least or partials.dq.shape[1:] != (SUM_ROWS * dim,):
        raise ValueError(f"sums of dq need {(least, SUM_ROWS * dim)}, got {tuple(partials.dq.shape)}")
