"""What `pull` reads, to the byte: wanted pairs or whole parts, with the same bits. See `tests/exchange_cases.py` for the case."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from moba_cp import SequenceLayout
from moba_cp.parallel.comm import SideStream
from moba_cp.parallel.exchanges import pull
from tests.cases import Case, every_layout, on_rank
from tests.exchange_cases import (
    CASE,
    GIB,
    TOKEN,
    TWO,
    routed,
    stages,
)
from tests.ranks import run_ranks

EIGHT = Case((32,), block_size=4, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)


def test_pull_reads_each_wanted_pair_once_and_nobody_sends() -> None:
    """Of the four blocks at home on rank 0, rank 1 wants (0, block 0) and (1, block 1): a quarter, so not whole parts."""
    layout, pairs = SequenceLayout.contiguous([0, 32], 2), 2 * 4 * TOKEN
    first, second = stages(EIGHT, layout, "pull", inputs=routed(EIGHT, [[0], [1]]))
    for rank, (forward, backward, *_, figures) in enumerate((first, second)):
        assert figures["bound"] == [0, pairs]
        assert set(forward) == {"centroids", "pull barriers", "pull keys and values"}
        # A barrier stands before the memory is written and before it is read; in backward also before gradients are.
        assert forward["pull barriers"] == (2, 2, 2)
        assert backward["pull barriers"] == (3, 3, 3)
        assert forward["pull keys and values"] == (0, 0, figures["bound"][rank])
        assert backward.get("pull keys and values", (0, 0, 0)) == (0, 0, figures["bound"][rank])
        assert backward.get("pull gradients", (0, 0, 0)) == (0, 0, figures["bound"][1 - rank])


def test_pull_reads_whole_what_is_mostly_wanted() -> None:
    """topk covers everything: rank 1 wants all of rank 0 and reads it in one piece, rank 0 nothing of rank 1."""
    whole = 8 * 2 * TOKEN
    first, second = stages(CASE, TWO, "pull")
    assert first[0]["pull keys and values"] == (0, 0, 0)
    assert first[1] == {"pull barriers": (3, 3, 3), "pull gradients": (0, 0, whole)}
    assert second[0]["pull keys and values"] == (0, 0, whole)
    assert second[1] == {"pull barriers": (3, 3, 3), "pull keys and values": (0, 0, whole)}


def whole_or_not(rank: int, size: int, case: Case, layout: SequenceLayout, workspace: int) -> list[tuple]:
    """Results of this rank where it reads wanted pairs only, where it reads parts whole, and where the even ranks do so."""
    results = []
    for share in (2.0, 0.0, 2.0 * (rank % 2)):
        with mock.patch.object(pull, "WHOLE_SHARE", share):
            results += on_rank(rank, size, case, layout, "pull", workspace_bytes=workspace)
    return results


@pytest.mark.parametrize("workspace", [1, GIB])
@pytest.mark.parametrize("name", every_layout([0, 1], 1))
def test_what_pull_reads_changes_no_bit(name: str, workspace: int) -> None:
    case = Case((29, 0, 3, 122), block_size=5, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)
    for results in run_ranks(4, whole_or_not, case, every_layout(case.cu_seqlens, 4)[name], workspace):
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def where_starts_are_made(rank: int, size: int, case: Case, layout: SequenceLayout) -> list[bool]:
    """For each look-up of starts by `pull`: whether the side stream, which reads them, was the current one."""
    inside, seen = [False], []
    use, home_start = SideStream.use, pull.home_start

    @contextlib.contextmanager
    def noted_use(side: SideStream) -> Iterator[None]:
        inside.append(True)
        with use(side):
            yield
        inside.pop()

    def noted_start(*args: object) -> torch.Tensor:
        seen.append(inside[-1])
        return home_start(*args)  # type: ignore[arg-type]

    with mock.patch.object(SideStream, "use", noted_use), mock.patch.object(pull, "home_start", noted_start):
        on_rank(rank, size, case, layout, "pull")
    return seen


def test_pull_makes_starts_on_the_stream_that_reads_them() -> None:
    """Starts come from a kernel the first time: on the caller's stream it may run long after the side stream reads."""
    for seen in run_ranks(2, where_starts_are_made, EIGHT, SequenceLayout.contiguous([0, 32], 2)):
        assert len(seen) >= 2  # forward and backward
        assert all(seen)


def test_pull_reads_keys_and_values_in_their_dtype_and_gradients_in_fp32() -> None:
    first, second = stages(CASE, TWO, "pull", torch.bfloat16)
    assert second[0]["pull keys and values"][2] == 8 * 2 * 12 * 2
    assert first[1]["pull gradients"][2] == 8 * 2 * 12 * 4
