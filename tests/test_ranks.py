"""The multi-rank harness itself: results in order, exceptions, time limits, deaths, and a new pool afterwards."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.ranks import RankDiedError, RankHungError, run_fresh_ranks, run_ranks


def _sum_of_ranks(rank: int, world_size: int, offset: int) -> tuple[int, torch.Tensor]:
    x = torch.tensor([float(rank + offset)])
    dist.all_reduce(x)
    return os.getpid(), x


def _echo(rank: int, world_size: int, x: object) -> object:
    return x


def _raise_on(rank: int, world_size: int, bad_ranks: list[int]) -> int:
    if rank in bad_ranks:
        raise ValueError(f"bad value on rank {rank}")
    dist.barrier()
    return rank


class _UnpicklableError(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"a={a} b={b}")


def _raise_unpicklable(rank: int, world_size: int) -> None:
    raise _UnpicklableError(1, 2)


def _sleep_on(rank: int, world_size: int, slow_rank: int) -> int:
    if rank == slow_rank:
        time.sleep(600)
    return rank


def _exit_on(rank: int, world_size: int, dying_rank: int) -> None:
    if rank == dying_rank:
        os._exit(7)
    dist.barrier()


def _pair_sum(rank: int, world_size: int) -> float:
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    x = torch.tensor(float(rank))
    dist.all_reduce(x, group=pairs[rank // 2])
    return x.item()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_results_come_in_rank_order_from_a_pool_that_stays(world_size: int) -> None:
    first = run_ranks(world_size, _sum_of_ranks, 1)
    again = run_ranks(world_size, _sum_of_ranks, 1)
    assert [x.item() for _, x in first] == [world_size * (world_size + 1) / 2] * world_size
    assert [pid for pid, _ in first] == [pid for pid, _ in again]
    assert len({pid for pid, _ in first}) == world_size


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int16, torch.bool])
def test_tensors_travel_by_value(dtype: torch.dtype) -> None:
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    sent = {"view": whole[1:, ::2], "scalar": whole[0, 1], "empty": whole[:0]}
    for back in run_ranks(2, _echo, sent):
        for name, x in sent.items():
            assert back[name].dtype == dtype
            assert torch.equal(back[name], x), name
            assert back[name].untyped_storage().nbytes() == x.numel() * x.element_size()


def test_tensors_come_back_detached() -> None:
    (back,) = run_ranks(1, _echo, torch.nn.Parameter(torch.ones(2)) * 2)
    assert not back.requires_grad


def test_an_exception_keeps_its_type_and_brings_its_traceback() -> None:
    with pytest.raises(ValueError, match="^bad value on rank 0$") as caught:
        run_ranks(3, _raise_on, [0, 1, 2])
    assert "on rank 0 of 3" in str(caught.value.__cause__)
    assert "_raise_on" in str(caught.value.__cause__)


def test_an_exception_on_one_rank_does_not_wait_for_the_others_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_ERROR_GRACE", 1.0)
    begin = time.monotonic()
    with pytest.raises(ValueError, match="^bad value on rank 1$"):
        run_ranks(2, _raise_on, [1], timeout=50)
    assert time.monotonic() - begin < 20
    assert [x.item() for _, x in run_ranks(2, _sum_of_ranks, 0)] == [1.0, 1.0]


def test_expected_errors_come_back_as_a_list() -> None:
    errors = run_ranks(2, _raise_on, [0, 1], expect_errors=True)
    assert [type(e) for e in errors] == [ValueError, ValueError]
    assert [str(e) for e in errors] == ["bad value on rank 0", "bad value on rank 1"]


def test_an_exception_that_cannot_be_pickled_keeps_its_name_and_text() -> None:
    with pytest.raises(RuntimeError, match=r"^_UnpicklableError: a=1 b=2$"):
        run_ranks(1, _raise_unpicklable)


def test_a_hang_ends_at_the_limit_and_a_new_pool_follows() -> None:
    before = run_ranks(2, _sum_of_ranks, 0)
    with pytest.raises(RankHungError, match=r"_sleep_on: no answer within 1 s from rank 1 of 2"):
        run_ranks(2, _sleep_on, 1, timeout=1)
    after = run_ranks(2, _sum_of_ranks, 0)
    assert {pid for pid, _ in before}.isdisjoint(pid for pid, _ in after)


def test_a_death_is_reported_with_its_exit_code_and_a_new_pool_follows() -> None:
    with pytest.raises(RankDiedError, match=r"rank 1 \(exit code 7\)"):
        run_ranks(3, _exit_on, 1)
    assert [x.item() for _, x in run_ranks(3, _sum_of_ranks, 0)] == [3.0] * 3


def test_sub_groups() -> None:
    assert run_ranks(4, _pair_sum) == [1.0, 1.0, 5.0, 5.0]


def test_fresh_ranks_tell_results_exceptions_deaths_and_stalls_apart() -> None:
    done = run_fresh_ranks(2, _sum_of_ranks, 0)
    assert [o.result[1].item() for o in done] == [1.0, 1.0]

    died = run_fresh_ranks(2, _exit_on, 1)
    assert died[1].exitcode == 7
    assert died[0].exception is not None  # the barrier broke

    stalled = run_fresh_ranks(2, _sleep_on, 0, timeout=2)
    assert stalled[0].timed_out
    assert stalled[1].result == 1
