"""Norm and scaling of lists of gradients agree with Megatron's own, without reading a number per tensor on the host."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from moba_cp.megatron import optimizer


def test_norm_and_scale() -> None:
    tensors = [torch.randn(n, 3) for n in (1, 4, 7)]
    norm, _ = optimizer._norm(0, None, [tensors], False)
    assert norm.shape == (1,)
    torch.testing.assert_close(norm[0], torch.cat([x.flatten() for x in tensors]).norm())
    copies = [x.to(torch.bfloat16) for x in tensors]
    optimizer._scale(0, None, [tensors, copies], 1.0)
    assert all(torch.equal(a.to(torch.bfloat16), b) for a, b in zip(tensors, copies, strict=True))
    targets = [torch.zeros_like(x) for x in tensors]
    optimizer._scale(0, None, [tensors, targets], 0.5)
    optimizer._scale(0, None, [tensors, tensors], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, targets, strict=True))


def test_megatron_uses_them_where_it_has_nothing_better(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads

    monkeypatch.setattr(clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_impl", other := lambda *_: None)
    optimizer.use_foreach_kernels()
    assert clip_grads.l2_norm_impl is optimizer._norm
    assert clip_grads.multi_tensor_scale_impl is other
