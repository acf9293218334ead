"""After a refusal: notes belong to one life of a group and are swept, every rank can leave, and the reason outlives its rank."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

import moba_cp
from moba_cp import MoBAConfig
from moba_cp.parallel import notes
from tests.calls import good_call, outcome
from tests.ranks import RankOutcome, run_fresh_ranks

LATE = notes.GRACE_S + 1.5  # seconds: the refusing rank has raised by then


def bad_call(rank: int) -> dict:
    return good_call(rank) | {"config": MoBAConfig(4, 2), "comm": "smoke"}


def side_by_side(fn, variants: Sequence[object], group_timeout: float) -> list[list[RankOutcome]]:
    """Fresh ranks for each variant, all at once: they sleep most of the time."""
    with ThreadPoolExecutor(len(variants)) as pool:
        runs = [pool.submit(run_fresh_ranks, 2, fn, v, group_timeout=group_timeout, timeout=60.0) for v in variants]
    return [run.result() for run in runs]


def made_again(rank: int, size: int) -> tuple[str, str]:
    """Rank 0 refuses in a group; then another of the same name, in which it is merely late."""
    first = dist.new_group([0, 1], use_local_synchronization=True)
    call = bad_call(rank) if rank == 0 else good_call(rank)
    refused = outcome(call | {"group": first})[0]
    dist.barrier()
    name, store = first.group_name, distributed_c10d._world.pg_map[first][1]
    dist.destroy_process_group(first)
    # gloo leaves its addresses in the store. A rank that makes the second group first would find the first group's there and
    # connect to those; then `new_group` itself hangs on both ranks now and then, before moba_cp is called.
    store.delete_key(f"cpu//0/{rank}")
    dist.barrier()
    second = dist.new_group([0, 1], use_local_synchronization=True)
    assert second.group_name == name
    time.sleep(LATE if rank == 0 else 0)
    return str(refused), str(outcome(good_call(rank) | {"group": second})[0])


def test_a_group_made_again_does_not_read_its_predecessors_refusal() -> None:
    for found in run_fresh_ranks(2, made_again, group_timeout=20.0, timeout=60.0):
        assert found.result is not None, found
        assert "smoke" in found.result[0]
        assert found.result[1] == "None"


def leaves(rank: int, size: int, warm: bool) -> tuple[float, str]:
    if warm:
        moba_cp.moba_attention(**good_call(rank))
    time.sleep(LATE if rank == 0 else 0)
    error = outcome(bad_call(rank) if rank == 1 else good_call(rank))[0]
    if rank == 1:
        time.sleep(LATE + 6.0)
    begin = time.monotonic()
    dist.destroy_process_group()
    return time.monotonic() - begin, str(error)


def test_every_rank_can_leave_after_a_refusal() -> None:
    """Also if the refusing rank does something else by then, outside of any call."""
    for outcomes in side_by_side(leaves, (False, True), group_timeout=30.0):
        for found in outcomes:
            assert found.result is not None, found
            assert found.result[0] < 2.0
            assert "smoke" in found.result[1]


def gone(rank: int, size: int, how: str) -> str:
    if rank == 1:
        outcome(bad_call(rank))
        if how == "left":
            dist.destroy_process_group()
            time.sleep(LATE + 6.0)
        os._exit(7)
    time.sleep(LATE)
    return str(outcome(good_call(rank))[0])


def test_the_reason_is_read_when_its_rank_is_gone() -> None:
    for found, _ in side_by_side(gone, ("left", "ended"), group_timeout=20.0):
        assert found.result is not None, found
        assert "rank 1 refused its input: ValueError: comm must be one of" in found.result
        assert found.seconds < LATE + 6.0


def kept_keys(rank: int, size: int, port_file: str) -> list[str]:
    """Keys of moba_cp in a store, after refusals on one rank and on all, and calls that waited long."""
    dist.destroy_process_group()
    if rank == 0:
        server = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=20), wait_for_workers=False)
        with open(port_file + ".part", "w") as file:
            file.write(str(server.port))
        os.rename(port_file + ".part", port_file)
        store = server
    else:
        while not os.path.exists(port_file):
            time.sleep(0.01)
        with open(port_file) as file:
            store = dist.TCPStore("127.0.0.1", int(file.read()), size, False, timedelta(seconds=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    for bad in (1, 2):
        outcome(bad_call(rank) if rank < bad else good_call(rank))
        dist.barrier()
    for _ in range(3):
        time.sleep(2 * notes.PATIENCE_S if rank == 0 else 0)
        moba_cp.moba_attention(**good_call(rank))
    time.sleep(1.0)  # sweeping is done beside
    found = [key for key in distributed_c10d._world.pg_map[dist.group.WORLD][1].list_keys() if "moba_cp" in key]
    dist.barrier()
    return found


def test_notes_are_swept(tmp_path) -> None:
    for found in run_fresh_ranks(2, kept_keys, str(tmp_path / "port"), group_timeout=20.0, timeout=60.0):
        assert found.result == [], found
