"""Routing statistics of layers over two ranks, against counts made from the selection of every query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, reference
from moba_cp.megatron import LayerReport
from moba_cp.megatron.routing import routing_statistics
from tests.ranks import run_ranks

HEADS, KV_HEADS, DIM = 4, 2, 8
CU_SEQLENS = [0, 37, 160]
MOBA = MoBAConfig(block_size=6, topk=4)


def statistics_on_rank(rank: int, world_size: int, comm: str) -> tuple[dict[int, dict[str, float]], list[int]]:
    """Statistics of layers 3 and 5, which saw different inputs; and the keys each rank attends to."""
    layout = SequenceLayout.contiguous(CU_SEQLENS, world_size)
    reports = []
    for number in (5, 3):
        q, k, v = (layout.shard(x, rank) for x in inputs(number))
        group = dist.group.WORLD if world_size > 1 else None
        _, report = moba_attention(q, k, v, MOBA, layout=layout, group=group, comm=comm, return_report=True)
        reports.append(LayerReport(number, report, layout, group))
    return routing_statistics(reports), reports[0].report.attended_keys.tolist()


def inputs(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return [torch.randn(CU_SEQLENS[-1], heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def expected_sink_share(number: int) -> float:
    q, k, _ = inputs(number)
    earlier = sinks = 0
    for begin, end in zip(CU_SEQLENS, CU_SEQLENS[1:], strict=False):
        chosen = reference.select_blocks(q[begin:end], k[begin:end], MOBA)
        own = torch.arange(end - begin) // MOBA.block_size
        chosen[:, torch.arange(end - begin), own] = False
        earlier += int(chosen.sum())
        sinks += int(chosen[:, :, 0].sum())
    return sinks / earlier


@pytest.mark.parametrize("comm", ["fetch", "pull", "ring", "all_gather"])
def test_statistics_are_those_of_every_query_and_the_same_on_all_ranks(comm: str) -> None:
    (ours, keys), (theirs, _) = run_ranks(2, statistics_on_rank, comm)
    assert ours == theirs
    assert list(ours) == [3, 5]
    for number, values in ours.items():
        assert values["sink_share"] == pytest.approx(expected_sink_share(number), abs=1e-12)
        assert 0 < values["wanted_share"] <= 1
        assert 0 < values["entropy"] <= 1
        # Rank 1 holds the later tokens of a contiguous layout, which have more to attend to.
        assert values["slowest_rank"] == 1
        assert values["imbalance"] == pytest.approx(max(keys) / (sum(keys) / 2))
        assert values["received_bytes"] >= values["lower_bound_bytes"] > 0
        assert values["bytes_over_bound"] == values["received_bytes"] / values["lower_bound_bytes"]


def test_one_process_moves_nothing() -> None:
    values = statistics_on_rank(0, 1, "auto")[0][3]
    assert values["sink_share"] == pytest.approx(expected_sink_share(3), abs=1e-12)
    assert (values["received_bytes"], values["lower_bound_bytes"], values["imbalance"]) == (0, 0, 1)
    assert "bytes_over_bound" not in values


def test_nothing_is_collected_without_moba_layers() -> None:
    assert routing_statistics([]) == {}


def nothing_on_one_rank(rank: int, world_size: int) -> Any:
    """Pipeline stages hold different layers; here only rank 1 has one."""
    if rank == 0:
        return routing_statistics([])
    layout = SequenceLayout.contiguous(CU_SEQLENS, 1)
    _, report = moba_attention(*inputs(7), MOBA, layout=layout, return_report=True)
    return routing_statistics([LayerReport(7, report, layout, None)])


def test_every_rank_learns_the_layers_of_the_others() -> None:
    first, second = run_ranks(2, nothing_on_one_rank)
    assert first == second
    assert first[7]["sink_share"] == pytest.approx(expected_sink_share(7), abs=1e-12)
