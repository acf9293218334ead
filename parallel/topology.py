"""Which ranks of a group share a node: what decides how heads are split, and what bytes between nodes are.

A node is a set of processes that can share memory: one host, one boot, one namespace of process numbers. The environment variable
`MOBA_CP_NODE` names a part of a host: processes with different values count as different nodes, for tests and benchmarks that
need several nodes on one machine. It is read when a group is first used; ranks of one node set it alike.
"""

from __future__ import annotations

import os
import platform
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

from .comm import CommGroup, process_group

NODE_VARIABLE = "MOBA_CP_NODE"
"""Environment variable that splits a host into nodes."""
_LONGEST_NAME = 64
_TEXT_BYTES = 512


@dataclass(frozen=True)
class Topology:
    """The nodes of a group.

    Attributes:
        nodes: node of each rank, numbered in order of their first ranks.
    """

    nodes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of nodes."""
        return len(set(self.nodes))

    def inside_one(self, ranks: Sequence[int]) -> bool:
        """Whether all of these ranks share a node."""
        return len({self.nodes[rank] for rank in ranks}) <= 1

    def splits(self, q_heads: int) -> tuple[int, ...]:
        """Sizes of head groups that stay inside nodes, ascending from 1: they divide the group's size and `q_heads`, and no
        group of that many neighbours crosses a node."""
        size = len(self.nodes)
        return tuple(
            u
            for u in range(1, size + 1)
            if size % u == 0 and q_heads % u == 0 and all(self.inside_one(range(r, r + u)) for r in range(0, size, u))
        )


_topologies: weakref.WeakKeyDictionary[dist.ProcessGroup, Topology] = weakref.WeakKeyDictionary()


def topology_of(comm: CommGroup, device: torch.device) -> Topology:
    """The nodes of a group; its ranks find them out together at the first call.

    Args:
        comm: the group.
        device: where the group communicates.
    """
    if comm.size == 1:
        return Topology((0,))
    group = process_group(comm.group)
    if group not in _topologies:
        quiet = CommGroup(comm.group, comm.size)  # set-up is not traffic of the call that happens to need it
        hosts = gather_text(quiet, device, host(), "topology")
        first = {name: number for number, name in enumerate(dict.fromkeys(hosts))}
        _topologies[group] = Topology(tuple(first[name] for name in hosts))
    return _topologies[group]


def host() -> str:
    """What is the same for processes of one node and different for others. See the module.

    Raises:
        ValueError: the value of `MOBA_CP_NODE` is too long.
    """
    name = os.environ.get(NODE_VARIABLE)
    if name is None:
        return _physical_host()
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{NODE_VARIABLE} must have at most {_LONGEST_NAME} characters, got {name!r}")
    return f"{_physical_host()} node {name!r}"


@lru_cache(maxsize=1)
def _physical_host() -> str:
    """Name, boot, and namespace of process numbers; other hosts of the same name and other containers differ. Where these cannot
    be read, different for every process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        return f"{platform.node()} (process {os.getpid()} without /proc)"
    return f"{platform.node()} ({boot}-{namespace})"


def gather_text(comm: CommGroup, device: torch.device, mine: str, stage: str) -> list[str]:
    """A short text of every rank."""
    text = torch.tensor(list(mine.encode().ljust(_TEXT_BYTES)), dtype=torch.uint8, device=device)
    return [bytes(x).decode().rstrip() for x in comm.all_gather(text, stage).wait().tolist()]
