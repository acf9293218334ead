"""When exchanges start and wait, beside the work on parts, by recording torch.distributed."""

from __future__ import annotations

import moba_cp
from moba_cp import SequenceLayout
from tests.cases import Case
from tests.exchange_cases import (
    CASE,
    TWO,
)
from tests.ranks import run_ranks
from tests.recorder import recorded


def steps_on_rank(rank: int, size: int, case: Case, layout: SequenceLayout, comm: str) -> tuple[list[str], list[str]]:
    q, k, v, _ = (layout.shard(x, rank).requires_grad_() for x in case.inputs())
    # Once before: pull sets up its memory.
    moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm).sum().backward()
    with recorded(steps=True) as forward:
        out = moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm)
    with recorded(steps=True) as backward:
        out.sum().backward()
    return tuple([e if isinstance(e, str) else e.name for e in events] for events in (forward, backward))


def test_ring_starts_the_next_shift_before_it_computes_the_current_part() -> None:
    layout = SequenceLayout.contiguous([0, 16], 4)
    gate = ["all_gather", "all_gather", "wait"]  # agreement and centroids
    for forward, backward in run_ranks(4, steps_on_rank, CASE, layout, "ring"):
        step = ["shift", "compute", "wait"]
        assert forward == [*gate, *step, *step, *step, "compute"]
        # The same, and each step's gradients travel behind it while the next part is computed.
        assert backward == [
            "all_gather",
            *["shift", "compute", "wait"],
            *["shift", "compute", "shift", "wait"],
            *["shift", "compute", "wait", "shift", "wait"],
            *["compute", "wait", "shift", "wait"],
        ]


def test_all_gather_is_under_way_while_the_local_part_is_computed() -> None:
    for forward, backward in run_ranks(2, steps_on_rank, CASE, TWO, "all_gather"):
        assert forward[3:] == ["all_gather", "compute", "wait", "compute"]
        assert backward == ["all_gather", "all_gather", "compute", "wait", "compute", "all_to_all", "wait"]


def test_fetch_waits_after_the_local_part() -> None:
    for forward, backward in run_ranks(2, steps_on_rank, CASE, TWO, "fetch"):
        assert forward[3:] == ["all_gather", "wait", "compute", "all_to_all", "wait", "compute"]
        assert backward == ["all_gather", "compute", "all_to_all", "wait", "compute", "all_to_all", "wait"]


def test_pull_waits_for_nobody_but_at_barriers() -> None:
    barrier, gate = ["all_gather", "wait"], ["all_gather", "wait"]
    for forward, backward in run_ranks(2, steps_on_rank, CASE, TWO, "pull"):
        assert forward == ["all_gather", *barrier, *gate, *barrier, "compute", "compute"]
        assert backward == ["all_gather", *barrier, *barrier, "compute", "compute", *barrier]
