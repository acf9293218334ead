"""Ranks that run the backward passes of two calls in different orders all get an error, and no gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.dense import causal_attention
from tests.cases import TRANSPORTS
from tests.ranks import run_fresh_ranks, run_ranks

CONFIG, LAYOUT = MoBAConfig(8, 3), SequenceLayout.zigzag([0, 64], 2)


def two_calls(rank: int, group: dist.ProcessGroup, comm: str, dtype: torch.dtype, order: list[int]) -> None:
    outs, where = [], {"layout": LAYOUT, "group": group}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        whole = (torch.randn(64, 2, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
        q, k, v = (LAYOUT.shard(x, rank).requires_grad_() for x in whole)
        if comm.startswith("dense "):
            outs.append(causal_attention(q, k, v, None, **where, comm=comm.removeprefix("dense ")))
        else:
            outs.append(moba_cp.moba_attention(q, k, v, CONFIG, **where, comm=comm))
    for index in order:
        outs[index].pow(2).sum().backward()


def swapped_on_one_rank(rank: int, size: int, comm: str, dtype: torch.dtype) -> str:
    group = dist.new_group([0, 1])  # of its own, in which calls count from 1
    try:
        two_calls(rank, group, comm, dtype, [0, 1])
        two_calls(rank, group, comm, dtype, [1, 0])  # any order serves if it is the same on all ranks
        try:
            two_calls(rank, group, comm, dtype, [0, 1] if rank == 0 else [1, 0])
        except ValueError as error:
            message = str(error)
        else:
            return "no error"
        two_calls(rank, group, comm, dtype, [0, 1])  # the group works on
        dist.barrier(group)
        return message
    finally:
        dist.destroy_process_group(group)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("comm", [*TRANSPORTS, "dense ring", "dense all_gather"])
def test_different_orders_raise_on_every_rank(comm: str, dtype: torch.dtype) -> None:
    for message in run_ranks(2, swapped_on_one_rank, comm, dtype):
        assert message == (
            "the ranks of the context-parallel group run backward passes in different orders: rank 0 is at call 5 of the "
            "group, rank 1 at call 6. Gradients would be mixed up"
        )


def going_on(rank: int, size: int, ahead: int) -> str:
    """Rank `ahead` leaves a backward pass out and begins another call."""
    q, k, v = (LAYOUT.shard(torch.ones(64, 2, 8, dtype=torch.float64), rank).requires_grad_() for _ in range(3))
    out = moba_cp.moba_attention(q, k, v, CONFIG, layout=LAYOUT, comm="ring").sum()
    with pytest.raises(ValueError) as error:  # the text is looked at below
        out.backward() if rank != ahead else moba_cp.moba_attention(q, k, v, CONFIG, layout=LAYOUT, comm="ring")
    return str(error.value)


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_rank_that_goes_on_without_backward_ends_the_others_by_name(ahead: int) -> None:
    for outcome in run_fresh_ranks(2, going_on, ahead):
        assert outcome.exception is None, outcome.exception
        assert "are apart: rank" in outcome.result
        assert f"rank {1 - ahead} {'is ' * ahead}at the backward of call 1" in outcome.result
