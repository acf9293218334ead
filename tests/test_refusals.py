"""After a refusal: notes belong to one life of a group and are swept, every rank can leave, and the reason outlives its rank."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

import moba_cp
from moba_cp import MoBAConfig
from moba_cp.parallel import notes
from tests.calls import good_call, outcome
from tests.ranks import RankOutcome, run_fresh_ranks

pytestmark = pytest.mark.xdist_group("refusals")  # `found` once, not once per worker

LATE = notes.GRACE_S + 1.5  # seconds: the refusing rank has raised by then


def bad_call(rank: int) -> dict:
    return good_call(rank) | {"config": MoBAConfig(4, 2), "comm": "smoke"}


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


def gone(rank: int, size: int, how: str) -> str:
    if rank == 1:
        outcome(bad_call(rank))
        if how == "left":
            dist.destroy_process_group()
            time.sleep(LATE + 6.0)
        os._exit(7)
    time.sleep(LATE)
    return str(outcome(good_call(rank))[0])


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
    kept, deadline = distributed_c10d._world.pg_map[dist.group.WORLD][1], time.monotonic() + 15
    while (found := [key for key in kept.list_keys() if "moba_cp" in key]) and time.monotonic() < deadline:
        time.sleep(0.1)  # sweeping is done beside
    dist.barrier()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[object, list[RankOutcome]]:
    """What fresh ranks found, by function and argument; all at once, since they sleep most of the time."""
    port_file = str(tmp_path_factory.mktemp("store") / "port")
    calls = {
        made_again: (made_again,),
        (leaves, False): (leaves, False),
        (leaves, True): (leaves, True),
        (gone, "left"): (gone, "left"),
        (gone, "ended"): (gone, "ended"),
        kept_keys: (kept_keys, port_file),
    }
    with ThreadPoolExecutor(len(calls)) as pool:
        run = partial(run_fresh_ranks, 2, group_timeout=30.0, timeout=60.0)
        runs = {key: pool.submit(run, *call) for key, call in calls.items()}
    return {key: run.result() for key, run in runs.items()}


def test_a_group_made_again_does_not_read_its_predecessors_refusal(found: dict) -> None:
    for rank in found[made_again]:
        assert rank.result is not None, rank
        assert "smoke" in rank.result[0]
        assert rank.result[1] == "None"


def test_every_rank_can_leave_after_a_refusal(found: dict) -> None:
    """Also if the refusing rank does something else by then, outside of any call."""
    for warm in (False, True):
        for rank in found[leaves, warm]:
            assert rank.result is not None, rank
            assert rank.result[0] < 5.0  # to wait for rank 1 would take rank 0 more than 6 s
            assert "smoke" in rank.result[1]


def test_the_reason_is_read_when_its_rank_is_gone(found: dict) -> None:
    for how in ("left", "ended"):
        rank = found[gone, how][0]
        assert rank.result is not None, rank
        assert "rank 1 refused its input: ValueError: comm must be one of" in rank.result
        # The rank that left ends `LATE` + 6 s after it refused; the dead one ended before rank 0 called.
        assert rank.seconds < found[gone, how][1].seconds + (0 if how == "left" else LATE + 6.0)


def test_notes_are_swept(found: dict) -> None:
    for rank in found[kept_keys]:
        assert rank.result == [], rank
