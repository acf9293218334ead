"""Calls with tensors that hold no numbers: under `FakeTensorMode`, on the meta device, and in graphs that `make_fx` records.

Such a call checks its arguments and infers the output's shape. It makes no plan, starts no collective and fills no cache. A
graph that records it holds the operators below, which refuse to run: attention itself is not in the graph. A CUDA graph is
another thing: it captures calls that run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

TRACED = (FakeTensor, FunctionalTensor)
"""Classes of tensors that hold no numbers."""
_TRACING_MODES = (FakeTensorMode, FunctionalTensorMode, ProxyTorchDispatchMode)


def without_numbers(*tensors: object) -> bool:
    """Whether a call with these arguments can only infer shapes. A mixture with ordinary tensors is bad input instead."""
    given = [x for x in tensors if isinstance(x, Tensor)]
    if given and all(_is_traced(x) or x.is_meta for x in given):
        return True
    return _tracing()


def sends_nothing(*tensors: object) -> bool:
    """Whether a call with these arguments may not even tell other ranks of an error: it is part of a recording. A call with
    tensors on the meta device outside of one may."""
    return any(_is_traced(x) for x in tensors if isinstance(x, Tensor)) or _tracing()


def is_captured(x: Tensor) -> bool:
    """Whether a CUDA graph is capturing the current stream, on which calls with `x` run."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_traced(x: Tensor) -> bool:
    return isinstance(x, TRACED) or torch._is_functional_tensor(x)


def _tracing() -> bool:
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(mode, _TRACING_MODES) for mode in _get_current_dispatch_mode_stack())


def infer_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A tensor without numbers in place of the attention output `[T, Hq, Dv]`; differentiable in the same way.

    Raises:
        RuntimeError: the tensors hold numbers, as in `make_fx` with real tensors.
    """
    return torch.ops.moba_cp.traced_attention(q, k, v)


def _refuse() -> None:
    raise RuntimeError(
        "attention of moba_cp cannot be part of a recorded graph: compile with torch.compile, which breaks the graph at the "
        "call, or trace with fake tensors (make_fx with tracing_mode='fake'), which infers shapes only"
    )


@torch.library.custom_op("moba_cp::traced_attention", mutates_args=())
def _traced_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    _refuse()
    return q


@torch.library.custom_op("moba_cp::traced_attention_backward", mutates_args=())
def _traced_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _refuse()
    return q, k, v


@_traced_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@_traced_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.moba_cp.traced_attention_backward(dout, *ctx.saved_tensors)


_traced_attention.register_autograd(_backward, setup_context=_save)
