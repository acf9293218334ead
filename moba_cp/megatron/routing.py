"""Routing statistics of attention layers, small enough for a line in TensorBoard."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch.distributed as dist
from torch import Tensor

from moba_cp import SequenceLayout
from moba_cp.parallel.blocks import block_table

from .reports import LayerReport


@dataclass(frozen=True)
class RoutingSums:
    """What one rank knows of one layer, as sums that add up over ranks and calls."""

    calls: float
    wanted_share: float
    entropy: float
    earlier: int  # selections of earlier blocks
    sinks: int  # of these, the first block of the query's document
    received_bytes: int  # keys and values, in forward
    lower_bound_bytes: int


_Entry = tuple[RoutingSums, float, int]  # with imbalance and number of the slowest rank
_Entries = dict[int, list[_Entry]]  # by layer number


def routing_sums(layer: LayerReport) -> RoutingSums:
    """Sums of one report, of this rank's tokens. Involves no other rank."""
    report = layer.report
    rank = dist.get_rank(layer.group) if layer.group is not None else 0
    earlier, sinks = _sink_selections(report.selected, report.token_numbers, report.block_size, layer.layout)
    stages = report.traffic.stages
    received = sum(stage.received_bytes for name, stage in stages.items() if name.endswith("keys and values"))
    bound = int(report.lower_bound_bytes[rank])
    return RoutingSums(1, report.wanted_share, report.entropy, earlier, sinks, received, bound)


def routing_statistics(reports: Iterable[LayerReport]) -> dict[int, dict[str, float]]:
    """Statistics by layer number, over all ranks of the run and all reports; every rank must call this.

    ``wanted_share``: bytes of remote blocks that are wanted, of those that are visible. ``entropy``: of which block is
    selected, 1 if all alike. ``sink_share``: selections of earlier blocks that go to the first block of a document.
    ``received_bytes`` and ``lower_bound_bytes``: keys and values in forward over all ranks, and the fewest for this
    routing; ``bytes_over_bound``, where the bound is not 0, their quotient. ``imbalance``: keys attended to by the
    slowest rank over the mean of its context-parallel group, the largest of all groups; ``slowest_rank``: its number
    in its group.
    """
    mine: _Entries = defaultdict(list)
    for layer in reports:
        slowest = int(layer.report.attended_keys.argmax())
        mine[layer.layer_number].append((routing_sums(layer), layer.report.imbalance, slowest))
    gathered: list[_Entries] = [mine]
    if dist.is_initialized():
        gathered = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, mine)
    numbers = sorted({number for of_rank in gathered for number in of_rank})
    return {n: _statistics([entry for of_rank in gathered for entry in of_rank.get(n, [])]) for n in numbers}


def _statistics(entries: list[_Entry]) -> dict[str, float]:
    total = {field.name: sum(getattr(sums, field.name) for sums, _, _ in entries) for field in fields(RoutingSums)}
    imbalance, slowest = max((imbalance, -rank) for _, imbalance, rank in entries)
    result = {
        "wanted_share": total["wanted_share"] / total["calls"],
        "entropy": total["entropy"] / total["calls"],
        "sink_share": total["sinks"] / total["earlier"] if total["earlier"] else 0.0,
        "received_bytes": total["received_bytes"],
        "lower_bound_bytes": total["lower_bound_bytes"],
        "imbalance": imbalance,
        "slowest_rank": -slowest,
    }
    if total["lower_bound_bytes"]:
        result["bytes_over_bound"] = total["received_bytes"] / total["lower_bound_bytes"]
    return result


def _sink_selections(
    selected: Tensor, token_numbers: Tensor, block_size: int, layout: SequenceLayout
) -> tuple[int, int]:
    """Selections of earlier blocks, and those of them that go to the first block of the query's document."""
    if not selected.numel():
        return 0, 0
    blocks = block_table(layout.cu_seqlens_array, block_size)
    own = blocks.start.searchsorted(token_numbers.numpy(), side="right") - 1
    first = blocks.first_of_document[own]
    own_t1, first_t1 = (selected.new_tensor(x)[:, None] for x in (own, first))
    earlier = (selected >= 0) & (selected < own_t1)
    return int(earlier.sum()), int((earlier & (selected == first_t1)).sum())
