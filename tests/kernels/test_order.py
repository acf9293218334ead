"""Order of programs where kv heads take turns: every work unit and every work item has exactly one program.

The functions of the Gluon kernels run on Python integers, one program after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels import gluon_on_host
from tests.kernels.list_cases import make_lists

pytest.importorskip("triton.experimental.gluon")
from moba_cp.kernels import gluon_rows, sizes
from moba_cp.kernels.backward import dkdv_dq_tiles_sm90, dq_sm90, rows_sm90, segments
from moba_cp.kernels.forward import sm90, stream_rows_sm90

NO_ITEM = dq_sm90._NO_ITEM.value


class Number(int):
    """An integer that can be cast, as tensors can."""

    def __floordiv__(self, other: int) -> Number:
        return Number(int(self) // other)

    def to(self, dtype: object) -> int:
        return self


@dataclass
class Pointer:
    """A pointer to one of some integers."""

    values: list[int]
    index: int = 0

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.values, self.index + offset)


def load(pointer: Pointer, mask: bool = True, other: int | None = None) -> int | None:
    assert not mask or 0 <= pointer.index < len(pointer.values)
    return pointer.values[pointer.index] if mask else other


def on_host(jitted: Any, program: int, programs: int) -> Callable:
    """A Gluon function on Python integers, as program `program` of `programs`."""
    language = SimpleNamespace(
        maximum=max, minimum=min, where=lambda condition, a, b: a if condition else b, load=load,
        program_id=lambda axis: program, num_programs=lambda axis: programs,
    )  # fmt: skip
    language.constexpr = int
    in_turns = FunctionType(gluon_rows.in_turns.fn.__code__, {"gl": language})
    return FunctionType(jitted.fn.__code__, {"gl": language, "in_turns": in_turns})


@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("segments", [0, 5])
@pytest.mark.parametrize("at_once", [1, 2, 4, 16])
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 16, 17])
def test_every_work_unit_has_its_programs(heads, at_once, segments, tiles):
    """Segments first, then each bin once: the first blocks of all heads that take turns before their second blocks."""
    for n_blocks in (1, 2, 7):
        n_bins = heads * n_blocks
        programs = (n_bins + segments) * tiles
        units = [
            on_host(rows_sm90.work_unit, 0, programs)(program, n_bins, n_blocks, tiles, at_once)
            for program in range(programs)
        ]
        assert units == [unit for unit in units[::tiles] for _ in range(tiles)], "neighbours share a unit"
        assert units[: segments * tiles : tiles] == [n_bins + c for c in range(segments)]
        wanted = [
            head * n_blocks + block
            for first in range(0, heads, at_once)
            for block in range(n_blocks)
            for head in range(first, min(first + at_once, heads))
        ]
        assert units[segments * tiles :: tiles] == wanted


@pytest.mark.parametrize("units", [1, 2, 7])
@pytest.mark.parametrize("tiles", [5, 32])
@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
def test_programs_of_a_unit_start_in_order_of_its_tiles(units, tiles, at_once):
    """A program waits for that of the tile before, which must have started; units take turns, `at_once` at a time."""
    start = on_host(dkdv_dq_tiles_sm90._unit_and_tile, 0, units * tiles)
    wanted = [
        (unit, tile)
        for first in range(0, units, at_once)
        for tile in range(tiles)
        for unit in range(first, min(first + at_once, units))
    ]
    assert [start(ticket, at_once, tiles) for ticket in range(units * tiles)] == wanted


@pytest.mark.parametrize("resident", [1, 3, 132])
def test_every_item_of_dq_has_one_program(resident):
    """Programs of one wave take turns, so that their items are consecutive at any time."""
    for n_items in (1, 2, resident, 16 * resident, 16 * resident + 1, 40 * resident + 7, 64 * resident - 1, 5000):
        programs = sizes.programs_for(n_items, resident)
        step, per_program = min(resident, programs), sizes.cdiv(n_items, programs)
        found = []
        for program in range(programs):
            first, end = on_host(dq_sm90._turns, program, programs)(program, step, per_program, n_items)
            found += range(first, end, step)
        assert sorted(found) == list(range(n_items))


@pytest.mark.parametrize("resident", [1, 3, 132])
@pytest.mark.parametrize("held_blocks", [[], [0], [3, 4, 5], [0, 9], list(range(10))], ids=str)
def test_programs_of_dq_take_the_items_of_held_blocks(held_blocks, resident):
    """In order, and no item of blocks that other ranks hold."""
    held_items, next_item = (gluon_on_host.on_host(f, dq_sm90) for f in (dq_sm90._held_items, dq_sm90._next))
    generator = torch.Generator().manual_seed(resident)
    start = torch.full((2, 10), -1)
    start[:, held_blocks] = 7
    for n_items in (1, 20, 16 * resident + 1, 32 * resident - 1, 1000):
        bins = torch.randint(-1, 20, (n_items,), generator=generator).sort().values
        programs = sizes.programs_for(n_items, resident)
        step, per_program = min(resident, programs), sizes.cdiv(n_items, programs)
        for program in range(programs):
            first, end = on_host(dq_sm90._turns, program, programs)(program, step, per_program, n_items)
            expected = [i for i in range(first, end, step) if bins[i] >= 0 and start[bins[i] // 10, bins[i] % 10] >= 0]
            items = held_items(
                first, end, step, gluon_on_host.Pointer(bins), gluon_on_host.Pointer(start.flatten()), 10, 10, 8
            )
            assert int((items < end).sum()) == len(expected)
            found = [int(items.min())]
            while found[-1] < end:
                found.append(int(next_item(items, found[-1])))
            assert found == [*expected, NO_ITEM]


def test_rows_of_kept_gradients_are_found_again():
    """`row_in_ds_order` says where `in_ds_order` has put a row, in each half of a work item."""
    rows = torch.arange(64).expand(16, 64)
    kept = rows.reshape(16, 2, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(16, 64)  # as `in_ds_order`
    row_of = on_host(rows_sm90.row_in_ds_order, 0, 1)
    assert [row_of(place) for place in range(128)] == [*kept[0].tolist(), *(kept[0] + 64).tolist()]


@pytest.mark.parametrize("segment", [256, 4096])
def test_segments_take_every_entry_once(segment):
    """Bins of more than two segments are cut between work items; both kernels cut them alike."""
    torch.manual_seed(segment)
    lengths = (torch.rand(40).pow(4) * 20 * segment).long()
    pointer = [0, *lengths.cumsum(0).tolist()]
    language = SimpleNamespace(
        where=lambda condition, a, b: Number(a if condition else b),
        maximum=lambda a, b: Number(max(a, b)),
        load=load,
        int64=0,
    )
    portable = FunctionType(segments.segment_bounds.fn.__code__, {"tl": language, "CUT_ROWS": 128})
    hopper = FunctionType(rows_sm90.unit_bounds.fn.__code__, {"gl": language, "CUT_ROWS": 128})
    long = {c: b for b in range(40) for c in range(pointer[-1] // segment + 1)
            if pointer[b] < c * segment < pointer[b + 1] and lengths[b] > 2 * segment}  # fmt: skip
    segment_bin = [long.get(c, -1) for c in range(pointer[-1] // segment + 1)]
    taken = []
    pointers = [Pointer(x) for x in (pointer, segment_bin, [0] * 40, [512] * 40)]
    for unit in range(40 + len(segment_bin)):
        bin_, before, begin, count, first_key, _ = hopper(unit, *pointers, 40, 40, 0, segment)
        if first_key < 0:
            continue
        assert before % 128 == 0
        assert begin == pointer[bin_] + before
        if unit >= 40:
            assert (begin, begin + count) == portable(pointer[bin_], pointer[bin_ + 1], unit - 40, segment)
            assert count > 0
        taken += range(begin, begin + count)
    assert sorted(taken) == list(range(pointer[-1]))


@pytest.mark.parametrize("at_once", [1, 2, 4, 16])
@pytest.mark.parametrize(("heads", "group"), [(1, 3), (2, 1), (3, 2), (5, 1), (17, 1)])
def test_every_work_item_has_one_program(heads, group, at_once):
    torch.manual_seed(heads)
    tokens, n_blocks, topk = 500, 5, 3
    order = torch.rand(heads * group, tokens, n_blocks).argsort(2)[:, :, :topk]
    selected = torch.where(torch.rand(order.shape) < 0.2, -1, order)
    selected[:group] = 0  # one long bin, and a head without any others
    lists = make_lists(selected, n_blocks, heads, 512)
    n_items = lists.item_bin.numel()
    per_head = sm90.programs_per_head(lists.shape, tokens)
    programs = heads * per_head if at_once > 1 else n_items
    pointers = [Pointer(x.tolist()) for x in (lists.item_bin, lists.item_start, lists.item_end, lists.pointer)]
    found = []
    for program in range(programs):
        item = on_host(stream_rows_sm90._item, program, programs)
        bin_, begin, count = item(*pointers, n_blocks, per_head, n_items, at_once, lists.shape.rows_per_item)
        if bin_ >= 0:
            found.append((bin_, begin, begin + count))
    used = [item for item in zip(*(p.values for p in pointers[:3]), strict=True) if item[0] >= 0]
    assert sorted(found) == used
    assert len(used) > heads * n_blocks
    if at_once == 1:
        assert found == used
    # The heads that take turns begin together, each with the first item of its first bin.
    firsts = [h * n_blocks for h in range(min(at_once, heads))]
    firsts = [b for b in firsts if lists.pointer[b + 1] > lists.pointer[b]]
    assert [bin_ for bin_, _, _ in found[: len(firsts)]] == firsts
