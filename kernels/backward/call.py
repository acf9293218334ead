"""What the backward kernels are launched with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sizes import head_stride, padded
from ..types import KVPart, QueryRows, RoutingLists


@dataclass(frozen=True)
class Call:
    """The arguments of one `attend_backward`, and the segments of long bins; the same for both variants.

    Attributes:
        part, lists, rows, q, dout, lse, delta, scale, dk, dv, accumulate: see `attend_backward`.
        n_segments: segments, of which `segment_bin` (int32 `[n_segments]`) names the bins; see `segments.py`.
        dq, place, sums_dq: of `DqPartials`.
    """

    part: KVPart
    lists: RoutingLists
    rows: QueryRows
    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    scale: float
    dk: Tensor
    dv: Tensor
    dq: Tensor
    accumulate: bool
    n_segments: int
    segment_bin: Tensor
    place: Tensor | None = None
    sums_dq: bool = False

    def dkdv_arguments(self, sums: Tensor) -> tuple:
        """Arguments of a kernel for dK and dV, up to its constants; `sums` is the buffer of `segment_sums`."""
        return self._dkdv_arguments(sums, self._dq_strides())

    def dkdv_dq_tiles_arguments(self, sums: Tensor, progress: Tensor) -> tuple:
        """Arguments of the kernel for dK, dV and sums of dq, up to its constants."""
        assert self.place is not None
        return *self._dkdv_arguments(sums, self.place.stride()[:2]), self.place, progress

    def _dkdv_arguments(self, sums: Tensor, dq_strides: tuple[int, ...]) -> tuple:
        part, lists, shape = self.part, self.lists, self.lists.shape
        return (
            self.q, self.dout, part.k, part.v, self.lse, self.delta, self.rows.position, lists.pointer, lists.entry,
            part.start, part.length, self.segment_bin, self.dk, self.dv, self.dq, sums,
            *self._row_strides(), *key_strides(part.k, part.v, self.dk, self.dv), *self._score_strides(),
            *dq_strides, part.start.stride(0), shape.n_bins, shape.n_blocks, shape.group_size, self.scale,
        )  # fmt: skip

    def dq_arguments(self) -> tuple:
        """Arguments of a kernel for dq, up to its constants."""
        part, lists, shape = self.part, self.lists, self.lists.shape
        return (
            self.q, self.dout, part.k, part.v, self.lse, self.delta, self.rows.position, lists.entry, lists.item_bin,
            lists.item_start, lists.item_end, part.start, part.length, self.dq,
            *self._row_strides(), *key_strides(part.k, part.v), *self._score_strides(), *self._dq_strides(),
            part.start.stride(0), shape.n_blocks, shape.group_size, self.scale,
        )  # fmt: skip

    def dq_of_ds_arguments(self) -> tuple:
        """Arguments of the kernel for dq where dS was kept, up to its constants."""
        part, lists, shape = self.part, self.lists, self.lists.shape
        assert self.place is not None
        return (
            self.dq, part.k, lists.entry, lists.item_bin, lists.item_start, lists.item_end, part.start, part.length, self.place,
            *key_strides(part.k), *self.place.stride()[:2], part.start.stride(0), shape.n_blocks, shape.group_size, self.scale,
        )  # fmt: skip

    def segment_sums(self, key_rows: int) -> Tensor:
        """Uninitialised fp32 buffer for the sums of segments: `[n_segments, key_rows, D + Dv]`."""
        width = self.part.k.shape[2] + self.part.v.shape[2]
        return torch.empty(self.n_segments, key_rows, width, dtype=torch.float32, device=self.q.device)

    def dims(self) -> dict[str, int]:
        """Head sizes, and the same padded for products."""
        dim, dim_v = self.part.k.shape[2], self.part.v.shape[2]
        return {"D": dim, "DV": dim_v, "D_PADDED": padded(dim), "DV_PADDED": padded(dim_v)}

    def bits(self) -> dict[str, int]:
        """Layout of an entry, and the number of slots."""
        shape = self.lists.shape
        return {"HEAD_BITS": shape.head_bits, "SLOT_BITS": shape.slot_bits, "TOPK": shape.topk}

    def _row_strides(self) -> tuple[int, ...]:
        """(token, head) strides of q and dout."""
        return (*self.q.stride()[:2], *self.dout.stride()[:2])

    def _score_strides(self) -> tuple[int, ...]:
        """(head, token) strides of lse and delta."""
        return (*self.lse.stride(), *self.delta.stride())

    def _dq_strides(self) -> tuple[int, int, int]:
        """Head and token strides of the partial dq in slots, and the stride of a slot in elements.

        The two large strides change with the number of tokens. Counted in slots, they need no alignment of their own: the
        third gives a row's. Where dS is kept, partial dq are in no slots: zeros.
        """
        if self.place is not None:
            return 0, 0, 0
        head, token, slot, _ = self.dq.stride()
        if slot and not head % slot and not token % slot:
            return head // slot, token // slot, slot
        raise ValueError(f"partial dq must have evenly spaced slots, got strides {self.dq.stride()}")


def key_strides(*tensors: Tensor) -> tuple[int, ...]:
    """(row, kv head) strides of `[N, H, ...]` tensors; head stride 0 where H = 1."""
    return tuple(s for x in tensors for s in (x.stride(0), head_stride(x)))
