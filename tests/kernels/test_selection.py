"""A caller's selection is placed alike by both backends, and what comes out is always readable."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import interpreter

selection = pytest.importorskip("moba_cp.kernels.selection")
from moba_cp.kernels import torch_backend  # noqa: E402
from moba_cp.kernels.types import query_rows  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"


def test_in_interpreter():
    interpreter.run_module(__file__)


def check(heads, tokens, count, slots, n_blocks, dtype, wild):
    """`wild`: numbers from far outside to far inside, so that every rule is broken by some row."""
    generator = torch.Generator().manual_seed(tokens + count)
    block = torch.randint(n_blocks, (tokens,), generator=generator)
    first = torch.minimum(block, torch.randint(max(n_blocks // 2, 1), (tokens,), generator=generator))
    rows = query_rows(block.numpy(), first.numpy(), torch.zeros(tokens, dtype=torch.int64).numpy(), DEVICE)
    last = block - first
    if wild:
        listed = torch.randint(-3, n_blocks + 3, (heads, tokens, count), generator=generator).to(dtype)
        if tokens:
            listed[:, tokens // 2] = torch.iinfo(dtype).max
            listed[:, tokens // 3] = torch.iinfo(dtype).min
    else:
        scores = torch.rand(heads, tokens, max(n_blocks, count), generator=generator)
        scores.masked_fill_(torch.arange(scores.shape[2]) > last[:, None], 2.0)
        best = scores.topk(count, 2, largest=False)
        listed = torch.where(best.values < 2.0, best.indices, -1)
        # Of `count` blocks one is the own block, so that the others fit `slots - 1`.
        listed = torch.where((listed == last[:, None]).any(2)[:, :, None] | (count < slots), listed, -1).to(dtype)
    strided = torch.full((tokens, heads, count + 1), 7, dtype=dtype)
    strided[:, :, 1:] = listed.transpose(0, 1)
    listed = strided[:, :, 1:].transpose(0, 1).to(DEVICE)
    actual, faults = selection.place_selection(listed, rows=rows, n_blocks=n_blocks, slots=slots)
    expected, expected_faults = torch_backend.place_selection(listed, rows=rows, n_blocks=n_blocks, slots=slots)
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype
    assert int(faults) == int(expected_faults)
    assert (int(faults) > 0) == (wild and tokens > 0)
    assert torch.equal(actual[:, :, -1].long(), rows.block.long().expand(heads, -1))
    earlier = actual[:, :, :-1].long()
    own, first = rows.block[:, None].long(), rows.first_block[:, None].long()
    assert bool(((earlier == -1) | ((earlier >= first) & (earlier < own))).all())
    assert bool(((earlier[:, :, 1:] > earlier[:, :, :-1]) | (earlier[:, :, :-1] == -1)).all())  # ascending, distinct
    if not wild:
        for head, row in ((0, 0), (heads - 1, tokens - 1)):
            wanted = {int(n) for n in listed[head, row]} - {-1, int(rows.block[row] - rows.first_block[row])}
            assert {int(n) for n in earlier[head, row]} - {-1} == {n + int(rows.first_block[row]) for n in wanted}


SIZES = [
    # heads, tokens, listed, slots, blocks, dtype
    (2, 17, 3, 4, 9, torch.int32),
    (1, 20, 4, 4, 30, torch.int64),
    (3, 11, 1, 2, 5, torch.int16),
    (1, 9, 7, 2, 40000, torch.int32),
    (2, 5, 3, 1, 3, torch.int64),
    (1, 140, 5, 8, 20, torch.int64),
]


@interpreter.interpreted
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small(sizes, wild):
    if not wild and sizes[2] > sizes[3]:
        pytest.skip("lists more than fit")
    check(*sizes, wild)


@interpreter.interpreted
def test_no_rows_and_long_rows():
    check(2, 0, 3, 4, 9, torch.int32, True)
    check(1, 3, 200, 256, 300, torch.int32, False)


class TestGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("wild", [False, True])
    @pytest.mark.parametrize(
        "sizes", [*SIZES, (8, 5000, 16, 16, 300, torch.int32), (2, 4096, 100, 128, 8192, torch.int64)], ids=str
    )
    def test_equals_torch(self, sizes, wild):
        if not wild and sizes[2] > sizes[3]:
            pytest.skip("lists more than fit")
        check(*sizes, wild)
