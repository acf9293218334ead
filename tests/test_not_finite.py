"""NaN and infinity in one key, value or query reach the rows that may see them, and no others, with every transport."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.reference import select_blocks
from tests.cases import comms_for
from tests.ranks import run_ranks

BLOCK, TOPK, HEADS, KV_HEADS = 4, 2, 4, 2
BOUNDARIES = (0, 18, 30)
TOKEN, KV_HEAD = 9, 1  # in the middle of block 2 of the first document
CONFIG = MoBAConfig(BLOCK, TOPK)
LAYOUT = SequenceLayout.zigzag(BOUNDARIES, 2)


def inputs(which: str, value: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = {n: torch.randn(30, h, 8, generator=generator) for n, h in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
    if which:
        made[which][TOKEN, KV_HEAD, 5] = value
    return list(made.values())


def outputs(rank: int, size: int, comm: str, which: str, value: float) -> Tensor:
    qkv = [LAYOUT.shard(x, rank) for x in inputs(which, value)]
    return moba_cp.moba_attention(*qkv, CONFIG, layout=LAYOUT, comm=comm)


@cache
def output(comm: str, which: str, value: float) -> Tensor:
    return LAYOUT.unshard(run_ranks(2, outputs, comm, which, value))


def may_change(which: str, value: float) -> Tensor:
    """bool `[T, Hq]`: rows that the number may reach: by its block, which they select, by their own block, or by a score."""
    q, k, _ = inputs(which, value)
    allowed = torch.zeros(30, HEADS, dtype=torch.bool)
    heads = slice(KV_HEAD * HEADS // KV_HEADS, (KV_HEAD + 1) * HEADS // KV_HEADS)
    if which == "q":
        allowed[TOKEN, KV_HEAD] = True
        return allowed
    block = TOKEN // BLOCK
    selected = select_blocks(q[:18], k[:18], CONFIG)[:, :, block].T  # NaN scores are in there
    own = torch.arange(18) // BLOCK == block
    allowed[:18, heads] = (selected | own[:, None])[:, heads]
    if which == "k":  # an infinite centroid also decides what later rows select instead
        allowed[(block + 1) * BLOCK : 18, heads] = True
    return allowed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("comm", comms_for(HEADS, 2))
def test_reaches_only_rows_that_may_see_it(comm: str, which: str, value: float) -> None:
    found, clean = output(comm, which, value), output(comm, "", 0.0)
    changed = (found != clean).any(2)
    assert not (changed & ~may_change(which, value)).any()
    if which == "v" or math.isnan(value):  # an infinite score may also be one of weight 0
        head = KV_HEAD if which == "q" else KV_HEAD * HEADS // KV_HEADS
        assert not found[TOKEN, head].isfinite().all()


@pytest.mark.parametrize("comm", comms_for(HEADS, 2))
def test_a_nan_score_ranks_above_every_number(comm: str) -> None:
    """Later rows whose q head reads the NaN key's head all attend to its block and show it."""
    found = output(comm, "k", math.nan)
    assert found[12:18, 2:].isnan().all()
    assert found[12:18, :2].isfinite().all()
    assert found[18:].isfinite().all()
