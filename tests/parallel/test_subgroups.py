"""Groups of some ranks of a group: made by these alone, anew in each life of the parent, and destroyed after it."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

import moba_cp
from moba_cp.dense import causal_attention
from moba_cp.parallel import agreement, subgroups
from moba_cp.parallel.subgroups import sub_group, sub_groups_of, timeout_of
from tests.ranks import run_fresh_ranks, run_ranks

CPU = torch.device("cpu")


def lives_on_rank(rank: int, size: int) -> list[float]:
    """Ranks 2 and 3 of four make, use and destroy their group and its sub-group three times; 0 and 1 take no part."""
    sums = []
    for _ in range(3):
        pair = dist.new_group([2, 3])
        if rank >= 2:
            agreement.check(pair, {"call": "a"}, CPU)
            alone = sub_group(pair, [rank - 2], CPU)
            assert dist.get_world_size(alone) == 1
            assert sub_group(pair, [rank - 2], CPU) is alone
            assert sub_group(pair, [0, 1], CPU) is pair
            assert sub_groups_of(pair) == [alone]
            x = torch.tensor(float(rank))
            dist.all_reduce(x, group=alone)
            sums.append(x.item())
            dist.destroy_process_group(pair)
        del pair
    return sums


def test_ranks_of_a_sub_group_make_groups_alone() -> None:
    assert run_ranks(4, lives_on_rank) == [[], [], [2.0] * 3, [3.0] * 3]


def quads_on_rank(rank: int, size: int) -> tuple[list[float], int]:
    """Groups of four, made again and again with the same ranks; each has two pairs."""
    sums = []
    for _ in range(4):
        quad = dist.new_group(list(range(4)))
        agreement.check(quad, {"call": "a"}, CPU)
        first = rank // 2 * 2
        pair = sub_group(quad, [first, first + 1], CPU)
        assert timeout_of(pair, CPU) == timeout_of(quad, CPU)
        x = torch.tensor(float(rank))
        dist.all_reduce(x, group=pair)
        sums.append(x.item())
        dist.destroy_process_group(quad)
        del quad, pair
    return sums, len(subgroups._parents)


def test_every_life_of_a_parent_has_new_groups() -> None:
    for rank, outcome in enumerate(run_fresh_ranks(4, quads_on_rank, group_timeout=20.0)):
        assert outcome.exception is None
        sums, kept = outcome.result
        assert sums == [1.0 if rank < 2 else 5.0] * 4
        assert kept == 1  # the last one's; those of earlier lives were destroyed


def devices_on_rank(rank: int, size: int) -> list[float]:
    """The same ranks for tensors on the host and for those on a GPU, which gloo serves as well."""
    quad, first = dist.new_group(list(range(4))), rank // 2 * 2
    agreement.check(quad, {"call": "a"}, CPU)
    pairs = [sub_group(quad, [first, first + 1], torch.device(kind)) for kind in ("cpu", "cuda")]
    sums = [torch.tensor(float(rank)) for _ in pairs]
    for x, pair in zip(sums, pairs, strict=True):
        dist.all_reduce(x, group=pair)
    return [x.item() for x in sums]


def test_a_group_for_each_kind_of_device() -> None:
    assert run_ranks(4, devices_on_rank) == [[1.0, 1.0], [1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]


def outputs_outlive_groups(rank: int, size: int) -> tuple[bool, str]:
    """Outputs of every way to communicate, with their graphs, after all groups were destroyed."""
    layout, config = moba_cp.SequenceLayout.contiguous([0, 32], size), moba_cp.MoBAConfig(4, 2)
    q, k, v = (torch.randn(8, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 4, 4))
    blocks = torch.zeros(4, 8, 1, dtype=torch.int64)
    group = dist.new_group(list(range(size)))
    options = {"layout": layout, "group": group}
    splits = [("auto", None), ("fetch", None), ("pull", None), ("ring", None), ("a2a", None), ("a2a+ring", 2)]
    kept = [moba_cp.moba_attention(q, k, v, config, comm=c, head_parallel=u, **options) for c, u in splits]
    kept += [causal_attention(q, k, v, None, comm=c, **options) for c in ("ring", "a2a")]
    kept.append(moba_cp.block_scores(q, k, blocks, config, **options))
    for out in kept[1:]:
        out.sum().backward()
    groups = [weakref.ref(one) for one in (group, *sub_groups_of(group))]
    del group, options
    dist.destroy_process_group()
    alive = any(one() is not None for one in groups)
    try:
        kept[0].sum().backward()
    except RuntimeError as error:
        return alive, str(error)
    return alive, ""


def test_nothing_that_a_caller_keeps_keeps_groups() -> None:
    """gloo's threads run as long as a group is alive, and a process that ends then may be aborted."""
    for outcome in run_fresh_ranks(4, outputs_outlive_groups, group_timeout=20.0):
        assert outcome.exception is None, outcome
        alive, error = outcome.result
        assert not alive
        assert "was destroyed" in error
