"""Derivatives that attention does not have are refused by name, however they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moba_cp
from moba_cp.dense import causal_attention
from tests.gpu_ranks import run_gpu_ranks
from tests.ranks import run_ranks

LAYOUT, CONFIG = moba_cp.SequenceLayout.contiguous([0, 13, 40], 1), moba_cp.MoBAConfig(8, 3)
ATTENTIONS = {
    "moba": lambda q, k, v: moba_cp.moba_attention(q, k, v, CONFIG, layout=LAYOUT),
    "full": lambda q, k, v: causal_attention(q, k, v, None, layout=LAYOUT),
}


def tensors(device: str = "cpu", **settings: bool) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(40, heads, 4, dtype=torch.float64, device=device, **settings) for heads in (4, 2, 2)]


@pytest.fixture(params=ATTENTIONS)
def attention(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return ATTENTIONS[request.param]


@pytest.mark.parametrize("loss", [Tensor.sum, lambda out: out.square().sum()], ids=["sum", "square"])
@pytest.mark.parametrize("unit_stride", [True, False], ids=["unit stride", "copied"])
def test_a_penalty_on_gradients_is_not_silently_wrong(
    attention: Callable[..., Tensor], loss: Callable[[Tensor], Tensor], unit_stride: bool
) -> None:
    """Also where the penalty has other derivatives, and `autograd.grad` asks for some inputs only."""
    q, k, v = tensors(requires_grad=True)
    if not unit_stride:
        k = k.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()

    def penalty(of: Tensor) -> None:
        (first,) = torch.autograd.grad(loss(attention(q, k, v)), of, create_graph=True)
        torch.autograd.grad(first.square().sum() + of.pow(3).sum(), of)

    for of in (q, k):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            penalty(of)


def test_a_graph_of_gradients_that_nobody_differentiates(attention: Callable[..., Tensor]) -> None:
    q, k, v = tensors(requires_grad=True)
    kept = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v), create_graph=True)
    plain = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    for x, y in zip(kept, plain, strict=True):
        assert torch.equal(x, y)


def heads_split(rank: int, size: int) -> None:
    layout = moba_cp.SequenceLayout.zigzag([0, 80], size)
    q, k, v = tensors(requires_grad=True)
    out = moba_cp.moba_attention(q, k, v, CONFIG, layout=layout, comm="a2a")
    torch.autograd.grad(out.sum(), q, create_graph=True)


def scores(rank: int, size: int) -> None:
    """Bilinear in the gates, so that the gradient of one depends on the other."""
    layout = moba_cp.SequenceLayout.zigzag([0, 80], size)
    q_gate, k_gate, _ = tensors(requires_grad=True)
    blocks = torch.zeros(4, 40, 1, dtype=torch.int32)
    found = moba_cp.block_scores(q_gate, k_gate, blocks, CONFIG, layout=layout)
    (first,) = torch.autograd.grad(found.sum(), k_gate, create_graph=True)
    torch.autograd.grad(first.square().sum() + q_gate.sum(), q_gate)


@pytest.mark.parametrize("function", [heads_split, scores])
def test_several_ranks(function: Callable[[int, int], None]) -> None:
    with pytest.raises(RuntimeError, match="no second derivatives"):
        run_ranks(2, function)


def refuses_alone(rank: int, size: int, device: str = "cpu") -> list[str]:
    """What rank 1 asks of backward, and rank 0 does not: both raise, and the group works on."""
    layout = moba_cp.SequenceLayout.zigzag([0, 80], size)

    def run(comm: str, wrong: Callable[[Tensor, list[Tensor]], object]) -> str:
        inputs, group = [x.requires_grad_() for x in tensors(device)], dist.new_group()
        if comm == "full attention":
            out = causal_attention(*inputs, None, layout=layout, group=group)
        else:
            out = moba_cp.moba_attention(*inputs, CONFIG, layout=layout, group=group, comm=comm)
        with pytest.raises((RuntimeError, ValueError)) as error:  # the text is looked at below
            wrong(out, inputs) if rank else torch.autograd.grad(out.sum(), inputs)
        moba_cp.moba_attention(*inputs, CONFIG, layout=layout, group=group).sum().backward()
        assert all(x.grad.isfinite().all() for x in inputs)
        return str(error.value)

    def again(out: Tensor, inputs: list[Tensor]) -> None:
        torch.autograd.grad(out, inputs, out.new_ones(2, *out.shape), is_grads_batched=True)

    def graph(out: Tensor, inputs: list[Tensor]) -> None:
        torch.autograd.grad(out.sum(), inputs, create_graph=True)

    return [*(run(comm, again) for comm in ("ring", "full attention", "a2a")), run("a2a", graph)]


def on_gpu(rank: int, size: int, path: Path) -> None:
    torch.save(refuses_alone(rank, size, "cuda"), path / f"{rank}.pt")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_backward_that_one_rank_refuses_ends_the_others_too(device: str, tmp_path: Path) -> None:
    """Before four rounds of a group; later on GPUs the others wait for the rank."""
    if device == "cuda":
        run_gpu_ranks(2, on_gpu, tmp_path)
        first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    else:
        first, second = run_ranks(2, refuses_alone)
    assert ["is_grads_batched" in x or "create_graph" in x for x in second] == [True] * 4
    for told, own in zip(first, second, strict=True):
        assert told.startswith(f"rank 1 refused its input: RuntimeError: {own[:60]}")


def saved_tensors_refused_alone(rank: int, size: int) -> list[str]:
    """What torch refuses of saved tensors on rank 1: both raise, and the group works on."""
    layout = moba_cp.SequenceLayout.zigzag([0, 80], size)

    def moba(*inputs: Tensor, **place: Any) -> Tensor:
        return moba_cp.moba_attention(*inputs, CONFIG, comm="ring", **place)

    def full(*inputs: Tensor, **place: Any) -> Tensor:
        return causal_attention(*inputs, None, **place)

    def run(call: Callable[..., Tensor], frees: bool) -> str:
        """Rank 1 frees its graph in a backward of both, or changes its keys in place."""
        inputs, group = [x.requires_grad_() * 1 for x in tensors()], dist.new_group()
        out = call(*inputs, layout=layout, group=group)
        if frees:
            out.sum().backward(retain_graph=rank == 0)
        elif rank:
            inputs[1].add_(1)
        with pytest.raises((RuntimeError, ValueError)) as error:  # the text is looked at below
            out.sum().backward()
        fresh = [x.requires_grad_() for x in tensors()]
        call(*fresh, layout=layout, group=group).sum().backward()
        assert all(x.grad.isfinite().all() for x in fresh)
        return str(error.value)

    return [run(call, frees) for call in (moba, full) for frees in (False, True)]


def test_what_torch_refuses_of_saved_tensors_on_one_rank_ends_the_others_too() -> None:
    first, second = run_ranks(2, saved_tensors_refused_alone)
    for told, own, text in zip(first, second, ["modified by an inplace operation", "a second time"] * 2, strict=True):
        assert text in own
        assert told.startswith(f"rank 1 refused its input: RuntimeError: {own[:60]}")


def test_a_checkpoint_is_read_once_also_for_a_graph_of_gradients(attention: Callable[..., Tensor]) -> None:
    """torch refuses to give it back a second time; that `create_graph=True` comes to nothing is what is said."""
    inputs = [x.requires_grad_() for x in tensors()]
    out = checkpoint(attention, *inputs, use_reentrant=False)
    found = torch.autograd.grad(out.sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(attention(*inputs).sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(found[0].sum(), inputs)


def test_transforms_of_torch_func(attention: Callable[..., Tensor]) -> None:
    q, k, v = tensors()
    batch = [x.expand(2, *x.shape) for x in (q, k, v)]
    asked: list[Callable[[], object]] = [
        lambda: torch.vmap(attention)(*batch),
        lambda: torch.func.grad(lambda x: attention(q, x, v).sum())(k),
        lambda: torch.func.vjp(lambda x: attention(x, k, v), q),
        lambda: torch.func.jacrev(lambda x: attention(x, k, v))(q),
    ]
    for ask in asked:
        with pytest.raises(TypeError, match="must not be inside a torch.func transform"):
            ask()


def test_a_transform_around_a_call_of_other_tensors(attention: Callable[..., Tensor]) -> None:
    """torch's autograd functions refuse it too, but only once ranks have begun to wait for each other."""
    qkv = tensors()
    with pytest.raises(TypeError, match="a call of moba_cp must not be inside a torch.func transform"):
        torch.vmap(lambda x: attention(*qkv).sum() + x)(torch.zeros(2))


def test_torchscript_does_not_record(attention: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"torch.jit.trace cannot record attention .* got q, k, v.*: use torch.export"):
        torch.jit.trace(attention, tuple(tensors()))


def test_forward_mode_and_batched_gradients(attention: Callable[..., Tensor]) -> None:
    q, k, v = tensors()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            attention(dual, k, v)
    q.requires_grad_()
    out = attention(q, k, v)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(out, q, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)
