"""moba_attn_varlen: MoonshotAI/MoBA's call, on the sizes its own test draws, shrunk for a CPU."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import moba_cp
from moba_cp import MoBAConfig
from tests.cases import relative_error

TOLERANCE = {
    torch.float64: 1e-10,  # sums of some hundred terms in another order than the reference's
    torch.float32: 1e-5,  # likewise, at 6e-8 a rounding
    torch.bfloat16: 2e-2,  # out and gradients are rounded to bf16, 4e-3; so is the out that backward starts from
}


def drawn(
    batch: int, tokens: int, q_heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, the output's gradient, and `batch` documents cut at random."""
    cuts = sorted(random.Random(batch).sample(range(1, tokens), batch - 1))
    generator = torch.Generator().manual_seed(tokens)
    heads = (q_heads, kv_heads, kv_heads, q_heads)
    data = [torch.randn(tokens, h, dim, generator=generator, dtype=torch.float64).to(dtype) for h in heads]
    return data, torch.tensor([0, *cuts, tokens], dtype=torch.int32)


def longest(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max())


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize(("tokens", "chunk", "topk"), [(512, 128, 2), (384, 64, 3), (512, 32, 4), (300, 1024, 2)])
def test_equals_the_reference(batch: int, q_heads: int, kv_heads: int, tokens: int, chunk: int, topk: int) -> None:
    dtype = torch.float64 if batch == 4 else torch.float32
    (q, k, v, dout), cu = drawn(batch, tokens, q_heads, kv_heads, 16, dtype)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = moba_cp.moba_attn_varlen(q, k, v, cu, longest(cu), moba_chunk_size=chunk, moba_topk=topk)
    expected = moba_cp.reference.moba_attention(q, k, v, cu, MoBAConfig(chunk, topk))
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    gradients = (torch.autograd.grad(o, (q, k, v), dout) for o in (out, expected))
    for got, wanted in zip(*gradients, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[dtype]


def test_bf16() -> None:
    (q, k, v, dout), cu = drawn(4, 512, 4, 2, 32, torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = moba_cp.moba_attn_varlen(q, k, v, cu, longest(cu), 64, 3)
    expected = moba_cp.reference.moba_attention(q, k, v, cu, MoBAConfig(64, 3))
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) <= TOLERANCE[out.dtype]
    gradients = (torch.autograd.grad(o, (q, k, v), dout) for o in (out, expected))
    for got, wanted in zip(*gradients, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE[out.dtype]


def test_topk_1_is_attention_within_the_own_block() -> None:
    """Not full causal attention, as in the published fast code: the same as cutting the documents into their blocks."""
    (q, k, v, _), cu = drawn(3, 200, 4, 2, 16, torch.float64)
    out = moba_cp.moba_attn_varlen(q, k, v, cu, longest(cu), 32, 1)
    ends = cu.tolist()
    blocks = [t for a, b in zip(ends[:-1], ends[1:], strict=True) for t in range(a, b, 32)] + [200]
    whole = moba_cp.moba_attn_varlen(q, k, v, torch.tensor(blocks), 32, 32, 100)
    assert relative_error(out, whole) <= TOLERANCE[torch.float64]


def test_cu_seqlens_as_a_list_and_a_generous_max_seqlen() -> None:
    (q, k, v, _), cu = drawn(4, 100, 2, 1, 8, torch.float32)
    expected = moba_cp.moba_attn_varlen(q, k, v, cu, longest(cu), 16, 2)
    assert torch.equal(moba_cp.moba_attn_varlen(q, k, v, cu.tolist(), 10_000, 16, 2), expected)


def test_no_document() -> None:
    q, k = torch.zeros(0, 2, 8), torch.zeros(0, 1, 8)
    assert moba_cp.moba_attn_varlen(q, k, k, torch.tensor([0]), 0, 16, 2).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"cu_seqlens": torch.tensor([0, 99])}, ValueError, "99 tokens, but q has 100"),
        ({"cu_seqlens": torch.tensor([1, 100])}, ValueError, "start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 70, 50, 100])}, ValueError, "got 70 then 50 at position 2"),
        ({"cu_seqlens": torch.tensor([0.0, 100.0])}, TypeError, "float32"),
        (
            {"cu_seqlens": torch.tensor([0, 100]).to("meta")},
            TypeError,
            "must hold numbers, got a tensor on the meta device",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 100]).to_sparse()},
            TypeError,
            "ordinary dense tensor, got layout torch.sparse_coo",
        ),
        ({"max_seqlen": 99}, ValueError, "max_seqlen is 99, but cu_seqlens has a document of 100 tokens"),
        ({"max_seqlen": "100"}, TypeError, "max_seqlen must be an int, got '100'"),
        ({"moba_chunk_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"moba_topk": 0}, ValueError, "topk must be at least 1, got 0"),
        ({"moba_topk": 1.5}, TypeError, "topk must be an int, got 1.5"),
        ({"q": torch.zeros(100, 3, 8)}, ValueError, "q heads .3. must be a multiple of the kv heads .2."),
        ({"q": torch.zeros(100, 8)}, ValueError, r"q must have shape .* got \(100, 8\)"),
        ({"k": torch.zeros(100, 2, 8, dtype=torch.float64)}, TypeError, "k torch.float64"),
        ({"v": None}, TypeError, "v must be a tensor, got NoneType"),
    ],
    ids=str,
)
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    x = torch.zeros(100, 2, 8)
    good = {"q": x, "k": x, "v": x, "cu_seqlens": torch.tensor([0, 100]), "max_seqlen": 100}
    good |= {"moba_chunk_size": 16, "moba_topk": 2}
    moba_cp.moba_attn_varlen(**good)
    with pytest.raises(error, match=text):
        moba_cp.moba_attn_varlen(**(good | change))
