"""Ranks that run the backward passes of two calls in different orders, or of which one alone computes a call again, all get an
error, and no gradients."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

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


COMMS = ("ring", "fetch", "pull", "all_gather", "a2a", "full attention")


def broken() -> saved_tensors_hooks:
    def unpack(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the file is gone")

    return saved_tensors_hooks(lambda x: x, unpack)


HOOKS = {"none": contextlib.nullcontext, "offloaded": save_on_cpu, "broken": broken}


def hooked_apart(rank: int, size: int, comm: str, first: str, second: str) -> tuple[str, float, bool]:
    """What comes of a backward pass of which rank 0 has hooks `first` and rank 1 `second`, and whether the group works then."""
    group = dist.new_group([0, 1])
    whole = [torch.randn(64, 2, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(3)]
    hooks = second if rank else first

    def attention(*inputs: torch.Tensor) -> torch.Tensor:
        if comm == "full attention":
            return causal_attention(*inputs, None, layout=LAYOUT, group=group)
        return moba_cp.moba_attention(*inputs, CONFIG, layout=LAYOUT, group=group, comm=comm)

    def gradients(hooks: str) -> list[torch.Tensor]:
        inputs = [LAYOUT.shard(x, rank).requires_grad_() for x in whole]
        if hooks == "checkpoint":
            out = checkpoint(attention, *inputs, use_reentrant=False)
        else:
            with HOOKS[hooks]():
                out = attention(*inputs)
        return list(torch.autograd.grad(out.pow(2).sum(), inputs))

    try:
        begin, found = time.monotonic(), []
        try:
            found = gradients(hooks)
        except (ValueError, RuntimeError) as error:
            told = str(error)
        else:
            told = ""
        seconds, plain = time.monotonic() - begin, gradients("none")
        return told, seconds, all(torch.equal(x, y) for x, y in zip(found or plain, plain, strict=True))
    finally:
        dist.destroy_process_group(group)


@pytest.mark.parametrize("comm", COMMS)
@pytest.mark.parametrize("first", ["none", "offloaded"])
def test_a_rank_that_alone_computes_a_call_again_ends_the_others_too(comm: str, first: str) -> None:
    (told, *_), (own, *_) = found = run_ranks(2, hooked_apart, comm, first, "checkpoint")
    assert "rank 1 of 2 computes a call again in backward" in own
    assert told.startswith("rank 1 refused its input: RuntimeError: rank 1 of 2 computes a call again")
    assert all(works and seconds < 30 for _, seconds, works in found)  # of the group's timeout of minutes


@pytest.mark.parametrize("comm", COMMS)
def test_a_rank_may_offload_alone(comm: str) -> None:
    assert [(told, works) for told, _, works in run_ranks(2, hooked_apart, comm, "none", "offloaded")] == [
        ("", True)
    ] * 2


def test_a_hook_that_fails_on_one_rank_ends_the_others_too() -> None:
    (told, *_), (own, *_) = found = run_ranks(2, hooked_apart, "ring", "none", "broken")
    assert (told, own) == ("rank 1 refused its input: ValueError: the file is gone", "the file is gone")
    assert all(works and seconds < 30 for _, seconds, works in found)
