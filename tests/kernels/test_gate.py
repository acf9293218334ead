"""`select_blocks` of the Triton backend equals the torch backend's on every row, for any rows, scores and ties.

Where equality must be exact, q and centroids are small integers: every order of summation gives the same fp32 score.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernels import interpreter

gate = pytest.importorskip("moba_cp.kernels.gate")
from moba_cp.kernels import configs, gate_exact, query_rows, torch_backend  # noqa: E402
from moba_cp.kernels.types import selection_dtype  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"
NAN, INF = float("nan"), float("inf")


def test_in_interpreter():
    interpreter.run_module(__file__)


def configure(monkeypatch, **changes):
    """Change fields of the gate's configuration."""
    original = configs.gate
    monkeypatch.setattr(configs, "gate", lambda *sizes: replace(original(*sizes), **changes))


def rows_of(block, first, device=DEVICE):
    """Rows with own blocks `block`, in documents whose first blocks are `first`. The gate ignores positions."""
    return query_rows(np.asarray(block), np.asarray(first), np.zeros(len(block)), device)


def packed_rows(lengths, block_size, order=None):
    """Rows of documents of `lengths` tokens, and the number of blocks."""
    block, first, blocks = [], [], 0
    for length in lengths:
        block += [blocks + t // block_size for t in range(length)]
        first += [blocks] * length
        blocks += -(-length // block_size)
    block, first = np.array(block), np.array(first)
    if order is not None:
        block, first = block[order], first[order]
    return rows_of(block, first), blocks


def inputs(tokens, q_heads, kv_heads, n_blocks, dim, seed=0, dtype=torch.bfloat16, spread=3, strided=False):
    """Integers in `[-spread, spread]`: exact scores and many ties."""
    generator = torch.Generator().manual_seed(seed)
    extra = 8 if strided else 0
    q = torch.randint(-spread, spread + 1, (tokens, q_heads + (extra > 0), dim + extra), generator=generator)
    c = torch.randint(-spread, spread + 1, (n_blocks, kv_heads + (extra > 0), dim + extra), generator=generator)
    q, c = q.to(DEVICE, dtype), c.to(DEVICE, dtype)
    return q[:, :q_heads, :dim], c[:, :kv_heads, :dim]


def assert_equal(q, c, rows, topk):
    expected = torch_backend.select_blocks(q, centroids=c, rows=rows, topk=topk)
    actual = gate.select_blocks(q, centroids=c, rows=rows, topk=topk)
    assert actual.dtype == selection_dtype(len(c))
    assert actual.shape == expected.shape
    wrong = (actual != expected).any(2).nonzero()
    assert wrong.numel() == 0, (wrong[:5], expected[tuple(wrong[0])], actual[tuple(wrong[0])])
    return actual


def check_small(lengths, block_size, topk, heads=(2, 1), dim=16, order=None, **kwargs):
    rows, blocks = packed_rows(lengths, block_size, order)
    q, c = inputs(len(rows), *heads, blocks, dim, **kwargs)
    return assert_equal(q, c, rows, topk)


SMALL = {
    "one tile": {"lengths": [90], "block_size": 3, "topk": 4},
    "several tiles": {"lengths": [330], "block_size": 2, "topk": 3},
    "packed documents": {"lengths": [17, 0, 1, 120, 64, 40], "block_size": 2, "topk": 4},
    "topk 1": {"lengths": [50], "block_size": 4, "topk": 1},
    "topk 2": {"lengths": [130], "block_size": 2, "topk": 2},
    "all selected": {"lengths": [50], "block_size": 8, "topk": 9},
    "topk above 16": {"lengths": [64], "block_size": 2, "topk": 20, "heads": (1, 1)},
    "few distinct scores": {
        "lengths": [260],
        "block_size": 2,
        "topk": 5,
        "spread": 1,
        "dim": 2,
        "order": np.arange(1, 260, 5),
    },
    "all equal": {"lengths": [150], "block_size": 2, "topk": 4, "spread": 0},
    "fp16, odd D, grouped": {
        "lengths": [100],
        "block_size": 2,
        "topk": 4,
        "dtype": torch.float16,
        "dim": 24,
        "heads": (4, 2),
    },
    "strided": {"lengths": [100], "block_size": 3, "topk": 4, "strided": True},
}


@interpreter.interpreted
@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    check_small(**SMALL[name])


@interpreter.interpreted
@pytest.mark.parametrize("tma", [False, True])
def test_any_row_order(tma, monkeypatch):
    configure(monkeypatch, tma=tma)
    check_small([70, 30, 60], 2, 4, order=np.random.default_rng(0).permutation(160))


@interpreter.interpreted
@pytest.mark.parametrize("retry_depth", [0, 3, 4])
def test_rows_without_a_proof_are_tried_again(retry_depth, monkeypatch):
    configure(monkeypatch, depth=2, retry_depth=retry_depth)
    check_small([330], 2, 4, order=np.arange(1, 330, 6))  # the interpreter is slow: every sixth row
    check_small([40, 290], 2, 3, spread=1, dim=4, order=np.arange(1, 330, 6))


@interpreter.interpreted
def test_sorted_path(monkeypatch):
    monkeypatch.setattr(gate, "LIST_TOPK", 4)
    monkeypatch.setattr(gate_exact, "SCORES_BYTES", 8 * 50 * 70)
    check_small([20, 100], 2, 7)


@interpreter.interpreted
@pytest.mark.parametrize("stride", [16, 32])
def test_regularly_spaced_preferences_are_exact_and_proved(stride):
    assert listed(*regular_preferences(128, 640, stride), 8, exact=True) <= 128 * REGULAR_LISTED


@interpreter.interpreted
def test_documents_that_begin_inside_a_tile(monkeypatch):
    """Twice as many candidates as lanes, but in three tiles with different swizzles: lists of two keys may have dropped some."""
    configure(monkeypatch, depth=2)
    first = np.arange(128) % 32
    assert_equal(*inputs(128, 2, 1, 96, 16, spread=60), rows_of(first + 64, first), 8)


@interpreter.interpreted
@pytest.mark.parametrize("rest", [NAN, INF, 3e38, 0.5])
def test_centroids_of_no_candidates_may_hold_anything(rest):
    q, c = inputs(64, 1, 1, 200, 16, spread=60)
    c[150:] = rest
    assert_equal(q, c, rows_of(np.arange(64) + 85, np.zeros(64)), 8)


@interpreter.interpreted
def test_squares_that_underflow_bound_nothing():
    """Elements of 2^-75 have squares of 0, so the largest norm would be the one of an element of 2^-74."""
    signs = torch.randint(0, 2, (4, 1, 128), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    c = torch.randint(0, 2, (40, 1, 128), generator=torch.Generator().manual_seed(1)) * 2.0**-74 - 2.0**-75
    c[7], c[0] = signs[0] * 2.0**-75, 0
    c[0, 0, 0] = 2.0**-74
    q, c = (signs * 2.0**60).to(DEVICE, torch.bfloat16), c.to(DEVICE, torch.bfloat16)
    assert 7 in assert_equal(q, c, rows_of([39] * 4, [0] * 4), 3)[0, 0]


@interpreter.interpreted
def test_one_head_of_centroids_for_all():
    q, c = inputs(100, 4, 1, 60, 16)
    assert_equal(q, c.expand(-1, 2, -1), rows_of(np.arange(100) * 60 // 100, np.zeros(100)), 4)


@interpreter.interpreted
def test_special_scores():
    check_special(100, 50)


@interpreter.interpreted
def test_proof_redoes_few_rows():
    """The lanes prove nearly all rows with random scores, and none with equal scores."""
    rows, blocks = packed_rows([200], 2)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(200, 1, 16, generator=generator).to(DEVICE, torch.bfloat16)
    c = torch.randn(blocks, 1, 16, generator=generator).to(DEVICE, torch.bfloat16)
    assert listed(q, c, rows, 3) <= 10
    assert listed(q * 0, c, rows, 3) == int((rows.block >= 3).sum())


REGULAR_LISTED = 0.1
"""Bound on the share of rows of `regular_preferences` that are computed again with topk 8: three times the share for blocks in
random lanes, comb(7, 3) / 32^2. Without the swizzle the 7 preferred blocks share one lane, or two lanes of 3 keys: every row."""


def regular_preferences(tokens, n_blocks, stride):
    """q, centroids and rows late in one document; each row prefers blocks `stride` apart. Exact scores, few ties."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-60, 61, (tokens, 1, 16), generator=generator)
    c = torch.randint(-60, 61, (n_blocks, 1, 16), generator=generator)
    q[..., 0], c[..., 0], c[::stride, :, 0] = 240, -240, 0
    rows = rows_of(n_blocks - 1 - np.arange(tokens), np.zeros(tokens))
    return q.to(DEVICE, torch.bfloat16), c.to(DEVICE, torch.bfloat16), rows


def listed(q, c, rows, topk, exact=False):
    """Number of rows that `gate_kernel` does not prove at first. `exact`: every row is selected as by the torch backend."""
    counts = []
    zeros = torch.zeros

    def spy(*args, **kwargs):
        counts.append(zeros(*args, **kwargs))
        return counts[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate.torch, "zeros", spy)
        selected = gate.select_blocks(q, centroids=c, rows=rows, topk=topk)
    if exact:
        assert torch.equal(selected, torch_backend.select_blocks(q, centroids=c, rows=rows, topk=topk))
    return int(counts[0][: q.shape[1]].sum())


def check_special(tokens, n_blocks, topk=4):
    """NaN, infinities, zeros of both signs, denormals and large numbers, in centroids and queries."""
    values = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-38, -1e-38, 3e38, -3e38, 1.0, -1.0, 2.0, 65536.0]
    generator = torch.Generator().manual_seed(1)
    pick = torch.tensor(values)[torch.randint(len(values), (n_blocks, 2), generator=generator)]
    c = torch.zeros(n_blocks, 2, 16)
    c[:, :, 0] = pick
    c[:, 1].nan_to_num_(nan=-0.0, posinf=1.0, neginf=-1.0)
    q = torch.zeros(tokens, 4, 16)
    # Queries with one non-zero number: a score is one product; NaN times 0 is NaN as well.
    q[:, :, 0] = torch.tensor([1.0, -1.0, 1.0, 0.5])
    q[5, :, 3] = NAN
    q[7, :, 0] = INF
    rows = rows_of(np.arange(tokens) * n_blocks // tokens, np.zeros(tokens))
    assert_equal(q.to(DEVICE, torch.bfloat16), c.to(DEVICE, torch.bfloat16), rows, topk)


def test_no_rows():
    q, c = inputs(0, 2, 1, 40, 16)
    assert gate.select_blocks(q, centroids=c, rows=rows_of([], []), topk=3).shape == (2, 0, 3)


GPU = {
    "128, 8": {"lengths": [32768], "block_size": 128, "topk": 8, "heads": (4, 2), "dim": 128},
    "512, 8": {"lengths": [65536 + 77], "block_size": 512, "topk": 8, "heads": (2, 2), "dim": 128},
    "4096, 12": {"lengths": [131072 + 1], "block_size": 4096, "topk": 12, "heads": (2, 1), "dim": 128},
    "2048, 3": {"lengths": [32768], "block_size": 2048, "topk": 3, "heads": (4, 4), "dim": 128},
    "1500 blocks": {"lengths": [24000], "block_size": 16, "topk": 8, "heads": (2, 1), "dim": 128},
    "packed, 2400 blocks": {"lengths": [1, 700, 0, 20000, 333, 16, 9000, 8000], "block_size": 16, "topk": 8, "dim": 64},
    "topk 3": {"lengths": [5000], "block_size": 16, "topk": 3, "dim": 96},
    "topk 16": {"lengths": [9000], "block_size": 16, "topk": 16, "dim": 128},
    "topk 64": {"lengths": [5000], "block_size": 16, "topk": 64, "dim": 128},
    "topk 100": {"lengths": [5000, 3000], "block_size": 16, "topk": 100, "dim": 128},
    "topk of all blocks": {"lengths": [5000], "block_size": 48, "topk": 105, "dim": 128},
    "D 192": {"lengths": [9000], "block_size": 100, "topk": 8, "dim": 192},
    "D 256": {"lengths": [9000], "block_size": 16, "topk": 8, "dim": 256, "heads": (8, 1)},
    "fp16, strided": {
        "lengths": [9000],
        "block_size": 64,
        "topk": 8,
        "dim": 128,
        "dtype": torch.float16,
        "strided": True,
    },
    "few distinct scores": {"lengths": [9000], "block_size": 16, "topk": 8, "spread": 1, "dim": 16},
    "all equal": {"lengths": [9000], "block_size": 16, "topk": 8, "spread": 0, "dim": 128},
    "one token": {"lengths": [1], "block_size": 128, "topk": 8, "dim": 128},
}


@pytest.mark.parametrize("name", GPU)
class TestGPU:
    pytestmark = interpreter.gpu

    def test_equals_torch(self, name):
        check_small(**GPU[name])

    def test_same_every_time(self, name):
        first = check_small(**GPU[name], seed=3)
        rows, blocks = packed_rows(GPU[name]["lengths"], GPU[name]["block_size"])
        rest = {k: v for k, v in GPU[name].items() if k not in ("lengths", "block_size", "topk")}
        q, c = inputs(len(rows), *rest.pop("heads", (2, 1)), blocks, **rest, seed=3)
        for _ in range(5):
            assert torch.equal(gate.select_blocks(q, centroids=c, rows=rows, topk=GPU[name]["topk"]), first)


class TestGPUOther:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("n_blocks", [30, 300, 3000])
    @pytest.mark.parametrize("topk", [3, 8, 20, 70])
    def test_special_scores(self, n_blocks, topk):
        check_special(4000, n_blocks, topk)

    @pytest.mark.parametrize("block_size", [16, 128])
    def test_any_row_order(self, block_size):
        order = np.random.default_rng(0).permutation(20000)
        check_small([7000, 12000, 1000], block_size, 8, dim=128, order=order)

    @pytest.mark.parametrize("n_blocks", [1024, 4096, 8192])
    @pytest.mark.parametrize("stride", [8, 16, 31, 32, 33, 48, 64, 128])
    def test_regularly_spaced_preferences(self, n_blocks, stride):
        q, c, rows = regular_preferences(n_blocks // 2, n_blocks, stride)
        assert_equal(q, c, rows, 8)
        assert listed(q, c, rows, 8) <= len(rows) * REGULAR_LISTED

    @pytest.mark.parametrize("topk", [3, 8, 20, 70, 400])
    def test_reads_nothing_on_the_host(self, topk):
        rows, blocks = packed_rows([6400], 16)
        q, c = inputs(6400, 2, 1, blocks, 64)
        gate.select_blocks(q, centroids=c, rows=rows, topk=topk)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gate.select_blocks(q, centroids=c, rows=rows, topk=topk)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_rows_alone_give_the_same(self):
        """A row's selection does not depend on other rows (random numbers: rounding would show)."""
        rows, blocks = packed_rows([20000], 16)
        q = torch.randn(20000, 2, 128, device=DEVICE, dtype=torch.bfloat16)
        c = torch.randn(blocks, 2, 128, device=DEVICE, dtype=torch.bfloat16)
        whole = gate.select_blocks(q, centroids=c, rows=rows, topk=8)
        order = torch.randperm(20000, device=DEVICE)
        shuffled = rows_of(rows.block[order].cpu().numpy(), np.zeros(20000))
        assert torch.equal(gate.select_blocks(q[order], centroids=c, rows=shuffled, topk=8), whole[:, order])

    @pytest.mark.parametrize(("tokens", "block_size", "topk"), [(131072, 128, 8), (131072, 512, 8), (131072, 4096, 12)])
    @pytest.mark.parametrize("seed", range(5))
    def test_random_scores_at_full_size(self, tokens, block_size, topk, seed):
        """Each selected block scores at least as high as every other candidate, within fp32 rounding; none is selected twice."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        n_blocks = tokens // block_size
        q = torch.randn(tokens, 2, 128, device=DEVICE, generator=generator).bfloat16()
        c = (torch.randn(n_blocks, 1, 128, device=DEVICE, generator=generator) * block_size**-0.5).bfloat16()
        block = torch.arange(tokens, device=DEVICE) // block_size
        rows = rows_of(block.cpu().numpy(), np.zeros(tokens))
        selected = gate.select_blocks(q, centroids=c, rows=rows, topk=topk).long()
        assert torch.equal(selected[:, :, -1], block.expand(2, -1))
        real = selected[:, :, 1:] >= 0
        assert ((selected[:, :, 1:] > selected[:, :, :-1]) | ~real).all()
        assert torch.equal((selected >= 0).sum(2), (block + 1).clamp(max=topk).expand(2, -1))
        for head in range(2):
            for begin in range(0, tokens, 16384):
                part = slice(begin, begin + 16384)
                scores = q[part, head].double() @ c[:, 0].double().T
                scores.masked_fill_(torch.arange(n_blocks, device=DEVICE) >= block[part, None], -INF)
                chosen = selected[head, part, :-1]
                lowest = scores.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, INF).amin(1)
                rest = scores.scatter(1, chosen.clamp(min=0), -INF).amax(1)
                rest = rest.masked_fill((chosen < 0).any(1), -INF)
                assert (rest - lowest).amax() < 1e-4 * block_size**-0.5
