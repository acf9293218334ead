"""`selection=` and `routing=`: what is attended to, its gradients and its bits, over every exchange and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.reference import select_blocks
from tests.cases import COMMS, MIXED, NAMES, TO_DEFINITION, Case, assert_close, every_layout, on_rank, whole
from tests.ranks import run_ranks

WORKSPACES = (1, 1 << 30)  # 1 byte: one kv head and 128 rows at once


def documents(case: Case) -> list[slice]:
    ends = case.cu_seqlens
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def own_block(case: Case) -> Tensor:
    """int64 `[T]`, within the document."""
    return torch.cat([torch.arange(s.stop - s.start) // case.block_size for s in documents(case)])


def random_selection(case: Case, heads: int, count: int, seed: int = 0) -> Tensor:
    """int32 `[heads, T, count]`: distinct blocks up to the own one in any order, some of them and the own one left out."""
    generator = torch.Generator().manual_seed(seed)
    own = own_block(case)
    listed = torch.full((heads, case.tokens, count), -1, dtype=torch.int32)
    for head in range(heads):
        for row, last in enumerate(own.tolist()):
            blocks = torch.randperm(last + 1, generator=generator).tolist()
            if count == case.topk:  # then one of them must be the own block, or an empty place
                blocks = [last, *[b for b in blocks if b != last]]
            blocks = blocks[: int(torch.randint(count + 1, (1,), generator=generator))]
            places = torch.randperm(count, generator=generator)[: len(blocks)]
            listed[head, row, places] = torch.tensor(blocks, dtype=torch.int32)
    return listed


def routed_selection(case: Case, q_gate: Tensor, k_gate: Tensor) -> Tensor:
    """int64 `[Hs, T, topk]`, -1 for none: the definition's selection by other tensors."""
    found = torch.full((q_gate.shape[1], case.tokens, case.topk), -1)
    for s in documents(case):
        if s.stop > s.start:
            chosen = select_blocks(q_gate[s], k_gate[s], case.config).to(torch.int8)
            best = chosen.topk(min(case.topk, chosen.shape[2]), 2)
            found[:, s, : best.values.shape[2]] = torch.where(best.values > 0, best.indices, -1)
    return found


def by_definition(case: Case, selection: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of dense fp64 attention under the mask of a selection, whose rows include the own block."""
    q, k, v, dout = case.inputs()
    qkv = [x.requires_grad_() for x in (q, k, v)]
    group = case.q_heads // case.kv_heads
    chosen = selection.repeat_interleave(case.q_heads // selection.shape[0], 0)
    parts = []
    for s in documents(case):
        length = s.stop - s.start
        position = torch.arange(length)
        block = position // case.block_size
        listed = (chosen[:, s, :, None] == block).any(2) | (block[:, None] == block)  # [Hq, L, L]
        mask = listed & (position <= position[:, None])
        scores = torch.einsum("qhd,khd->hqk", q[s], k[s].repeat_interleave(group, 1)) * case.dim**-0.5
        weight = torch.softmax(scores.masked_fill(~mask, float("-inf")), 2)
        parts.append(torch.einsum("hqk,khd->qhd", weight, v[s].repeat_interleave(group, 1)))
    out = torch.cat(parts)
    return out.detach(), *torch.autograd.grad(out, qkv, dout)


def gates(case: Case, heads: tuple[int, int], dim: int, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(case.tokens, h, dim, generator=generator, dtype=torch.float64) for h in heads]


def calls_on_rank(rank: int, size: int, case: Case, layout: SequenceLayout, calls: list[dict]) -> list[tuple]:
    """out, dq, dk, dv of each call. A selection and gates are given for all tokens; gates want gradients, and get none."""
    results = []
    for call in calls:
        if "selection" in call:
            call["selection"] = layout.shard(call["selection"], rank, dim=1)
        if "routing" in call:
            call["routing"] = tuple(layout.shard(x, rank).requires_grad_() for x in call["routing"])
        results += on_rank(rank, size, case, layout, **call)
        assert all(x.grad is None for x in call.get("routing", ()))
    return results


def run(size: int, case: Case, layout: SequenceLayout, calls: list[dict]) -> list[tuple[Tensor, ...]]:
    per_rank = run_ranks(size, calls_on_rank, case, layout, calls)
    return [whole(layout, results) for results in zip(*per_rank, strict=True)]


def some_layouts(cp_size: int) -> list[SequenceLayout]:
    """Blocks whole on their ranks, blocks that straddle ranks, and ranks that hold nothing."""
    named = every_layout(MIXED.cu_seqlens, cp_size)
    return [named[name] for name in ("contiguous", "interleaved", "all on the last rank")][: 3 if cp_size > 1 else 1]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_any_selection_is_attended_to_over_every_exchange(cp_size: int) -> None:
    sizes = ((6, 3), (3, 2), (1, 3), (1, 1))
    given = [random_selection(MIXED, heads, count, heads + count) for heads, count in sizes]
    expected = [by_definition(MIXED, selection.long()) for selection in given]
    for number, layout in enumerate(some_layouts(cp_size)):
        options = [((i + number) % 4, comm, WORKSPACES[i % 2]) for i, comm in enumerate(COMMS)]
        calls = [{"selection": given[i], "comm": comm, "workspace_bytes": w} for i, comm, w in options]
        for option, result in zip(options, run(cp_size, MIXED, layout, calls), strict=True):
            assert_close(result, expected[option[0]], TO_DEFINITION, (layout, *option))


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_other_tensors_route_over_every_exchange(cp_size: int) -> None:
    """Any number of heads and any width; blocks that straddle ranks."""
    sizes = (((6, 3), 8), ((6, 6), 3), ((3, 1), 300), ((1, 1), 1))
    given = [gates(MIXED, heads, dim) for heads, dim in sizes]
    expected = [by_definition(MIXED, routed_selection(MIXED, *pair)) for pair in given]
    for number, layout in enumerate(some_layouts(cp_size)):
        options = [((i + number) % 4, comm) for i, comm in enumerate(COMMS)]
        calls = [{"routing": given[i], "comm": comm} for i, comm in options]
        for option, result in zip(options, run(cp_size, MIXED, layout, calls), strict=True):
            assert_close(result, expected[option[0]], TO_DEFINITION, (layout, *option))


@pytest.mark.parametrize(("cp_size", "options"), [(3, {"comm": "a2a"}), (4, {"comm": "a2a+fetch", "head_parallel": 2})])
def test_selections_travel_with_the_heads(cp_size: int, options: dict) -> None:
    layout = every_layout(MIXED.cu_seqlens, cp_size)["interleaved"]
    listed, pair = random_selection(MIXED, 1, 3), gates(MIXED, (3, 1), 4)
    for given, blocks in (({"selection": listed}, listed.long()), ({"routing": pair}, routed_selection(MIXED, *pair))):
        (result,) = run(cp_size, MIXED, layout, [given | options])
        assert_close(result, by_definition(MIXED, blocks), TO_DEFINITION, (given.keys(), options))
    flat, split = (
        run_ranks(cp_size, same_bits_on_rank, MIXED, layout, [comm], more)
        for comm, more in (("ring", {}), (options["comm"], {k: v for k, v in options.items() if k != "comm"}))
    )
    assert flat == split == [[]] * cp_size


def same_bits_on_rank(
    rank: int, size: int, case: Case, layout: SequenceLayout, comms: list[str], more: dict | None = None
) -> list[str]:
    """What differs from a call that routes by q and k, if its selection, or q and k themselves, are given."""
    wrong = []
    for i, comm in enumerate(comms):
        dtype, workspace = (torch.float64, torch.bfloat16)[i % 2], WORKSPACES[i // 2 % 2]
        *qkv, dout = (layout.shard(x, rank).requires_grad_() for x in case.inputs(dtype))
        fixed = {"layout": layout, "comm": comm, "workspace_bytes": workspace, "return_selection": True, **(more or {})}

        def call(options: dict, qkv=qkv, dout=dout, fixed=fixed) -> tuple[Tensor, ...]:
            out, selection = moba_cp.moba_attention(*qkv, case.config, **fixed, **options)
            return out.detach(), *torch.autograd.grad(out, qkv, dout), selection.blocks, selection.weights

        expected = call({})
        shuffled = expected[4][:, :, torch.randperm(expected[4].shape[2])].to(torch.int64)
        for what, options in {
            "selection": {"selection": expected[4]},
            "selection in another order": {"selection": shuffled, "check_selection": False},
            "routing": {"routing": (qkv[0], qkv[1])},
        }.items():
            for name, a, b in zip((*NAMES, "blocks", "weights"), call(options), expected, strict=True):
                if not torch.equal(a, b):
                    wrong.append(f"{name} with {what}, {dtype}, {comm}, {workspace}")
    return wrong


@pytest.mark.parametrize("cp_size", [1, 2])
def test_what_routing_would_choose_gives_the_same_bits(cp_size: int) -> None:
    case = Case((150, 9, 61), 16, 4, 4, 2, 8, 8)
    for name in ("zigzag per document", "interleaved")[:cp_size]:
        layout = every_layout(case.cu_seqlens, cp_size)[name]
        for wrong in run_ranks(cp_size, same_bits_on_rank, case, layout, list(COMMS)):
            assert wrong == []


def test_weights_are_shares_of_the_attention() -> None:
    case = MIXED
    q, k, v, _ = case.inputs()
    layout = SequenceLayout.contiguous(case.cu_seqlens, 1)
    for workspace in WORKSPACES:
        _, selection = moba_cp.moba_attention(
            q, k, v, case.config, layout=layout, return_selection=True, workspace_bytes=workspace
        )
        assert selection.weights.dtype == torch.float64
        assert bool((selection.weights[selection.blocks < 0] == 0).all())
        assert torch.equal(selection.blocks[:, :, -1].long(), own_block(case).expand(6, -1))
        assert torch.equal(selection.earlier[:, :, :-1], selection.blocks[:, :, :-1] >= 0)
        assert not bool(selection.earlier[:, :, -1].any())
        torch.testing.assert_close(selection.weights.sum(2), torch.ones(6, case.tokens, dtype=torch.float64))
        s = documents(case)[0]  # head 4 reads kv head 2
        scores = (q[s, 4] @ k[s, 2].T) * case.dim**-0.5
        for row in range(29):
            listed = selection.blocks[4, row]
            held = [
                scores[row, b * 5 : min(b * 5 + 5, row + 1)].exp().sum() if b >= 0 else 0.0 for b in listed.tolist()
            ]
            share = torch.tensor(held, dtype=torch.float64)
            torch.testing.assert_close(selection.weights[4, row], share / share.sum())


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_weights_in_fp32_sum_to_one_also_of_large_scores(scale: float) -> None:
    """They are the shares with which partial outputs are merged. The row's log-sum-exp is rounded to 1e-3 where it is 1e4."""
    q, k, v = (torch.randn(64, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
    layout = SequenceLayout.contiguous([0, 64], 1)
    _, selection = moba_cp.moba_attention(
        q * scale, k, v, moba_cp.MoBAConfig(8, 4), layout=layout, return_selection=True
    )
    # Four additions in fp32.
    torch.testing.assert_close(selection.weights.sum(2), torch.ones(4, 64), rtol=0, atol=5e-7)


def test_what_breaks_a_rule_counts_as_none_where_it_is_not_checked() -> None:
    q, k, v, _ = MIXED.inputs()
    layout = SequenceLayout.contiguous(MIXED.cu_seqlens, 1)
    good = torch.full((1, MIXED.tokens, 3), -1, dtype=torch.int64)
    good[0, 10:29, 0] = 1
    bad = good.clone()
    bad[0, :, 1] = torch.tensor([2**40, -(2**40), 99, -2, 6])[torch.arange(MIXED.tokens) % 5]
    bad[0, 10:29, 2] = 1
    call = lambda **options: moba_cp.moba_attention(q, k, v, MIXED.config, layout=layout, **options)  # noqa: E731
    assert torch.equal(call(selection=bad, check_selection=False), call(selection=good))
    with pytest.raises(ValueError, match=r"selection .* row 0, .* \(55 rows in all break a rule\)"):
        call(selection=bad)


def test_autocast_does_not_change_the_routing() -> None:
    q, k, v, _ = MIXED.inputs(torch.float32)
    layout = SequenceLayout.contiguous(MIXED.cu_seqlens, 1)
    call = lambda: moba_cp.moba_attention(q, k, v, MIXED.config, layout=layout, routing=(q, k))  # noqa: E731
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), expected)


def test_topk_1_selects_the_own_block_whatever_routes() -> None:
    q, k, v, _ = MIXED.inputs()
    layout, config = SequenceLayout.contiguous(MIXED.cu_seqlens, 1), MoBAConfig(5, 1)
    call = lambda **options: moba_cp.moba_attention(q, k, v, config, layout=layout, **options)  # noqa: E731
    own = own_block(MIXED).expand(1, -1)[:, :, None]
    for options in ({"routing": gates(MIXED, (1, 1), 4)}, {"selection": own}, {"selection": torch.full_like(own, -1)}):
        assert torch.equal(call(**options), call())
    with pytest.raises(ValueError, match="lists more than 0 blocks besides"):
        call(selection=torch.zeros_like(own))
