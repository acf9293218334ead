"""Limits of dq's errors: roundings of bf16 kernels pass for any inputs, mistakes fail for any inputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout, reference
from scripts.harness import definition, limits

TOKENS, Q_HEADS, KV_HEADS, DIM = 256, 4, 2, 64
CONFIG = MoBAConfig(32, 3)
LAYOUT, ALONE = SequenceLayout.contiguous([0, TOKENS], 1), definition.Ranks(None)
ALIKE = {"independent": 0.0, "values alike": 8.0, "keys and values alike": 8.0}


def draw(kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bf16 q, k, v, dout; values alike share a vector several times as large as what they differ by."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(TOKENS, n, DIM, generator=generator) for n in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS))
    v += ALIKE[kind] * torch.randn(DIM, generator=generator)
    if kind == "keys and values alike":
        k += 3 * torch.randn(DIM, generator=generator)
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), dout.bfloat16()


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def kernels(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *, dropped: int | None = None, with_delta: bool = True
) -> tuple[Tensor, Tensor]:
    """bf16 output and dq: exact but for the roundings of the kernels for GPUs.

    Args:
        dropped: block that dq of every row behind it leaves out; None for a right dq.
        with_delta: subtract delta, as is right.
    """
    group, blocks = Q_HEADS // KV_HEADS, TOKENS // CONFIG.block_size
    q, keys, values, dout = (x.double() for x in (q, *(x.repeat_interleave(group, 1) for x in (k, v)), dout))
    scale = CONFIG.scale(DIM)
    mask = reference.attention_mask(q.bfloat16(), k, CONFIG)
    weight = (torch.einsum("qhd,khd->hqk", q, keys) * scale).masked_fill(~mask, -math.inf).softmax(-1)
    out = rounded(torch.einsum("hqk,khd->qhd", weight, values))
    delta = (out * dout).sum(-1).T[..., None] * with_delta
    dscore = rounded(weight * (torch.einsum("qhd,khd->hqk", dout, values) - delta))
    of_block = (x.unflatten(-1, (blocks, -1)) for x in (dscore, keys.permute(1, 2, 0)))
    partial = rounded(torch.einsum("hqbk,hdbk->qhbd", *of_block) * scale)
    if dropped is not None:
        partial[(dropped + 1) * CONFIG.block_size :, :, dropped] = 0
    return out.bfloat16(), partial.sum(2).bfloat16()


def errors(inputs: tuple[Tensor, ...], out: Tensor, dq: Tensor) -> dict[str, float]:
    return definition.check_rows(*inputs, out, dq, None, CONFIG, LAYOUT, 0, ALONE, rows_per_rank=16)


@pytest.mark.parametrize("kind", ALIKE)
def test_rounding_passes(kind: str) -> None:
    inputs = draw(kind)
    found = errors(inputs, *kernels(*inputs))
    assert limits.broken([found], limits.TRAINED) == []
    assert 0.0014 < found["dq_rounding_error"] < 0.0018  # a root mean square of bf16's roundings, whatever the inputs
    # dq itself cannot be compared where values are alike: delta from a rounded output makes it wrong.
    assert (found["dq_error"] > limits.GRADIENT) == (kind != "independent")


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("mistake", ["a block", "a factor", "a head", "zero", "no delta", "no scale"])
def test_mistakes_fail(kind: str, mistake: str) -> None:
    inputs = draw(kind)
    out, dq = kernels(*inputs)
    if mistake == "a block":
        dq = kernels(*inputs, dropped=2)[1]
    elif mistake == "a factor":
        dq = dq * 1.02
    elif mistake == "a head":
        dq[:, [0, 1]] = dq[:, [1, 0]]
    elif mistake == "zero":
        dq = torch.zeros_like(dq)
    elif mistake == "no delta":
        dq = kernels(*inputs, with_delta=False)[1]
    else:
        dq = dq / CONFIG.scale(DIM)
    (line,) = limits.broken([errors(inputs, out, dq)], limits.TRAINED)
    assert line.startswith("dq_rounding_error is ")


def test_sizes_are_those_of_autograd() -> None:
    """`definition.attend` against plain autograd in fp64: dq, dq with delta from another output, and the size of the terms."""
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(48, n, generator=generator, dtype=torch.float64) for n in (8, 4))
    query, gradient, output = (torch.randn(2, n, generator=generator, dtype=torch.float64) for n in (8, 4, 4))
    blocks, row = torch.tensor([[-1, 0, 1], [0, 1, 2]]), torch.tensor([20, 47])
    found = definition.attend(
        query, gradient, output, keys, values, blocks, row, torch.zeros_like(row), torch.arange(48), 16, 0.3, ALONE
    )
    for i, count in enumerate((21, 48)):
        leaf = query[i].clone().requires_grad_()
        weight = (keys[:count] @ leaf * 0.3).softmax(0)
        out = weight @ values[:count]
        out.backward(gradient[i])
        torch.testing.assert_close(found.out[i], out.detach())
        torch.testing.assert_close(found.dq[i], leaf.grad)
        weight = weight.detach()
        dscore = 0.3 * weight * (values[:count] @ gradient[i] - output[i] @ gradient[i])
        terms = dscore[:, None] * keys[:count]
        torch.testing.assert_close(found.dq_of_output[i], terms.sum(0))
        squares = terms.square().sum() + terms.sum(0).square().sum()
        squares += sum(some.sum(0).square().sum() for some in terms.split(16))
        torch.testing.assert_close(found.rounded[i], squares.sqrt())
