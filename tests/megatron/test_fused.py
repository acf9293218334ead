"""Norm with residual, SwiGLU and rotary embedding in one pass: the values and gradients of the formulas in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moba_cp.megatron import fused
from tests.kernels import interpreter
from tests.kernels.interpreter import interpreted

DEVICES = [
    pytest.param("cpu", marks=interpreted),
    pytest.param("cuda", marks=interpreter.gpu),
]
EPS = 1e-5
# fp32 sums in another order.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()


def check(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Outputs agree, and the gradients of a weighted sum of them."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)
    weights = [torch.randn_like(x) for x in theirs]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights)), inputs) for outputs in (ours, theirs)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [8, 24, 1024])
def test_norms(width: int, device: str) -> None:
    x, y, weight = draw(5, 2, width, device=device), draw(5, 2, width, device=device), draw(width, device=device)
    check((fused.rms_norm(x, weight, EPS),), (F.rms_norm(x, (width,), weight, EPS),), [x, weight])
    total = x + y
    check(fused.add_rms_norm(x, y, weight, EPS), (total, F.rms_norm(total, (width,), weight, EPS)), [x, y, weight])


@pytest.mark.parametrize("device", DEVICES)
def test_norm_of_more_rows_than_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_PROGRAMS", 3)
    x, weight = draw(7, 16, device=device), draw(16, device=device)
    check((fused.rms_norm(x, weight, EPS),), (F.rms_norm(x, (16,), weight, EPS),), [x, weight])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [6, 520])
def test_swiglu(width: int, device: str) -> None:
    x = draw(3, 2, 2 * width, device=device)
    gate, up = x.chunk(2, -1)
    check((fused.swiglu(x),), (F.silu(gate) * up,), [x])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocabulary", [7, 384, 4100])
def test_cross_entropy(vocabulary: int, device: str) -> None:
    logits = (4 * draw(6, 2, vocabulary, device=device)).detach().requires_grad_()
    labels = torch.arange(12).view(2, 6).t().to(device) * 5 % vocabulary
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(6, 2)
    check((fused.cross_entropy(logits, labels),), (expected,), [logits])
    labels[3, 1], labels[0, 0] = vocabulary, -100  # as Megatron: the largest logit's loss, and no gradient through it
    outside = fused.cross_entropy(logits, labels)
    torch.testing.assert_close(outside[3, 1], logits[3, 1].logsumexp(0) - logits[3, 1].max(), **TOLERANCE)
    (gradient,) = torch.autograd.grad(outside.sum(), logits)
    torch.testing.assert_close(gradient[0, 0], logits[0, 0].softmax(0), **TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("group", "groups", "dim", "half"), [(1, 1, 8, 4), (3, 2, 12, 6), (2, 3, 16, 5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_split_and_rotate(group: int, groups: int, dim: int, half: int, batch: int, device: str) -> None:
    mixed = draw(5, batch, groups * (group + 2) * dim, device=device)
    freqs = (torch.arange(5.0)[:, None] * torch.rand(half)).to(device)[:, None, None]
    table = fused.rotation_table(torch.cat([freqs, freqs], -1), torch.float32)
    q, k, v = fused.split_rotate(mixed, groups, dim, table)
    assert v.untyped_storage().data_ptr() == mixed.untyped_storage().data_ptr()
    by_group = mixed.unflatten(-1, (groups, -1, dim))
    rotate = fused.rotate
    expected = (rotate(by_group[..., :-2, :].flatten(2, 3), *table), rotate(by_group[..., -2, :], *table))
    check((q, k, v), (*expected, by_group[..., -1, :]), [mixed])


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_are_not_dense(device: str) -> None:
    mixed = draw(4, 1, 2 * 4 * 8, device=device)
    table = fused.rotation_table(torch.rand(4, 1, 1, 8, device=device), torch.float32)
    q, k, v = fused.split_rotate(mixed, 2, 8, table)
    strided = [torch.randn(*x.shape[:2], 2 * x.size(2), 8, device=device)[:, :, ::2] for x in (q, k, v)]
    (ours,) = torch.autograd.grad((q, k, v), mixed, strided, retain_graph=True)
    (dense,) = torch.autograd.grad((q, k, v), mixed, [x.contiguous() for x in strided])
    assert torch.equal(ours, dense)


@interpreted
def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="must be alike"):
        fused.add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(8), EPS)
    with pytest.raises(ValueError, match="labels must be int64"):
        fused.cross_entropy(torch.zeros(2, 8), torch.zeros(2))
    table = (torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="do not fit a rotation table"):
        fused.split_rotate(torch.zeros(4, 1, 24), 1, 8, table)


def test_passes_refuse_what_is_not_contiguous() -> None:
    """Kernels read rows one behind another. Refused on the CPU too, where any strides would do."""
    x, weight = torch.zeros(16, 4).t(), torch.ones(16)
    wide, table = torch.zeros(24, 1, 4).transpose(0, 2), (torch.zeros(4, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"total must be contiguous, got shape \(4, 16\) with strides \(1, 4\)"):
        fused.norm_backward(x, weight, x, None, EPS)
    with pytest.raises(ValueError, match="x must be contiguous"):
        fused.swiglu_pass(x)
    with pytest.raises(ValueError, match="x must be contiguous"):
        fused.swiglu_backward(x, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="mixed must be contiguous"):
        fused.split_rotate_pass(wide, 1, 8, table)
    of_heads = [torch.zeros(4, 1, 1, 8) for _ in range(3)]
    with pytest.raises(ValueError, match="sin must be contiguous"):
        fused.split_rotate_pass(wide.contiguous(), 1, 8, (table[0], torch.zeros(4, 4).t()))
    with pytest.raises(ValueError, match="cos must be contiguous"):
        fused.split_rotate_backward(*of_heads, (torch.zeros(4, 4).t(), table[1]))


def test_in_interpreter() -> None:
    interpreter.run_module(__file__)
