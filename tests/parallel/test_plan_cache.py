"""Plans are found by value, kept up to a number of bytes, counted, and of use whatever mode made them."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, memory
from moba_cp.parallel import plan_cache
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.parallel.home import home_start, index_tensor
from moba_cp.parallel.plan_cache import PLANS, bytes_of
from moba_cp.pipeline import device_rows

CPU = torch.device("cpu")
NAMES = ("home_from", "local_from", "send_rows", "return_rows", "centroid_order")


def packed(tokens: int, documents: int, seed: int) -> list[int]:
    """Boundaries of documents of random lengths."""
    cuts = np.random.default_rng(seed).choice(tokens - 1, documents - 1, replace=False)
    return [0, *(np.sort(cuts) + 1).tolist(), tokens]


def planned(layout: SequenceLayout, rank: int = 0, block_size: int = 128) -> object:
    """Everything that one rank's calls make of a layout."""
    plan = rank_plan(home_plan(layout, block_size), rank)
    device_rows(plan, CPU)
    for name in NAMES:
        index_tensor(plan, name, CPU)
    home_start(plan.plan, rank, CPU)
    return plan


def test_equal_layouts_share_a_plan() -> None:
    cu = packed(1000, 5, 0)
    assert planned(SequenceLayout.zigzag(cu, 2)) is planned(SequenceLayout.zigzag(cu, 2))


def test_the_least_recently_used_plans_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANS.clear()
    layouts = [SequenceLayout.zigzag(packed(20_000, 5, seed), 2) for seed in range(4)]
    first = planned(layouts[0])
    size = moba_cp.kept_bytes().host
    assert size > 20_000 // 2 * 8 * 3  # three int64 per local token at least
    monkeypatch.setattr(plan_cache, "MOST_HOST_BYTES", int(2.5 * size))
    planned(layouts[1])
    assert planned(layouts[0]) is first
    planned(layouts[2])  # drops 1, which was used before 0
    assert len(PLANS) <= 3
    assert planned(layouts[0]) is first
    planned(layouts[3])
    assert moba_cp.kept_bytes().host < 4 * size
    monkeypatch.setattr(plan_cache, "MOST_HOST_BYTES", 1)
    planned(SequenceLayout.zigzag(packed(20_000, 5, 9), 2))
    assert len(PLANS) == 1  # the newest stays


def test_many_layouts_keep_a_bounded_number_of_bytes() -> None:
    """12 layouts with 512K local tokens each, of 25 MiB or more; 96 MiB may be kept beside the newest."""
    PLANS.clear()
    for seed in range(12):
        plan = planned(SequenceLayout.zigzag(packed(4_000_000, 100, seed), 8))
        assert bytes_of(plan).host > 20 << 20
        assert moba_cp.kept_bytes().host <= 150 << 20
    assert len(PLANS) < 12
    PLANS.clear()
    kept = moba_cp.kept_bytes()
    assert (kept.host, kept.device, kept.shared) == (0, 0, 0)


def test_a_captured_plan_stays_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = plan_cache.PlanCache()
    monkeypatch.setattr(memory, "PLANS", cache)
    plan = planned(SequenceLayout.zigzag(packed(20_000, 5, 3), 2))
    assert moba_cp.kept_bytes().captured_host == 0
    cache.keep(plan)
    cache.keep(plan)
    cache.clear()
    assert moba_cp.kept_bytes().captured_host == bytes_of(plan).host > 20_000


def test_layouts_of_megatron_count() -> None:
    pytest.importorskip("megatron.core")
    from moba_cp.megatron.layout import packed_layout

    PLANS.clear()
    true, padded = tuple(range(0, 12 * 5001, 12)), tuple(range(0, 16 * 5001, 16))
    layout = packed_layout(true, padded, 8)
    assert packed_layout(true, padded, 8) is layout
    assert moba_cp.kept_bytes().host >= layout.nbytes > 5000 * 8


@pytest.mark.parametrize(
    ("tokens", "documents", "size", "seconds"), [(10**6, 10_000, 64, 0.15), (8 * 10**6, 1000, 4096, 1.5)]
)
def test_planning_a_new_layout_is_cheap(tokens: int, documents: int, size: int, seconds: float) -> None:
    """CPU time of layout, digest, plans and index tensors of one rank. The bound is four times what is wanted of a quiet
    machine, so that a busy one passes."""
    cu = np.asarray(packed(tokens, documents, 0))
    planned(SequenceLayout.zigzag([0, 4096], 2))  # imports
    begin = time.process_time()
    layout = SequenceLayout.zigzag(cu, size)
    assert layout.digest
    planned(layout)
    assert time.process_time() - begin < 4 * seconds


def test_large_groups_keep_no_starts_of_other_ranks() -> None:
    """512 ranks and 62,500 blocks: starts of all of them would take 122 MiB; they are made at each use."""
    plan = home_plan(SequenceLayout.zigzag([0, 8_000_000], 512), 128)
    before = bytes_of(plan).host
    for rank in range(512):
        start = home_start(plan, rank, CPU)
        assert int((start >= 0).sum()) == int((plan.home == rank).sum())
        assert np.array_equal(start.numpy(), np.where(plan.home == rank, plan.home_row, -1))
    assert bytes_of(plan).host - before < 2 << 20


class Read(TorchDispatchMode):
    """Counts the elements that operators read: views read none, and what is written in place does not count."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place, aliased = func._schema.is_mutable, func._schema.returns[0].alias_info is not None
        if in_place or not aliased:
            self.elements += sum(x.numel() for x in args[in_place:] if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_starts_of_another_rank_cost_its_blocks_and_a_fill() -> None:
    """A walk over 512 ranks makes the starts of each in each layer. Comparing all blocks each time took 0.2 ms per rank."""
    plan = home_plan(SequenceLayout.zigzag([0, 8_000_000], 512), 128)
    home_start(plan, 0, CPU)
    with Read() as read:
        home_start(plan, 300, CPU)
    assert 0 < read.elements <= 4 * int((plan.home == 300).sum()) < len(plan.blocks) // 100


def test_dropped_plans_are_freed_without_the_garbage_collector() -> None:
    """Large tensors do not hasten the collector: a plan that refers to itself would keep them long after it was dropped."""
    layouts = [SequenceLayout.contiguous([0, 41 + i, 64], 1) for i in range(3)]
    PLANS.clear()
    gc.collect()
    gc.disable()
    try:
        plans, sides = [], []
        for layout in layouts:
            call(layout)  # with a backward pass
            plans.append(weakref.ref(home_plan(layout, 8)))
            sides.append(weakref.ref(rank_plan(home_plan(layout, 8), 0)))
        assert all(ref() is not None for ref in plans + sides)
        PLANS.clear()
        assert all(ref() is None for ref in plans + sides)
    finally:
        gc.enable()


def test_a_plan_in_use_outlives_its_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    PLANS.clear()
    layout, other = (SequenceLayout.contiguous([0, n, 64], 1) for n in (41, 50))
    plan = planned(layout, block_size=8)
    made = len(plan.plan.memo)  # type: ignore[attr-defined]
    monkeypatch.setattr(plan_cache, "MOST_PLANS", 1)
    planned(other, block_size=8)
    assert len(PLANS) == 1
    assert made == len(plan.plan.memo) > 0  # type: ignore[attr-defined]
    again = planned(layout, block_size=8)
    assert again is not plan
    assert np.array_equal(again.position, plan.position)  # type: ignore[attr-defined]


def call(layout: SequenceLayout) -> torch.Tensor:
    q, k, v = (torch.randn(64, h, 8, requires_grad=not torch.is_inference_mode_enabled()) for h in (2, 1, 1))
    out = moba_cp.moba_attention(q, k, v, MoBAConfig(8, 3), layout=layout)
    if out.requires_grad:
        out.sum().backward()
    return out


def test_threads_share_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """More layouts than are kept, in threads that interrupt each other anywhere."""
    monkeypatch.setattr(plan_cache, "MOST_PLANS", 3)
    layouts = [SequenceLayout.contiguous([0, 40 + i], 1) for i in range(6)]

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(layouts), 200):
            plan = rank_plan(home_plan(layouts[i], 8), 0)
            assert len(device_rows(plan, CPU).block) == 40 + i

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(switch)


def test_no_mode_leaves_plans_of_no_use_to_others() -> None:
    layout = SequenceLayout.contiguous([0, 41, 64], 1)
    PLANS.clear()
    with FakeTensorMode():
        call(layout)
    assert len(PLANS) == 0
    with torch.inference_mode():
        call(layout)
    assert len(PLANS) == 1
    assert call(layout).isfinite().all()  # with a backward pass
