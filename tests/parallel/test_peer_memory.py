"""Memory that ranks read directly, over files in memory: who sees what, growth, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moba_cp.parallel.comm import CommGroup
from moba_cp.parallel.peer_memory import ALIGNMENT, kept_bytes, peer_memory, release
from tests.cases import sub_groups
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def shares(rank: int, size: int) -> dict:
    """Every rank writes its number; then all read all. Then the same in a larger buffer, and in the same again."""
    comm, seen, files = CommGroup(None, size), {}, len(os.listdir("/proc/self/fd"))
    for name, wanted in (("first", 10), ("again", 256), ("larger", 300), ("smaller", 5)):
        memory = peer_memory(comm, CPU, "test", wanted)
        memory.buffers[rank][:wanted] = rank + 1
        dist.barrier()
        seen[name] = [int(memory.view(r, wanted - 1, (1,), torch.uint8)) for r in range(size)]
        seen[name + " size"] = memory.buffers[0].numel()
        dist.barrier()
    seen["other purpose"] = (
        peer_memory(comm, CPU, "another", 1).buffers[rank].data_ptr() != memory.buffers[rank].data_ptr()
    )
    seen["kept"] = kept_bytes()
    seen["files"] = len(os.listdir("/proc/self/fd")) - files
    seen["traffic"] = comm.traffic.collectives
    return seen


def test_every_rank_sees_every_buffer() -> None:
    for seen in run_ranks(3, shares):
        for name in ("first", "again", "larger", "smaller"):
            assert seen[name] == [1, 2, 3]
        assert seen["first size"] == seen["again size"] == ALIGNMENT  # kept
        assert seen["larger size"] == seen["smaller size"] == 2 * ALIGNMENT  # grown, by more than asked for
        assert seen["other purpose"]
        assert seen["kept"] >= 3 * ALIGNMENT  # of the two purposes here; the process may have others
        assert seen["traffic"] == seen["files"] == 0  # nothing counted, nothing left open


_pairs: list[dist.ProcessGroup] = []


def in_pairs(rank: int, size: int) -> list[int]:
    if not _pairs:
        _pairs.extend(sub_groups(2))
    group = _pairs[rank // 2]
    memory = peer_memory(CommGroup(group, 2), CPU, "test", 8)
    memory.view(rank % 2, 0, (1,), torch.int64).fill_(rank)
    dist.barrier()
    return [int(memory.view(r, 0, (1,), torch.int64)) for r in range(2)]


def test_groups_do_not_share() -> None:
    assert run_ranks(4, in_pairs) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def no_room(rank: int, size: int) -> Exception | None:
    try:
        peer_memory(CommGroup(None, size), CPU, "huge", 1 << 60)
    except RuntimeError as error:
        return error
    return None


def test_what_cannot_be_shared_is_said_with_what_to_do() -> None:
    for rank, error in enumerate(run_ranks(2, no_room)):
        assert f"rank {rank} of 2 could not share memory with the other ranks" in str(error)
        assert "'ring', 'fetch' and 'all_gather' do without" in str(error)


def gives_back(rank: int, size: int) -> tuple[int, int, int, int]:
    release()
    peer_memory(CommGroup(None, size), CPU, "test", 1000)
    kept = kept_bytes()
    release()
    return kept, kept_bytes(), peer_memory(CommGroup(None, size), CPU, "test", 1).buffers[0].numel(), kept_bytes()


def one_fails(rank: int, size: int, what: str) -> tuple[Exception | None, bool]:
    """Only rank 1 cannot make its file, or open another's; the others are told, and the group works on."""
    error = None
    with mock.patch(what, side_effect=OSError("no room")) if rank == 1 else contextlib.nullcontext():
        try:
            peer_memory(CommGroup(None, size), CPU, "one alone", 8)
        except RuntimeError as raised:
            error = raised
    return error, peer_memory(CommGroup(None, size), CPU, "one alone", 8).buffers[0].numel() == ALIGNMENT


@pytest.mark.parametrize("what", ["os.memfd_create", "os.ftruncate", "torch.from_file"])
def test_what_one_rank_cannot_do_all_say_at_once(what: str) -> None:
    run_ranks(2, gives_back)
    first, second = run_ranks(2, one_fails, what, timeout=10)
    assert "another rank failed" in str(first[0])
    assert "no room" in str(second[0])
    assert first[1]
    assert second[1]


def test_memory_is_given_back() -> None:
    assert run_ranks(2, gives_back) == [(1024, 0, ALIGNMENT, ALIGNMENT)] * 2


def test_a_group_is_a_process_group() -> None:
    for function in (kept_bytes, release):
        with pytest.raises(TypeError, match="group must be .* got 'cp'"):
            function("cp")  # type: ignore[arg-type]
