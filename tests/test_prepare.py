"""Calls on one rank, which are checked and planned once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, prepare
from moba_cp.config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from moba_cp.parallel.plan_cache import PLANS
from moba_cp.stages import time_stages
from tests.ranks import run_ranks

LAYOUTS = [SequenceLayout.contiguous(cu, 1) for cu in ([0, 40], [0, 13, 40])]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(40, heads, 4, generator=generator).requires_grad_() for heads in (4, 2, 2)]


def eager(q: Tensor, k: Tensor, v: Tensor, layout: Any = LAYOUTS[0], topk: int = 3, **options: Any) -> Tensor:
    return moba_cp.moba_attention(q, k, v, MoBAConfig(8, topk), layout=layout, **options)


def operator(
    q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout = LAYOUTS[0], topk: int = 3, group: str = ""
) -> Tensor:
    return torch.ops.moba_cp.attention(
        q, k, v, layout.described, None, None, None, 8, topk, None, group, "auto", True, False, torch.is_grad_enabled(),
        DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES, None,
    )[0]  # fmt: skip


@pytest.fixture(params=[eager, operator])
def attention(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return request.param


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of q of the calls that were checked and planned, in turn; none is known at the start."""
    shapes: list[tuple[int, ...]] = []
    check = prepare.check_call
    monkeypatch.setattr(
        prepare, "check_call", lambda q, *rest, **named: (shapes.append(tuple(q.shape)), check(q, *rest, **named))[1]
    )
    PLANS.clear()
    yield shapes
    PLANS.clear()


def test_a_call_is_checked_and_planned_once(attention: Callable[..., Tensor], prepared: list[tuple[int, ...]]) -> None:
    """Until its shapes, its dtype, its numbers or whether gradients follow differ; what is bad is refused each time."""
    q, k, v = tensors()
    for _ in range(3):
        attention(q, k, v)
    again = SequenceLayout.contiguous(torch.tensor([0, 40]), 1)
    attention(*(torch.nn.Parameter(x.detach()) for x in (q, k, v)), again)
    assert len(prepared) == 1
    before = PLANS.kept_bytes().host
    others: list[Callable[[], object]] = [
        lambda: attention(q[:, :2], k, v),
        lambda: attention(q.double(), k.double(), v.double()),
        lambda: attention(q, k, v, topk=2),
        torch.no_grad()(lambda: attention(q, k, v)),
        lambda: attention(q, k, v, LAYOUTS[1]),
    ]
    for count, other in enumerate(others, start=2):
        for _ in range(2):
            other()
        assert len(prepared) == count
    assert PLANS.kept_bytes().host > before
    for _ in range(2):
        with pytest.raises(ValueError, match="gives rank 0 40 tokens, but q has 39"):
            attention(q[1:], k[1:], v[1:])
        with pytest.raises(TypeError, match="q, k and v must have one dtype"):
            attention(q, k.double(), v)
    PLANS.clear()
    attention(q, k, v)
    assert prepared[-1] == (40, 4, 4)


def test_known_calls_give_what_others_give(attention: Callable[..., Tensor]) -> None:
    """Bits of outputs and gradients, in whatever order calls and their backward passes come."""
    found = []
    for known in (False, True):
        PLANS.clear()
        calls = [(tensors(), layout) for layout in LAYOUTS]
        if known:
            for qkv, layout in calls:
                attention(*qkv, layout)
        outs = [attention(*qkv, layout) for qkv, layout in calls]
        for out in outs:
            (out * out).sum().backward()
        found.append([x for (qkv, _), out in zip(calls, outs, strict=True) for x in (out, *(y.grad for y in qkv))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Named(Tensor):
    """A tensor of a class of its own."""


REFUSED: dict[str, Callable[..., object]] = {
    "an int that equals True": lambda q, k, v: eager(q, k, v, workspace_bytes=True),
    "a float that equals an int": lambda q, k, v: eager(q, k, v, exchange_bytes=1.0),
    "ranks that are no int": lambda q, k, v: eager(q, k, v, head_parallel=1.0),
    "a flag that equals one": lambda q, k, v: eager(q, k, v, check_selection=1),
    "what has no hash": lambda q, k, v: eager(q, k, v, comm=["auto"]),
    "a layout of another class": lambda q, k, v: eager(q, k, v, [0, 40]),
    "a tensor of another class": lambda q, k, v: eager(q, k, v.as_subclass(Named)),
    "a sparse tensor": lambda q, k, v: eager(q, k, v.detach().to_sparse()),
    "a list": lambda q, k, v: eager(q, k, v.tolist()),
    "a transform": lambda q, k, v: torch.func.vmap(lambda x: eager(x, k, v))(q[None]),
}


@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
def test_what_resembles_a_known_call_is_refused(refused: Callable[..., object]) -> None:
    qkv = tensors()
    for workspace, exchange in ((DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES), (1, 1)):
        for head_parallel in (None, 1):
            eager(*qkv, workspace_bytes=workspace, exchange_bytes=exchange, head_parallel=head_parallel)
    with pytest.raises(TypeError):
        refused(*qkv)


def test_tensors_without_numbers_resemble_a_known_call() -> None:
    eager(*tensors())
    assert eager(*(x.detach().to("meta") for x in tensors())).is_meta


def group_of_one(rank: int, size: int) -> tuple[int, str]:
    """How often three calls with a group by name are planned, and what is said of one that does not fit the layout."""
    planned, check = [], prepare.check_call
    prepare.check_call = lambda *args, **named: (planned.append(1), check(*args, **named))[1]
    alone = dist.new_subgroups(group_size=1)[0].group_name
    q, k, v = tensors()
    for _ in range(3):
        operator(q, k, v, group=alone).sum().backward()
    with pytest.raises(ValueError, match="ranks") as refused:
        operator(q, k, v, group=dist.group.WORLD.group_name)
    return len(planned), str(refused.value)


def test_a_group_of_one_rank_is_no_group() -> None:
    for planned, refused in run_ranks(2, group_of_one):
        assert planned == 2  # the last one was refused
        assert "the layout is for 1 ranks, but the group has 2" in refused


def test_stages_are_timed_of_calls_that_are_known(
    attention: Callable[..., Tensor], prepared: list[tuple[int, ...]]
) -> None:
    """A known call has no timer."""
    qkv = tensors()
    attention(*qkv)
    with time_stages():
        attention(*qkv)
    attention(*qkv)
    assert len(prepared) == 2
