"""Routing lists: every bin has the torch backend's entries in the same order, and items cover each entry once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels import interpreter

lists = pytest.importorskip("moba_cp.kernels.lists")
from moba_cp.kernels import list_configs, torch_backend  # noqa: E402
from moba_cp.kernels.types import RoutingLists, selection_dtype  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"


def test_in_interpreter():
    interpreter.run_module(__file__)


@pytest.fixture(params=["sorted", "few blocks"])
def few_entries(monkeypatch, request):
    """Few entries per program, because the interpreter sorts slowly."""
    configure(monkeypatch, entries=32, count_entries=64, few_tokens=8)
    if request.param == "sorted":
        configure(monkeypatch, few_blocks=0)


def configure(monkeypatch, **changes):
    """Change the configuration that `route` takes by default."""
    monkeypatch.setattr(list_configs, "LISTS", replace(list_configs.LISTS, **changes))


def random_selection(q_heads, tokens, topk, n_blocks, seed=0, hot=False):
    """Ascending distinct blocks with some -1 at the front and the own block last, as `select_blocks` returns them."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.sort(torch.randint(n_blocks, (tokens,), generator=generator)).values
    scores = torch.rand(q_heads, tokens, n_blocks, generator=generator)
    if hot:
        scores[:, :, 0] = 2
        scores[:, :, 1] = -1
    scores[:, torch.arange(tokens), own] = 3
    scores.masked_fill_(torch.arange(n_blocks) > own[:, None], -2)
    kept = min(topk, n_blocks)
    best = torch.topk(scores, kept, dim=2)
    selected = torch.where(best.values > -2, best.indices, -1).sort(2).values
    return torch.nn.functional.pad(selected, (topk - kept, 0), value=-1).to(DEVICE, selection_dtype(n_blocks))


def check(selected, n_blocks, kv_heads, block_size):
    actual = lists.route(selected, n_blocks=n_blocks, kv_heads=kv_heads, block_size=block_size)
    shape = actual.shape
    q_heads = selected.shape[0]
    expected = torch_backend.route(selected.cpu(), n_blocks=n_blocks, kv_heads=kv_heads, block_size=block_size)
    assert actual.pointer.dtype == torch.int32
    pointer = actual.pointer.tolist()
    assert pointer == expected.pointer.tolist()
    entry = actual.entry[: pointer[-1]].cpu().long()
    slot = entry & ((1 << shape.slot_bits) - 1)
    in_group = (entry >> shape.slot_bits) & ((1 << shape.head_bits) - 1)
    token = entry >> (shape.slot_bits + shape.head_bits)
    group = q_heads // kv_heads
    assert shape.group_size == group
    assert shape.topk == selected.shape[2]
    of_bins = [columns for _, _, columns in torch_backend.listed_bins(expected)]
    expected_head, expected_token, expected_slot = (torch.cat(x) for x in zip(*of_bins, strict=True))
    assert torch.equal(token, expected_token)
    assert torch.equal(slot, expected_slot)
    assert torch.equal(in_group, expected_head % group)
    # Items: every bin in runs of rows_per_item entries from its start, in order; the other items are unused.
    per_item = shape.rows_per_item
    wanted = [
        (bin_, start, min(start + per_item, pointer[bin_ + 1]))
        for bin_ in range(kv_heads * n_blocks)
        for start in range(pointer[bin_], pointer[bin_ + 1], per_item)
    ]
    items = list(zip(*(x.tolist() for x in (actual.item_bin, actual.item_start, actual.item_end)), strict=True))
    assert [item for item in items if item[0] != -1] == wanted
    for bin_ in range(kv_heads * n_blocks):  # where kernels look for a bin's items
        if pointer[bin_ + 1] > pointer[bin_]:
            assert items[pointer[bin_] // per_item + bin_][:2] == (bin_, pointer[bin_])
    return actual


CASES = {
    # q heads, kv heads, tokens, topk, blocks
    "plain": (2, 2, 17, 4, 9),
    "grouped": (6, 2, 11, 3, 7),
    "one block": (1, 1, 20, 1, 1),
    "odd topk": (2, 1, 13, 7, 40),
    "more slots than blocks": (2, 1, 10, 9, 5),
    "one token": (3, 3, 1, 3, 5),
}


@interpreter.interpreted
@pytest.mark.usefixtures("few_entries")
@pytest.mark.parametrize(("name", "block_size"), [*((name, 64) for name in CASES), ("plain", 512)])
def test_small(name, block_size, monkeypatch):
    configure(monkeypatch, item_rows_small=8, item_rows_large=8)
    q_heads, kv_heads, tokens, topk, n_blocks = CASES[name]
    selected = random_selection(q_heads, tokens, topk, n_blocks)
    check(selected, n_blocks, kv_heads, block_size)


@interpreter.interpreted
@pytest.mark.usefixtures("few_entries")
@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_several_batches_per_share(programs, monkeypatch):
    configure(monkeypatch, programs=programs)
    selected = random_selection(4, 30, 4, 12, hot=True)
    check(selected, 12, 2, 128)


@interpreter.interpreted
@pytest.mark.usefixtures("few_entries")
def test_strided_view_and_wide_entries(monkeypatch):
    selected = random_selection(6, 60, 4, 9)
    check(selected[2:4, 7:40], 9, 2, 128)
    configure(monkeypatch, entry_bits=3)
    check(selected[2:4, 7:20], 9, 2, 128)


@interpreter.interpreted
def test_more_blocks_than_registers(monkeypatch):
    selected = random_selection(4, 9, 4, 9)
    configure(monkeypatch, register_bins=2)
    check(selected, 9, 2, 512)
    check(selected[2:4, 3:8], 9, 2, 128)


@interpreter.interpreted
@pytest.mark.usefixtures("few_entries")
def test_more_slots_than_a_batch(monkeypatch):
    configure(monkeypatch, entries=4)
    selected = random_selection(2, 9, 7, 9)
    check(selected, 9, 2, 128)


@interpreter.interpreted
def test_many_items_and_many_unused(monkeypatch):
    """A bin of more items than are written at once; most of the item table unused."""
    configure(monkeypatch, item_rows_small=1)
    selected = random_selection(1, 70, 6, 9, hot=True)
    selected[:, :, 1:-1] = -1
    check(selected.sort(2).values, 9, 1, 128)
    configure(monkeypatch, items_at_once=4)
    check(selected.sort(2).values, 9, 1, 128)


def test_lists_are_restored_from_their_tensors():
    """`from_tensors` restores lists from their shape and `tensors()`, all of them."""
    made = torch_backend.route(random_selection(2, 6, 2, 3).cpu(), n_blocks=3, kv_heads=1, block_size=128)
    again = RoutingLists.from_tensors(made.shape, made.tensors())
    assert again.shape == made.shape
    for name, value in vars(made).items():
        if isinstance(value, torch.Tensor):
            assert getattr(again, name) is value
            assert any(value is x for x in made.tensors()), name
    with pytest.raises(ValueError, match="5 tensors, got 4"):
        RoutingLists.from_tensors(made.shape, made.tensors()[:4])


def test_nothing_listed():
    selected = random_selection(2, 6, 1, 3)
    empty = lists.route(selected[:, :0], n_blocks=3, kv_heads=1, block_size=128)
    assert empty.pointer.tolist() == [0] * 4
    assert empty.item_bin.numel() == empty.entry.numel() == 0


def test_too_many_entries():
    selected = torch.zeros(1, 1, 1, dtype=torch.int16).expand(4, 1 << 20, 512)
    with pytest.raises(ValueError, match=r"at most 2146435072 entries, got \(4, 1048576, 512\)"):
        lists.route(selected, n_blocks=1, kv_heads=4, block_size=128)


class TestGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize(
        ("q_heads", "kv_heads", "tokens", "topk", "n_blocks", "block_size"),
        [
            (4, 4, 20000, 8, 1024, 128),
            (8, 2, 8191, 8, 256, 512),
            (4, 1, 5000, 12, 32, 4096),
            (2, 1, 3000, 8, 3000, 16),
            (1, 1, 2000, 5, 8192, 16),
            (2, 2, 1000, 8, 9000, 16),
            (1, 1, 400, 8, 65536, 16),
            (1, 1, 200, 1500, 2000, 16),
            (2, 1, 300, 100, 200, 64),
            (2, 1, 3000, 50, 4096, 16),
            (1, 1, 40000, 1, 8192, 16),
            (8, 2, 30000, 3, 31, 4096),
            (1, 1, 1, 8, 100, 128),
        ],
    )
    @pytest.mark.parametrize("hot", [False, True])
    @pytest.mark.parametrize("shared_memory", [True, False])
    def test_equals_torch(
        self, q_heads, kv_heads, tokens, topk, n_blocks, block_size, hot, shared_memory, monkeypatch
    ):  # fmt: skip
        configure(monkeypatch, shared_memory=shared_memory)
        selected = random_selection(q_heads, tokens, topk, n_blocks, hot=hot)
        check(selected, n_blocks, kv_heads, block_size)

    def test_view_of_a_chunk(self):
        selected = random_selection(8, 3000, 8, 100)
        check(selected[2:6, 100:2999], 100, 2, 128)

    def test_same_every_time(self):
        selected = random_selection(4, 20000, 8, 500)
        first = lists.route(selected, n_blocks=500, kv_heads=2, block_size=128)
        for _ in range(20):
            again = lists.route(selected, n_blocks=500, kv_heads=2, block_size=128)
            for name in ("pointer", "entry", "item_bin", "item_start", "item_end"):
                valid = slice(int(first.pointer[-1])) if name == "entry" else slice(None)
                valid = first.item_bin >= 0 if name in ("item_start", "item_end") else valid
                assert torch.equal(getattr(again, name)[valid], getattr(first, name)[valid]), name

    def test_wide_entries(self):
        """Entries of 32 bits, 21 of token, 5 of head and 6 of slot, are int64."""
        tokens = (1 << 20) + 1
        own = torch.tensor([-1] * 32 + [1], dtype=torch.int32, device=DEVICE)
        actual = lists.route(own.expand(17, tokens, 33), n_blocks=2, kv_heads=1, block_size=128)
        assert actual.pointer.tolist() == [0, 0, 17 * tokens]
        head = torch.arange(17, device=DEVICE)[:, None]
        expected = (torch.arange(tokens, device=DEVICE) << 11) | (head << 6) | 32
        assert torch.equal(actual.entry[: 17 * tokens], expected.flatten())

    def test_reads_nothing_on_the_host(self):
        selected = random_selection(4, 5000, 8, 500)
        lists.route(selected, n_blocks=500, kv_heads=2, block_size=128)
        torch.cuda.set_sync_debug_mode("error")
        try:
            lists.route(selected, n_blocks=500, kv_heads=2, block_size=128)
            lists.route(selected, n_blocks=500, kv_heads=2, block_size=512)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_number_of_programs():
    """More programs where each has work for several batches and the table of counts stays small; never fewer than 1024."""
    config = list_configs.LISTS
    assert lists.programs_of(2048, 64, config) == 1024  # 8K tokens, 16 heads
    assert lists.programs_of(16384, 64, config) == 4096
    assert lists.programs_of(32768, 1024, config) == 4096
    assert lists.programs_of(131072, 4096, config) == 2048
    assert lists.programs_of(131072, 8192, config) == 1024
    assert lists.programs_of(131072, 65536, config) == 1024
    for n_blocks in (1, 1000, 2048, 2049, 8192):
        assert lists.programs_of(1 << 20, n_blocks, config) * n_blocks <= config.table_entries
