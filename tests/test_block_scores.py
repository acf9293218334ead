"""`block_scores`: the gate's scores with gradients, over any layout; and the indexer that is trained with them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from tests.cases import every_layout
from tests.ranks import run_ranks

CU = [0, 29, 29, 32, 54, 55]
CONFIG = MoBAConfig(5, 3)
EXAMPLE = Path(__file__).parents[1] / "examples" / "indexer.py"


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gates of 4 and 2 heads, blocks of which some are own or none, and gradients of the scores; of all tokens."""
    generator = torch.Generator().manual_seed(0)
    q_gate, k_gate = (torch.randn(55, h, 6, generator=generator, dtype=torch.float64) for h in (4, 2))
    own = torch.cat([torch.arange(b - a) // 5 for a, b in zip(CU[:-1], CU[1:], strict=True)])
    blocks = (torch.rand(4, 55, 3, generator=generator) * (own[:, None] + 2)).long() - 1
    return q_gate, k_gate, blocks, torch.randn(4, 55, 3, generator=generator, dtype=torch.float64)


def by_loops() -> tuple[Tensor, Tensor, Tensor]:
    """Scores and both gradients, one at a time."""
    q_gate, k_gate, blocks, gradient = inputs()
    q_gate.requires_grad_(), k_gate.requires_grad_()
    starts = torch.cat([torch.full((b - a,), a) for a, b in zip(CU[:-1], CU[1:], strict=True)]).tolist()
    scores = torch.zeros(4, 55, 3, dtype=torch.float64)
    for head, row, slot in torch.ones_like(blocks).nonzero().tolist():
        block, start = int(blocks[head, row, slot]), starts[row]
        if 0 <= block < (row - start) // 5:
            mean = k_gate[start + 5 * block : start + 5 * block + 5, head // 2].mean(0)
            scores[head, row, slot] = (q_gate[row, head] * mean).sum()
    return scores.detach(), *torch.autograd.grad(scores, (q_gate, k_gate), gradient)


def scores_on_rank(rank: int, size: int, layouts: list[SequenceLayout]) -> list[tuple[Tensor, ...]]:
    found = []
    for layout in layouts:
        q_gate, k_gate, blocks, gradient = inputs()
        gates = [layout.shard(x, rank).requires_grad_() for x in (q_gate, k_gate)]
        scores = moba_cp.block_scores(*gates, layout.shard(blocks, rank, 1), CONFIG, layout=layout)
        found.append((scores.detach(), *torch.autograd.grad(scores, gates, layout.shard(gradient, rank, 1))))
    return found


@pytest.mark.parametrize("cp_size", [1, 3])
def test_scores_and_gradients_over_every_layout(cp_size: int) -> None:
    layouts = list(every_layout(CU, cp_size).values())
    per_rank = run_ranks(cp_size, scores_on_rank, layouts)
    expected = by_loops()
    for i, layout in enumerate(layouts):
        for n, dim in enumerate((1, 0, 0)):
            whole = layout.unshard([r[i][n] for r in per_rank], dim)
            torch.testing.assert_close(whole, expected[n], rtol=1e-12, atol=1e-12)  # fp64 sums in another order


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_reach_only_what_lists_them(bad: float) -> None:
    """Not the first block, whose place in memory an entry that does not count might take: -1, or the row's own block."""
    layout = SequenceLayout.contiguous([0, 10, 30], 1)
    own = torch.cat([torch.arange(10), torch.arange(20)]) // 5
    blocks = torch.stack([torch.full((30,), -1), own, (own - 1).clamp(min=-1)], 1)[None]
    for where in ("k_gate", "q_gate"):
        q_gate, k_gate = (torch.randn(30, 1, 4, dtype=torch.float64) for _ in range(2))
        {"k_gate": k_gate, "q_gate": q_gate}[where][{"k_gate": 0, "q_gate": 27}[where]] = bad
        scores = moba_cp.block_scores(q_gate.requires_grad_(), k_gate.requires_grad_(), blocks, CONFIG, layout=layout)
        scores.sum().backward()
        assert q_gate.grad is not None
        assert k_gate.grad is not None
        reached = {  # rows 5 to 9 list the first block, and row 27 lists rows 20 to 24
            "k_gate": (scores[0].isfinite().all(1), slice(5, 10), q_gate.grad, slice(5, 10), k_gate.grad, slice(0)),
            "q_gate": (scores[0].isfinite().all(1), slice(27, 28), q_gate.grad, slice(0), k_gate.grad, slice(20, 25)),
        }[where]
        for finite, rows in zip(reached[::2], reached[1::2], strict=True):
            wrong = ~finite if finite.dim() == 1 else ~finite.isfinite().all(2).all(1)
            expected = torch.zeros(30, dtype=torch.bool)
            expected[rows] = True
            assert torch.equal(wrong, expected), (where, wrong.nonzero().flatten().tolist())


def test_the_best_scored_blocks_are_those_that_are_selected() -> None:
    q_gate, k_gate, _, _ = inputs()
    layout, v = SequenceLayout.contiguous(CU, 1), torch.randn(55, 1, 4, dtype=torch.float64)
    q, k = torch.randn(55, 4, 4, dtype=torch.float64), torch.randn(55, 1, 4, dtype=torch.float64)
    call = lambda topk: moba_cp.moba_attention(  # noqa: E731
        q, k, v, MoBAConfig(5, topk), layout=layout, routing=(q_gate, k_gate), return_selection=True
    )[1]
    every, best = call(6), call(3)
    scores = moba_cp.block_scores(q_gate, k_gate, every.blocks, CONFIG, layout=layout).masked_fill(
        ~every.earlier, float("-inf")
    )
    top = scores.topk(2, 2)
    wanted = torch.where(top.values > float("-inf"), every.blocks.gather(2, top.indices), -1).sort(2).values
    assert torch.equal(best.blocks[:, :, :-1], wanted)


def test_autocast_rounds_nothing() -> None:
    layout = SequenceLayout.contiguous(CU, 1)

    def run() -> tuple[Tensor, ...]:
        q_gate, k_gate, blocks, gradient = inputs()
        gates = [x.float().requires_grad_() for x in (q_gate, k_gate)]
        scores = moba_cp.block_scores(*gates, blocks, CONFIG, layout=layout)
        return scores, *torch.autograd.grad(scores, gates, gradient.float())

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    for x, y in zip(plain, cast, strict=True):
        assert x.dtype == y.dtype == torch.float32
        assert torch.equal(x, y)


def refused_on_rank(rank: int, size: int) -> list[str]:
    layout, errors = SequenceLayout.contiguous(CU, size), []
    q_gate, k_gate, blocks = (layout.shard(x, rank, dim) for x, dim in zip(inputs()[:3], (0, 0, 1), strict=True))
    bad = blocks.clone()
    bad[2, 1, 0] = 99
    for arguments in ((q_gate, k_gate, bad), (q_gate, k_gate[:, :, :4], blocks), (q_gate, k_gate, blocks[:1])):
        with pytest.raises(ValueError) as error:  # the text is looked at below
            moba_cp.block_scores(*arguments, CONFIG, layout=layout)
        errors.append(str(error.value))
    for arguments in ((q_gate, k_gate.to("meta"), blocks), (q_gate, k_gate, blocks.to("meta"))):
        with pytest.raises(ValueError, match="must be on one device, got .*meta"):
            moba_cp.block_scores(*arguments, CONFIG, layout=layout)
    with pytest.raises(TypeError, match="q_gate must be fp64, fp32, bf16 or fp16, got torch.float8_e5m2"):
        moba_cp.block_scores(*(x.to(torch.float8_e5m2) for x in (q_gate, k_gate)), blocks, CONFIG, layout=layout)
    with pytest.raises(ValueError, match="disagree on block_size: rank 0 has 5, rank 1 has 6"):
        moba_cp.block_scores(q_gate, k_gate, blocks.clamp(max=0), MoBAConfig(5 + rank, 2), layout=layout)
    with pytest.raises(ValueError, match="disagree on gradient of k_gate: rank 0 has wanted, rank 1 has not wanted"):
        moba_cp.block_scores(q_gate, k_gate.requires_grad_(rank == 0), blocks, CONFIG, layout=layout)
    return errors


def test_bad_input_is_refused_on_every_rank() -> None:
    for values, sizes, shape in run_ranks(2, refused_on_rank):
        assert "head 2, row 1, whose own block is" in values
        assert "has 99" in values
        assert "k_gate must have q_gate's tokens and head size" in sizes
        assert "blocks must have shape [heads of q_gate, tokens, n]" in shape


def scored(
    rank: int, size: int, layout: SequenceLayout, factor: float = 1.0, wanted: bool = True
) -> tuple[Tensor, Tensor]:
    """Scores of a rank, and its k_gate."""
    q_gate, k_gate, blocks, _ = inputs()
    q_gate, k_gate = layout.shard(q_gate * factor, rank), layout.shard(k_gate, rank).requires_grad_(wanted)
    return moba_cp.block_scores(q_gate, k_gate, layout.shard(blocks, rank, 1), CONFIG, layout=layout), k_gate


def ordered_and_not(rank: int, size: int) -> list[str]:
    """Backward of two calls in another order on rank 1; then a gradient that rank 1 alone does not want."""
    layout, errors = SequenceLayout.zigzag(CU, size), []
    calls = [scored(rank, size, layout, factor) for factor in (1.0, 2.0)]
    with pytest.raises(ValueError, match="backward passes in different orders") as error:
        calls[rank][0].sum().backward()
    errors.append(str(error.value))
    (once, gates), (twice, other_gates) = (scored(rank, size, layout, factor) for factor in (1.0, 2.0))
    twice.sum().backward()
    once.sum().backward()
    torch.testing.assert_close(other_gates.grad, 2 * gates.grad, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="disagree on gradient of k_gate: rank 0 has wanted, rank 1 has not wanted"):
        scored(rank, size, layout, wanted=rank == 0)
    return errors


def test_ranks_whose_backward_passes_differ_raise() -> None:
    first, second = run_ranks(2, ordered_and_not)
    assert first == second


def test_shapes_are_inferred_without_numbers() -> None:
    layout = SequenceLayout.contiguous(CU, 1)
    for context in (FakeTensorMode(), torch.device("meta")):
        with context:
            q_gate, k_gate = (torch.empty(55, heads, 6, requires_grad=True) for heads in (4, 2))
            scores = moba_cp.block_scores(
                q_gate, k_gate, torch.empty(4, 55, 3, dtype=torch.int32), CONFIG, layout=layout
            )
            scores.sum().backward()
        assert (scores.shape, scores.dtype) == ((4, 55, 3), torch.float32)
        assert (q_gate.grad.shape, k_gate.grad.shape) == (q_gate.shape, k_gate.shape)


def test_compiled_code_breaks_once() -> None:
    q_gate, k_gate, blocks, _ = inputs()
    layout, counter = SequenceLayout.contiguous(CU, 1), CompileCounter()
    tripled = lambda q, k: moba_cp.block_scores(q * 2, k, blocks, CONFIG, layout=layout) * 3  # noqa: E731
    gates = [x.requires_grad_() for x in (q_gate, k_gate)]
    expected, found = tripled(*gates), torch.compile(tripled, backend=counter)(*gates)
    assert torch.equal(found, expected)
    assert counter.frame_count == 2  # what comes before the call, and what comes after
    for x, y in zip(*(torch.autograd.grad(out.sum(), gates) for out in (found, expected)), strict=True):
        assert torch.equal(x, y)


def test_the_example_learns_what_to_select() -> None:
    spec = importlib.util.spec_from_file_location("indexer", EXAMPLE)
    assert spec is not None
    indexer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(indexer)  # type: ignore[union-attr]
    found = indexer.main(dense_steps=90, sparse_steps=20)
    assert found["indexer"] > 0.85 > 0.75 > found["mean keys"]


def test_gradients_have_the_same_bits_every_time() -> None:
    """Many rows add to the same few means; threads must not change the order."""
    q, k = (torch.randn(192, 1, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    layout, config = SequenceLayout.contiguous([0, 192], 1), moba_cp.MoBAConfig(8, 24)
    blocks = torch.arange(24).expand(1, 192, 24)
    blocks = blocks.masked_fill(blocks > torch.arange(192)[:, None] // 8, -1)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    try:
        found = []
        for _ in range(20):
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            scores = moba_cp.block_scores(*leaves, blocks, config, layout=layout)
            found.append(torch.autograd.grad(scores.square().sum(), leaves))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for gradients in found for x, y in zip(gradients, found[0], strict=True))
