"""Dense attention over several sets of keys, merged by log-sum-exp: kernels that run on the CPU, and arguments of the others."""

from __future__ import annotations

import pytest
import torch

from moba_cp.kernels import dense

SCALE = 0.3


def make(q_heads: int, kv_heads: int, dim: int, value_dim: int, tokens: int = 29) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((q_heads, dim), (kv_heads, dim), (kv_heads, value_dim), (q_heads, value_dim))
    return [torch.randn(tokens, *s, generator=generator, dtype=torch.float64) for s in shapes]


def expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in leaves[1:])
    score = torch.einsum("qhd,khd->hqk", leaves[0], keys) * SCALE
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    out = torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, float("-inf")).softmax(-1), values)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def in_pieces(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor) -> list[torch.Tensor]:
    """Attention of the first 17 tokens to themselves, of the rest to itself, then of the rest to the first 17."""
    first, rest = slice(0, 17), slice(17, None)
    pieces = [(first, first, True), (rest, rest, True), (rest, first, False)]
    out, lse = torch.zeros_like(dout), q.new_full((q.shape[1], len(q)), float("-inf"))
    for rows, keys, causal in pieces:
        dense.attend(q[rows], k[keys], v[keys], SCALE, causal, out[rows], lse[:, rows])
    gradients = dq, dk, dv = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys, causal in pieces:
        dense.attend_backward(
            *(q[rows], k[keys], v[keys], out[rows], lse[:, rows], dout[rows], SCALE, causal),
            *(dq[rows], dk[keys], dv[keys]),
        )
    return [out, *gradients]


@pytest.mark.parametrize("workspace", [1, 29 * 13 * 4 * 2 * 3, 1 << 30])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("kernel", ["cpu", "math"])
def test_pieces_give_the_whole(
    kernel: str, heads: tuple[int, int], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dv unlike D, and any number of heads and rows processed together."""
    monkeypatch.setattr(dense, "choose_kernel", lambda *_: kernel)
    monkeypatch.setattr(dense, "WORKSPACE_BYTES", workspace)
    monkeypatch.setattr(dense, "_MATH_SCORES", 100)
    inputs = make(*heads, 8, 5)
    for got, want in zip(in_pieces(*inputs), expected(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 48), (60, 64)])
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_cuda_operators_accept_what_they_are_given(
    kernel: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and arguments only, on the meta device: torch's operators may change between versions."""
    monkeypatch.setattr(dense, "choose_kernel", lambda *_: kernel)
    monkeypatch.setattr(dense, "_cudnn_lse_dim", lambda _: 4)
    meta = [x.to("meta") for x in make(6, 2, *sizes)]
    q, k, v, dout = (x.to(torch.bfloat16) for x in meta)
    dq, dk, dv, out = (x.to(torch.float32) for x in meta)
    lse = out.new_empty(6, 29)
    dense.attend(q, k, v, SCALE, True, out, lse)
    dense.attend_backward(q, k, v, dout, lse, dout, SCALE, True, dq, dk, dv)


def test_other_dtypes_and_devices_have_a_kernel() -> None:
    q, k, v, _ = make(2, 2, 8, 8)
    assert dense.choose_kernel(q, k, v, SCALE, True, True) == "cpu"
