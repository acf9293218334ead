"""Cases small enough to work out in the test: the readable definition and moba_attention must both give that answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from tests.cases import Case, interleaved, relative_error
from tests.ranks import run_ranks

FP64_SUMS = 1e-12  # fp64 sums of fewer than a hundred terms in another order
NAN = float("nan")

Attention = Callable[[Tensor, Tensor, Tensor, list[int], MoBAConfig], Tensor]


def on_one_rank(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], config: MoBAConfig) -> Tensor:
    return moba_cp.moba_attention(q, k, v, config, layout=SequenceLayout.contiguous(cu_seqlens, 1))


def _on_rank(
    rank: int, world_size: int, qkv: tuple[Tensor, ...], layout: SequenceLayout, config: MoBAConfig, comm: str
) -> Tensor:
    return moba_cp.moba_attention(*(layout.shard(x, rank) for x in qkv), config, layout=layout, comm=comm)


def on_three_ranks(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], config: MoBAConfig) -> Tensor:
    layout = interleaved(cu_seqlens, 3, width=2)
    return layout.unshard(run_ranks(3, _on_rank, (q, k, v), layout, config, "fetch"))


every_attention = pytest.mark.parametrize(
    "attention", [moba_cp.reference.moba_attention, on_one_rank, on_three_ranks], ids=["reference", "1 rank", "3 ranks"]
)


def block_shares(attention: Attention, q: Tensor, k: Tensor, cu_seqlens: list[int], config: MoBAConfig) -> Tensor:
    """How much of each row's attention lies on each block: `[T, n_blocks]`, for one head and blocks numbered over all
    documents. The value of a key is the one-hot number of its block."""
    length = [b - a for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    counts = [-(-n // config.block_size) for n in length]
    number = torch.tensor(
        [sum(counts[:d]) + t // config.block_size for d, n in enumerate(length) for t in range(n)], dtype=torch.int64
    )
    values = torch.nn.functional.one_hot(number, sum(counts)).to(q.dtype)
    return attention(q[:, None], k[:, None], values[:, None], cu_seqlens, config)[:, 0]


def attended(shares: Tensor) -> list[list[int]]:
    """Blocks that each row attends to."""
    return [row.nonzero().flatten().tolist() for row in shares]


@every_attention
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_scores_the_later_block_wins(attention: Attention, dtype: torch.dtype) -> None:
    """Five blocks of two; blocks 0, 1 and 3 have the same keys, block 2 scores less."""
    same, less = [[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.5, 0.5]]
    k = torch.tensor([*same, *same, *less, *same, *less], dtype=dtype)
    q = torch.ones(10, 2, dtype=dtype)
    two = attended(block_shares(attention, q, k, [0, 10], MoBAConfig(2, 2)))
    assert two == [[0]] * 2 + [[0, 1]] * 2 + [[1, 2]] * 2 + [[1, 3]] * 2 + [[3, 4]] * 2
    three = attended(block_shares(attention, q, k, [0, 10], MoBAConfig(2, 3)))
    assert three == [[0]] * 2 + [[0, 1]] * 2 + [[0, 1, 2]] * 2 + [[0, 1, 3]] * 2 + [[1, 3, 4]] * 2


@every_attention
@pytest.mark.parametrize("dim", [3, 16, 64, 100])
def test_ties_of_real_numbers(attention: Attention, dim: int) -> None:
    """All blocks hold the same random keys, so every score of a row is the same sum whatever its bits: the own block
    and the two before it."""
    generator = torch.Generator().manual_seed(dim)
    k = torch.randn(3, dim, generator=generator).repeat(13, 1)
    q = torch.randn(39, dim, generator=generator)
    rows = attended(block_shares(attention, q, k, [0, 39], MoBAConfig(3, 3, softmax_scale=1e-3)))
    assert rows == [[b for b in (t // 3 - 2, t // 3 - 1, t // 3) if b >= 0] for t in range(39)]


@every_attention
def test_minus_zero_ties_with_zero(attention: Attention) -> None:
    """Keys of 0.0 and -0.0 score alike, in either order."""
    for signs in ([0.0, -0.0, 1.0], [-0.0, 0.0, 1.0]):
        k = torch.tensor(signs, dtype=torch.float32)[:, None]
        rows = attended(block_shares(attention, torch.ones(3, 1), k, [0, 3], MoBAConfig(1, 2)))
        assert rows == [[0], [0, 1], [1, 2]]


@every_attention
def test_topk_1_is_attention_within_the_own_block(attention: Attention) -> None:
    case = Case((11, 2), block_size=4, topk=1, q_heads=2, kv_heads=2)
    q, k, v, _ = case.inputs()
    out = attention(q, k, v, case.cu_seqlens, case.config)
    for begin, end in ((0, 4), (4, 8), (8, 11), (11, 13)):
        here = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        expected = scaled_dot_product_attention(*here, is_causal=True).transpose(0, 1)
        assert relative_error(out[begin:end], expected) <= FP64_SUMS


@every_attention
@pytest.mark.parametrize("topk", [6, 7, 1000])
def test_topk_that_covers_everything_is_full_causal_attention(attention: Attention, topk: int) -> None:
    """Six blocks; under GQA every q head reads kv head `h // 3`."""
    case = Case((23, 17), block_size=4, topk=topk, q_heads=6, kv_heads=2, v_dim=3)
    q, k, v, _ = case.inputs()
    out = attention(q, k, v, case.cu_seqlens, case.config)
    for begin, end in ((0, 23), (23, 40)):
        here = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        expected = scaled_dot_product_attention(*here, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        assert relative_error(out[begin:end], expected) <= FP64_SUMS


@every_attention
def test_a_document_shorter_than_a_block_is_full_causal_attention(attention: Attention) -> None:
    case = Case((3, 5, 0, 7), block_size=8, topk=1)
    q, k, v, _ = case.inputs()
    out = attention(q, k, v, case.cu_seqlens, case.config)
    for begin, end in ((0, 3), (3, 8), (8, 15)):
        here = (x[begin:end].transpose(0, 1)[None] for x in (q, k, v))
        expected = scaled_dot_product_attention(*here, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        assert relative_error(out[begin:end], expected) <= FP64_SUMS


@every_attention
def test_blocks_never_cross_a_document_and_short_last_blocks_are_nobodys_candidate(attention: Attention) -> None:
    """Documents of 5 and 6 in blocks of 2: blocks 0 1 2 | 3 4 5. The short block 2 has by far the largest keys, and
    block 1 larger ones than block 0; a row chooses within its document."""
    k = torch.tensor([1.0, 1, 2, 2, 100, 3, 3, 1, 1, 5, 5], dtype=torch.float64)[:, None] * 0.01
    rows = attended(block_shares(attention, torch.ones_like(k), k, [0, 5, 11], MoBAConfig(2, 2)))
    assert rows == [[0], [0], [0, 1], [0, 1], [1, 2], [3], [3], [3, 4], [3, 4], [3, 5], [3, 5]]


@every_attention
def test_causal_inside_the_own_block_and_weights_are_one_softmax(attention: Attention) -> None:
    """q.k is log 2 for block 0 and log 3 for block 1, so keys weigh 2 and 3: the row at 3 has 2 + 2 + 3 + 3, the row at
    2 only the first key of its own block."""
    k = torch.log(torch.tensor([2.0, 2, 3, 3], dtype=torch.float64))[:, None]
    shares = block_shares(attention, torch.ones_like(k), k, [0, 4], MoBAConfig(2, 2, softmax_scale=1.0))
    expected = torch.tensor([[1, 0], [1, 0], [4 / 7, 3 / 7], [4 / 10, 6 / 10]], dtype=torch.float64)
    assert relative_error(shares, expected) <= FP64_SUMS


@every_attention
def test_centroids_are_rounded_once_to_the_dtype_of_the_keys(attention: Attention) -> None:
    """bf16 numbers from 256 on are even: block 0 averages 257, a tie that rounds to 256, as block 1 averages. Rounded, they
    tie and block 1 wins; in fp32 block 0 scores more."""
    k = torch.tensor([256.0, 258, 256, 256, 0, 0], dtype=torch.float32)
    low = k.to(torch.bfloat16)[:, None]
    config = MoBAConfig(2, 2, softmax_scale=1e-4)
    assert attended(block_shares(attention, torch.ones_like(low), low, [0, 6], config))[4:] == [[1, 2]] * 2
    exact = k[:, None]
    assert attended(block_shares(attention, torch.ones_like(exact), exact, [0, 6], config))[4:] == [[0, 2]] * 2


@every_attention
def test_centroids_are_accumulated_in_fp32(attention: Attention) -> None:
    """Sixteen keys whose running sum bf16 cannot hold: 256 and fifteen ones sum to 271, but in bf16 to 256. The mean,
    16.9375, rounds to 16.875 or 17.0, above the 16.5 of block 1; summed in bf16 it would be 16."""
    k = torch.tensor([256.0] + [1.0] * 15 + [16.5] * 16 + [0.0], dtype=torch.bfloat16)[:, None]
    row = attended(block_shares(attention, torch.ones_like(k), k, [0, 33], MoBAConfig(16, 2, softmax_scale=1e-4)))[32]
    assert row == [0, 2]


@every_attention
def test_a_nan_key_touches_the_rows_that_must_see_it_and_no_other(attention: Attention) -> None:
    """Documents of 6, 10 and 4 in blocks of 2; the key at 9 (block 1 of the second document) is NaN, and ranks above
    the larger keys of block 0. Every later row of the document takes that block; row 8 comes before the NaN."""
    k = torch.ones(20, 1, dtype=torch.float64)
    k[6:8] = 50.0
    k[9] = NAN
    q, cu_seqlens = torch.ones_like(k), [0, 6, 16, 20]
    out = attention(q[:, None], k[:, None], torch.ones_like(k)[:, None], cu_seqlens, MoBAConfig(2, 2))
    assert out.isnan().flatten().nonzero().flatten().tolist() == list(range(9, 16))
    assert relative_error(out[~out.isnan()], torch.ones(13, dtype=torch.float64)) <= FP64_SUMS  # means of ones


@every_attention
def test_of_two_nan_blocks_the_later_wins_and_topk_1_does_not_look(attention: Attention) -> None:
    """Blocks of 1, NaN at 0 and 2: at topk 2 rows 3 and on take block 2; row 2 takes block 0. At topk 1 a row sees
    itself."""
    k = torch.tensor([NAN, 1, NAN, 1, 1], dtype=torch.float64)[:, None, None]
    one = torch.ones_like(k)
    assert attention(one, k, one, [0, 5], MoBAConfig(1, 2)).isnan().flatten().tolist() == [True] * 5
    assert attention(one, k, one, [0, 5], MoBAConfig(1, 1)).isnan().flatten().tolist() == [True, False] * 2 + [False]


@every_attention
def test_a_nan_query_touches_its_own_row_and_head_only(attention: Attention) -> None:
    case = Case((9, 8), block_size=2, topk=2, q_heads=2, kv_heads=1)
    q, k, v, _ = case.inputs()
    clean = attention(q, k, v, case.cu_seqlens, case.config)
    q[5, 1] = NAN
    out = attention(q, k, v, case.cu_seqlens, case.config)
    assert out[5, 1].isnan().all()
    out[5, 1] = clean[5, 1]
    assert relative_error(out, clean) <= FP64_SUMS


@every_attention
def test_infinite_scores_are_scores(attention: Attention) -> None:
    """A centroid of -inf ranks below every number but is a candidate all the same; its key weighs exp(-inf) = 0."""
    k = torch.tensor([-float("inf"), -1.0, 1.0], dtype=torch.float32)[:, None]
    for topk in (2, 3):
        rows = attended(block_shares(attention, torch.ones(3, 1), k, [0, 3], MoBAConfig(1, topk)))
        assert rows[1:] == [[1], [1, 2]], topk


@every_attention
@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0])
def test_softmax_scale_scales_attention_and_not_routing(attention: Attention, scale: float) -> None:
    """At -1 the best-scored block gets the least weight but is still the one selected; at 0 keys weigh alike."""
    k = torch.tensor([3.0, 1.0, 2.0, 0.0], dtype=torch.float64)[:, None]
    shares = block_shares(attention, torch.ones_like(k), k, [0, 4], MoBAConfig(1, 2, softmax_scale=scale))
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 0] = 1
    for row in (1, 2, 3):  # block 0 scores most
        expected[row, [0, row]] = torch.softmax(k[[0, row], 0] * scale, 0)
    assert relative_error(shares, expected) <= FP64_SUMS


@every_attention
def test_selection_is_per_q_head_under_gqa(attention: Attention) -> None:
    """Two q heads of opposite sign on one kv head choose opposite blocks."""
    k = torch.tensor([2.0, 1.0, -2.0, 0.0], dtype=torch.float64)[:, None, None]
    q = torch.ones(4, 2, 1, dtype=torch.float64)
    q[:, 1] = -1
    values = torch.eye(4, dtype=torch.float64)[:, None]
    out = attention(q, k, values, [0, 4], MoBAConfig(1, 2))
    assert attended(out[:, 0]) == [[0], [0, 1], [0, 2], [0, 3]]
    assert attended(out[:, 1]) == [[0], [0, 1], [1, 2], [2, 3]]


@pytest.mark.parametrize("attention", [moba_cp.reference.moba_attention, on_one_rank], ids=["reference", "1 rank"])
def test_gradients_are_those_of_attention_with_the_selection_held(attention: Attention) -> None:
    """Finite differences of the whole function, at a point where no selection changes within their step."""
    case = Case((7, 0, 5), block_size=2, topk=2, q_heads=2, kv_heads=1, dim=3, v_dim=2, seed=5)
    q, k, v, _ = (x.requires_grad_() for x in case.inputs())
    assert torch.autograd.gradcheck(lambda *qkv: attention(*qkv, case.cu_seqlens, case.config), (q, k, v))


@every_attention
def test_nothing_flows_through_the_selection(attention: Attention) -> None:
    """Values that are all alike give an output that no routing changes: dq and dk are zero but for rounding."""
    if attention is on_three_ranks:
        pytest.skip("gradients do not cross processes here; test_attention.py compares them")
    case = Case((16,), block_size=2, topk=3)
    q, k, v, dout = case.inputs()
    q, k, v = q.requires_grad_(), k.requires_grad_(), torch.ones_like(v)
    dq, dk = torch.autograd.grad(attention(q, k, v, case.cu_seqlens, case.config), (q, k), dout)
    assert dq.abs().max() < FP64_SUMS
    assert dk.abs().max() < FP64_SUMS


def test_the_reference_is_differentiable_without_documents() -> None:
    tensors = [torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3)]
    moba_cp.reference.moba_attention(*tensors, [0], moba_cp.MoBAConfig(block_size=4, topk=2)).sum().backward()
    assert [x.grad.shape for x in tensors] == [(0, 2, 4)] * 3
