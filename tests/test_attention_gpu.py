"""On GPUs: output and dq are the same bits for every layout, number of ranks and transport; dk, dv to fp32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, chunks, moba_attention, moba_attn_varlen, reference
from moba_cp.kernels import triton_backend
from moba_cp.parallel import cost
from moba_cp.parallel.exchanges import pull
from tests.gpu_ranks import run_gpu_ranks, share_gpus

pytestmark = pytest.mark.gpu

CASES = [
    # cu_seqlens, block size, topk, q heads, kv heads, D, Dv
    ([0, 4096], 128, 4, 4, 2, 128, 128),
    ([0, 1000, 1000, 3333, 5000], 64, 5, 4, 4, 64, 64),
    ([0, 6000], 512, 4, 4, 1, 128, 128),
    ([0, 6000, 6700], 1024, 3, 4, 2, 128, 128),
    ([0, 700, 4500], 256, 3, 2, 2, 128, 64),
    ([0, 3000], 100, 6, 4, 2, 96, 96),
]


def make(case: tuple, seed: int = 0) -> tuple[torch.Tensor, ...]:
    cu, _, _, q_heads, kv_heads, dim, dim_v = case
    g = torch.Generator("cuda").manual_seed(seed)
    shapes = [(q_heads, dim), (kv_heads, dim), (kv_heads, dim_v), (q_heads, dim_v)]
    return tuple(torch.randn(cu[-1], *s, device="cuda", dtype=torch.bfloat16, generator=g) for s in shapes)


def layouts(cu: list[int], size: int) -> list[SequenceLayout]:
    total = cu[-1]
    cut = [0, total // 7, total // 3, total // 2 + 5, total]
    runs: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    for i, (a, b) in enumerate(zip(cut[:-1], cut[1:], strict=True)):
        runs[i % size].insert(0, (a, b))  # interleaved, in reverse order
    return [
        SequenceLayout.contiguous(cu, size),
        SequenceLayout.zigzag(cu, size),
        SequenceLayout.zigzag(cu, size, per_document=False),
        SequenceLayout.from_runs(runs, cu),
    ]


def run(case: tuple, layout: SequenceLayout, rank: int, comm: str, workspace_bytes: int = 1 << 30):
    """Output, dq, dk, dv of this rank's tokens."""
    _, block_size, topk = case[:3]
    q, k, v, dout = make(case)
    local = [layout.shard(x, rank).requires_grad_() for x in (q, k, v)]
    config = MoBAConfig(block_size, topk)
    out = moba_attention(*local, config, layout=layout, comm=comm, workspace_bytes=workspace_bytes)
    out.backward(layout.shard(dout, rank))
    return out.detach(), *(x.grad for x in local)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


Results = Sequence[torch.Tensor]


def differences(got: Results, again: Results, alone: Results, where: str) -> list[str]:
    """What differs between out, dq, dk, dv of a group and of one GPU for the same tokens, and from the same call again."""
    out, dq, *sums = zip(("out", "dq", "dk", "dv"), got, alone, strict=True)
    found = [f"{where}: {name}" for name, a, b in (out, dq) if not torch.equal(a, b)]
    found += [
        f"{where}: {name} {relative(a, b):.1e}"
        for name, a, b in sums
        if a.numel() and relative(a, b) > 3e-3  # fp32 sums in another order, rounded to bf16
    ]
    return found + [f"{where}: repeat"] * (not all(map(torch.equal, got, again)))


KEPT = [
    ([0, 6000], 512, 4, 6, 6, 128, 128),
    ([0, 700, 4500], 256, 3, 6, 6, 128, 128),
    ([0, 3000, 3000, 6000], 256, 3, 8, 4, 128, 128),
]
"""Calls in which the gradients of scores of one kv head take less memory than all partial results."""


@pytest.mark.parametrize("case", KEPT, ids=str)
def test_keeping_gradients_of_scores_changes_no_bit(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that holds all partial results, one that holds a kv head's with its gradients of scores, and one that holds
    some of its rows'."""
    kept: list[bool] = []
    make_partials = triton_backend.new_dq_partials

    def noted(*arguments, keeps_ds=False):
        kept.append(keeps_ds)
        return make_partials(*arguments, keeps_ds=keeps_ds)

    monkeypatch.setattr(triton_backend, "new_dq_partials", noted)
    monkeypatch.setattr(chunks, "LONG_ROWS", 1)
    cu, _, topk, q_heads, kv_heads, dim, _ = case
    all_partials = cu[-1] * q_heads * topk * triton_backend.bytes_per_slot(dim, torch.bfloat16)
    layout = SequenceLayout.contiguous(cu, 1)
    with monkeypatch.context() as patched:
        patched.setattr(triton_backend, "kept_ds_bytes", lambda *_, **__: 0)
        whole = run(case, layout, 0, "auto", all_partials)
    assert kept
    assert not any(kept)
    monkeypatch.setattr("moba_cp.call.least_chunk_of_ds", lambda *_: 0)
    # all rows of one or two heads, then of one head's rows a third or less
    for workspace, least in ((all_partials - 1, 2), (all_partials // kv_heads, 3 * kv_heads)):
        kept.clear()
        got = run(case, layout, 0, "auto", workspace)
        assert len(kept) >= least
        assert all(kept)
        found = differences(got, run(case, layout, 0, "auto", workspace), whole, f"kept in {workspace} bytes")
        assert not found, found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_gpu_against_the_definition(case: tuple) -> None:
    cu, block_size, topk = case[:3]
    q, k, v, dout = make(case)
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    # bf16 centroids, as the definition rounds them: the mask comes from the bf16 inputs
    expected = _reference_with_bf16_routing(exact, (q, k), cu, MoBAConfig(block_size, topk))
    expected.backward(dout.float())
    got = run(case, SequenceLayout.contiguous(cu, 1), 0, "auto")
    # bf16 partial results carry 2 ** -9 relative error each, averaged over a row: 3e-3; gradients 4e-3
    assert relative(got[0], expected) < 3e-3
    for mine, x in zip(got[1:], exact, strict=True):
        assert relative(mine, x.grad) < 4e-3


def _reference_with_bf16_routing(exact, rounded, cu, config):
    q, k, v = exact
    group = q.shape[1] // k.shape[1]
    outputs = []
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        mask = reference.attention_mask(rounded[0][a:b], rounded[1][a:b], config)
        keys, values = (x[a:b].repeat_interleave(group, 1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q[a:b], keys) * config.scale(q.shape[-1])
        weight = score.masked_fill(~mask, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weight, values))
    return torch.cat(outputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_workspace_changes_no_bit(case: tuple) -> None:
    layout = SequenceLayout.contiguous(case[0], 1)
    whole, chunked = run(case, layout, 0, "auto"), run(case, layout, 0, "auto", workspace_bytes=1 << 18)
    assert torch.equal(whole[0], chunked[0])
    assert torch.equal(whole[1], chunked[1])
    for a, b in zip(whole[2:], chunked[2:], strict=True):
        assert relative(a, b) < 3e-3  # fp32 sums in another grouping, rounded to bf16


def test_repeated_calls_give_the_same_bits() -> None:
    layout = SequenceLayout.contiguous(CASES[0][0], 1)
    first = run(CASES[0], layout, 0, "auto")
    for _ in range(19):
        for a, b in zip(first, run(CASES[0], layout, 0, "auto"), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [128, 256, 1024])
@pytest.mark.parametrize("tokens", [512, 1024, 2048])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_varlen_on_the_published_shapes_and_tolerances(batch: int, tokens: int, chunk: int) -> None:
    """The parametrisation and tolerances of MoonshotAI/MoBA's own test of `moba_attn_varlen`."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(batch))[: batch - 1] + 1
    cu = torch.cat([torch.tensor([0]), cuts.sort().values, torch.tensor([tokens])]).to("cuda", torch.int32)
    longest = int(cu.diff().max())
    for heads in (1, 2, 4, 8):
        q, k, v, dout = make(([0, tokens], 0, 0, heads, heads, 128, 128), seed=heads)
        for topk in (2, 3, 4):
            mine, theirs = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
            out = moba_attn_varlen(*mine, cu, longest, moba_chunk_size=chunk, moba_topk=topk)
            out.backward(dout)
            expected = reference.moba_attention(*theirs, cu.tolist(), MoBAConfig(chunk, topk))
            expected.backward(dout)
            for a, b in zip((out, *(x.grad for x in mine)), (expected, *(x.grad for x in theirs)), strict=True):
                assert torch.allclose(a, b, atol=2e-2, rtol=2e-2)
                difference = (a - b).abs()
                assert difference.max() < 4e-2
                assert difference.mean() < 4e-4


# With the share of wanted bytes from which `pull` reads parts whole: always, and never.
TRANSPORTS = [("all_gather", 0.5), ("ring", 0.5), ("fetch", 0.5), ("pull", 0.0), ("pull", 2.0), ("auto", 0.5)]


def transports(size: int) -> list[tuple[str, float]]:
    """`TRANSPORTS` that ranks of these GPUs can use."""
    return [each for each in TRANSPORTS if each[0] != "pull" or not share_gpus(size)]


def _rank(rank: int, size: int) -> None:
    cost.PULL_BYTES = 0  # "auto" takes pull for the small cases too
    failures = []
    for case in CASES:
        alone = run(case, SequenceLayout.contiguous(case[0], 1), 0, "auto")
        for layout in layouts(case[0], size):
            for comm, pull.WHOLE_SHARE in transports(size):
                for workspace in (1 << 30, 1 << 18):
                    got = run(case, layout, rank, comm, workspace)
                    again = run(case, layout, rank, comm, workspace)
                    where = f"{case} {layout} {comm} whole from {pull.WHOLE_SHARE} workspace {workspace} rank {rank}"
                    failures += differences(got, again, [layout.shard(x, rank) for x in alone], where)
    assert not failures, f"{len(failures)} failures, the first:\n" + "\n".join(failures[:20])


def _late(rank: int, size: int) -> None:
    """Rank 1 comes to its backward late: what rank 0 sent is still under way while it works on later heads."""
    case = ([0, 32768], 128, 4, 6, 6, 128, 128)
    layout = SequenceLayout.zigzag(case[0], size)
    q, k, v, dout = (layout.shard(x, rank) for x in make(case))
    for comm, pull.WHOLE_SHARE in transports(size):
        results = []
        for cycles in (0, 200_000_000):  # about 0.1 s
            local = [x.clone().requires_grad_() for x in (q, k, v)]
            # One kv head at a time: six ranges, whose gradients have to be kept apart.
            out = moba_attention(*local, MoBAConfig(128, 4), layout=layout, comm=comm, workspace_bytes=1 << 25)
            if rank == 1:
                torch.cuda._sleep(cycles)
            out.backward(dout)
            results.append([x.grad for x in local])
        assert all(map(torch.equal, *results)), (comm, pull.WHOLE_SHARE)


@pytest.mark.timeout(600)  # 320 calls, each some tenths of a second where both ranks share a GPU
@pytest.mark.parametrize("on_rank", [_rank, _late], ids=["bits", "late"])
def test_two_ranks_give_the_bits_of_one(on_rank: Callable) -> None:
    run_gpu_ranks(2, on_rank)
