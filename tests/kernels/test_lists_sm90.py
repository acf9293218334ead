"""The Hopper kernels that make routing lists, run on the CPU: the torch backend's lists. GPU tests are in `test_lists.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels import gluon_on_host
from tests.kernels.test_lists import random_selection

pytest.importorskip("triton.experimental.gluon")
from moba_cp.kernels import list_configs, lists, lists_sm90, torch_backend
from moba_cp.kernels.gpu import gpu_of_capability


@pytest.fixture
def on_host(monkeypatch):
    """`lists.route` on the CPU, by the Hopper kernels; shares are as small as they may be."""

    def launch(kernel, grid, *arguments, num_warps, **constants):
        gluon_on_host.run_on_host(kernel, lists_sm90, grid, arguments, constants)

    def pointer_alone(begin, shape, shares, capacity, config):
        return begin[::shares], *torch.empty(3, 0, dtype=torch.int32)

    monkeypatch.setattr(lists, "launch_kernel", launch)
    monkeypatch.setattr(lists, "gluon_serves", lambda device: True)
    monkeypatch.setattr(lists, "_items", pointer_alone)  # `item_kernel` is the same as without
    monkeypatch.setattr(list_configs, "SHARES_PER_MULTIPROCESSOR", 1 << 20)


def check(selected, n_blocks, kv_heads):
    made = lists.route(selected, n_blocks=n_blocks, kv_heads=kv_heads, block_size=128)
    expected = torch_backend.route(selected, n_blocks=n_blocks, kv_heads=kv_heads, block_size=128)
    assert torch.equal(made.pointer, expected.pointer.to(torch.int32))
    listed = int(made.pointer[-1])
    assert torch.equal(made.entry[:listed].long(), expected.entry[:listed].long())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.integers(1, 3), group=st.integers(1, 3), tokens=st.integers(1, 900), topk=st.integers(1, 20),
    n_blocks=st.integers(1, 300), hot=st.booleans(), shuffled=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_equals_torch(on_host, kv_heads, group, tokens, topk, n_blocks, hot, shuffled, seed):
    selected = random_selection(kv_heads * group, tokens, topk, n_blocks, seed, hot and n_blocks > 1).cpu()
    if shuffled:  # slots in another order, -1 among them
        selected = selected[:, :, torch.randperm(topk, generator=torch.Generator().manual_seed(seed))].int()
    check(selected, n_blocks, kv_heads)


@pytest.mark.parametrize(("n_blocks", "topk"), [(1024, 8), (5000, 8), (8192, 3), (40, 64)])
def test_many_blocks_and_slots(on_host, n_blocks, topk):
    check(random_selection(2, 1500, topk, n_blocks).cpu(), n_blocks, 1)


def test_strided_view_and_wide_entries(on_host, monkeypatch):
    monkeypatch.setattr(list_configs, "LISTS", replace(list_configs.LISTS, entry_bits=10))
    selected = random_selection(6, 700, 5, 90).cpu()
    check(selected[2:, 100:699], 90, 2)
    check(selected.transpose(1, 2).contiguous().transpose(1, 2), 90, 3)


def test_nothing_selected(on_host):
    check(torch.full((2, 300, 4), -1, dtype=torch.int16), 7, 1)


def test_shares():
    """A share is whole, or smaller where multiprocessors would be idle; its counts never take more than its entries."""
    gpu = gpu_of_capability((9, 0))._replace(multiprocessors=132)
    for n_blocks, tokens, heads, entries in (
        (1024, 1 << 17, 16, 1 << 14),  # 128K tokens, blocks of 128
        (1024, 1 << 17, 1, 1 << 12),
        (4096, 1 << 19, 16, 1 << 15),
        (64, 1 << 13, 16, 1 << 12),
        (8192, 10_000, 1, 1 << 13),
        (2, 1000, 1, 1 << 10),
    ):
        config = list_configs.shared_lists(n_blocks, 8, gpu)
        assert lists.share_entries(tokens * heads * 8, config, gpu) == entries
