"""Several chunks of query rows: each byte crosses the wire once as long as parts fit the budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from moba_cp import SequenceLayout
from tests import exchange_cases
from tests.cases import TRANSPORTS, Case, on_rank
from tests.exchange_cases import CASE, GIB, TOKEN, Stages
from tests.ranks import run_ranks

stages = cache(exchange_cases.stages)  # several tests look at the same calls

CHUNKED = replace(CASE, lengths=(900,), block_size=16, topk=3)
THREE = SequenceLayout.zigzag([0, 900], 3)  # 300 rows per rank: three chunks of 128 rows where the workspace holds one


def moved(counted: Stages, stage: str) -> tuple[int, int]:
    """Bytes sent and received in one stage."""
    return counted.get(stage, (0, 0, 0))[1:]


@pytest.mark.parametrize("comm", TRANSPORTS)
def test_each_byte_crosses_once_however_many_chunks_of_rows(comm: str) -> None:
    """The same bytes of keys, values and gradients with one chunk and with three."""
    for whole, chunked in zip(stages(CHUNKED, THREE, comm), stages(CHUNKED, THREE, comm, workspace=1), strict=True):
        assert whole[4]["walks"] == chunked[4]["walks"] == (1, 1)
        for counted, expected in ((chunked[0], whole[0]), (chunked[1], whole[1])):
            for stage in (f"{comm} keys and values", f"{comm} gradients"):
                assert moved(counted, stage) == moved(expected, stage)


@pytest.mark.parametrize("comm", ["ring", "pull"])
@pytest.mark.parametrize(("kept", "walks"), [(0, (3, 3)), (3 * 320 * TOKEN, (1, 3))])
def test_bytes_beyond_what_may_be_kept_cross_once_per_chunk(comm: str, kept: int, walks: tuple[int, int]) -> None:
    """At most 320 tokens are at home on a rank; the second budget holds the keys and values of one kv head of three such
    ranks, and not their gradients, which take as many bytes again. The report says what travels again."""
    once = stages(CHUNKED, THREE, comm)
    for whole, chunked in zip(once, stages(CHUNKED, THREE, comm, workspace=1, kept=kept), strict=True):
        assert chunked[4]["walks"] == walks
        for at, stage, times in (
            (0, "keys and values", walks[0]),
            (1, "keys and values", walks[1]),
            (1, "gradients", walks[1]),
        ):
            expected = moved(whole[at], f"{comm} {stage}")
            assert moved(chunked[at], f"{comm} {stage}") == tuple(n * times for n in expected)


@pytest.mark.parametrize("comm", ["ring", "pull"])
def test_the_report_says_what_would_bring_everything_once(comm: str) -> None:
    """With one byte less, backward travels once per chunk of rows."""
    (first, *_) = stages(CHUNKED, THREE, comm, workspace=1, kept=0)
    forward, backward = first[4]["once_bytes"]
    assert (forward, backward) == (3 * 320 * TOKEN, 2 * 3 * 320 * TOKEN)
    assert f"travel 3x forward, 3x backward; once with exchange_bytes={backward} " in first[4]["text"]
    for kept, walks in ((backward, (1, 1)), (backward - 1, (1, 3)), (forward - 1, (3, 3))):
        (first, *_) = stages(CHUNKED, THREE, comm, workspace=1, kept=kept)
        assert first[4]["walks"] == walks
        assert ("once with" in first[4]["text"]) == (max(walks) > 1)


def kept_or_not(rank: int, size: int, case: Case, layout: SequenceLayout, comm: str) -> list[tuple]:
    """Results of this rank in three chunks: everything kept, keys and values kept, nothing kept."""
    return [
        on_rank(rank, size, case, layout, comm, workspace_bytes=1, exchange_bytes=kept)[0] for kept in (GIB, 10**5, 0)
    ]


@pytest.mark.parametrize("comm", ["ring", "pull"])
def test_what_is_kept_for_later_chunks_changes_no_result(comm: str) -> None:
    for kept, keys_only, nothing in run_ranks(3, kept_or_not, CHUNKED, THREE, comm):
        for other in (keys_only, nothing):
            assert torch.equal(kept[0], other[0])
            assert torch.equal(kept[1], other[1])
            for a, b in zip(kept[2:], other[2:], strict=True):  # dk, dv: the same terms in another order
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
