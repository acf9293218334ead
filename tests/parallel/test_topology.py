"""Nodes: what the environment variable makes of one host, and which splits stay inside nodes."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moba_cp.parallel import peer_memory
from moba_cp.parallel.comm import CommGroup
from moba_cp.parallel.topology import NODE_VARIABLE, Topology, host, topology_of
from tests.ranks import run_ranks


def test_splits_stay_inside_nodes() -> None:
    assert Topology((0,)).splits(8) == (1,)
    assert Topology((0,) * 4).splits(8) == (1, 2, 4)
    assert Topology((0,) * 8).splits(12) == (1, 2, 4)  # 8 does not divide 12
    assert Topology((0, 0, 1, 1)).splits(8) == (1, 2)
    assert Topology((0,) * 4 + (1,) * 2).splits(12) == (1, 2)  # neighbours of 3 would cross
    assert Topology((0, 1, 0, 1)).splits(8) == (1,)  # neighbours are on different nodes
    assert Topology((0,) * 6).splits(1) == (1,)


def test_inside_one() -> None:
    nodes = Topology((0, 0, 1, 1))
    assert nodes.count == 2
    assert nodes.inside_one([2, 3])
    assert not nodes.inside_one([1, 2])
    assert nodes.inside_one([])


def test_the_variable_splits_a_host() -> None:
    with mock.patch.dict(os.environ):
        os.environ.pop(NODE_VARIABLE, None)
        physical = host()
        os.environ[NODE_VARIABLE] = "a"
        first = host()
        os.environ[NODE_VARIABLE] = "b"
        assert len({physical, first, host()}) == 3
        assert first.startswith(physical)
        os.environ[NODE_VARIABLE] = "x" * 65
        with pytest.raises(ValueError, match=f"{NODE_VARIABLE} must have at most 64 characters, got 'xxx"):
            host()


def nodes_on_rank(rank: int, size: int) -> tuple[tuple[int, ...], int]:
    group = dist.new_group(list(range(size)))
    comm = CommGroup(group, size)
    with mock.patch.dict(os.environ, {NODE_VARIABLE: "ba"[rank % 2]}):
        found = topology_of(comm, torch.device("cpu"))
    assert topology_of(comm, torch.device("cpu")) is found  # found once
    return found.nodes, comm.traffic.collectives


def test_nodes_are_numbered_by_their_first_ranks() -> None:
    assert run_ranks(4, nodes_on_rank) == [((0, 1, 0, 1), 0)] * 4


def test_shared_memory_asks_for_the_same_node() -> None:
    assert peer_memory.host is host
