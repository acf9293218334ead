"""What attention cannot be differentiated by, refused by name: second derivatives, forward mode, `torch.func` transforms.

torch's own `once_differentiable` refuses a second derivative only where the incoming gradient requires one and the graph is
walked as a whole. Otherwise the gradients come back as constants, and a gradient penalty is silently wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

SavedTensors: TypeAlias = Callable[[], tuple[Tensor, ...]]
"""Gives what forward saved."""
_TWICE = (
    "attention of moba_cp has no second derivatives: trying to differentiate twice a function that was marked with "
    "@once_differentiable"
)
_NO_TRANSFORMS = (
    "must not be inside a torch.func transform (vmap, grad, vjp, jvp, ...): use torch.autograd, and pack a batch as documents of "
    "one layout"
)
_NO_FORWARD_MODE = "attention of moba_cp has no forward-mode derivative (jvp)"


def refuse_transforms(**named: Tensor) -> None:
    """No argument is inside a transform of `torch.func`, which autograd functions of fixed shapes do not follow; none has a
    tangent of forward mode; and `torch.jit.trace`, in which sizes are tensors, does not record the call.

    Raises:
        TypeError: an argument is batched, or tracks gradients, by such a transform; or the call is recorded.
        NotImplementedError: an argument has a tangent.
    """
    if torch.jit.is_tracing():
        raise TypeError(f"torch.jit.trace cannot record attention of moba_cp, got {', '.join(named)}: use torch.export")
    if forward_ad._current_level >= 0:
        for name, x in named.items():
            if forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(f"{_NO_FORWARD_MODE}, got {name} with a tangent")
    if not torch._C._are_functorch_transforms_active():
        return
    of = torch._C._functorch
    for name, x in named.items():
        if of.is_batchedtensor(x) or of.is_gradtrackingtensor(x):
            raise TypeError(f"{name} {_NO_TRANSFORMS}")


def refuse_transforms_around() -> None:
    """The call is not inside a transform of `torch.func` of other tensors either: autograd functions refuse to run there, and on
    one rank alone, where others have begun to wait for it.

    Raises:
        TypeError: it is.
    """
    if torch._C._are_functorch_transforms_active():
        raise TypeError(f"a call of moba_cp {_NO_TRANSFORMS}")


def can_refuse(ctx: Any, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Note in forward whether `saved` holds the inputs themselves, so that their gradients can carry a refusal to them, and
    which hooks (checkpointing, offloading) have what forward saved, so that giving it back is work: a name, empty for none.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    ctx.hooks = "" if hooks is None else _name(hooks[0])
    needed = [x for x, wanted in zip(inputs, ctx.needs_input_grad, strict=False) if wanted]
    ctx.linked = all(any(x is y for y in saved) for x in needed)


def _name(hook: Any) -> str:
    """What tells one kind of hook from others, on every rank."""
    of = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{getattr(of, '__module__', '')}.{of.__qualname__}"[-200:]  # a method of a built-in type has no module


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of a `torch.autograd.Function`, with gradients that refuse to be differentiated again.

    Forward calls `can_refuse`. Where it saved other tensors than its inputs, `create_graph=True` is refused at once. Other
    ranks are told of what is refused here by `ctx.together`, if forward has set it: also of what torch refuses as it gives saved
    tensors back (one was changed in place, the graph is freed), where no hook has them.

    Args:
        backward: takes `ctx`, a function that gives its saved tensors, and the incoming gradients. A hook may compute them again,
            over all ranks, so ranks must have compared the order of their backward passes by then. It runs once.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *incoming: Any) -> Any:
        given = [x for x in incoming if isinstance(x, Tensor)]
        again = torch.is_grad_enabled()
        saved = functools.cache(lambda: ctx.saved_tensors)
        with getattr(ctx, "together", contextlib.nullcontext()):
            # As is_grads_batched=True makes them.
            if any(torch._C._functorch.is_legacy_batchedtensor(x) for x in given):
                raise RuntimeError("attention of moba_cp takes one gradient at a time, got is_grads_batched=True")
            if again and not ctx.linked:
                raise RuntimeError(f"{_TWICE}; here create_graph=True is refused already")
            if getattr(ctx, "hooks", None) == "":
                saved()
        with torch.no_grad():
            gradients = backward(ctx, saved, *incoming)
        if not again:
            return gradients
        count = sum(isinstance(x, Tensor) for x in gradients)
        held = [x for x in (*given, *saved()) if x.requires_grad]
        linked = iter(_Twice.apply(count, *(x for x in gradients if isinstance(x, Tensor)), *held))
        return tuple(next(linked) if isinstance(x, Tensor) else x for x in gradients)

    return refusing


def refuses_create_graph(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of a `torch.autograd.Function` of one rank, which refuses `create_graph=True` at once. A compiled graph has no
    second derivatives anyway."""

    @functools.wraps(backward)
    def refusing(ctx: Any, *incoming: Any) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise RuntimeError("layers of moba_cp have no second derivatives, got create_graph=True")
        return backward(ctx, *incoming)

    return refusing


class _Twice(torch.autograd.Function):
    """The first `count` tensors as they are; they depend on all of `tensors`, and refuse a derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> None:
        raise RuntimeError(_TWICE)


def no_forward_mode(ctx: Any, *tangents: object) -> None:
    """`jvp` of an autograd function that has none."""
    raise NotImplementedError(_NO_FORWARD_MODE)
