"""The primitives of a backend, as the pipeline sees them: what each takes, returns and promises.

`torch_backend` and `triton_backend` are modules that implement this protocol, and the type checker compares both with it.
Parameters that share a type, above all tensors, are keyword-only, so that swapping two of them is a type error.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .types import DqPartials, KVPart, Partials, QueryRows, RoutingLists


class DecodeStep(Protocol):
    """Steps of decoding with equal shapes, dtypes, devices and strides; the bits of the primitives it stands for."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device that only this object holds."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor
    ) -> Tensor:
        """Output `[samples, 1, Hq, Dv]`; the step's centroids and count are updated."""
        ...


class Backend(Protocol):
    """Primitives of block attention on one device.

    Sums are fp64 for fp64 inputs and fp32 otherwise, which is called the accumulation dtype. The unit of log-sum-exps (natural or
    base 2) is the backend's own: they only come back to its own backward. Tensors have unit stride in the last dimension.

    Attributes:
        NAME: "torch" or "triton".
    """

    NAME: str

    def check_sizes(self, *, dim: int, dim_v: int, block_size: int) -> None:
        """Raise ValueError for head and block sizes that this backend does not serve."""

    def bytes_per_slot(self, dim: int, dtype: torch.dtype) -> int:
        """Workspace bytes per (q head, row, slot) of partials with last size `dim`; `dtype` is the inputs'."""
        ...

    def dq_bytes(self, q: Tensor, v: Tensor, block_size: int, n_blocks: int) -> tuple[int, int]:
        """Most workspace bytes of partial dq per (q head, row, slot), and besides per (kv head, block): the same on every device.

        Args:
            q, v: of the call; head sizes and dtype count.
            block_size, n_blocks: of the call.
        """
        ...

    def kept_ds_bytes(
        self, q: Tensor, v: Tensor, *, rows: int, kv_heads: int, slots: int, n_blocks: int, block_size: int
    ) -> int:
        """Bytes per kv head that backward takes to keep the gradients of scores of `rows` rows; 0 if it keeps none.

        Args:
            q, v: of the call; shapes, dtype and device count.
            rows: query rows.
            kv_heads, slots, n_blocks, block_size: of the call.
        """
        ...

    def new_partials(self, selected: Tensor, dim_v: int, dtype: torch.dtype) -> Partials:
        """Uninitialised partial outputs for `selected` `[Hq, T, topk]`; `dtype` is the inputs'. Contiguous."""
        ...

    def new_dq_partials(
        self, selected: Tensor, lists: RoutingLists, q: Tensor, v: Tensor, *, keeps_ds: bool = False
    ) -> DqPartials:
        """Uninitialised partial dq for `selected` `[Hq, T, topk]`.

        Args:
            lists: `route(selected, ...)`.
            q, v: of the call, `v` or `dout`; head sizes, dtype and device count.
            keeps_ds: gradients of scores are to be kept, which takes `kept_ds_bytes` and saves two of dq's three products. The
                bits of dq are the same.
        """
        ...

    def new_lse(self, q: Tensor) -> Tensor:
        """Uninitialised log-sum-exps of `q` `[T, Hq, D]`: `[Hq, T]`."""
        ...

    def centroids(self, k: Tensor, *, start: Tensor, block_size: int) -> Tensor:
        """Means of complete blocks: accumulated in the accumulation dtype, rounded once to the dtype of `k`.

        Args:
            k: `[N, H, D]` keys.
            start: int32 `[n]`, row of each block's first key; every block has `block_size` consecutive rows.
            block_size: keys per block.

        Returns:
            `[n, H, D]` in the dtype of `k`.
        """
        ...

    def select_blocks(self, q: Tensor, *, centroids: Tensor, rows: QueryRows, topk: int) -> Tensor:
        """Per q head and row: its own block, and the `topk - 1` best-scored earlier blocks of its document.

        Scores are `<q, centroid>`, unscaled. Of equal scores the later block wins; NaN ranks above every number.

        Args:
            q: `[T, Hq, D]`.
            centroids: `[n_blocks, Hkv, D]`; those of blocks that are nobody's candidate may hold anything. Rows take longer where
                one is not finite, or far larger than others.
            rows: positions of the `T` rows.
            topk: most blocks per row, own block included.

        Returns:
            int16 `[Hq, T, topk]`, or int32 where int16 cannot number the blocks: ascending, -1 at the front where there
            are fewer than `topk`. The last slot is the own block.
        """
        ...

    def place_selection(self, listed: Tensor, *, rows: QueryRows, n_blocks: int, slots: int) -> tuple[Tensor, Tensor]:
        """A caller's selection in the form of `select_blocks`.

        The own block is added where a row does not list it. A number below -1, a block after the row's own, a block that is
        listed before, and the earliest blocks beyond `slots - 1` break a rule and are left out: no result names a block that
        the row may not read.

        Args:
            listed: int16, int32 or int64 `[H, T, k]`: block numbers within each row's document, -1 for none, in any order.
            rows: positions of the `T` rows.
            n_blocks: blocks over all documents.
            slots: last size of the result.

        Returns:
            `[H, T, slots]` as of `select_blocks`; and int32 `[1]`, how many (head, row) pairs break a rule.
        """
        ...

    def wanted_pairs(self, selected: Tensor, *, n_blocks: int, kv_heads: int) -> Tensor:
        """bool `[kv_heads, n_blocks]`: pairs that any row of `selected` `[Hq, T, topk]` selected."""
        ...

    def route(self, selected: Tensor, *, n_blocks: int, kv_heads: int, block_size: int) -> RoutingLists:
        """Routing lists for `attend` and its backward.

        Args:
            selected: `[Hq, T, topk]` of `select_blocks`: the q heads of `kv_heads` kv heads.
            n_blocks: blocks in all.
            kv_heads: kv heads being processed.
            block_size: keys per block.
        """
        ...

    def attend(
        self, q: Tensor, part: KVPart, lists: RoutingLists, rows: QueryRows, scale: float, partials: Partials
    ) -> None:
        """Attention of every listed row to every block of the part: one normalised partial per (row, block).

        Args:
            q: `[T, Hq, D]`, the heads being processed.
            part: keys and values. Pairs that it does not hold are left for another part.
            lists: `route(selected, ...)`.
            rows: positions of the rows.
            scale: factor on the scores.
            partials: `new_partials(selected, Dv, q.dtype)`; written at the slots of this part's blocks.
        """

    def merge(self, partials: Partials, *, selected: Tensor, out: Tensor, lse: Tensor) -> None:
        """Softmax-weighted sum of the partials, in block order.

        Args:
            partials: of `attend`, every slot with `selected >= 0` written.
            selected: `[Hq, T, topk]` of `select_blocks`.
            out: `[T, Hq, Dv]`, written.
            lse: `[Hq, T]`, written: log-sum-exp over all keys of the row.
        """

    def block_weights(self, partials: Partials, *, selected: Tensor) -> Tensor:
        """Share of each slot's block in the row's attention: `[Hq, T, topk]` in the accumulation dtype, 0 for empty slots.

        Args:
            partials: of `attend`, every slot with `selected >= 0` written.
            selected: `[Hq, T, topk]` of `select_blocks`.
        """
        ...

    def delta(self, *, out: Tensor, dout: Tensor) -> Tensor:
        """`sum(out * dout)` over the last dimension of `[T, Hq, Dv]`: `[Hq, T]` in the accumulation dtype."""
        ...

    def attend_backward(
        self, part: KVPart, lists: RoutingLists, rows: QueryRows, *, q: Tensor, dout: Tensor, lse: Tensor, delta: Tensor,
        scale: float, dk: Tensor, dv: Tensor, dq_partials: DqPartials, accumulate: bool,
    ) -> None:  # fmt: skip
        """Gradients of `attend` followed by `merge`, one part at a time.

        Args:
            part, lists, rows, scale: as in `attend`.
            q, dout: `[T, Hq, D]`, `[T, Hq, Dv]`.
            lse, delta: `[Hq, T]`, of `merge` and `delta`.
            dk, dv: of the shapes of `part.k`, `part.v`, in the accumulation dtype or the keys'. Every row of a pair in the
                part is written (zeros where no row selected it), or added to with `accumulate`.
            dq_partials: `new_dq_partials(selected, lists, q, dout)`; written at the slots of this part's blocks. Where it keeps
                gradients of scores, of these `lists`.
            accumulate: add to `dk` and `dv` instead of writing them.
        """

    def merge_dq(self, dq_partials: DqPartials, *, selected: Tensor, dq: Tensor) -> None:
        """Sum of the partial dq, in block order, into `dq` `[T, Hq, D]`; `selected` is `[Hq, T, topk]`."""

    def add_gradients(self, *, own_dk: Tensor, own_dv: Tensor, arrived: list[Tensor], dk: Tensor, dv: Tensor) -> None:
        """dK and dV of this rank's blocks: its own sums and those of other ranks, added in order and rounded once.

        Args:
            own_dk, own_dv: `[N, H, D]`, `[N, H, Dv]` in the accumulation dtype. Their contents are lost.
            arrived: `[N, H, D + Dv]` each, in the accumulation dtype.
            dk, dv: the sums, written, in the dtype of the keys and values; any strides of the first two dimensions.
        """

    def update_centroids(
        self, k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, count: Tensor, centroids: Tensor,
        block_size: int, at_most: int,
    ) -> None:  # fmt: skip
        """Centroids of the complete blocks of a cache, as far as they are missing; the bits of `centroids`.

        Args:
            k: `[samples, slots, H, D]` keys of a cache, any strides of the first three dimensions.
            slots: int32 `[samples, slots]`, slot of each sample's content in order. Its last dimension is dense.
            before, lengths: int32 `[samples]`, content before this step, and with it. Content before it may have shrunk
                since the last step: `count` then covers too much.
            count: int32 `[samples, H, tiles]`, contiguous: known centroids of each tile of `COUNT_TILE` blocks; updated.
            centroids: `[samples, n, H, D]` in the dtype of `k`, contiguous; missing ones are written.
            block_size: keys per block.
            at_most: about how many centroids a sample misses at most; decides the grid only.
        """

    def select_for_decoding(
        self, q: Tensor, k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor, count: Tensor,
        arrived: Tensor | None, centroids: Tensor, block_size: int, topk: int,
    ) -> Tensor:  # fmt: skip
        """`update_centroids`, and `select_blocks` for one query per sample.

        Args:
            q: `[samples, Hq, D]`.
            k, slots, before, lengths, count, centroids, block_size: as in `update_centroids`.
            position: int32 `[samples]`, position of the query in the sample's content; -1 where there is none.
            arrived: int32 `[samples, H]`, contiguous, zero before and after: counts programs of Triton's kernels. None for
                the torch backend.
            topk: most blocks per row, own block included.

        Returns:
            `[Hq, samples, topk]`, as of `select_blocks`: block j of sample i has number `i * n + j`.
        """
        ...

    def attend_selected(
        self, q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, position: Tensor, selected: Tensor,
        arrived: Tensor | None, blocks: int, block_size: int, scale: float,
    ) -> Tensor:  # fmt: skip
        """Attention of one query per sample and q head to the selected blocks of a cache.

        Args:
            q: `[samples, Hq, D]`.
            k, v: `[samples, slots, Hkv, D]`, `[samples, slots, Hkv, Dv]`, any strides of the first three dimensions.
            slots: int32 `[samples, slots]`, slot of each sample's content in order. Its last dimension is dense.
            position: int32 `[samples]`, position of the query in the sample's content; later content is not visible. -1
                where a sample has no query: its output is zero.
            selected: `[Hq, samples, topk]` of `select_blocks`, contiguous: block j of sample i has number
                `i * blocks + j`.
            arrived: as in `select_for_decoding`.
            blocks: see `selected`.
            block_size: keys per block.
            scale: factor on the scores.

        Returns:
            `[samples, Hq, Dv]` in the dtype of `q`, contiguous.
        """
        ...

    def decode_step(
        self, q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor,
        count: Tensor, arrived: Tensor | None, centroids: Tensor, block_size: int, topk: int, scale: float,
    ) -> DecodeStep | None:  # fmt: skip
        """`select_for_decoding` and `attend_selected` in one object, for many steps with tensors of the same kinds and strides.

        None where that would save nothing. The arguments are those of both; nothing is computed yet.
        """
        ...
