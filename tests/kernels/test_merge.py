"""`merge` and `merge_dq` in Triton equal plain torch's, do not read unselected slots, and write with any strides."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels import interpreter

merge = pytest.importorskip("moba_cp.kernels.merge")
from moba_cp.kernels import torch_backend  # noqa: E402
from moba_cp.kernels.types import DqPartials, Partials  # noqa: E402
from tests.kernels.forward_cases import relative  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"
NAN = float("nan")


def test_in_interpreter():
    interpreter.run_module(__file__)


def make_partials(tokens, q_heads, topk, dim, dtype, selected_dtype=torch.int16, seed=0):
    """Partials with NaN in unselected slots and widely different log-sum-exps; `selected` is a view of a chunk."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, device=DEVICE, generator=generator)  # noqa: E731
    out, lse = draw(q_heads, tokens, topk, dim).to(dtype), 20 * draw(q_heads, tokens, topk)
    number = torch.arange(topk, device=DEVICE)
    missing = torch.randint(0, topk, (q_heads + 1, tokens + 5, 1), device=DEVICE, generator=generator)
    selected = torch.where(number < missing, -1, number).to(selected_dtype)[1:, 2 : tokens + 2]
    out[selected < 0] = NAN
    lse[selected < 0] = NAN
    return Partials(out, lse), selected


def strided(tokens, heads, dim, dtype):
    """A view `[T, H, D]` of a larger tensor of NaN, and that tensor."""
    whole = torch.full((tokens + 2, heads + 1, dim + 8), NAN, dtype=dtype, device=DEVICE)
    return whole[1 : tokens + 1, :heads, :dim], whole


def check_merge(tokens, q_heads, topk, dim, dtype, tolerance, selected_dtype=torch.int16):
    partials, selected = make_partials(tokens, q_heads, topk, dim, dtype, selected_dtype)
    out, whole = strided(tokens, q_heads, dim, dtype)
    lse = torch.full((q_heads, tokens + 7), NAN, device=DEVICE)
    merge.merge(partials, selected=selected, out=out, lse=lse[:, 3 : tokens + 3])
    expected_out, expected_lse = (
        torch.empty(tokens, q_heads, dim, device=DEVICE),
        torch.empty(q_heads, tokens, device=DEVICE),
    )
    natural = Partials(partials.out.float(), partials.lse / math.log2(math.e))
    torch_backend.merge(natural, selected=selected, out=expected_out, lse=expected_lse)
    assert relative(out, expected_out) < tolerance
    assert relative(lse[:, 3 : tokens + 3], expected_lse * math.log2(math.e)) < 1e-6
    assert int(whole.isnan().sum()) == whole.numel() - out.numel()
    assert int(lse.isnan().sum()) == 7 * q_heads


def check_merge_dq(tokens, q_heads, topk, dim, dtype, tolerance, selected_dtype=torch.int16):
    partials, selected = make_partials(tokens, q_heads, topk, dim, dtype, selected_dtype)
    dq, whole = strided(tokens, q_heads, dim, dtype)
    merge.merge_dq(DqPartials(partials.out), selected=selected, dq=dq)
    expected = torch.empty(tokens, q_heads, dim, device=DEVICE)
    torch_backend.merge_dq(DqPartials(partials.out.float()), selected=selected, dq=expected)
    assert relative(dq, expected) < tolerance
    assert int(whole.isnan().sum()) == whole.numel() - dq.numel()


@interpreter.interpreted
def test_partial_dq_at_places():
    """Partials elsewhere in memory, in any order, give the bits of those in their slots; other places hold NaN."""
    partials, selected = make_partials(40, 2, 3, 24, torch.float32)
    memory = torch.full((400, 24), NAN, device=DEVICE)
    place = torch.randperm(400, device=DEVICE)[: selected.numel()].view(selected.shape)
    memory[place] = partials.out
    place = place.masked_fill(selected < 0, 1 << 30).int()  # never read
    expected, dq = (torch.full((40, 2, 24), NAN, device=DEVICE) for _ in range(2))
    merge.merge_dq(DqPartials(partials.out), selected=selected, dq=expected)
    merge.merge_dq(DqPartials(memory, place), selected=selected, dq=dq)
    assert not dq.isnan().any()
    assert torch.equal(dq, expected)


@interpreter.interpreted
def test_sums_of_dq():
    """fp32 sums in any tiles, in their order of rows and columns, give the bits of fp32 partials in slots. Others hold NaN."""
    partials, selected = make_partials(40, 2, 3, 128, torch.float32)
    rows = torch.full((6 * 64, 128), NAN, device=DEVICE)
    place = torch.randperm(len(rows), device=DEVICE)[: selected.numel()].view(selected.shape)
    rows[place] = partials.out
    # Of a tile's rows and columns: warp, half of its rows, row; half of the columns, sixteen of them, and 8 + 2 * q + c in these.
    sums = rows.view(6, 4, 2, 8, 2, 4, 2, 4, 2).permute(0, 4, 1, 2, 5, 3, 7, 6, 8).reshape(6, 8192)
    place = place.masked_fill(selected < 0, 1 << 30).int()  # never read
    expected, dq = (torch.full((40, 2, 128), NAN, device=DEVICE) for _ in range(2))
    merge.merge_dq(DqPartials(partials.out), selected=selected, dq=expected)
    merge.merge_dq(DqPartials(sums, place, sums=True), selected=selected, dq=dq)
    assert not dq.isnan().any()
    assert torch.equal(dq, expected)


SHAPES = {"one row": (1, 1, 1, 16), "several tiles": (150, 2, 5, 24), "wide": (9, 3, 2, 256)}


@interpreter.interpreted
@pytest.mark.parametrize("selected_dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("check", [check_merge, check_merge_dq])
@pytest.mark.parametrize("name", SHAPES)
def test_small(check, name, selected_dtype):
    check(*SHAPES[name], torch.float32, 1e-6, selected_dtype)


@interpreter.interpreted
def test_no_rows():
    partials, selected = make_partials(4, 2, 3, 16, torch.float32)
    none = slice(0, 0)
    empty = Partials(partials.out[:, none], partials.lse[:, none])
    merge.merge(empty, selected=selected[:, none], out=torch.empty(0, 2, 16), lse=torch.empty(2, 0))
    merge.merge_dq(DqPartials(empty.out), selected=selected[:, none], dq=torch.empty(0, 2, 16))


@interpreter.interpreted
def test_nan_stays_in_its_row():
    partials, selected = make_partials(40, 1, 3, 16, torch.float32)
    partials.out[0, 7, 2, 3] = NAN
    partials.lse[0, 9, 2] = NAN
    out, lse = torch.empty(40, 1, 16), torch.empty(1, 40)
    merge.merge(partials, selected=selected, out=out, lse=lse)
    assert out.isnan().any(-1).nonzero()[:, 0].tolist() == [7, 9]
    assert lse.isnan().nonzero()[:, 1].tolist() == [9]


@pytest.mark.gpu
@pytest.mark.skipif(interpreter.ACTIVE, reason="compiled kernels")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("check", [check_merge, check_merge_dq])
    @pytest.mark.parametrize(
        "shape", [(3001, 4, 8, 128), (777, 2, 12, 96), (500, 3, 3, 64), (100, 1, 40, 256), (99, 2, 1, 192)]
    )
    def test_merge(self, check, shape, dtype):
        check(*shape, dtype, 5e-3)

    def test_twenty_runs_and_chunks(self):
        partials, selected = make_partials(5000, 2, 8, 128, torch.bfloat16)
        out, lse = torch.empty(5000, 2, 128, device=DEVICE), torch.empty(2, 5000, device=DEVICE)
        merge.merge(partials, selected=selected, out=out, lse=lse)
        for begin in range(0, 2000, 100):
            rows = slice(begin, begin + 3000)
            some = Partials(partials.out[:, rows].contiguous(), partials.lse[:, rows].contiguous())
            out_2, lse_2 = torch.empty(3000, 2, 128, device=DEVICE), torch.empty(2, 3000, device=DEVICE)
            merge.merge(some, selected=selected[:, rows], out=out_2, lse=lse_2)
            assert torch.equal(out[rows], out_2)
            assert torch.equal(lse[:, rows], lse_2)
