"""Ranks that disagree, groups that do not fit, ranks that refuse at different times: all raise, and the group works on."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from tests.calls import TWO, assert_works, full_result, good_call, outcome, zeros
from tests.cases import sub_groups
from tests.ranks import RankOutcome, run_fresh_ranks, run_ranks

BAD = {"comm": "smoke"}


# What rank 1 has instead; what of it every rank's message must name.
DISAGREEMENTS: dict[str, tuple[dict, list[str]]] = {
    "layout": ({"layout": SequenceLayout.contiguous([0, 8, 16], 2)}, ["layout", "2 documents", "1 documents"]),
    "runs": ({"layout": SequenceLayout.from_runs([[(0, 7), (15, 16)], [(7, 15)]], [0, 16])}, ["layout"]),
    "block_size": ({"config": MoBAConfig(8, 2)}, ["config", "block_size=8", "block_size=4"]),
    "topk": ({"config": MoBAConfig(4, 3)}, ["config", "topk=3", "topk=2"]),
    "scale": ({"config": MoBAConfig(4, 2, 0.25)}, ["config", "softmax_scale=0.25", "softmax_scale=None"]),
    "comm": ({"comm": "ring"}, ["comm", "rank 1 has ring", "rank 0 has fetch"]),
    "q heads": ({"q": zeros(8, 2, 8)}, ["heads", "Hq 2", "Hq 4"]),
    "head size": ({"v": zeros(8, 2, 5)}, ["heads", "Dv 5", "Dv 4"]),
    "dtype": (
        {n: zeros(8, h, d, dtype=torch.float32) for n, h, d in (("q", 4, 8), ("k", 2, 8), ("v", 2, 4))},
        ["dtype", "torch.float32", "torch.float64"],
    ),
    "selection": (
        {"selection": torch.full((1, 8, 2), -1)},
        ["routing", "selection of 1 heads, k 2", "by q and k"],
    ),
    "routing": (
        {"routing": (zeros(8, 4, 3), zeros(8, 2, 3))},
        ["routing", "gate 4/2 heads of 3, float64", "by q and k"],
    ),
    "report": ({"return_report": True}, ["return_report", "True", "False"]),
    "workspace": ({"workspace_bytes": 4096}, ["workspace_bytes", "4096"]),
    "head_parallel": ({"comm": "a2a", "head_parallel": 2}, ["comm", "rank 1 has a2a", "head_parallel"]),
    "gradients": ({"q": zeros(8, 4, 8).requires_grad_()}, ["gradients", "rank 1 has wanted"]),
}


def disagreeing_ranks(rank: int, size: int, names: list[str]) -> tuple[list, tuple]:
    outcomes = [outcome(good_call(rank) | (DISAGREEMENTS[n][0] if rank == 1 else {})) for n in names]
    return outcomes, full_result(rank)


def test_ranks_that_disagree_all_say_on_what() -> None:
    per_rank = run_ranks(2, disagreeing_ranks, list(DISAGREEMENTS))
    for outcomes, _ in per_rank:
        for (name, (_, words)), (error, started, seconds) in zip(DISAGREEMENTS.items(), outcomes, strict=True):
            assert isinstance(error, ValueError), name
            for word in ("disagree", *words):
                assert word in str(error), (name, error)
            assert started == 1, name  # nothing but the question itself
            assert seconds < 4, name
    assert str(per_rank[0][0][0][0]) == str(per_rank[1][0][0][0])
    assert_works([good for _, good in per_rank])


def on_another_host(rank: int, size: int) -> tuple[Exception | None, int, float]:
    with mock.patch("moba_cp.prepare.host", return_value=f"node{rank}"):
        return outcome(good_call(rank) | {"comm": "pull"})


def test_pull_is_refused_across_hosts() -> None:
    for error, started, _ in run_ranks(2, on_another_host):
        assert isinstance(error, ValueError)
        assert "disagree on host (pull is for ranks of one): rank 0 has node0, rank 1 has node1" in str(error)
        assert started == 1


def beside_another_collective(rank: int, size: int) -> str:
    """Rank 1 gathers something else in the same group, as large as what begins a call."""
    if rank:
        foreign = torch.full((1024,), 0x89, dtype=torch.uint8)
        dist.all_gather_into_tensor(foreign.new_empty(2048), foreign)
        return ""
    with pytest.raises(RuntimeError) as error:  # the text is looked at below
        moba_cp.moba_attention(**good_call(rank))
    return str(error.value)


def test_another_collective_of_the_group_is_named() -> None:
    assert "another collective of this group ran at the same time" in run_ranks(2, beside_another_collective)[0]


def long_disagreement(rank: int, size: int) -> Exception | None:
    """Configurations that differ only in the last digit of a long number."""
    config = MoBAConfig(4, 10**90 + rank)
    return outcome(good_call(rank) | {"config": config})[0]


def test_what_is_too_long_to_show_is_still_compared() -> None:
    for error in run_ranks(2, long_disagreement):
        assert isinstance(error, ValueError)
        assert "config" in str(error)


def refusing_in_a_sub_group(rank: int, size: int) -> tuple[Exception | None, bool]:
    """Rank 3 refuses; its pair hears of it, and the other pair does not notice."""
    pair = sub_groups(2)[rank // 2]
    call = good_call(rank % 2, pair)
    error = outcome(call | (BAD if rank == 3 else {}))[0]
    again = outcome(call)[0]
    return error, again is None


def test_refusals_stay_inside_their_group() -> None:
    errors, fine = zip(*run_ranks(4, refusing_in_a_sub_group), strict=True)
    assert errors[:2] == (None, None)
    assert "rank 1 refused its input" in str(errors[2])  # rank 3 is rank 1 of its group
    assert "'smoke'" in str(errors[3])
    assert all(fine)


def test_a_group_is_needed_for_more_than_one_rank() -> None:
    with pytest.raises(
        ValueError, match="layout is for 2 ranks, but torch.distributed is not initialized: start with torchrun"
    ):
        moba_cp.moba_attention(**good_call(0))


def wrong_groups(rank: int, size: int) -> list[str]:
    """A group this rank is not in, and a group of another size than the layout's."""
    pairs = sub_groups(2)
    found = []
    for group, layout in ((pairs[1 - rank // 2], TWO), (pairs[rank // 2], SequenceLayout.contiguous([0, 32], 4))):
        error = outcome(good_call(rank % 2) | {"group": group, "layout": layout})[0]
        found.append(f"{type(error).__name__}: {error}")
    return found


def test_wrong_groups() -> None:
    for foreign, small in run_ranks(4, wrong_groups):
        assert "belong" in foreign
        assert small.startswith("ValueError: the layout is for 4 ranks, but the group has 2")


def all_reduce_after_a_refusal(rank: int, size: int) -> float:
    outcome(good_call(rank) | (BAD if rank == 1 else {}))
    x = torch.tensor(rank + 1.0)
    dist.all_reduce(x)
    return x.item()


def test_other_collectives_of_the_group_work_after_a_refusal() -> None:
    outcomes = run_fresh_ranks(2, all_reduce_after_a_refusal, group_timeout=20.0)
    assert [o.result for o in outcomes] == [3.0, 3.0]


THREE = SequenceLayout.contiguous([0, 24], 3)


def late_and_refusing(rank: int, size: int, late: tuple[float, ...]) -> tuple[list, tuple]:
    """Calls that ranks 1 and 2 refuse, `late[rank]` seconds after the first; rank 0 refuses the second of them as well."""
    outcomes = []
    for everyone in (False, True):
        dist.barrier()
        time.sleep(late[rank])
        outcomes.append(outcome(call_of_three(rank) | (BAD if rank or everyone else {})))
        time.sleep(max(late) + 3.0 - late[rank])  # those who waited in vain have given up
    out = moba_cp.moba_attention(**call_of_three(rank))
    return outcomes, out


def call_of_three(rank: int) -> dict:
    x = torch.randn(24, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    local = THREE.shard(x, rank)
    return {"q": local, "k": local, "v": local, "config": MoBAConfig(4, 2), "layout": THREE, "comm": "ring"}


LATE = ((0.0, 0.0, 0.0), (0.5, 0.0, 1.0), (0.0, 1.0, 0.5))  # seconds per rank


@pytest.fixture(scope="module")
def found_when_late() -> dict[tuple[float, ...], list[RankOutcome]]:
    """Fresh ranks for all of `LATE` at once: they sleep most of the time."""
    run = partial(run_fresh_ranks, 3, late_and_refusing, group_timeout=60.0)
    with ThreadPoolExecutor(len(LATE)) as pool:
        return dict(zip(LATE, pool.map(run, LATE), strict=True))


@pytest.mark.xdist_group("late")  # the fixture once, not once per worker
@pytest.mark.parametrize("late", LATE, ids=str)
def test_ranks_that_refuse_at_different_times(late: tuple[float, ...], found_when_late: dict) -> None:
    """All raise, and the group works on: the ranks owe the same number of all-gathers whoever gave up waiting."""
    per_rank = [found.result for found in found_when_late[late]]
    assert None not in per_rank, found_when_late[late]
    for rank, (outcomes, _) in enumerate(per_rank):
        one_good, all_bad = outcomes
        assert isinstance(one_good[0], ValueError)
        assert ("refused its input" in str(one_good[0])) == (rank == 0)
        assert isinstance(all_bad[0], ValueError)
        assert "smoke" in str(all_bad[0])
        assert all_bad[1] == 0
    x = torch.randn(24, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = moba_cp.reference.moba_attention(x, x, x, [0, 24], MoBAConfig(4, 2))
    torch.testing.assert_close(THREE.unshard([out for _, out in per_rank]), expected, rtol=0, atol=1e-10)
