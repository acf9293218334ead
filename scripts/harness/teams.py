"""Groups of 1, 2, 4, ... ranks inside one job, so that one start measures every rank count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .definition import Ranks
from .timing import Times, from_common_start, over_all

Prepared = TypeVar("Prepared")

TIMEOUT = timedelta(minutes=4)
"""After which ranks that wait for one that failed end the job."""


@dataclass(frozen=True)
class Team:
    """The group of `size` neighbouring ranks that this rank is in. All teams of a size do the same work at the same time.

    Attributes:
        size: ranks of the group.
        rank: this rank in it; None where the ranks left over are too few for a group, and this one is among them.
        group: for collectives; None for the default group, and for a group of one.
    """

    size: int
    rank: int | None
    group: dist.ProcessGroup | None

    @property
    def ranks(self) -> Ranks:
        """For sums over the team."""
        return Ranks(None if self.size == 1 else self.group or dist.group.WORLD)


def join(device: torch.device) -> torch.device:
    """Join the job that torchrun started, or be a job of one; the device of this rank."""
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return device


def make_teams(sizes: Iterable[int]) -> dict[int, Team]:
    """Teams of each size; every rank calls alike."""
    world, me = dist.get_world_size(), dist.get_rank()
    teams = {}
    for size in sorted(set(sizes)):
        if size in (1, world):
            teams[size] = Team(size, me if size == world else 0, None)
            continue
        mine: dist.ProcessGroup | None = None
        for first in range(0, world - size + 1, size):
            group = dist.new_group(list(range(first, first + size)), timeout=TIMEOUT)
            if first <= me < first + size:
                mine = group
        teams[size] = Team(size, me % size if mine is not None else None, mine)
    return teams


def first_rank_says(value: Any) -> Any:
    """What rank 0 passes, on every rank."""
    said = [value]
    dist.broadcast_object_list(said)
    return said[0]


def prepare(make: Callable[[], Prepared], team: Team, device: torch.device) -> Prepared | None:
    """What `make` returns on ranks in a team, None on others. What it refuses on any rank ends the case on all of them, also on
    those in no team, which would go on to keep time alone.

    Raises:
        ValueError, torch.OutOfMemoryError: of this rank's `make`; or a ValueError, where another rank's raised.
    """
    made: Prepared | None = None
    refused: Exception | None = None
    if team.rank is not None:
        try:
            made = make()
        except (ValueError, torch.OutOfMemoryError) as error:
            refused = error
    if over_all(float(refused is not None), device):
        raise refused or ValueError("another rank failed")
    return made


def time_teams(call: Callable[[], Any] | None, device: torch.device, iterations: int, seconds: float) -> Times:
    """Time `call` from a common start of all ranks: milliseconds of the slowest one.

    Args:
        call: None where this rank is in no team; it keeps time with the others.
        iterations: calls, fewer where they take more than `seconds` together, but at least one.
    """
    found: list[float] = []
    while not found or (len(found) < iterations and sum(found) < 1e3 * seconds):
        found.append(from_common_start(call, device))
    return Times(tuple(found))
