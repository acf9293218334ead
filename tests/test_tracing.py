"""torch.compile, fake tensors and the meta device: the same numbers, or shapes without numbers, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.dense import causal_attention

CONFIG = MoBAConfig(8, 2)
ENTRIES: dict[str, Callable[..., Tensor]] = {
    "moba_attention": lambda q, k, v, cu: moba_cp.moba_attention(
        q, k, v, CONFIG, layout=SequenceLayout.contiguous(cu, 1)
    ),
    "moba_attn_varlen": lambda q, k, v, cu: moba_cp.moba_attn_varlen(q, k, v, cu, 64, 8, 2),
    "causal_attention": lambda q, k, v, cu: causal_attention(q, k, v, None, layout=SequenceLayout.contiguous(cu, 1)),
}


def inputs(tokens: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    sizes = ((4, 8), (2, 8), (2, 6))
    made = [torch.randn(tokens, heads, dim, generator=generator).to(device, dtype) for heads, dim in sizes]
    return [x.requires_grad_() for x in made]


def with_gradients(f: Callable[..., Tensor], qkv: list[Tensor]) -> list[Tensor]:
    out = f(*qkv)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), qkv)]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ENTRIES)
def test_compiled_code_gives_the_same_numbers_in_any_order_of_calls(name: str, backend: str) -> None:
    """New layouts, lengths and dtypes, compiled before or after they were seen eagerly."""
    torch._dynamo.reset()
    entry = ENTRIES[name]
    # One layout object per call: dynamo guards on what a closure holds.
    compiled = torch.compile(lambda q, k, v, cu: entry(q * 1, k, v, cu) + 1, backend=backend)
    for number, cu in enumerate(([0, 33], [0, 20, 45], [0, 20, 46], [0, 7, 7, 51])):
        qkv = inputs(cu[-1], torch.float64 if number == 3 else torch.float32)
        eager = lambda q, k, v, cu=cu: entry(q * 1, k, v, torch.tensor(cu)) + 1  # noqa: E731
        if number % 2:
            with_gradients(eager, qkv)
        found = with_gradients(lambda q, k, v, cu=cu: compiled(q, k, v, torch.tensor(cu)), qkv)
        for x, y in zip(found, with_gradients(eager, qkv), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)  # compilers may round `sin` and sums in another way


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_break(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counters.clear()
    layouts = {tokens: SequenceLayout.contiguous([0, 20, tokens], 1) for tokens in (40, 52)}

    def f(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        return moba_cp.moba_attention(q * 2, k, v, CONFIG, layout=layout) * 3

    explained = torch._dynamo.explain(f)(*inputs(40), layouts[40])
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2
    compiled = torch.compile(f, backend="aot_eager", dynamic=dynamic)
    for tokens, layout in layouts.items():
        torch.testing.assert_close(compiled(*inputs(tokens), layout), f(*inputs(tokens), layout), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ENTRIES)
def test_fake_tensors_infer_shapes_and_leave_nothing_behind(name: str, dtype: torch.dtype) -> None:
    cu, qkv = [0, 19, 43], inputs(43, dtype)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in qkv]
        out, *gradients = with_gradients(lambda q, k, v: ENTRIES[name](q, k, v, cu), fake)
    assert (out.shape, out.dtype, out.device.type) == ((43, 4, 6), dtype, "cpu")
    assert [x.shape for x in gradients] == [x.shape for x in qkv]
    assert ENTRIES[name](*qkv, cu).isfinite().all()


@pytest.mark.parametrize("name", ENTRIES)
def test_meta_tensors_infer_shapes(name: str) -> None:
    out, *gradients = with_gradients(lambda q, k, v: ENTRIES[name](q, k, v, [0, 31]), inputs(31, device="meta"))
    assert (out.shape, out.is_meta) == ((31, 4, 6), True)
    assert all(x.is_meta for x in gradients)
    assert ENTRIES[name](*inputs(31), [0, 31]).isfinite().all()


def test_bad_fake_input_is_refused() -> None:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs(30)]
        with pytest.raises(ValueError, match="gives rank 0 31 tokens, but q has 30"):
            ENTRIES["moba_attention"](*fake, [0, 31])
        layout = SequenceLayout.contiguous([0, 30], 1)
        with pytest.raises(ValueError, match="return_report"):
            moba_cp.moba_attention(*fake, CONFIG, layout=layout, return_report=True)


def test_a_recorded_graph_has_shapes_and_does_not_run() -> None:
    """Attention is not in the graph, so running it must not give numbers."""
    qkv = [x.detach() for x in inputs(27)]
    f = lambda q, k, v: ENTRIES["moba_attention"](q, k, v, [0, 27]) + 1  # noqa: E731
    graph = make_fx(f, tracing_mode="fake")(*qkv)
    assert "traced_attention" in graph.code
    with pytest.raises(RuntimeError, match="cannot be part of a recorded graph"):
        graph(*qkv)
    with pytest.raises(RuntimeError, match="cannot be part of a recorded graph"):
        make_fx(f)(*qkv)
    assert f(*qkv).isfinite().all()
