"""Backward of block attention with large blocks on a Hopper GPU, where dq is summed over tiles of keys: `DqPartials.sums`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moba_cp.kernels import backward, lists, merge, sizes, triton_backend
from moba_cp.kernels.backward import segments
from moba_cp.kernels.types import DqPartials, KVPart
from tests.kernels.backward_cases import Case, expected, make_case, relative
from tests.kernels.interpreter import gpu
from tests.kernels.test_backward import run

pytestmark = gpu
CASES = {
    "block 1024": {"lengths": [5000, 1025], "block_size": 1024, "topk": 3, "q_heads": 4, "kv_heads": 4},
    "block 1024, group": {"lengths": [5000, 90, 1], "block_size": 1024, "topk": 3, "q_heads": 4, "kv_heads": 1},
    "block 640, 3 kv heads": {"lengths": [4000], "block_size": 640, "topk": 3, "q_heads": 6, "kv_heads": 3},
    "block 4096": {"lengths": [9000, 300], "block_size": 4096, "topk": 2, "q_heads": 2, "kv_heads": 1},
    "block 8192": {"lengths": [20000], "block_size": 8192, "topk": 2, "q_heads": 2, "kv_heads": 2},
    "fetched pairs": {"lengths": [5000], "block_size": 1024, "topk": 3, "kv_heads": 2, "fetched": True},
    "strided": {"lengths": [4000], "block_size": 1024, "topk": 3, "kv_heads": 2, "strided": True},
    "blocks nobody wants": {"lengths": [7000], "block_size": 1024, "topk": 2, "cold": True},
    "hot block": {"lengths": [80000], "block_size": 1024, "topk": 2, "hot": True},
}


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def make(name: str, dtype: torch.dtype = torch.bfloat16, **more) -> Case:
    return make_case(**CASES[name], dim=128, dtype=dtype, device="cuda", **more)


def poisoned(case: Case, *, accumulate: bool = False) -> tuple[DqPartials, Tensor, Tensor]:
    """Partial dq, dk and dv that hold NaN and places far outside; or ones in dk and dv, to be added to."""
    partials = triton_backend.new_dq_partials(case.selected, case.lists, case.q, case.dout)
    assert partials.sums
    assert partials.place is not None
    partials.dq.fill_(float("nan"))
    partials.place.fill_(1 << 30)
    value = 1.0 if accumulate else float("nan")
    dk, dv = (torch.full(x.shape, value, device="cuda") for x in (case.part.k, case.part.v))
    return partials, dk, dv


def launch(case: Case, partials: DqPartials, dk: Tensor, dv: Tensor, *, accumulate: bool = False) -> None:
    backward.attend_backward(
        case.part, case.lists, case.rows, q=case.q, dout=case.dout, lse=case.lse, delta=case.delta, scale=case.scale,
        dk=dk, dv=dv, dq_partials=partials, accumulate=accumulate,
    )  # fmt: skip


def merged(case: Case, partials: DqPartials) -> Tensor:
    dq = torch.full_like(case.q, float("nan"))
    merge.merge_dq(partials, selected=case.selected, dq=dq)
    return dq


def summed(case: Case, *, accumulate: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and dq."""
    partials, dk, dv = poisoned(case, accumulate=accumulate)
    launch(case, partials, dk, dv, accumulate=accumulate)
    return dk, dv, merged(case, partials)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_torch_and_the_two_kernels(name, dtype):
    """dk and dv have the bits of `dkdv_kernel`, which adds the same products; dq is plain torch's to the rounding of P and dS
    to `dtype`, and but for 2 % no further from it than that of `dq_kernel`, which rounds each slot's as well."""
    case = make(name, dtype)
    if name == "hot block":
        assert segments.segment_count(len(case.rows), case.lists.shape)
    for accumulate in (False, True):
        dk, dv, dq = summed(case, accumulate=accumulate)
        other_dk, other_dv, in_slots = run(case, variant="sm90", accumulate=accumulate)
        assert torch.equal(dk.nan_to_num(7.0), other_dk.nan_to_num(7.0))
        assert torch.equal(dv.nan_to_num(7.0), other_dv.nan_to_num(7.0))
        right = expected(case)[2].masked_fill((case.selected < 0)[..., None], 0.0).sum(2).transpose(0, 1)
        error = relative(dq, right)
        assert error < (4e-3 if dtype == torch.bfloat16 else 1e-3)
        assert error < 1.02 * relative(merged(case, DqPartials(in_slots)), right)


@pytest.mark.parametrize("name", ["block 640, 3 kv heads", "block 4096", "hot block"])
def test_same_bits_every_time_and_however_bins_are_cut(name, monkeypatch):
    """Programs of a block's tiles add in order of the tiles, whichever runs first, and whichever rows a program has. Kv heads
    take turns in short calls; rows of 0 bytes at once stand for a long one."""
    case = make(name)
    first = summed(case)
    for _ in range(20):
        for x, y in zip(first, summed(case), strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 1)
    monkeypatch.setattr(sizes, "ROWS_AT_ONCE", 0)
    assert torch.equal(first[2], summed(case)[2])


@pytest.mark.parametrize("units", [1, 3, 64])
def test_units_in_turns_change_no_bit(units, monkeypatch):
    case = make("block 640, 3 kv heads")
    first = summed(case)
    monkeypatch.setattr("moba_cp.kernels.backward.sm90.units_at_once", lambda entries, n_bins: units)
    for x, y in zip(first, summed(case), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["block 1024, group", "block 640, 3 kv heads"])
def test_parts_give_the_bits_of_the_whole(name):
    """Each block is in one of two parts. The sums of blocks that a part does not hold stay as they are."""
    case = make(name)
    whole = summed(case)
    partials, dk, dv = poisoned(case)
    number = torch.arange(case.part.start.numel(), device="cuda").view(case.part.start.shape)
    for part in range(2):
        start = case.part.start.masked_fill(number % 3 % 2 != part, -1)
        of_part = replace(case, part=KVPart(case.part.k, case.part.v, start, case.part.length))
        launch(of_part, partials, dk, dv)
    for x, y in zip(whole, (dk, dv, merged(case, partials)), strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def test_dq_does_not_depend_on_the_other_rows():
    case = make("block 1024")
    whole = summed(case)[2]
    chunk = slice(701, 4345)
    selected, shape = case.selected[:, chunk], case.lists.shape
    route = lists.route(selected, n_blocks=shape.n_blocks, kv_heads=shape.kv_heads, block_size=shape.block_size)
    part = replace(
        case, q=case.q[chunk], dout=case.dout[chunk], lse=case.lse[:, chunk], delta=case.delta[:, chunk], lists=route,
        rows=case.rows.slice(chunk.start, chunk.stop), selected=selected,
    )  # fmt: skip
    assert torch.equal(summed(part)[2], whole[chunk])


@pytest.mark.parametrize("topk", [1, 3])
def test_no_rows_give_zeros(topk):
    case = make_case([3000], 1024, topk, q_heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16, device="cuda")
    none, shape = slice(300, 300), case.lists.shape
    selected = case.selected[:, none]
    route = lists.route(selected, n_blocks=shape.n_blocks, kv_heads=2, block_size=1024)
    empty = replace(
        case, q=case.q[none], dout=case.dout[none], lse=case.lse[:, none], delta=case.delta[:, none], lists=route,
        rows=case.rows.slice(300, 300), selected=selected,
    )  # fmt: skip
    dk, dv, dq = summed(empty)
    assert not dk.any()
    assert not dv.any()
    assert dq.numel() == 0


def test_sums_that_are_too_few_are_refused():
    case = make("block 1024")
    partials, dk, dv = poisoned(case)
    with pytest.raises(ValueError, match=r"sums of dq need \(\d+, 8192\), got \(\d+, 8192\)"):
        launch(case, replace(partials, dq=partials.dq[1:]), dk, dv)
