"""What an operator leaves for its backward outside of the graph: used where backward gets the same memory, gone with it, and
nowhere needed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch._functorch.config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, operators
from moba_cp.attached import attached
from moba_cp.config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from moba_cp.kernels import torch_backend

CONFIG = MoBAConfig(8, 3)
LAYOUTS = [SequenceLayout.contiguous(cu, 1) for cu in ([0, 40], [0, 13, 40])]
SLOTS = {"as many": 3, "fewer blocks": 16}
"""`topk`: as many slots as the call has, and more, of which backward drops some."""
Attention = Callable[..., Tensor]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, heads, 4, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def eager(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout = LAYOUTS[0], topk: int = 3) -> Tensor:
    return moba_cp.moba_attention(q, k, v, MoBAConfig(8, topk), layout=layout)


def outputs(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout = LAYOUTS[0], topk: int = 3) -> tuple[Tensor, ...]:
    """Of the operator, called directly."""
    return torch.ops.moba_cp.attention(
        q, k, v, layout.described, None, None, None, 8, topk, None, "", "auto", True, False, torch.is_grad_enabled(),
        DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES, None,
    )  # fmt: skip


def operator(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout = LAYOUTS[0], topk: int = 3) -> Tensor:
    return outputs(q, k, v, layout, topk)[0]


@pytest.fixture(params=["operator", "aot_eager", "inductor"])
def attention(request: pytest.FixtureRequest) -> Attention:
    if request.param == "operator":
        return operator
    torch._dynamo.reset()
    return torch.compile(eager, backend=request.param, fullgraph=True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Block counts of the routing lists made, in turn."""
    counts: list[int] = []
    route = torch_backend.route

    def counted(*args: Tensor, n_blocks: int, **sizes: int) -> object:
        counts.append(n_blocks)
        return route(*args, n_blocks=n_blocks, **sizes)

    monkeypatch.setattr(torch_backend, "route", counted)
    return counts


def gradients(out: Tensor, qkv: list[Tensor], **options: bool) -> list[Tensor]:
    return list(torch.autograd.grad(out.sin().sum(), qkv, **options))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("topk", SLOTS.values(), ids=SLOTS)
def test_lists_are_made_once_per_call(attention: Attention, made: list[int], topk: int) -> None:
    """Several calls in flight, backward in another order than forward."""
    qkv = tensors()
    expected = [gradients(eager(*qkv, layout, topk), qkv) for layout in LAYOUTS]
    made.clear()
    outs = [attention(*qkv, layout, topk) for layout in (*LAYOUTS, LAYOUTS[0])]
    assert made == [5, 6, 5]
    for number in (1, 2, 0):
        assert equal(gradients(outs[number], qkv), expected[number % 2])
    assert made == [5, 6, 5]


def test_backward_runs_twice_over_one_graph(attention: Attention, made: list[int]) -> None:
    qkv = tensors()
    with torch._functorch.config.patch(donated_buffer=False):  # else compiled graphs refuse `retain_graph` themselves
        out = attention(*qkv)
        first = gradients(out, qkv, retain_graph=True)
    assert equal(gradients(out, qkv), first)
    assert len(made) == 1


@pytest.mark.parametrize("topk", SLOTS.values(), ids=SLOTS)
def test_lists_are_made_again_for_a_copy(attention: Attention, made: list[int], topk: int) -> None:
    """As where saved tensors are moved to the host and back."""
    qkv = tensors()
    expected = gradients(eager(*qkv, LAYOUTS[1], topk), qkv)
    made.clear()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x):
        out = attention(*qkv, LAYOUTS[1], topk)
    assert equal(gradients(out, qkv), expected)
    assert made == [6, 6]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_call(attention: Attention, use_reentrant: bool) -> None:
    qkv = tensors()
    expected = gradients(eager(*qkv), qkv)
    out = checkpoint(attention, *qkv, use_reentrant=use_reentrant)
    if use_reentrant:  # does not support autograd.grad
        out.sin().sum().backward()
        found = [x.grad for x in qkv if x.grad is not None]
    else:
        found = gradients(out, qkv)
    assert equal(found, expected)


def test_a_call_checkpointed_inside_a_graph() -> None:
    torch._dynamo.reset()
    qkv = tensors()
    compiled = torch.compile(lambda *x: checkpoint(eager, *x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert equal(gradients(compiled(*qkv), qkv), gradients(eager(*qkv), qkv))


@pytest.mark.parametrize("end", ["backward", "never"])
def test_lists_are_freed_with_what_the_graph_saved(
    attention: Attention, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, without the garbage collector, which does not see the size of tensors."""
    alive: list[weakref.ref[Tensor]] = []
    attach = operators.attach

    def noted(selected: Tensor, *rest: object) -> None:
        attach(selected, *rest)
        found = attached(selected, rest[0])
        assert found is not None
        alive.extend(weakref.ref(x) for lists in found.lists for x in lists.tensors())

    monkeypatch.setattr(operators, "attach", noted)
    qkv = tensors()
    out = attention(*qkv)
    gc.collect()
    gc.disable()
    try:
        assert alive
        assert all(x() is not None for x in alive)
        if end == "backward":
            gradients(out, qkv)
        else:
            del out
        assert all(x() is None for x in alive)
    finally:
        gc.enable()


def test_both_tensors_are_of_one_pass(made: list[int]) -> None:
    """Memory that holds another pass's numbers would be taken for them; then the route's memory is another one too."""
    qkv = tensors()
    first, second = outputs(*qkv), outputs(*qkv, LAYOUTS[1])
    assert attached(first[2], first[5]) is not None
    assert attached(first[2].detach().view(-1), first[5][:2]) is not None
    assert attached(first[2], second[5]) is None
    assert attached(first[2], first[5].clone()) is None
    assert attached(first[2].clone(), first[5]) is None


def test_nothing_is_left_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a backward; and in a CUDA graph, which would keep the memory for good."""
    qkv = tensors()
    with torch.no_grad():
        found = outputs(*qkv)
        assert attached(found[2], found[5]) is None
    monkeypatch.setattr(operators, "is_captured", lambda x: True)
    found = outputs(*qkv)
    assert attached(found[2], found[5]) is None
    assert equal(gradients(found[0], qkv), gradients(eager(*qkv), qkv))
