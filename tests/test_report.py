"""MoBAReport: every figure against a count by hand or by brute force, the same on all ranks, and free when not asked for."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

import moba_cp
from moba_cp import MoBAReport, SequenceLayout
from moba_cp.parallel.blocks import block_table
from tests.cases import COMMS, Case, every_layout
from tests.ranks import run_ranks
from tests.recorder import recorded

CASE = Case((29, 0, 3, 41, 1), block_size=4, topk=3, q_heads=4, kv_heads=2, dim=4, v_dim=2)
PAIR_BYTES = (4 + 2) * 8


def report_on_rank(rank: int, size: int, case: Case, layout: SequenceLayout, comm: str) -> MoBAReport:
    qkv = (layout.shard(x, rank) for x in case.inputs()[:3])
    return moba_cp.moba_attention(*qkv, case.config, layout=layout, comm=comm, return_report=True)[1]


def own_blocks(case: Case) -> list[int]:
    """Number of each token's own block."""
    blocks = block_table(np.array(case.cu_seqlens), case.block_size)
    return np.repeat(np.arange(len(blocks)), blocks.length).tolist()


def selections(case: Case) -> list[tuple[int, int, int]]:
    """(token, q head, block) that the definition selects."""
    q, k, *_ = case.inputs()
    found, first = [], 0
    for begin, end in zip(case.cu_seqlens[:-1], case.cu_seqlens[1:], strict=True):
        chosen = moba_cp.reference.select_blocks(q[begin:end], k[begin:end], case.config)
        found += [(begin + t, h, first + b) for h, t, b in chosen.nonzero().tolist()]
        first += chosen.shape[2]
    return found


@pytest.mark.parametrize("comm", [comm for comm in COMMS if comm != "a2a"])
@pytest.mark.parametrize("name", ["contiguous", "zigzag per document", "interleaved", "all on the last rank"])
def test_figures_by_brute_force(name: str, comm: str) -> None:
    layout = every_layout(CASE.cu_seqlens, 3)[name]
    reports = run_ranks(3, report_on_rank, CASE, layout, comm)
    chosen, own = selections(CASE), own_blocks(CASE)
    blocks = block_table(np.array(CASE.cu_seqlens), CASE.block_size)
    holder = {t: r for r in range(3) for t in layout.local_indices(r).tolist()}
    home = moba_cp.parallel.home_plan(layout, CASE.block_size).home

    earlier = Counter(b for t, _, b in chosen if b != own[t])
    distance = Counter((own[t] - b).bit_length() for t, _, b in chosen)  # 2 ** (i - 1) <= d < 2 ** i; 0 for 0
    keys = [0, 0, 0]
    for t, _, b in chosen:
        keys[holder[t]] += CASE.block_size if b != own[t] else t - int(blocks.start[b]) + 1
    pairs = {(holder[t], h // 2, b) for t, h, b in chosen if home[b] != holder[t]}
    bound = [sum(int(blocks.length[b]) * PAIR_BYTES for r, _, b in pairs if r == rank) for rank in range(3)]

    for rank, report in enumerate(reports):
        assert report.lower_bound_bytes.tolist() == bound
        assert report.attended_keys.tolist() == keys
        assert report.imbalance == pytest.approx(max(keys) / (sum(keys) / 3))
        assert report.distance_histogram.tolist() == [distance[i] for i in range(len(report.distance_histogram))]
        assert sum(report.distance_histogram) == len(chosen)
        assert report.most_wanted == sorted(earlier.items(), key=lambda item: (-item[1], item[0]))[:10]
        visible = int(report.visible_bytes.sum())
        assert report.wanted_share == (sum(bound) / visible if visible else 0.0)
        assert all(0 <= b <= v for b, v in zip(bound, report.visible_bytes, strict=True))
        assert report.transport == comm or comm == "auto"
        assert (report.block_size, report.n_blocks) == (4, len(blocks))
        # This rank's own part of the selection.
        assert torch.equal(report.token_numbers, layout.local_indices(rank))
        mine = {
            (int(report.token_numbers[t]), h, int(report.selected[h, t, s]))
            for h, t, s in (report.selected >= 0).nonzero().tolist()
        }
        assert mine == {s for s in chosen if holder[s[0]] == rank}
        as_sorted = report.selected.sort(2).values
        assert torch.equal(report.selected, as_sorted)
        assert report.selected[:, :, -1].tolist() == [[own[t] for t in report.token_numbers.tolist()]] * 4


def one_head(keys: list[float], lengths: tuple[int, ...], topk: int) -> MoBAReport:
    """The report of one rank, one head, blocks of one token, every query 1."""
    k = torch.tensor(keys, dtype=torch.float64)[:, None, None]
    case = Case(lengths, 1, topk)
    layout = SequenceLayout.contiguous(case.cu_seqlens, 1)
    return moba_cp.moba_attention(torch.ones_like(k), k, k, case.config, layout=layout, return_report=True)[1]


def test_entropy_and_most_wanted_by_hand() -> None:
    """Four blocks: block 0 scores most, so all three later rows take it: entropy 0. With rising scores each row takes
    the block before it, three blocks once each: ln 3 of ln 4."""
    falling, rising = one_head([9, 3, 2, 1], (4,), 2), one_head([1, 2, 3, 9], (4,), 2)
    assert falling.entropy == 0
    assert falling.most_wanted == [(0, 3)]
    assert falling.distance_histogram[:3].tolist() == [4, 1, 2]  # own; 1 back; 2 and 3 back
    assert rising.entropy == pytest.approx(math.log(3) / math.log(4))
    assert rising.most_wanted == [(0, 1), (1, 1), (2, 1)]
    assert rising.distance_histogram[:3].tolist() == [4, 3, 0]


def test_entropy_weighs_documents_by_their_selections() -> None:
    """One document of 0 nats with 3 selections, one of ln 3 with 3, and one that selects nothing."""
    report = one_head([9, 3, 2, 1, 5, 1, 2, 3, 9], (4, 1, 4), 2)
    assert report.entropy == pytest.approx(math.log(3) / math.log(4) / 2)


@pytest.mark.parametrize("lengths", [(), (0,), (1,)], ids=str)
def test_nothing_to_report(lengths: tuple[int, ...]) -> None:
    case = Case(lengths, 4, 3)
    for report in run_ranks(2, report_on_rank, case, SequenceLayout.contiguous(case.cu_seqlens, 2), "auto"):
        assert report.lower_bound_bytes.tolist() == report.visible_bytes.tolist() == [0, 0]
        assert (report.wanted_share, report.entropy, report.most_wanted) == (0.0, 0.0, [])
        assert report.attended_keys.sum() == 2 * sum(lengths)
        assert report.imbalance == (2.0 if lengths == (1,) else 1.0)


def collectives_on_rank(rank: int, size: int, case: Case, comm: str) -> tuple[list, list, bool]:
    layout = SequenceLayout.contiguous(case.cu_seqlens, size)
    qkv = [layout.shard(x, rank) for x in case.inputs()[:3]]
    moba_cp.moba_attention(*qkv, case.config, layout=layout, comm=comm)  # pull sets up its memory once
    with recorded() as without:
        plain = moba_cp.moba_attention(*qkv, case.config, layout=layout, comm=comm)
    with recorded() as asked:
        out, _ = moba_cp.moba_attention(*qkv, case.config, layout=layout, comm=comm, return_report=True)
    return without, asked, torch.equal(plain, out)


@pytest.mark.parametrize(("comm", "extra"), [("all_gather", 1), ("ring", 1), ("fetch", 1), ("pull", 1), ("auto", 1)])
def test_a_report_costs_a_few_collectives_and_none_when_not_asked_for(comm: str, extra: int) -> None:
    """The report sums one row of numbers over ranks."""
    for without, asked, same in run_ranks(2, collectives_on_rank, CASE, comm):
        assert same
        assert asked[: len(without)] == without
        assert len(asked) == len(without) + extra
