"""moba_attention over gloo groups of one to four ranks: the definition's output and gradients, whatever the layout,
the number of ranks, the transport and the workspace."""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moba_cp
from moba_cp import SequenceLayout
from moba_cp.kernels import torch_backend
from moba_cp.kernels.types import selection_dtype
from tests.cases import (
    DEFAULT_WORKSPACE,
    FP64,
    MIXED,
    NAMES,
    TO_DEFINITION,
    TO_EACH_OTHER,
    TRANSPORTS,
    Case,
    all_on,
    assert_close,
    cases,
    comms_for,
    every_layout,
    interleaved,
    layouts,
    on_rank,
    reference,
    relative_error,
    run,
    run_many,
    sub_groups,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), data=st.data())
def test_equals_the_definition(cp_size: int, case: Case, data: st.DataObject) -> None:
    layout = data.draw(layouts(case.cu_seqlens, cp_size))
    comm = data.draw(st.sampled_from(comms_for(case.q_heads, cp_size)))
    workspace = data.draw(st.sampled_from([1, 20_000, DEFAULT_WORKSPACE]))
    assert_close(run(cp_size, case, layout, comm, FP64, workspace), reference(case), TO_DEFINITION)


@pytest.mark.parametrize("case", [MIXED, Case((0, 150, 9, 171, 0), 16, 4, 4, 2, 7, 3)], ids=["short", "long"])
def test_layouts_sizes_transports_and_workspaces_agree(case: Case) -> None:
    expected = run(1, case, SequenceLayout.contiguous(case.cu_seqlens, 1))
    assert_close(expected, reference(case), TO_DEFINITION)
    for cp_size in (1, 2, 3, 4):
        tried = list(every_layout(case.cu_seqlens, cp_size).values())
        pairs = product(tried if case is MIXED else tried[1:4], TRANSPORTS if cp_size > 1 else ["auto"])
        calls = [
            (case, layout, comm, FP64, workspace)
            for number, (layout, comm) in enumerate(pairs)
            # 1 byte: one kv head and 128 rows at once; with every layout and every transport, but not with every pair
            for workspace in ((1, DEFAULT_WORKSPACE) if number % 3 == 0 or cp_size == 1 else (DEFAULT_WORKSPACE,))
        ]
        for call, result in zip(calls, run_many(cp_size, calls), strict=True):
            assert_close(result, expected, TO_EACH_OTHER, call[1:])


def selected_on_rank(
    rank: int, world_size: int, case: Case, layouts_: list[SequenceLayout], dtype: torch.dtype
) -> list[Tensor]:
    found = []
    for layout in layouts_:
        q, k, v, _ = (layout.shard(x, rank) for x in case.inputs(dtype))
        _, report = moba_cp.moba_attention(q, k, v, case.config, layout=layout, return_report=True)
        found.append(report.selected)
    return found


@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_selection_does_not_depend_on_layout_or_size(dtype: torch.dtype) -> None:
    """Bit for bit, also of scores that lie as close as rounding: in bf16 at D = 2, centroids often are equal."""
    case = Case((117, 0, 3, 61, 1), block_size=3, topk=4, q_heads=6, kv_heads=3, dim=2, v_dim=1)
    expected = None
    for cp_size in (1, 2, 3, 4):
        tried = list(every_layout(case.cu_seqlens, cp_size).values())
        per_rank = run_ranks(cp_size, selected_on_rank, case, tried, dtype)
        for i, layout in enumerate(tried):
            selected = layout.unshard([per_rank[r][i] for r in range(cp_size)], dim=1)
            expected = selected if expected is None else expected
            assert torch.equal(selected, expected), layout


@pytest.mark.parametrize("comm", comms_for(6, 3))
def test_a_repeated_call_gives_the_same_bits(comm: str) -> None:
    case = Case((90, 7, 64), 8, 4, 6, 2)
    for dtype in (FP64, torch.float32, torch.bfloat16):
        layout = SequenceLayout.zigzag(case.cu_seqlens, 3)
        for per_rank in run_ranks(3, on_rank, case, layout, comm, dtype, DEFAULT_WORKSPACE, 3):
            first, *others = per_rank
            for other in others:
                for name, a, b in zip(NAMES, first, other, strict=True):
                    assert torch.equal(a, b), (dtype, name)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),  # fp32 rounds at 6e-8; sums of some hundred terms, and exponentials of them
        (torch.bfloat16, 2e-2),  # out and gradients are rounded to bf16 (4e-3); so is the out that delta is made of
        (torch.float16, 3e-3),  # likewise, at 5e-4
    ],
    ids=["fp32", "bf16", "fp16"],
)
def test_lower_precisions(dtype: torch.dtype, tolerance: float) -> None:
    case = Case((90, 7, 64), 8, 4, 4, 2, 16, 16)
    expected = reference(case, dtype)
    calls = [
        (case, SequenceLayout.zigzag(case.cu_seqlens, 2), comm, dtype, w)
        for comm in comms_for(4, 2)
        for w in (1, 1 << 20)
    ]
    for result in run_many(2, calls):
        assert [x.dtype for x in result] == [dtype] * 4
        assert_close(result, expected, tolerance)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (0, 1, 0)], ids=str)
def test_no_token_or_one(lengths: tuple[int, ...]) -> None:
    case = Case(lengths, block_size=4, topk=3)
    expected = reference(case)
    for cp_size in (1, 2, 4):
        tried = list(every_layout(case.cu_seqlens, cp_size).values())
        comms = comms_for(case.q_heads, cp_size)
        workspaces = [1, DEFAULT_WORKSPACE]
        if not any(lengths):  # all layouts are the same, and there is nothing to cut into chunks
            tried, workspaces = tried[:1], workspaces[1:]
        calls = [(case, layout, comm, FP64, w) for layout in tried for comm in comms for w in workspaces]
        for result in run_many(cp_size, calls):
            assert_close(result, expected, TO_DEFINITION)


@pytest.mark.parametrize("holder", [0, 1, 2])
def test_ranks_without_tokens(holder: int) -> None:
    calls = [
        (MIXED, all_on(MIXED.cu_seqlens, 3, holder), comm, FP64, w) for comm in comms_for(6, 3) for w in (1, 1 << 30)
    ]
    expected = reference(MIXED)
    for result in run_many(3, calls):
        assert_close(result, expected, TO_DEFINITION)


@pytest.mark.parametrize("block_size", [1, 1000, 2**40])
def test_blocks_of_one_token_and_larger_than_everything(block_size: int) -> None:
    case = Case((13, 0, 6), block_size, 3)
    calls = [(case, layout) for layout in every_layout(case.cu_seqlens, 2).values()]
    expected = reference(case)
    for call, result in zip(calls, run_many(2, calls), strict=True):
        assert_close(result, expected, TO_DEFINITION, call[1])


def int32_on_rank(rank: int, world_size: int, case: Case, layout: SequenceLayout) -> list[tuple[Tensor, ...]]:
    with mock.patch.object(torch_backend, "selection_dtype", return_value=torch.int32):
        return on_rank(rank, world_size, case, layout, "fetch")


def test_selections_in_int32() -> None:
    assert [selection_dtype(n) for n in (1, 32_767, 32_768)] == [torch.int16, torch.int16, torch.int32]
    layout = SequenceLayout.zigzag(MIXED.cu_seqlens, 2)
    per_rank = run_ranks(2, int32_on_rank, MIXED, layout)
    result = tuple(layout.unshard([of_rank[0][n] for of_rank in per_rank]) for n in range(4))
    assert_close(result, reference(MIXED), TO_DEFINITION)


@pytest.mark.heavy
def test_more_blocks_than_int16_counts() -> None:
    """Blocks number 33,000 in documents of one token: the selection is kept in int32; each token attends to itself."""
    case = Case((1,) * 33_000, block_size=1, topk=2, q_heads=1, dim=2, v_dim=1)
    out, dq, dk, dv = run(2, case, SequenceLayout.contiguous(case.cu_seqlens, 2), timeout=120)
    _, _, v, dout = case.inputs()
    assert torch.equal(out, v)
    assert torch.equal(dv, dout)
    assert not dq.any()
    assert not dk.any()


def on_sub_group(rank: int, world_size: int, case: Case, repeat: int) -> list[tuple[Tensor, ...]]:
    """Each pair of ranks is a context-parallel group on data of its own; both work at once."""
    groups = sub_groups(2)
    pair, rank_in_pair = divmod(rank, 2)
    case = Case(**{**case.__dict__, "seed": pair})
    layout = SequenceLayout.zigzag(case.cu_seqlens, 2)
    results = []
    for comm in comms_for(case.q_heads, 2) * repeat:
        *qkv, dout = (layout.shard(x, rank_in_pair) for x in case.inputs())
        qkv = [x.requires_grad_() for x in qkv]
        out = moba_cp.moba_attention(*qkv, case.config, layout=layout, group=groups[pair], comm=comm)
        results.append((out.detach(), *torch.autograd.grad(out, qkv, dout)))
    return results


def test_sub_groups_beside_each_other() -> None:
    per_rank = run_ranks(4, on_sub_group, MIXED, 2)
    layout = SequenceLayout.zigzag(MIXED.cu_seqlens, 2)
    for pair in (0, 1):
        expected = reference(Case(**{**MIXED.__dict__, "seed": pair}))
        for first, second in zip(per_rank[2 * pair], per_rank[2 * pair + 1], strict=True):
            result = tuple(layout.unshard(parts) for parts in zip(first, second, strict=True))
            assert_close(result, expected, TO_DEFINITION, pair)


def on_two_groups(rank: int, world_size: int, case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A call over the world and one over a pair, both forward, then both backward, the first one first."""
    pair = sub_groups(2)[rank // 2]
    wide, narrow = SequenceLayout.contiguous(case.cu_seqlens, 4), SequenceLayout.zigzag(case.cu_seqlens, 2)
    problems = []
    for layout, group, r in ((wide, None, rank), (narrow, pair, rank % 2)):
        *qkv, dout = (layout.shard(x, r) for x in case.inputs())
        qkv = [x.requires_grad_() for x in qkv]
        out = moba_cp.moba_attention(*qkv, case.config, layout=layout, group=group, comm="fetch")
        problems.append((out, qkv, dout))
    return tuple((out.detach(), *torch.autograd.grad(out, qkv, dout)) for out, qkv, dout in problems)


def test_overlapping_groups_with_calls_under_way_in_both() -> None:
    per_rank = run_ranks(4, on_two_groups, MIXED)
    expected = reference(MIXED)
    wide, narrow = SequenceLayout.contiguous(MIXED.cu_seqlens, 4), SequenceLayout.zigzag(MIXED.cu_seqlens, 2)
    assert_close(tuple(wide.unshard([r[0][n] for r in per_rank]) for n in range(4)), expected, TO_DEFINITION)
    for first in (0, 2):
        parts = [r[1] for r in per_rank[first : first + 2]]
        assert_close(tuple(narrow.unshard([p[n] for p in parts]) for n in range(4)), expected, TO_DEFINITION)


def strided_on_rank(rank: int, world_size: int, case: Case, layout: SequenceLayout, comm: str) -> tuple[Tensor, ...]:
    """Heads before tokens in memory, q k v out of one buffer, and an output gradient of stride 0."""
    q, k, v, _ = (layout.shard(x, rank) for x in case.inputs())
    q = q.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    packed = torch.cat([k, v], -1).requires_grad_()
    k, v = packed.split([case.dim, case.v_dim], -1)
    assert not k.is_contiguous()
    out = moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm)
    out.sum().backward()
    return out.detach(), q.grad, *packed.grad.split([case.dim, case.v_dim], -1)


def test_strided_inputs_and_output_gradients() -> None:
    q, k, v, _ = (x.requires_grad_() for x in MIXED.inputs())
    out = moba_cp.reference.moba_attention(q, k, v, MIXED.cu_seqlens, MIXED.config)
    out.sum().backward()
    for cp_size in (1, 2):
        for comm in comms_for(MIXED.q_heads, cp_size):
            layout = SequenceLayout.contiguous(MIXED.cu_seqlens, cp_size)
            per_rank = run_ranks(cp_size, strided_on_rank, MIXED, layout, comm)
            result = tuple(layout.unshard(parts) for parts in zip(*per_rank, strict=True))
            assert_close(result, (out.detach(), q.grad, k.grad, v.grad), TO_DEFINITION, (cp_size, comm))


def some_gradients_on_rank(rank: int, world_size: int, case: Case, which: str) -> list[Tensor | None]:
    layout = SequenceLayout.zigzag(case.cu_seqlens, world_size)
    *qkv, dout = (layout.shard(x, rank) for x in case.inputs())
    for name, x in zip("qkv", qkv, strict=True):
        x.requires_grad_(name in which)
    out = moba_cp.moba_attention(*qkv, case.config, layout=layout, comm="ring")
    assert out.requires_grad == bool(which)
    if which:
        out.backward(dout)
    return [x.grad for x in qkv]


@pytest.mark.parametrize("which", ["", "q", "k", "v", "qv"])
def test_gradients_on_some_inputs_only(which: str) -> None:
    per_rank = run_ranks(2, some_gradients_on_rank, MIXED, which)
    layout = SequenceLayout.zigzag(MIXED.cu_seqlens, 2)
    for name, parts, expected in zip("qkv", zip(*per_rank, strict=True), reference(MIXED)[1:], strict=True):
        if name in which:
            assert relative_error(layout.unshard(parts), expected) <= TO_DEFINITION
        else:
            assert parts == (None, None)


def several_passes_on_rank(rank: int, world_size: int, case: Case, comm: str) -> dict[str, tuple[Tensor, ...]]:
    """The same gradients through other orders of forward and backward."""
    layout = SequenceLayout.zigzag(case.cu_seqlens, world_size)
    *inputs, dout = (layout.shard(x, rank) for x in case.inputs())
    inputs = [x.requires_grad_() for x in inputs]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm)

    first = attention(*inputs)
    other = attention(*(x * 2 for x in inputs))  # a call between a forward and its backward
    with torch.no_grad():
        assert torch.equal(attention(*inputs), first)
    found = {"after another forward": torch.autograd.grad(first, inputs, dout, retain_graph=True)}
    found["a second time"] = torch.autograd.grad(first, inputs, dout)
    torch.autograd.grad(other, inputs, dout)
    for reentrant in (True, False):
        out = checkpoint(attention, *inputs, use_reentrant=reentrant)
        for x in inputs:
            x.grad = None
        out.backward(dout)
        found[f"checkpoint, use_reentrant={reentrant}"] = tuple(x.grad for x in inputs)
    chain = attention(attention(*inputs), *inputs[1:])  # a layer after a layer
    found["two layers"] = torch.autograd.grad(chain, inputs, dout)
    return found


@pytest.mark.parametrize("comm", comms_for(4, 2))
def test_orders_of_forward_and_backward(comm: str) -> None:
    case = Case((29, 0, 3, 22, 1), 5, 3, 4, 2, 8, 8)
    per_rank = run_ranks(2, several_passes_on_rank, case, comm)
    q, k, v, dout = (x.requires_grad_() for x in case.inputs())
    twice = q
    for _ in range(2):
        twice = moba_cp.reference.moba_attention(twice, k, v, case.cu_seqlens, case.config)
    layout = SequenceLayout.zigzag(case.cu_seqlens, 2)
    for name in per_rank[0]:
        result = tuple(layout.unshard([r[name][n] for r in per_rank]) for n in range(3))
        expected = torch.autograd.grad(twice, (q, k, v), dout) if name == "two layers" else reference(case)[1:]
        for got, wanted in zip(result, expected, strict=True):
            assert relative_error(got, wanted) <= TO_DEFINITION, name


def test_tokens_in_reverse_order_on_every_rank() -> None:
    layout = interleaved(MIXED.cu_seqlens, 3, backward=True)
    assert layout.local_indices(0).tolist() == sorted(layout.local_indices(0).tolist(), reverse=True)
    assert_close(run(3, MIXED, layout), reference(MIXED), TO_DEFINITION)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Sums stay in fp32, in backward too, and whether or not autocast was on in forward."""
    case = Case((29, 3), 5, 3, 4, 2, 8, 4)
    *inputs, dout = (x.float() for x in case.inputs())
    inputs = [x.requires_grad_() for x in inputs]
    layout = SequenceLayout.contiguous(case.cu_seqlens, 1)
    attend = lambda: moba_cp.moba_attention(*inputs, case.config, layout=layout)  # noqa: E731
    plain, defined = attend(), moba_cp.reference.moba_attention(*inputs, case.cu_seqlens, case.config)
    expected = torch.autograd.grad(plain, inputs, dout, retain_graph=True)
    with torch.autocast("cpu", dtype=dtype):
        out = attend()
        assert torch.equal(out, plain)
        assert torch.equal(moba_cp.reference.moba_attention(*inputs, case.cu_seqlens, case.config), defined)
        for made in (out, plain):
            for got, wanted in zip(torch.autograd.grad(made, inputs, dout), expected, strict=True):
                assert torch.equal(got, wanted)


@pytest.mark.parametrize("logit", [1e2, 1e4, 1e8])
def test_weights_sum_to_one_at_any_size_of_scores(logit: float) -> None:
    """fp32: exp(score - log-sum-exp) is off by the rounding of the log-sum-exp, 8 for scores of 1e8; quotients are not."""
    x, ones = torch.full((24, 1, 4), (logit / 2) ** 0.5), torch.ones(24, 1, 4)
    layout = SequenceLayout.contiguous([0, 24], 1)
    out = moba_cp.moba_attention(x, x, ones, moba_cp.MoBAConfig(4, 3), layout=layout)
    torch.testing.assert_close(out, ones, rtol=0, atol=1e-6)  # ten sums and quotients of fp32


def interleaved_calls_on_rank(rank: int, size: int) -> list[float]:
    """Three calls of other shapes and dtypes open at once, backward in another order, the first twice; pull against ring."""
    cases = [
        (Case((29, 0, 3, 22, 40), 5, 3, 4, 2, 8, 8), torch.float64, 1),
        (Case((70,), 8, 4, 6, 3, 16, 4), torch.float32, 1 << 30),
        (Case((12, 200), 7, 3, 2, 1, 4, 12), torch.float64, 4000),
    ]
    gradients: dict[str, dict[int, list[torch.Tensor]]] = {}
    for comm in ("ring", "pull"):
        calls = []
        for case, dtype, workspace in cases:
            layout = SequenceLayout.zigzag(case.cu_seqlens, size)
            *qkv, dout = (layout.shard(x, rank) for x in case.inputs(dtype))
            qkv = [x.requires_grad_() for x in qkv]
            out = moba_cp.moba_attention(*qkv, case.config, layout=layout, comm=comm, workspace_bytes=workspace)
            calls.append((out, qkv, dout))
        gradients[comm] = {
            order: list(torch.autograd.grad(*calls[number], retain_graph=True))
            for order, number in enumerate((2, 0, 1, 0))
        }
    return [
        relative_error(a, b)
        for order, of_ring in gradients["ring"].items()
        for a, b in zip(gradients["pull"][order], of_ring, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_calls_under_way_together_do_not_disturb_each_other(size: int) -> None:
    for errors in run_ranks(size, interleaved_calls_on_rank):
        assert max(errors) < 1e-6, errors  # fp32 in one of the three
