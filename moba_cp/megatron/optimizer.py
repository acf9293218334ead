"""Norm and scaling of all gradients at once, where Megatron has neither Transformer Engine's kernels nor apex's.

Megatron's own substitutes take one tensor after the other, and read each tensor's norm on the host, which empties the GPU's queue
a hundred times per step.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads, optimizer
from torch import Tensor


def use_foreach_kernels() -> None:
    """Let Megatron's optimizer use torch's functions of lists, for the rest of the process. Where Transformer Engine or
    apex serve it, and when called again, nothing changes."""
    if getattr(clip_grads, "l2_norm_impl", None) is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm
    for module in (clip_grads, optimizer):
        if getattr(module, "multi_tensor_scale_impl", None) is utils.local_multi_tensor_scale:
            module.multi_tensor_scale_impl = _scale


def _norm(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Norm of all tensors of the first list as one vector, ``[1]`` on their device."""
    norms = torch._foreach_norm(tensor_lists[0])
    return torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms])).reshape(1), None


def _scale(chunk_size: int, noop_flag: Any, tensor_lists: list[list[Tensor]], scale: float) -> None:
    """Tensors of the first list times ``scale`` into those of the second, which may be the same."""
    sources, targets = tensor_lists
    if all(a is b for a, b in zip(sources, targets, strict=True)):
        torch._foreach_mul_(targets, scale)
    else:
        torch._foreach_copy_(targets, sources if scale == 1.0 else torch._foreach_mul(sources, scale))
