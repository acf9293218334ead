"""Brings whole blocks to their home ranks, and returns gradients to the ranks that hold the tokens."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .blocks import HomePlan, RankPlan
from .comm import CommGroup

IndexName: TypeAlias = Literal["send_rows", "return_rows", "home_from", "local_from", "centroid_order"]
"""Index arrays of a `RankPlan`: its fields, and two that are derived from it."""


class HomeBlocks:
    """Keys and values of this rank's home blocks.

    Attributes:
        plan: this rank's plan.
        k, v: `[home tokens, Hkv, D]`, `[home tokens, Hkv, Dv]`; views of the local tensors where nothing has to move.
        start: int32 `[n_blocks]` on the device, row of each block's first key in `k` and `v`; -1 for blocks at home
            elsewhere.
    """

    def __init__(self, plan: RankPlan, k: Tensor, v: Tensor, device: torch.device) -> None:
        self.plan, self.k, self.v = plan, k, v
        self.start = home_start(plan.plan, plan.rank, device)


def bring_home(plan: RankPlan, k: Tensor, v: Tensor, comm: CommGroup) -> HomeBlocks:
    """Exchange the fragments of blocks that straddle ranks: one all-to-all, none where there are no fragments.

    Args:
        plan: this rank's plan.
        k, v: local keys `[T, Hkv, D]` and values `[T, Hkv, Dv]`, any strides.
        comm: the group.
    """
    if _stays(plan, "home_from", k.device):
        return HomeBlocks(plan, k, v, k.device)
    counts = plan.send_tokens, plan.receive_tokens
    return HomeBlocks(plan, *_moved(plan, k, v, comm, "send_rows", "home_from", counts, "home blocks"), k.device)


def send_back(plan: RankPlan, dk: Tensor, dv: Tensor, comm: CommGroup) -> tuple[Tensor, Tensor]:
    """Return gradients of home keys and values to the ranks that hold the tokens: the inverse of `bring_home`.

    Args:
        plan: this rank's plan.
        dk, dv: `[home tokens, Hkv, D]`, `[home tokens, Hkv, Dv]`, complete gradients.
        comm: the group.

    Returns:
        dk, dv of the local tokens.
    """
    if _stays(plan, "local_from", dk.device):
        return dk, dv
    counts = plan.receive_tokens, plan.send_tokens
    return _moved(plan, dk, dv, comm, "return_rows", "local_from", counts, "home gradients")


def _stays(plan: RankPlan, order: IndexName, device: torch.device) -> bool:
    """Whether no row moves: neither on this rank, nor as a fragment between any ranks."""
    return index_tensor(plan, order, device) is None and not plan.plan.has_fragments


def _moved(
    plan: RankPlan, x: Tensor, y: Tensor, comm: CommGroup, leaving: IndexName, order: IndexName,
    counts: tuple[np.ndarray, np.ndarray], stage: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows of `x` and `y` after fragments have moved: one all-to-all of both, none where there are no fragments.

    Args:
        leaving, order: index tensors of the plan: rows that leave, and for each row of the result its row in
            `[rows | received rows]`.
        counts: rows sent to and received from each rank.
    """
    width, packed, index = x.shape[-1], torch.cat([x, y], dim=-1), index_tensor(plan, order, x.device)
    if plan.plan.has_fragments:
        rows = packed[index_tensor(plan, leaving, x.device)]
        arrived = comm.all_to_all(rows, counts[0].tolist(), counts[1].tolist(), stage).wait()
        packed = torch.cat([packed, arrived])
    if index is not None:
        packed = packed[index]
    return packed[..., :width], packed[..., width:]


def centroid_start(plan: RankPlan, device: torch.device) -> Tensor:
    """int32 on the device: home row of the first key of each block of which this rank makes a centroid.

    In a group of one these are all blocks in order, so that centroids need no reordering. A block that is no candidate may have
    too few keys for a centroid: the first candidate takes its position, where it is never read. In a larger group these are the
    rank's `centroid_blocks`.
    """
    return plan.plan.memo.get(("centroid start", plan.rank, device), lambda: _centroid_start(plan, device))


def _centroid_start(plan: RankPlan, device: torch.device) -> Tensor:
    rows = plan.centroid_rows
    if plan.plan.layout.cp_size == 1 and rows.size:
        rows = np.where(plan.plan.blocks.is_last, rows[0], plan.plan.home_row)
    return torch.from_numpy(rows.astype(np.int32)).to(device)


def gather_centroids(plan: RankPlan, local: Tensor, comm: CommGroup) -> Tensor:
    """Every rank's centroids by block number: `[n_blocks, Hkv, D]`; rows of blocks that are no candidates are arbitrary.

    Args:
        plan: this rank's plan.
        local: `[n, Hkv, D]`, centroids of the blocks that `centroid_start` names.
        comm: the group.
    """
    if comm.size == 1:
        return local
    most = _most_centroids(plan.plan)
    if local.shape[0] < most:
        padded = local.new_zeros(most, *local.shape[1:])
        padded[: local.shape[0]] = local
        local = padded
    gathered = comm.all_gather(local, "centroids").wait()
    return gathered.flatten(0, 1)[index_tensor(plan, "centroid_order", local.device)]


def _most_centroids(plan: HomePlan) -> int:
    counts = lambda: np.bincount(plan.home[~plan.blocks.is_last], minlength=plan.layout.cp_size)  # noqa: E731
    return plan.memo.get("most centroids", lambda: int(counts().max(initial=0)))


def _centroid_order(plan: HomePlan) -> np.ndarray:
    candidate = np.flatnonzero(~plan.blocks.is_last)
    home = plan.home[candidate]
    by_home = np.argsort(home, kind="stable")
    counts = np.bincount(home, minlength=plan.layout.cp_size)
    index = np.arange(candidate.size) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.zeros(len(plan.blocks), dtype=np.int64)
    order[candidate[by_home]] = home[by_home] * _most_centroids(plan) + index
    return order


def _return_rows(plan: RankPlan) -> np.ndarray:
    """Home rows of tokens that other ranks hold, by (holder, block, position)."""
    if plan.home_from is None:
        return np.zeros(0, dtype=np.int64)
    received = np.flatnonzero(plan.home_from >= plan.block.size)
    return received[np.argsort(plan.home_from[received])]


def index_tensor(plan: RankPlan, name: IndexName, device: torch.device) -> Tensor | None:
    """An index array of the plan on `device`, int64; None where the plan says nothing has to move."""
    return plan.plan.memo.get((name, plan.rank, device), lambda: _index_tensor(plan, name, device))


def _index_tensor(plan: RankPlan, name: IndexName, device: torch.device) -> Tensor | None:
    match name:
        case "return_rows":
            array = _return_rows(plan)
        case "centroid_order":
            array = _centroid_order(plan.plan)
        case _:
            array = getattr(plan, name)
    return None if array is None else torch.from_numpy(array).to(device)


_STARTS_BYTES = 8 << 20
"""Starts of all ranks are kept on the device up to this size; beyond it, each use makes them again."""


def home_start(plan: HomePlan, rank: int, device: torch.device) -> Tensor:
    """int32 `[n_blocks]`: row of each block's first key among the home keys of `rank`; -1 for blocks elsewhere.

    Beyond `_STARTS_BYTES` a walk over all ranks makes each of these at each layer, so one costs a fill and a copy of the blocks
    at home there, not a comparison of every block.
    """
    blocks, row, bounds = plan.memo.get(("row by home", device), lambda: _row_by_home(plan, device))

    def make() -> Tensor:
        mine = slice(bounds[rank], bounds[rank + 1])
        return torch.full((len(plan.blocks),), -1, dtype=torch.int32, device=device).index_copy_(
            0, blocks[mine], row[mine]
        )

    if plan.layout.cp_size * len(plan.blocks) * 4 > _STARTS_BYTES:
        return make()
    return plan.memo.get(("home start", rank, device), make)


def _row_by_home(plan: HomePlan, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Of `blocks_by_home`, int32 home row of each block's first key; and where the blocks of each rank begin, one more than
    ranks."""
    blocks = blocks_by_home(plan, device)
    row = torch.from_numpy(plan.home_row.astype(np.int32)).to(device)[blocks]
    counts = np.bincount(plan.home, minlength=plan.layout.cp_size)
    return blocks, row, [0, *np.cumsum(counts).tolist()]


def blocks_by_home(plan: HomePlan, device: torch.device) -> Tensor:
    """int64 `[n_blocks]` on the device: block numbers by (home rank, number)."""
    make = lambda: torch.from_numpy(np.argsort(plan.home, kind="stable")).to(device)  # noqa: E731
    return plan.memo.get(("blocks by home", device), make)
