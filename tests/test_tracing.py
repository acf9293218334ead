"""torch.compile, torch.export, fake tensors and the meta device: the same numbers, or shapes without numbers, and nothing left
behind."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.fx.experimental.proxy_tensor import make_fx

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, operators
from moba_cp.dense import causal_attention
from moba_cp.kernels import torch_backend
from tests.ranks import run_ranks

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


@pytest.mark.parametrize(("name", "backend"), [("moba_attention", "eager"), *((name, "aot_eager") for name in ENTRIES)])
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
def test_one_graph_serves_every_layout(dynamic: bool | None) -> None:
    """No break, the bits of an eager call, and at most one more compilation, in which dynamo makes sizes dynamic."""
    torch._dynamo.reset()
    counters.clear()

    def f(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        return moba_cp.moba_attention(q * 2, k, v, CONFIG, layout=layout) * 3

    compiled = torch.compile(f, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    runs = SequenceLayout.from_runs([[(30, 61), (0, 30)]], [0, 20, 61])
    ends = ([0, 40], [0, 20, 52], [0, 7, 7, 9, 33], [0, 90])
    for layout in (*(SequenceLayout.contiguous(cu, 1) for cu in ends), runs):
        qkv = inputs(layout.total_tokens)
        found = with_gradients(lambda *x, layout=layout: compiled(*x, layout), qkv)
        expected = with_gradients(lambda *x, layout=layout: f(*x, layout), qkv)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    assert counters["stats"]["unique_graphs"] <= 2
    with torch.no_grad():
        assert torch.equal(compiled(*qkv, layout), f(*qkv, layout))
    with pytest.raises(ValueError, match="gives rank 0 61 tokens, but q has 60"):
        compiled(*inputs(60), layout)


def test_a_graph_in_inference_mode() -> None:
    """Layouts made in it or outside: they enter as ordinary tensors either way."""
    torch._dynamo.reset()
    compiled = torch.compile(moba_cp.moba_attention, backend="aot_eager", fullgraph=True)
    outside = SequenceLayout.contiguous([0, 20, 40], 1)
    with torch.inference_mode():
        for layout in (outside, SequenceLayout.contiguous([0, 9, 40], 1), pickle.loads(pickle.dumps(outside))):
            qkv = inputs(40)
            expected = moba_cp.moba_attention(*qkv, CONFIG, layout=layout)
            assert torch.equal(compiled(*qkv, CONFIG, layout=layout), expected)
            assert not layout.described.is_inference()
    qkv = inputs(40)
    assert torch.equal(compiled(*qkv, CONFIG, layout=layout), moba_cp.moba_attention(*qkv, CONFIG, layout=layout))


def test_lengths_on_the_device_are_part_of_the_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ENTRIES["moba_attn_varlen"], backend="aot_eager", fullgraph=True)
    for cu in ([0, 33], [0, 20, 45], [0, 20, 46]):
        qkv, lengths = inputs(cu[-1]), torch.tensor(cu, dtype=torch.int32)
        found = with_gradients(lambda *x, lengths=lengths: compiled(*x, lengths), qkv)
        expected = with_gradients(lambda *x, cu=cu: ENTRIES["moba_attn_varlen"](*x, cu), qkv)
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    with pytest.raises(ValueError, match="max_seqlen is 64, but cu_seqlens has a document of 70 tokens"):
        compiled(*inputs(70), torch.tensor([0, 70], dtype=torch.int32))


def test_selections_are_part_of_the_graph() -> None:
    torch._dynamo.reset()
    layout, qkv = SequenceLayout.contiguous([0, 41], 1), inputs(41)
    gate = [torch.randn(41, 1, 3, requires_grad=True) for _ in range(2)]

    def f(q: Tensor, k: Tensor, v: Tensor, listed: Tensor) -> tuple[Tensor, ...]:
        call = lambda **options: moba_cp.moba_attention(q, k, v, CONFIG, layout=layout, **options)  # noqa: E731
        out, selection = call(routing=(gate[0] * 2, gate[1]), return_selection=True)
        return (
            out + call(selection=listed, check_selection=False),
            selection.blocks,
            selection.weights,
            call(selection=listed),
        )

    listed = torch.zeros(1, 41, 1, dtype=torch.int64)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    found, expected = compiled(*qkv, listed), f(*qkv, listed)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    assert not found[2].requires_grad
    for x, y in zip(*(torch.autograd.grad(outs[0].sin().sum(), qkv) for outs in (found, expected)), strict=True):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="a block after the row's own: head 0, row 0"):
        compiled(*qkv, listed + 3)


@pytest.mark.parametrize("options", [{"return_report": True}, {"config": MoBAConfig(8, 200)}], ids=["report", "topk"])
def test_one_graph_break(options: dict) -> None:
    torch._dynamo.reset()
    layout = SequenceLayout.contiguous([0, 20, 40], 1)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = moba_cp.moba_attention(q * 2, k, v, **({"config": CONFIG, "layout": layout} | options))
        return (out[0] if options.get("return_report") else out) * 3

    explained = torch._dynamo.explain(f)(*inputs(40))
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2
    assert torch.equal(torch.compile(f, backend="eager")(*inputs(40)), f(*inputs(40)))


def compiled_on_rank(rank: int, size: int, comms: list[str]) -> list[str]:
    """What differs from an eager call, in a graph without breaks; the group as a mesh, as a group, and by default."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    wrong, gathered, exchange_wanted = [], [], operators.exchange_wanted
    operators.exchange_wanted = lambda *given: (gathered.append(comm), exchange_wanted(*given))[1]
    for number, comm in enumerate(comms):
        group = (mesh, dist.group.WORLD, None)[number % 3]

        def f(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, comm=comm, group=group) -> Tensor:
            return moba_cp.moba_attention(q * 1, k, v, CONFIG, layout=layout, comm=comm, group=group) + 1

        torch._dynamo.reset()
        compiled = torch.compile(f, backend="aot_eager", dynamic=True, fullgraph=True)
        for cu in ([0, 33, 90], [0, 80]):
            layout = SequenceLayout.zigzag(cu, size)
            qkv = [layout.shard(x.detach(), rank).requires_grad_() for x in inputs(cu[-1])]
            found, expected = (with_gradients(lambda *x, g=g, layout=layout: g(*x, layout), qkv) for g in (compiled, f))
            wrong += [f"{comm}: backward gathers wanted pairs again" for _ in gathered]
            with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda x: x):  # backward decides again
                again = with_gradients(lambda *x, layout=layout, compiled=compiled: compiled(*x, layout), qkv)
            wrong += [
                f"{comm}, {cu}" for x, y in zip(found + again, expected * 2, strict=True) if not torch.equal(x, y)
            ]
            wrong += [] if bool(gathered) == (comm == "fetch") else [f"{comm}: gathered for {gathered}"]
            gathered.clear()
    return wrong


def test_a_group_of_ranks_runs_one_graph() -> None:
    """What backward makes again, where it has to, differs: nothing, wanted pairs of all ranks, those of this rank."""
    for wrong in run_ranks(2, compiled_on_rank, ["ring", "fetch", "pull"], timeout=240):
        assert wrong == []


class Layer(torch.nn.Module):
    """Attention as in a model, with the documents' lengths as an input."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return moba_cp.moba_attn_varlen(q * 2, k, v, cu_seqlens, 4096, 8, 2) + 1


def test_an_exported_graph_serves_other_lengths() -> None:
    tokens, documents = torch.export.Dim("tokens", min=2), torch.export.Dim("documents", min=3)
    example = (*(x.detach() for x in inputs(40)), torch.tensor([0, 20, 40]))
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: documents})
    exported = torch.export.export(Layer(), example, dynamic_shapes=shapes)
    assert "moba_cp.attention.default" in exported.graph_module.code
    with torch.no_grad():
        for cu in ([0, 20, 40], [0, 7, 7, 51]):
            qkv = inputs(cu[-1])
            assert torch.equal(exported.module()(*qkv, torch.tensor(cu)), Layer()(*qkv, torch.tensor(cu)))


def test_an_output_may_come_back_in_other_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels want unit stride in the last dimension, whatever a graph made of what it saved."""
    strides, delta = [], torch_backend.delta
    monkeypatch.setattr(
        torch_backend, "delta", lambda **given: (strides.append(given["out"].stride(2)), delta(**given))[1]
    )
    layout, qkv = SequenceLayout.contiguous([0, 30], 1), [x.detach() for x in inputs(30)]
    description, rest = torch.from_numpy(layout.description), (1 << 20, 1 << 20, None)
    arguments = (*qkv, description, None, None, None, 8, 2, None, "", "auto", True, False, True, *rest)
    out, lse, selected, _, _, route = torch.ops.moba_cp.attention(*arguments)
    apart = out.transpose(1, 2).contiguous().transpose(1, 2)
    assert apart.stride(2) != 1
    found = [
        torch.ops.moba_cp.attention_backward(
            torch.ones_like(out), *qkv, given, lse, selected, description, route, 8, 2, None, "", "auto", *rest
        )
        for given in (out, apart)
    ]
    assert strides == [1, 1]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_operators_keep_the_rules_of_torch(gradients: bool) -> None:
    layout, qkv = SequenceLayout.contiguous([0, 30], 1), [x.requires_grad_(gradients) for x in inputs(30)]
    description, rest = torch.from_numpy(layout.description), (1 << 20, 1 << 20, None)
    arguments = (*qkv, description, None, None, None, 8, 2, None, "", "auto", True, not gradients, gradients, *rest)
    torch.library.opcheck(torch.ops.moba_cp.attention, arguments)
    with pytest.raises(TypeError, match="k_gate must be a tensor, got NoneType"):
        torch.ops.moba_cp.attention(*arguments[:5], qkv[0], *arguments[6:])
    if gradients:
        out, lse, selected, _, _, route = (x.detach() for x in torch.ops.moba_cp.attention(*arguments))
        saved = (*(x.detach() for x in qkv), out, lse, selected, description, route)
        backward = (torch.ones_like(out), *saved, 8, 2, None, "", "auto", *rest)
        torch.library.opcheck(torch.ops.moba_cp.attention_backward, backward)


def test_saved_blocks_are_contiguous_where_heads_share_a_selection() -> None:
    """As the fake operator says. With so many blocks they are int32 already, and one head's are those of all heads."""
    tokens = 32_800
    qkv, description = inputs(tokens), torch.from_numpy(SequenceLayout.contiguous([0, tokens], 1).description)
    selection = torch.full((1, tokens, 2), -1, dtype=torch.int32)
    selection[0, :, 1] = torch.arange(tokens)
    rest = (selection, None, None, 1, 2, None, "", "auto", True, True, True, 1 << 30, 1 << 30, None)
    _, _, selected, blocks, weights, _ = torch.ops.moba_cp.attention(*qkv, description, *rest)
    assert all(x.is_contiguous() for x in (selected, blocks, weights))
    assert torch.equal(selected, selection.expand_as(selected))


def test_the_operators_have_no_second_derivatives() -> None:
    """Also where the penalty depends on q in other ways. A batch of gradients is refused too."""
    qkv, description = inputs(30), torch.from_numpy(SequenceLayout.contiguous([0, 30], 1).description)
    rest = (None, None, None, 8, 2, None, "", "auto", True, False, True, 1 << 20, 1 << 20, None)
    out = torch.ops.moba_cp.attention(*qkv, description, *rest)[0]
    (first,) = torch.autograd.grad(out.sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(first.square().sum() + qkv[0].pow(3).sum(), qkv[0])
    out = torch.ops.moba_cp.attention(*qkv, description, *rest)[0]
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(out, qkv[0], torch.ones(2, *out.shape), is_grads_batched=True)


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


def varlen(q: Tensor, k: Tensor, v: Tensor, *arguments: object) -> Tensor:
    return moba_cp.moba_attn_varlen(q, k, v, *arguments)  # type: ignore[arg-type]


CU = torch.tensor([0, 20, 31])
UNUSUAL: dict[str, tuple[Callable[..., Tensor], str]] = {
    "block size": (lambda *qkv: varlen(*qkv, CU, 31, True, 2), "block_size must be an int, got True"),
    "topk": (lambda *qkv: varlen(*qkv, CU, 31, 8, True), "topk must be an int, got True"),
    "no longest document": (lambda *qkv: varlen(*qkv, CU, None, 8, 2), "max_seqlen must be an int, got None"),
    "a float": (lambda *qkv: varlen(*qkv, CU, 31.0, 8, 2), "max_seqlen must be an int, got 31.0"),
    "computed in the graph": (lambda *qkv: varlen(*qkv, CU, (CU[1:] - CU[:-1]).max(), 8, 2), ""),
    "a list of documents": (lambda *qkv: varlen(*qkv, [0, 20, 31], 31, 8, 2), ""),
    "more than an operator's integers": (
        lambda *qkv: moba_cp.moba_attention(
            *qkv, CONFIG, layout=SequenceLayout.contiguous([0, 31], 1), workspace_bytes=1 << 63
        ),
        "",
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_compiled_code_takes_and_refuses_what_eager_code_does(case: str) -> None:
    torch._dynamo.reset()
    call, text = UNUSUAL[case]
    qkv = inputs(31)
    if text:
        for f in (call, torch.compile(call, backend="eager")):
            with pytest.raises(TypeError, match=text):
                f(*qkv)
    else:
        assert torch.equal(torch.compile(call, backend="eager")(*qkv), call(*qkv))


class Varlen(torch.nn.Module):
    """The longest document: as many tokens as there are (0), read from the lengths (1), or no number (2)."""

    def __init__(self, longest: int) -> None:
        super().__init__()
        self.longest = longest

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        longest = (lambda: q.shape[0], lambda: (cu[1:] - cu[:-1]).max().item(), lambda: None)[self.longest]()
        return varlen(q, k, v, cu, longest, 8, 2)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("longest", [0, 1])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_that_only_the_graph_will_know(longest: int, strict: bool) -> None:
    torch._dynamo.reset()
    tokens, qkv = torch.export.Dim("tokens", max=100), [x.detach() for x in inputs(31)]
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, None)
    module = Varlen(longest)
    exported = torch.export.export(module, (*qkv, CU), dynamic_shapes=shapes, strict=strict).module()
    assert torch.equal(exported(*qkv, CU), module(*qkv, CU))
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(*qkv, CU), module(*qkv, CU))


def test_what_no_exported_graph_holds_is_said() -> None:
    qkv = [x.detach() for x in inputs(31)]
    with pytest.raises(RuntimeError, match="moba_attn_varlen cannot be part of an exported graph with these arguments"):
        torch.export.export(Varlen(2), (*qkv, CU), strict=False)


def eager_beside_compiled(rank: int, size: int) -> list[Tensor]:
    torch._dynamo.reset()
    layout = SequenceLayout.zigzag([0, 40], size)
    attend = lambda q, k, v: moba_cp.moba_attention(q, k, v, CONFIG, layout=layout, comm="ring")  # noqa: E731
    both = attend, torch.compile(attend, backend="eager") if rank else attend
    return [x for f in both for x in with_gradients(f, inputs(20))]


def test_a_rank_may_run_eagerly_beside_compiled_ones() -> None:
    """As where ranks reach dynamo's limit of recompilations at different calls."""
    for found in run_ranks(2, eager_beside_compiled):
        for eager, mixed in zip(found[:4], found[4:], strict=True):
            assert torch.equal(eager, mixed)


def test_layouts_in_compiled_code() -> None:
    """Also those that it makes: torch cannot trace their numpy."""
    torch._dynamo.reset()
    x = torch.arange(24.0).view(12, 2)

    def there_and_back(x: Tensor) -> Tensor:
        layout = SequenceLayout.zigzag([0, 5, 12], 2)
        return layout.unshard([layout.shard(x + 1, rank) for rank in range(2)]) - 1

    assert torch.equal(torch.compile(there_and_back, backend="eager")(x), x)


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
