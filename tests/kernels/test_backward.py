"""Backward of block attention, portable kernels: results equal plain torch's, and nothing else is written."""

import math

import pytest
import torch

from moba_cp.kernels import backward, configs, lists, torch_backend
from moba_cp.kernels.backward import segments
from moba_cp.kernels.gpu import Gpu
from moba_cp.kernels.types import DqPartials, ListShape
from tests.kernels.backward_cases import Case, expected, held_rows, make_case, relative, written_slots
from tests.kernels.interpreter import ACTIVE, gpu, interpreted, run_module

# P, dS and stored partials are rounded to the inputs' dtype. With fp32 inputs (interpreter only) the order of sums differs.
# The interpreter truncates to bf16 where the GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2 if ACTIVE else 4e-3, torch.float16: 1e-3}


def test_in_interpreter():
    run_module(__file__)


def run(case: Case, *, accumulate=False, gradient=torch.float32, variant="portable"):
    """dk, dv and partial dq of the kernels, in buffers filled with NaN; with `accumulate` dk and dv with ones."""
    fill = 1.0 if accumulate else float("nan")
    part = case.part
    dk, dv = (torch.full((x.shape[0], x.shape[1], x.shape[2] + 8), fill, device=x.device) for x in (part.k, part.v))
    dk, dv = (x.to(gradient)[:, :, : y.shape[2]] for x, y in zip((dk, dv), (part.k, part.v)))
    dq = torch.full((*case.selected.shape, case.q.shape[2]), float("nan"), device=case.q.device, dtype=case.q.dtype)
    backward.attend_backward(
        part, case.lists, case.rows, q=case.q, dout=case.dout, lse=case.lse, delta=case.delta, scale=case.scale,
        dk=dk, dv=dv, dq_partials=DqPartials(dq), accumulate=accumulate, variant=variant,
    )  # fmt: skip
    return dk, dv, dq


def check(case: Case, *, accumulate=False, gradient=torch.float32, variant="portable", tolerance=None):
    """The kernels' results equal torch's, and elements that they must not write are unchanged."""
    got = run(case, accumulate=accumulate, gradient=gradient, variant=variant)
    want = expected(case)
    held, slots = held_rows(case), written_slots(case)
    tolerance = tolerance or TOLERANCE[case.q.dtype]
    for name, x, y, written in zip(("dk", "dv", "dq"), got, want, (held, held, slots)):
        untouched = x[~written]
        start = 1 if accumulate and name != "dq" else 0
        assert (untouched == 1).all() if start else untouched.isnan().all(), f"{name} written outside"
        assert not x[written].isnan().any(), f"{name} not written"
        if written.any():
            assert relative(x[written], y[written] + start) < tolerance, name
    return got


CASES = {
    "packed documents, short last blocks": {"lengths": [70, 33, 1, 16], "block_size": 16, "topk": 3},
    "odd block size": {"lengths": [170, 90], "block_size": 48, "topk": 2, "q_heads": 4, "kv_heads": 2},
    "two key tiles a block": {"lengths": [300], "block_size": 160, "topk": 2},
    "head sizes that are no powers of two, Dv != D": {
        "lengths": [90],
        "block_size": 32,
        "topk": 3,
        "dim": 96,
        "value_dim": 80,
    },
    "D = 192, Dv = 128": {"lengths": [130], "block_size": 100, "topk": 2, "dim": 192, "value_dim": 128},
    "pairs the part lacks": {
        "lengths": [100, 60],
        "block_size": 32,
        "topk": 4,
        "q_heads": 4,
        "kv_heads": 2,
        "absent": True,
    },
    "fetched pairs": {
        "lengths": [100, 60],
        "block_size": 32,
        "topk": 4,
        "q_heads": 6,
        "kv_heads": 2,
        "fetched": True,
        "absent": True,
    },
    "blocks nobody wants": {"lengths": [200], "block_size": 32, "topk": 2, "cold": True, "q_heads": 1},
    "topk beyond the blocks": {"lengths": [64], "block_size": 32, "topk": 9},
    "topk 1": {"lengths": [64], "block_size": 32, "topk": 1},
    "strided inputs": {
        "lengths": [150],
        "block_size": 160,
        "topk": 2,
        "q_heads": 2,
        "kv_heads": 2,
        "strided": True,
        "scale": 0.3,
    },
    "one token": {"lengths": [1], "block_size": 16, "topk": 2},
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_matches_torch(name):
    check(make_case(**CASES[name]))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_in_the_keys_dtype(dtype):
    check(make_case([140], 32, 3, dtype=dtype), gradient=dtype)


@interpreted
def test_accumulates():
    check(make_case([90, 50], 32, 3, absent=True), accumulate=True)


@interpreted
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("block_size", [16, 160])
def test_hot_bins_are_cut_and_summed(monkeypatch, block_size, accumulate):
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 1)
    # Blocks of 160 keys are two tiles. Interpreting them is slow, so only blocks of 16 have several kv heads and many bins.
    tokens, q_heads, kv_heads = (112, 4, 2) if block_size == 16 else (560, 2, 1)
    case = make_case([tokens], block_size, 3, q_heads=q_heads, kv_heads=kv_heads, hot=True)
    n_segments = segments.segment_count(len(case.rows), case.lists.shape)
    assert n_segments
    cut = segments.find_segments(case.lists.pointer, n_segments, block_size)
    count = case.lists.pointer.diff()
    assert set(cut[cut >= 0].tolist()) == set((count > 2 * block_size).nonzero()[:, 0].tolist())
    got = check(case, accumulate=accumulate)
    # dq does not depend on how a bin is cut.
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 1000)
    assert torch.equal(got[2].nan_to_num(), run(case)[2].nan_to_num())


@interpreted
def test_dq_does_not_depend_on_the_other_rows():
    case = make_case([220], 160, 2, q_heads=2)
    _, _, whole = run(case)
    chunk = slice(37, 150)
    rows = case.rows.slice(chunk.start, chunk.stop)
    selected = case.selected[:, chunk]
    dq = torch.full((*selected.shape, 64), float("nan"))
    route = lists.route(selected, n_blocks=case.lists.shape.n_blocks, kv_heads=1, block_size=160)
    dk, dv = (torch.empty_like(x) for x in (case.part.k, case.part.v))
    backward.attend_backward(
        case.part, route, rows, q=case.q[chunk], dout=case.dout[chunk], lse=case.lse[:, chunk],
        delta=case.delta[:, chunk], scale=case.scale, dk=dk, dv=dv, dq_partials=DqPartials(dq), accumulate=False,
        variant="portable",
    )  # fmt: skip
    assert torch.equal(dq.nan_to_num(), whole[:, chunk].nan_to_num())


@interpreted
def test_no_rows():
    case = make_case([40], 16, 2)
    none = slice(0, 0)
    selected, rows = case.selected[:, none], case.rows.slice(0, 0)
    route = lists.route(selected, n_blocks=case.lists.shape.n_blocks, kv_heads=1, block_size=16)
    dk, dv = (torch.full_like(x, float("nan")) for x in (case.part.k, case.part.v))
    dq = DqPartials(torch.empty(*selected.shape, 64))
    backward.attend_backward(
        case.part, route, rows, q=case.q[none], dout=case.dout[none], lse=case.lse[:, none], delta=case.delta[:, none],
        scale=case.scale, dk=dk, dv=dv, dq_partials=dq, accumulate=False, variant="portable",
    )  # fmt: skip
    assert not dk.any()
    assert not dv.any()


@interpreted
def test_delta():
    out, dout = torch.randn(70, 4, 112)[:, :3, :96], torch.randn(70, 3, 96)
    want = torch_backend.delta(out=out, dout=dout)
    torch.testing.assert_close(backward.delta(out=out, dout=dout), want, rtol=1e-5, atol=1e-5)
    assert backward.delta(out=out[:0], dout=dout[:0]).shape == (3, 0)


def test_delta_refuses_other_strides():
    """Before a launch, so that this needs no GPU."""
    out, apart = torch.zeros(5, 2, 16), torch.zeros(5, 16, 2).transpose(1, 2)
    for given in ({"out": apart, "dout": out}, {"out": out, "dout": apart}):
        with pytest.raises(ValueError, match=r"unit stride in the last dimension, got .*\(32, 1, 2\)"):
            backward.delta(**given)


def test_tiles_never_depend_on_rows_and_cover_blocks():
    for block_size in (16, 48, 64, 100, 128, 512, 4096):
        for dim, value_dim in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256)):
            for shared in (99 << 10, 163 << 10, 227 << 10):
                config = configs.backward(dim, value_dim, block_size, Gpu((9, 0), shared))
                assert config.dq is not None or config.dkdv.keys >= block_size
                tiles = [tile for tile in (config.dkdv, config.dq) if tile is not None]
                assert min(size for tile in tiles for size in (tile.keys, tile.rows)) >= 16


def test_buffer_for_segments_is_bounded():
    """At most an eighth of the bf16 dq partials, and none where no bin can be long."""
    for block_size in (128, 512, 4096):
        tokens, heads, topk, dim = 1 << 19, 16, 8, 128
        count = segments.segment_count(tokens, shape_of(heads, topk, block_size))
        dq_bytes = tokens * heads * topk * dim * 2
        assert (count - 1) * block_size * 2 * dim * 4 <= dq_bytes / 8
    assert segments.segment_count(8192, shape_of(16, 8, 128)) == 0


def shape_of(heads: int, topk: int, block_size: int) -> ListShape:
    """Lists with one q head per kv head."""
    return ListShape(heads, 1, 0, block_size, topk, 0, 0, 0)


def test_unknown_variant():
    case = make_case([40], 16, 2)
    with pytest.raises(ValueError, match="fastest"):
        run(case, variant="fastest")


GPU_CASES = CASES | {
    "block 128": {"lengths": [3000, 1, 77], "block_size": 128, "topk": 4, "q_heads": 4, "kv_heads": 2, "dim": 128},
    "block 512": {"lengths": [5000, 513], "block_size": 512, "topk": 3, "q_heads": 4, "kv_heads": 4, "dim": 128},
    "block 64, D 256": {"lengths": [1000], "block_size": 64, "topk": 3, "dim": 256},
    "block 512, D 192, Dv 128": {"lengths": [3000], "block_size": 512, "topk": 3, "dim": 192, "value_dim": 128},
    "block 512, D 256": {"lengths": [2000], "block_size": 512, "topk": 2, "dim": 256},
    "block 2048, D 96": {"lengths": [9000], "block_size": 2048, "topk": 3, "dim": 96, "q_heads": 8, "kv_heads": 2},
    "hot block": {"lengths": [20000], "block_size": 64, "topk": 3, "hot": True, "q_heads": 2, "kv_heads": 1},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
class TestGPU:
    pytestmark = gpu

    def test_matches_torch(self, name, dtype):
        case = make_case(**GPU_CASES[name], dtype=dtype, device="cuda")
        if name == "hot block":
            assert segments.segment_count(len(case.rows), case.lists.shape)
        first = check(case)
        check(case, accumulate=True)
        again = run(case)
        for x, y in zip(first, again):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), "not the same bits again"


class TestDelta:
    pytestmark = gpu

    def test_delta(self):
        out, dout = (torch.randn(5000, 6, 144, device="cuda", dtype=torch.bfloat16)[:, :5, :128] for _ in range(2))
        want = torch_backend.delta(out=out, dout=dout)
        torch.testing.assert_close(backward.delta(out=out, dout=dout), want, rtol=1e-5, atol=math.sqrt(128) * 1e-5)
