"""A rank that dies or stalls during a call of the others: they end with an error that names what they waited for, within
the group's timeout."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

import moba_cp
from moba_cp import SequenceLayout
from moba_cp.parallel.comm import CommGroup
from tests.cases import Case
from tests.ranks import RankOutcome, run_fresh_ranks

pytestmark = pytest.mark.xdist_group("failures")  # `outcomes_of` once, not once per worker

CASE = Case((40,), block_size=4, topk=3, q_heads=6, kv_heads=2, dim=8, v_dim=4)
GROUP_TIMEOUT = 2.0
STALL = 5.0  # seconds: the others are to end after the group's timeout, and before the stalled rank does
LIMIT = 30.0
BEGIN = "waited for the other ranks to begin the same MoBA attention call"


def fail(how: str) -> None:
    if how == "dies":
        os._exit(7)
    time.sleep(STALL)
    os._exit(7)


def call(rank: int, size: int, comm: str) -> None:
    """Forward and backward, with blocks that straddle ranks."""
    layout = SequenceLayout.zigzag(CASE.cu_seqlens, size)
    qkv = [layout.shard(x, rank).requires_grad_() for x in CASE.inputs()[:3]]
    moba_cp.moba_attention(*qkv, CASE.config, layout=layout, comm=comm).sum().backward()


def fails_before_the_call(rank: int, size: int, bad_rank: int, how: str) -> None:
    call(rank, size, "fetch")
    if rank == bad_rank:
        fail(how)
    call(rank, size, "fetch")


def fails_at_a_stage(rank: int, size: int, bad_rank: int, how: str, comm: str, stage: str) -> None:
    """The bad rank fails instead of starting the first collective of `stage`."""

    def failing(name: str):
        original = getattr(CommGroup, name)

        def method(self: CommGroup, *args, **kwargs):
            if stage in (args[-1], kwargs.get("stage")):
                fail(how)
            return original(self, *args, **kwargs)

        return mock.patch.object(CommGroup, name, method)

    if rank != bad_rank:
        call(rank, size, comm)
        return
    with failing("all_gather"), failing("all_to_all"), failing("shift"):
        call(rank, size, comm)


def check(outcomes: list, bad_rank: int, how: str, waited_for: str) -> None:
    """Every other rank raised in time; one of them at least names what the bad rank failed at. (A rank further down a ring
    may wait for a later message of a neighbour that has given up.)"""
    for outcome in outcomes:
        if outcome.rank == bad_rank:
            assert outcome.exitcode == 7
            continue
        assert isinstance(outcome.exception, RuntimeError), outcome
        assert f"rank {outcome.rank} of {len(outcomes)} waited for" in str(outcome.exception)
        assert "it did not come" in str(outcome.exception)
        # Before the stalled rank ends, or within the group's timeout after the death.
        limit = 0.0 if how == "stalls" else GROUP_TIMEOUT + STALL
        assert outcome.seconds < outcomes[bad_rank].seconds + limit
    named = [waited_for in str(o.exception) for o in outcomes if o.rank != bad_rank]
    assert any(named), [str(o.exception) for o in outcomes]


STORE = ("the host of the store stops",)
# What fails, and what the others then waited for. First the arguments of `fails_before_the_call`, then of `fails_at_a_stage`.
BEFORE = [(bad_rank, how) for how in ("dies", "stalls") for bad_rank in (0, 1)]
ON_THE_WAY = {
    ("dies", "fetch", "home blocks"): "the all-to-all of home blocks",
    ("stalls", "fetch", "centroids"): "the all-gather of centroids",
    ("dies", "fetch", "wanted pairs"): "the all-gather of wanted pairs",
    ("stalls", "fetch", "fetch keys and values"): "the all-to-all of fetch keys and values",
    ("dies", "fetch", "fetch gradients"): "the all-to-all of fetch gradients",
    ("dies", "all_gather", "all_gather keys and values"): "the all-gather of all_gather keys and values",
    ("stalls", "all_gather", "all_gather gradients"): "the all-to-all of all_gather gradients",
    ("dies", "pull", "pull set-up"): "the all-gather of pull set-up",
    ("stalls", "pull", "pull barriers"): "the all-gather of pull barriers",
    ("dies", "ring", "ring keys and values"): "the ring send and receive of ring keys and values",
    ("stalls", "ring", "ring gradients"): "the ring send and receive of ring gradients",
    ("dies", "a2a", "heads in"): "the all-to-all of heads in",
    ("stalls", "a2a", "heads out"): "the all-to-all of heads out",
    ("stalls", "ring", "home gradients"): "the all-to-all of home gradients",
}


@pytest.fixture(scope="module")
def outcomes_of(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, list[RankOutcome]]:
    """How the ranks of every case ended, some cases at a time: they sleep most of the time."""
    port_file = str(tmp_path_factory.mktemp("store") / "port")

    def run(case: tuple) -> list[RankOutcome]:
        if case == STORE:
            return run_fresh_ranks(2, store_host_stops, port_file, group_timeout=GROUP_TIMEOUT, timeout=STALL + 2)
        if case in BEFORE:
            return run_fresh_ranks(2, fails_before_the_call, *case, group_timeout=GROUP_TIMEOUT, timeout=LIMIT)
        return run_fresh_ranks(3, fails_at_a_stage, 1, *case, group_timeout=GROUP_TIMEOUT, timeout=LIMIT)

    cases = [STORE, *sorted([*BEFORE, *ON_THE_WAY], key=lambda case: "stalls" not in case)]
    with ThreadPoolExecutor(5) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.parametrize(("bad_rank", "how"), BEFORE)
def test_a_rank_does_not_come(how: str, bad_rank: int, outcomes_of: dict) -> None:
    check(outcomes_of[bad_rank, how], bad_rank, how, BEGIN)


@pytest.mark.parametrize(("how", "comm", "stage"), ON_THE_WAY)
def test_a_rank_fails_on_the_way(how: str, comm: str, stage: str, outcomes_of: dict) -> None:
    check(outcomes_of[how, comm, stage], 1, how, ON_THE_WAY[how, comm, stage])


def finds_a_peer_gone(rank: int, size: int) -> None:
    with mock.patch.object(dist, "batch_isend_irecv", side_effect=RuntimeError("Connection closed by peer")):
        call(rank, size, "ring")


def test_a_peer_is_found_gone_when_a_collective_starts() -> None:
    """What gloo says at once where the other end's socket is closed already."""
    for outcome in run_fresh_ranks(2, finds_a_peer_gone, group_timeout=GROUP_TIMEOUT, timeout=LIMIT):
        expected = (
            f"rank {outcome.rank} of 2 waited for the ring send and receive of ring keys and values: it did not come"
        )
        assert f"{expected} (Connection closed by peer)" in str(outcome.exception), outcome


def store_host_stops(rank: int, size: int, port_file: str) -> None:
    """Over a TCP store that lives in rank 0, as under torchrun without an agent; rank 0 is then stopped, sockets open."""
    dist.destroy_process_group()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=GROUP_TIMEOUT), wait_for_workers=False)
        with open(port_file + ".part", "w") as file:
            file.write(str(store.port))
        os.rename(port_file + ".part", port_file)
    else:
        while not os.path.exists(port_file):
            time.sleep(0.01)
        with open(port_file) as file:
            store = dist.TCPStore("127.0.0.1", int(file.read()), size, False, timedelta(seconds=GROUP_TIMEOUT))
    limit = timedelta(seconds=GROUP_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    call(rank, size, "fetch")
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    call(rank, size, "fetch")


def test_the_host_of_the_store_stalls(outcomes_of: dict) -> None:
    """Asking it for a note of refusal gives no answer either; what the others say is what they waited for."""
    outcomes = outcomes_of[STORE]
    assert outcomes[0].timed_out
    assert isinstance(outcomes[1].exception, RuntimeError), outcomes[1]
    assert BEGIN in str(outcomes[1].exception)
