"""Decoding: one query per sample and q head against the keys of a cache, selected blocks only.

1. `select_kernel` adds the centroids of blocks that became complete since the last step (usually none), scores all blocks, and
   takes the best. Where it does not serve, `update_centroids_kernel` and the gate of a forward pass do.
2. `attend_selected_kernel` splits the selected blocks over programs, and merges their results.

In both, programs share the work of a (sample, kv head), and the last to finish reads what all have stored. Counters in memory
tell which is the last. They are zero between launches, so a call needs no launch to clear them, and a CUDA graph may be replayed.

Content is counted from each sample's first token. A table maps it to slots of the cache, so padding on either side, or between a
prompt and what was generated, is never read. The host reads nothing, so the steps can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import configs
from .decode_kernels import attend_selected_kernel, select_kernel, update_centroids_kernel
from .gate import select_blocks
from .gpu import gpu_of
from .launch import TENSOR, BoundLaunch, launch_kernel
from .sizes import LOG2E, next_power_of_2, padded
from .types import COUNT_TILE, decode_rows, selection_dtype

MOST_BLOCKS = 4096
"""Most blocks per sample whose order keys `select_kernel` keeps in registers."""
MOST_TOPK = 64
"""Largest topk of `select_kernel`, which takes the best one after the other."""
Arguments = tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""Of a launch: its grid, numbers that follow the tensors, and constants."""


def update_centroids(
    k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, count: Tensor, centroids: Tensor, block_size: int,
    at_most: int,
) -> None:  # fmt: skip
    """See `backend.Backend.update_centroids`."""
    samples, most, heads, dim = centroids.shape
    tiles = count.shape[2]
    if centroids.numel() == 0:
        return
    config = configs.centroids(dim, block_size, k.element_size())
    lanes = min(next_power_of_2(max(at_most, 1)), COUNT_TILE)
    launch_kernel(update_centroids_kernel, (samples * heads * tiles, lanes),
        k, slots, before, lengths, count, centroids, k.stride(0), k.stride(1), k.stride(2), slots.stride(0),
        before.stride(0), lengths.stride(0), heads, most, tiles, LANES=lanes, BLOCK=block_size, D=dim,
        D_PADDED=next_power_of_2(dim), KEYS=config.keys, TILE=COUNT_TILE, num_warps=config.num_warps,
    )  # fmt: skip
    # Every program has read the count by now.
    first = torch.arange(tiles, device=count.device, dtype=torch.int32) * COUNT_TILE
    count.copy_((lengths[:, None, None] // block_size - first).clamp(0, COUNT_TILE).expand_as(count))


def select_for_decoding(
    q: Tensor, k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor, count: Tensor,
    arrived: Tensor | None, centroids: Tensor, block_size: int, topk: int,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.select_for_decoding`."""
    samples, most, _, _ = centroids.shape
    q_heads = q.shape[1]
    if not _serves(topk, most) or q.numel() == 0:
        update_centroids(
            k, slots=slots, before=before, lengths=lengths, count=count, centroids=centroids, block_size=block_size,
            at_most=1,
        )  # fmt: skip
        rows = decode_rows(position, most, block_size)
        return select_blocks(q, centroids=centroids.flatten(0, 1), rows=rows, topk=topk)
    keys = torch.empty(samples * q_heads, most, dtype=torch.int32, device=q.device)
    selected = torch.empty(q_heads, samples, topk, dtype=selection_dtype(samples * most), device=q.device)
    grid, numbers, constants = _selection(
        q, k, slots=slots, before=before, lengths=lengths, position=position, count=count, centroids=centroids,
        block_size=block_size, topk=topk,
    )  # fmt: skip
    launch_kernel(
        select_kernel, grid, q, k, slots, before, lengths, position, count, arrived, centroids, keys, selected, *numbers,
        **constants,
    )  # fmt: skip
    return selected


def _selection(
    q: Tensor, k: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor, count: Tensor,
    centroids: Tensor, block_size: int, topk: int,
) -> Arguments:  # fmt: skip
    """Grid, numbers and constants of `select_kernel`."""
    samples, most, heads, dim = centroids.shape
    group, tiles = q.shape[1] // heads, count.shape[2]
    config = configs.decode_select(dim, block_size, k.element_size(), group, most)
    numbers = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), slots.stride(0), before.stride(0),
        lengths.stride(0), position.stride(0), samples, heads, group, most, tiles,
    )  # fmt: skip
    constants = {
        "BLOCK": block_size, "D": dim, "D_PADDED": padded(dim), "KEYS": config.keys, "TILE": COUNT_TILE,
        "ROWS": configs.GATE_ROWS, "TOPK": topk, "SLOTS": next_power_of_2(topk), "BLOCKS": most, "HEADS": config.heads,
        "OVERLAP": _overlaps(q), "num_warps": 4,
    }  # fmt: skip
    return (samples * heads * tiles,), numbers, constants


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, position: Tensor, selected: Tensor, arrived: Tensor | None,
    blocks: int, block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    """See `backend.Backend.attend_selected`; partials and sums in fp32."""
    samples, q_heads, _ = q.shape
    dim_v = v.shape[3]
    out = torch.empty(samples, q_heads, dim_v, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    grid, numbers, constants = _attention(
        q, k, v, slots=slots, position=position, selected=selected, blocks=blocks, block_size=block_size, scale=scale
    )
    partial = _new_partial(q, dim_v, grid[1])
    launch_kernel(
        attend_selected_kernel, grid, q, k, v, slots, position, selected, arrived, partial, out, *numbers, **constants
    )
    return out


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, position: Tensor, selected: Tensor, blocks: int, block_size: int,
    scale: float,
) -> Arguments:  # fmt: skip
    """Grid, numbers and constants of `attend_selected_kernel`."""
    samples, q_heads, dim = q.shape
    dim_v, topk, group = v.shape[3], selected.shape[2], q_heads // k.shape[2]
    config = configs.decode_attend(dim, dim_v, block_size, group)
    numbers = (
        scale * LOG2E, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1),
        v.stride(2), slots.stride(0), position.stride(0), samples, blocks, group,
    )  # fmt: skip
    overlap = _overlaps(q)
    constants = {
        "TOPK": topk, "SLOTS": next_power_of_2(topk), "SPLITS": config.splits, "SPLIT": config.split,
        "BLOCK": block_size, "D": dim, "D_PADDED": padded(dim), "DV": dim_v, "DV_PADDED": padded(dim_v),
        "KEYS": config.keys, "ROWS": padded(group), "STAGES": config.num_stages, "HEADS": config.heads,
        "AT_ONCE": config.at_once, "OVERLAP": overlap, "num_warps": config.num_warps, "launch_pdl": overlap,
    }  # fmt: skip
    return (q_heads, topk * config.splits, samples), numbers, constants


def _new_partial(q: Tensor, dim_v: int, parts: int) -> Tensor:
    """Memory for partial results and their log-sum-exps."""
    return torch.empty(q.shape[0] * q.shape[1] * parts * (dim_v + 1), dtype=torch.float32, device=q.device)


def _overlaps(q: Tensor) -> bool:
    """Whether attention is launched before the selection has ended, and waits for it on the device: from Hopper on."""
    return q.is_cuda and gpu_of(q.device).is_hopper_or_newer


class DecodeStep:
    """Selection and attention of one step, launched with less work for the host: again and again, for other tensors.

    Grid, numbers and constants are those of the arguments. They fit tensors of the same devices, dtypes, shapes and strides.

    Args:
        The arguments of `select_for_decoding` and of `attend_selected`.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor,
        count: Tensor, arrived: Tensor, centroids: Tensor, block_size: int, topk: int, scale: float,
    ) -> None:  # fmt: skip
        samples, q_heads, _ = q.shape
        blocks = centroids.shape[1]
        selected = torch.empty(q_heads, samples, topk, dtype=selection_dtype(samples * blocks), device=q.device)
        select = _selection(
            q, k, slots=slots, before=before, lengths=lengths, position=position, count=count, centroids=centroids,
            block_size=block_size, topk=topk,
        )  # fmt: skip
        attend = _attention(
            q,
            k,
            v,
            slots=slots,
            position=position,
            selected=selected,
            blocks=blocks,
            block_size=block_size,
            scale=scale,
        )
        self._like_out = torch.empty(samples, 1, q_heads, v.shape[3], dtype=q.dtype, device=q.device)
        keys = torch.empty(samples * q_heads, blocks, dtype=torch.int32, device=q.device)
        self._of_select = (count, arrived, centroids, keys, selected)
        self._of_attend = (selected, arrived, _new_partial(q, v.shape[3], attend[0][1]))
        of_call = 6  # tensors of each launch that belong to the call: see `__call__`
        self._select = _bound(select_kernel, of_call + len(self._of_select), *select)
        self._attend = _bound(attend_selected_kernel, of_call + len(self._of_attend), *attend)

    @property
    def nbytes(self) -> int:
        """Bytes on the device that only this object holds."""
        return sum(x.nbytes for x in (self._like_out, *self._of_select[3:], self._of_attend[2]))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor
    ) -> Tensor:
        """Output `[samples, 1, Hq, Dv]`; `q` may have a dimension of size 1 for queries."""
        out = torch.empty_like(self._like_out)
        self._select(q, k, slots, before, lengths, position, *self._of_select)
        self._attend(q, k, v, slots, position, *self._of_attend, out)
        return out


def _bound(
    kernel: Any, tensors: int, grid: tuple[int, ...], numbers: tuple[Any, ...], constants: dict[str, Any]
) -> BoundLaunch:
    """Launches of a kernel whose first `tensors` arguments are tensors."""
    return BoundLaunch(kernel, grid, (*(TENSOR,) * tensors, *numbers), constants)


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, *, slots: Tensor, before: Tensor, lengths: Tensor, position: Tensor,
    count: Tensor, arrived: Tensor | None, centroids: Tensor, block_size: int, topk: int, scale: float,
) -> DecodeStep | None:  # fmt: skip
    """See `backend.Backend.decode_step`."""
    if not _serves(topk, centroids.shape[1]) or arrived is None:
        return None
    return DecodeStep(
        q, k, v, slots=slots, before=before, lengths=lengths, position=position, count=count, arrived=arrived,
        centroids=centroids, block_size=block_size, topk=topk, scale=scale,
    )  # fmt: skip


def _serves(topk: int, blocks: int) -> bool:
    """Whether `select_kernel` can select so many blocks of so many."""
    return 1 < topk <= MOST_TOPK and blocks <= MOST_BLOCKS
