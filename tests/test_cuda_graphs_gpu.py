"""On one GPU: attention is captured by a CUDA graph, forward and backward, and a replay has an eager call's bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.dense import causal_attention

pytestmark = pytest.mark.gpu

CASES = [
    # cu_seqlens, block size, topk, q heads, kv heads, D
    ([0, 8192], 512, 8, 12, 4, 64),
    ([0, 1000, 3333, 5000], 128, 5, 4, 2, 128),
    ([0, 4096, 8000], 512, 4, 4, 4, 128),
    ([0, 3000], 100, 6, 4, 2, 96),
    ([0, 6000, 8192], 1024, 4, 4, 2, 128),  # dq is summed
]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(case: tuple, seed: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    cu, _, _, q_heads, kv_heads, dim = case
    generator = torch.Generator("cuda").manual_seed(seed)
    heads = (q_heads, kv_heads, kv_heads, q_heads)
    return [torch.randn(cu[-1], h, dim, device="cuda", dtype=torch.bfloat16, generator=generator) for h in heads]


def attention_of(case: tuple, **options: int) -> Attention:
    layout, config = SequenceLayout.contiguous(case[0], 1), MoBAConfig(*case[1:3])
    return lambda q, k, v: moba_attention(q, k, v, config, layout=layout, **options)


def passes(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def captured(attention: Attention, static: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """The graph of both passes over `static`, and the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            passes(attention, *static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = passes(attention, *static)
    return graph, found


def check_replays(case: tuple, attention: Attention, exact: Sequence[int] = (0, 1, 2, 3)) -> None:
    """Inputs that the capture did not see select other blocks, so that routing must be part of the graph. `exact`: which of out,
    dq, dk and dv have the same bits; the others are sums of bf16 rounding in another order."""
    static = inputs(case, 0)
    graph, found = captured(attention, static)
    for seed in (1, 2):
        fresh = inputs(case, seed)
        for target, x in zip(static, fresh, strict=True):
            target.copy_(x)
        graph.replay()
        for index, (ours, expected) in enumerate(zip(found, passes(attention, *fresh), strict=True)):
            if index in exact:
                assert torch.equal(ours, expected)
            else:
                torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


@pytest.mark.parametrize("case", CASES)
def test_replays_of_moba(case: tuple) -> None:
    check_replays(case, attention_of(case))


def test_replays_with_several_chunks_of_rows() -> None:
    """Lists of the next chunk are made, and gradients are added, on side streams: the graph holds them too."""
    case = CASES[1]
    check_replays(case, attention_of(case, workspace_bytes=4 << 20))


def test_replays_of_full_attention() -> None:
    case = CASES[2]
    layout = SequenceLayout.contiguous(case[0], 1)
    # dq of cudnn and flash is summed in no fixed order.
    check_replays(case, lambda q, k, v: causal_attention(q, k, v, None, layout=layout), exact=(0, 2, 3))


def test_graphed_callable() -> None:
    case = CASES[0]
    attention = attention_of(case)
    samples = tuple(x.requires_grad_() for x in inputs(case, 0)[:3])
    graphed = torch.cuda.make_graphed_callables(attention, samples)
    q, k, v, dout = inputs(case, 3)
    for ours, expected in zip(passes(graphed, q, k, v, dout), passes(attention, q, k, v, dout), strict=True):
        assert torch.equal(ours, expected)
