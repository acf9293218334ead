"""What the pipeline does to tensors before kernels see them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, chunks
from moba_cp.kernels import Backend, torch_backend
from moba_cp.kernels.dispatch import aligned
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.parallel.comm import CommGroup
from moba_cp.pipeline import Call, head_ranges
from moba_cp.stages import Stages
from moba_cp.strides import readable

BASE = torch.zeros(10, 4, 3 * 64 + 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(10, 4, 64), False),
        (torch.zeros(10, 4, 128)[:, :, :64], False),  # strided, but every row is aligned
        (torch.zeros(10, 4, 72), False),  # no new tensor would be aligned either
        (BASE[:, :, 64:128], True),  # rows of 200 elements
        (torch.zeros(10 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(10, 4, 64), True),  # begins 2 bytes late
        (torch.zeros(64, 4, 10).transpose(0, 2), True),
        (torch.zeros(10, 4, 1).expand(10, 4, 64), True),
    ],
)
def test_variants_of_kernels_do_not_depend_on_strides(x: torch.Tensor, copied: bool) -> None:
    """Every tensor whose copy would be aligned is aligned, so all parts of a call take the same variant."""
    y = readable(x)
    assert torch.equal(x, y)
    assert (y.data_ptr() != x.data_ptr()) == copied
    assert y.stride(2) == 1
    assert aligned(y) or x.shape[2] % 16


TOKENS, HEADS, TOPK = 2048, 6, 4
MIB = 1 << 20
SLOTS = TOKENS * 2 * TOPK * 4 * 65
"""Bytes of the partial results of one kv head and its two q heads, in fp32: 4.06 MiB."""


def plain_call(workspace_bytes: int, kept_bytes: int) -> Call:
    """A call of one rank, on a backend that takes `kept_bytes` to keep the gradients of scores of one kv head."""
    plan = rank_plan(home_plan(SequenceLayout.contiguous([0, TOKENS], 1), 256), 0)
    backend = SimpleNamespace(bytes_per_slot=torch_backend.bytes_per_slot, kept_ds_bytes=lambda *_, **__: kept_bytes)
    return Call(
        MoBAConfig(256, TOPK), plan, CommGroup(None, 1), cast(Backend, backend), "auto", workspace_bytes, 1 << 30,
        Stages(torch.device("cpu")), True, 0,
    )  # fmt: skip


def heads_at_once(call: Call, backward: bool = False) -> list[int]:
    """Kv heads of each range, all of whose rows are worked on together."""
    q, k = torch.empty(TOKENS, 2 * HEADS, 64), torch.empty(TOKENS, HEADS, 64)
    ranges = head_ranges(call, q, k, k, backward=backward)
    assert all(len(chunks) == 1 for _, chunks in ranges)
    return [heads.stop - heads.start for heads, _ in ranges]


@pytest.mark.parametrize(
    ("workspace", "without", "keeping"),
    [
        (HEADS * SLOTS, [6], [4, 2]),  # all partial results fit; with gradients of scores no more memory is taken
        (HEADS * SLOTS - 1, [5, 1], [4, 2]),
        (12 * MIB, [2, 2, 2], [2, 2, 2]),
        (12 * MIB - 1, [2, 2, 2], [1] * 6),
        (6 * MIB - 1, [1] * 6, [1] * 6),  # not even one head's gradients fit
    ],
)
def test_gradients_of_scores_are_kept_within_the_workspace(
    workspace: int, without: list[int], keeping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS)
    assert heads_at_once(plain_call(workspace, 0)) == without
    call = plain_call(workspace, 6 * MIB)
    assert heads_at_once(call) == heads_at_once(call, backward=True) == keeping


def test_who_keeps_gradients_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes, and forward passes whose lists these take; not those of several ranks, nor where that is little work."""
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS)
    call = plain_call(12 * MIB - 1, 6 * MIB)
    made_again = replace(call, keep_lists=False)
    assert heads_at_once(call) == heads_at_once(made_again, backward=True) == [1] * 6
    assert heads_at_once(made_again) == [2, 2, 2]
    several = replace(call, comm=cast(CommGroup, SimpleNamespace(size=2)))
    assert heads_at_once(several) == heads_at_once(several, backward=True) == [2, 2, 2]
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS + 1)
    assert heads_at_once(call) == [2, 2, 2]
