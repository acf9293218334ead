"""Bad input: an error that carries the values, on every rank, before any collective; and a group that works on."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.kernels import triton_backend
from tests.cases import Case, assert_close, reference, sub_groups
from tests.ranks import run_fresh_ranks, run_ranks
from tests.recorder import recorded

CASE = Case((16,), block_size=4, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)
TWO = SequenceLayout.contiguous([0, 16], 2)
F64 = torch.float64


def zeros(*shape: int, dtype: torch.dtype = F64, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# What to change of a call that is good on two ranks; the error; and what its message must carry.
BAD_CALLS: dict[str, tuple[dict, type[Exception], str]] = {
    "q of two dimensions": ({"q": zeros(8, 32)}, ValueError, r"q must have shape .*\(8, 32\)"),
    "v of four dimensions": ({"v": zeros(1, 8, 2, 4)}, ValueError, r"v must have shape .*\(1, 8, 2, 4\)"),
    "q is a list": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "k is None": ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    "integers": ({"q": zeros(8, 4, 8, dtype=torch.int32)}, TypeError, "q must be .* got torch.int32"),
    "sparse": ({"q": zeros(8, 4, 8).to_sparse()}, TypeError, "q must be .* dense tensor, got layout torch.sparse_coo"),
    "nested": (
        {"v": torch.nested.nested_tensor([zeros(8, 2, 4)])},
        TypeError,
        "v must be .* dense tensor, got a nested",
    ),
    "dtypes differ": ({"k": zeros(8, 2, 8, dtype=torch.float32)}, TypeError, "q torch.float64, k torch.float32"),
    "devices differ": ({"v": zeros(8, 2, 4, device="meta")}, ValueError, "q cpu, k cpu, v meta"),
    "token counts differ": ({"k": zeros(7, 2, 8)}, ValueError, r"q \(8, 4, 8\), k \(7, 2, 8\)"),
    "kv heads differ": ({"v": zeros(8, 1, 4)}, ValueError, r"k \(8, 2, 8\), v \(8, 1, 4\)"),
    "head sizes differ": ({"k": zeros(8, 2, 7)}, ValueError, r"q \(8, 4, 8\), k \(8, 2, 7\)"),
    "Hq no multiple of Hkv": ({"q": zeros(8, 3, 8)}, ValueError, r"q heads \(3\) .* kv heads \(2\)"),
    "no head": ({"q": zeros(8, 0, 8)}, ValueError, r"q must have at least one head .*\(8, 0, 8\)"),
    "head size 0": ({"v": zeros(8, 2, 0)}, ValueError, r"v must have at least one head .*\(8, 2, 0\)"),
    "unknown comm": ({"comm": "smoke"}, ValueError, "one of auto, all_gather, ring, fetch, pull; got 'smoke'"),
    "comm of torch": ({"comm": "alltoall"}, ValueError, "one of auto, all_gather, ring, fetch, pull; got 'alltoall'"),
    "head_parallel of 0": ({"head_parallel": 0}, ValueError, "head_parallel must be at least 1, got 0"),
    "head_parallel is a word": (
        {"head_parallel": "node"},
        TypeError,
        "head_parallel must be an int or None, got 'node'",
    ),
    "head_parallel of 3 on 2 ranks": (
        {"comm": "auto", "head_parallel": 3},
        ValueError,
        "must divide the 2 ranks of the layout, got 3",
    ),
    "head_parallel of a flat exchange": (
        {"comm": "ring", "head_parallel": 2},
        ValueError,
        r"comm='ring' does not split heads, got head_parallel=2; 'a2a\+ring' splits",
    ),
    "head_parallel of less than a2a's": (
        {"comm": "a2a", "head_parallel": 1},
        ValueError,
        r"over all 2 ranks, got head_parallel=1; name what moves .* a2a\+ring",
    ),
    "heads that a2a cannot split": (
        {"comm": "a2a", "q": zeros(8, 3, 8), "k": zeros(8, 3, 8), "v": zeros(8, 3, 4)},
        ValueError,
        "comm='a2a' on 2 ranks needs q heads that 2 divides, got 3",
    ),
    "heads that head_parallel cannot split": (
        {"comm": "auto", "head_parallel": 2, "q": zeros(8, 3, 8), "k": zeros(8, 3, 8), "v": zeros(8, 3, 4)},
        ValueError,
        "head_parallel=2 needs q heads that 2 divides, got 3",
    ),
    "comm is None": ({"comm": None}, TypeError, "comm must be a string, got None"),
    "config is a dict": ({"config": {"topk": 3}}, TypeError, "config must be a MoBAConfig, got dict"),
    "workspace of 0": ({"workspace_bytes": 0}, ValueError, "workspace_bytes must be at least 1, got 0"),
    "workspace of 1e9": ({"workspace_bytes": 1e9}, TypeError, "workspace_bytes must be an int, got 1000000000.0"),
    "workspace too long to print": ({"workspace_bytes": 10**5000}, ValueError, "4300 digits"),
    "report is a tensor": ({"return_report": zeros(2)}, TypeError, "return_report must be True or False, got tensor"),
    "report is a word": ({"return_report": "no"}, TypeError, "return_report must be True or False, got 'no'"),
    "layout is None": ({"layout": None}, TypeError, "layout must be a SequenceLayout, got NoneType"),
    "layout of other tokens": (
        {"layout": SequenceLayout.contiguous([0, 20], 2)},
        ValueError,
        r"gives rank \d 10 tokens, but q has 8",
    ),
    "layout for another group size": (
        {"layout": SequenceLayout.contiguous([0, 24], 3)},
        ValueError,
        "layout is for 3 ranks, but the group has 2",
    ),
    "group is a string": ({"group": "cp"}, TypeError, "group must be .* got 'cp'"),
}


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: MoBAConfig(0, 3), ValueError, "block_size must be at least 1, got 0"),
        (lambda: MoBAConfig(-4, 3), ValueError, "block_size must be at least 1, got -4"),
        (lambda: MoBAConfig(4, 0), ValueError, "topk must be at least 1, got 0"),
        (lambda: MoBAConfig(2**70, 3), ValueError, r"block_size must be at most \d+, got 1180591620717411303424"),
        (lambda: MoBAConfig(4.0, 3), TypeError, "block_size must be an int, got 4.0"),
        (lambda: MoBAConfig(4, True), TypeError, "topk must be an int, got True"),
        (lambda: MoBAConfig(4, 3, float("nan")), ValueError, "softmax_scale must be finite, got nan"),
        (lambda: MoBAConfig(4, 3, float("-inf")), ValueError, "softmax_scale must be finite, got -inf"),
        (lambda: MoBAConfig(4, 3, 10**400), ValueError, "softmax_scale must be finite, got 1000"),
        (lambda: MoBAConfig(4, 3, "0.1"), TypeError, "softmax_scale must be a float or None, got '0.1'"),
        (lambda: MoBAConfig(4, 3, dropout=0.1), TypeError, "dropout"),
    ],
)
def test_bad_config(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


def test_config_is_a_frozen_value() -> None:
    config = MoBAConfig(4, 3, 2)
    assert config == MoBAConfig(4, 3, 2.0)
    assert hash(config) == hash(MoBAConfig(4, 3, 2.0))
    assert (config.scale(16), MoBAConfig(4, 3).scale(16)) == (2.0, 0.25)
    with pytest.raises(AttributeError):
        config.topk = 4


@pytest.mark.parametrize("name", ["dropout", "window_size", "bias", "causal"])
def test_options_that_do_not_exist_are_not_ignored(name: str) -> None:
    q, k, v, _ = CASE.inputs()
    with pytest.raises(TypeError, match=name):
        moba_cp.moba_attention(q, k, v, CASE.config, layout=SequenceLayout.contiguous([0, 16], 1), **{name: 0.5})


def good_call(rank: int, group: dist.ProcessGroup | None = None) -> dict:
    q, k, v, _ = (TWO.shard(x, rank) for x in CASE.inputs())
    return {"q": q, "k": k, "v": v, "config": CASE.config, "layout": TWO, "group": group, "comm": "fetch"}


def outcome(call: dict) -> tuple[Exception | None, int, float]:
    """The error of a call, how many collectives the rank started, and the seconds it took."""
    begin = time.monotonic()
    with recorded() as started:
        try:
            moba_cp.moba_attention(**call)
            error = None
        except Exception as caught:
            error = caught.with_traceback(None)
            error.__cause__ = error.__context__ = None
    return error, len(started), time.monotonic() - begin


def full_result(rank: int) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv of a good call: the group works."""
    *qkv, dout = (TWO.shard(x, rank) for x in CASE.inputs())
    qkv = [x.requires_grad_() for x in qkv]
    out = moba_cp.moba_attention(*qkv, CASE.config, layout=TWO, comm="fetch")
    return out.detach(), *torch.autograd.grad(out, qkv, dout)


def refusing_ranks(rank: int, size: int, names: list[str], bad_ranks: list[int], pause: float) -> tuple[list, tuple]:
    """A call that is bad on `bad_ranks`, for each name; then a good one. A rank pauses after it refused."""
    outcomes = []
    for name in names:
        bad = rank in bad_ranks
        outcomes.append(outcome(good_call(rank) | (BAD_CALLS[name][0] if bad else {})))
        time.sleep(pause if bad else 0)
    return outcomes, full_result(rank)


def assert_works(results: list[tuple[torch.Tensor, ...]]) -> None:
    assert_close(tuple(TWO.unshard(parts) for parts in zip(*results, strict=True)), reference(CASE), 1e-10)


def test_every_rank_refuses_bad_input_before_any_collective() -> None:
    per_rank = run_ranks(2, refusing_ranks, list(BAD_CALLS), [0, 1], 0.0)
    for outcomes, _ in per_rank:
        for (name, (_, error, text)), (raised, started, seconds) in zip(BAD_CALLS.items(), outcomes, strict=True):
            with pytest.raises(error, match=text):
                raise raised
            assert started == 0, name
            assert seconds < 0.5, name
    assert_works([good for _, good in per_rank])


ALL_BUT_GROUPS = [name for name in BAD_CALLS if "group" not in name]


@pytest.mark.parametrize(
    ("bad_rank", "names", "pause"),
    [
        (0, ALL_BUT_GROUPS, 0.0),  # its next call comes at once
        (1, ALL_BUT_GROUPS, 0.0),
        (0, ["layout of other tokens", "unknown comm"], 2.5),
        (1, ["dtypes differ"], 2.5),
    ],
)
def test_one_rank_alone_with_bad_input_ends_the_others_too(bad_rank: int, names: list[str], pause: float) -> None:
    """It takes part in nothing but the question whether the ranks agree; the other hears of it in a fraction of a second, with
    its message; the group works on."""
    per_rank = run_ranks(2, refusing_ranks, names, [bad_rank], pause)
    for number, (name, bad, other) in enumerate(
        zip(names, *(per_rank[r][0] for r in (bad_rank, 1 - bad_rank)), strict=True)
    ):
        _, error, text = BAD_CALLS[name]
        with pytest.raises(error, match=text):
            raise bad[0]
        assert bad[1] <= 1
        assert bad[2] < 2.5
        with pytest.raises(ValueError, match=f"rank {bad_rank} refused its input: {error.__name__}: .*{text}"):
            raise other[0]
        assert other[1] == 1  # the question whether the ranks agree
        # Before the refusing rank goes on; at the next call it waits out the pause of the other first.
        assert other[2] < 1.5 + (pause if number else 0)
    assert_works([good for _, good in per_rank])


def refusing_again_and_again(rank: int, size: int) -> tuple[list, tuple]:
    """Three bad calls in a row on rank 1 without a good one of its own in between, and then one that rank 0 refuses."""
    bad = BAD_CALLS["unknown comm"][0]
    outcomes = [outcome(good_call(rank) | (bad if rank == r else {})) for r in (1, 1, 1, 0, 1)]
    return outcomes, full_result(rank)


def test_refusals_in_a_row() -> None:
    per_rank = run_ranks(2, refusing_again_and_again)
    for outcomes, _ in per_rank:
        assert all(isinstance(error, ValueError) for error, _, _ in outcomes)
        assert all(seconds < 4 for _, _, seconds in outcomes)
    assert_works([good for _, good in per_rank])


# What rank 1 has instead; what of it every rank's message must name.
DISAGREEMENTS: dict[str, tuple[dict, list[str]]] = {
    "layout": ({"layout": SequenceLayout.contiguous([0, 8, 16], 2)}, ["layout", "2 documents", "1 documents"]),
    "runs": ({"layout": SequenceLayout.from_runs([[(0, 7), (15, 16)], [(7, 15)]], [0, 16])}, ["layout"]),
    "block_size": ({"config": MoBAConfig(8, 2)}, ["config", "block_size=8", "block_size=4"]),
    "topk": ({"config": MoBAConfig(4, 3)}, ["config", "topk=3", "topk=2"]),
    "scale": ({"config": MoBAConfig(4, 2, 0.25)}, ["config", "softmax_scale=0.25", "softmax_scale=None"]),
    "comm": ({"comm": "ring"}, ["comm", "rank 1 has ring", "rank 0 has fetch"]),
    "q heads": ({"q": zeros(8, 2, 8)}, ["heads", "Hq 2", "Hq 4"]),
    "head size": ({"v": zeros(8, 2, 5)}, ["heads", "Dv 5", "Dv 4"]),
    "dtype": (
        {n: zeros(8, h, d, dtype=torch.float32) for n, h, d in (("q", 4, 8), ("k", 2, 8), ("v", 2, 4))},
        ["dtype", "torch.float32", "torch.float64"],
    ),
    "report": ({"return_report": True}, ["return_report", "True", "False"]),
    "workspace": ({"workspace_bytes": 4096}, ["workspace_bytes", "4096"]),
    "head_parallel": ({"comm": "a2a", "head_parallel": 2}, ["comm", "rank 1 has a2a", "head_parallel"]),
    "gradients": ({"q": zeros(8, 4, 8).requires_grad_()}, ["gradients", "rank 1 has wanted"]),
}


def disagreeing_ranks(rank: int, size: int, names: list[str]) -> tuple[list, tuple]:
    outcomes = [outcome(good_call(rank) | (DISAGREEMENTS[n][0] if rank == 1 else {})) for n in names]
    return outcomes, full_result(rank)


def test_ranks_that_disagree_all_say_on_what() -> None:
    per_rank = run_ranks(2, disagreeing_ranks, list(DISAGREEMENTS))
    for outcomes, _ in per_rank:
        for (name, (_, words)), (error, started, seconds) in zip(DISAGREEMENTS.items(), outcomes, strict=True):
            assert isinstance(error, ValueError), name
            for word in ("disagree", *words):
                assert word in str(error), (name, error)
            assert started == 1, name  # nothing but the question itself
            assert seconds < 4, name
    assert str(per_rank[0][0][0][0]) == str(per_rank[1][0][0][0])
    assert_works([good for _, good in per_rank])


def on_another_host(rank: int, size: int) -> tuple[Exception | None, int, float]:
    with mock.patch("moba_cp.attention.host", return_value=f"node{rank}"):
        return outcome(good_call(rank) | {"comm": "pull"})


def test_pull_is_refused_across_hosts() -> None:
    for error, started, _ in run_ranks(2, on_another_host):
        assert isinstance(error, ValueError)
        assert "disagree on host (pull is for ranks of one): rank 0 has node0, rank 1 has node1" in str(error)
        assert started == 1


def long_disagreement(rank: int, size: int) -> Exception | None:
    """Configurations that differ only in the last digit of a long number."""
    config = MoBAConfig(4, 10**90 + rank)
    return outcome(good_call(rank) | {"config": config})[0]


def test_what_is_too_long_to_show_is_still_compared() -> None:
    for error in run_ranks(2, long_disagreement):
        assert isinstance(error, ValueError)
        assert "config" in str(error)


def refusing_in_a_sub_group(rank: int, size: int) -> tuple[Exception | None, bool]:
    """Rank 3 refuses; its pair hears of it, and the other pair does not notice."""
    pair = sub_groups(2)[rank // 2]
    call = good_call(rank % 2, pair)
    error = outcome(call | (BAD_CALLS["unknown comm"][0] if rank == 3 else {}))[0]
    again = outcome(call)[0]
    return error, again is None


def test_refusals_stay_inside_their_group() -> None:
    errors, fine = zip(*run_ranks(4, refusing_in_a_sub_group), strict=True)
    assert errors[:2] == (None, None)
    assert "rank 1 refused its input" in str(errors[2])  # rank 3 is rank 1 of its group
    assert "'smoke'" in str(errors[3])
    assert all(fine)


def test_a_group_is_needed_for_more_than_one_rank() -> None:
    with pytest.raises(ValueError, match="layout is for 2 ranks, but torch.distributed is not initialized"):
        moba_cp.moba_attention(**good_call(0))


def wrong_groups(rank: int, size: int) -> list[str]:
    """A group this rank is not in, and a group of another size than the layout's."""
    pairs = sub_groups(2)
    found = []
    for group, layout in ((pairs[1 - rank // 2], TWO), (pairs[rank // 2], SequenceLayout.contiguous([0, 32], 4))):
        error = outcome(good_call(rank % 2) | {"group": group, "layout": layout})[0]
        found.append(f"{type(error).__name__}: {error}")
    return found


def test_wrong_groups() -> None:
    for foreign, small in run_ranks(4, wrong_groups):
        assert "belong" in foreign
        assert small.startswith("ValueError: the layout is for 4 ranks, but the group has 2")


def double_backward(rank: int, size: int) -> None:
    call = good_call(rank)
    call["q"].requires_grad_()
    out = moba_cp.moba_attention(**call)
    (dq,) = torch.autograd.grad((out * out).sum(), call["q"], create_graph=True)
    dq.sum().backward()


def test_second_derivatives_are_refused() -> None:
    with pytest.raises(RuntimeError, match="once_differentiable"):
        run_ranks(2, double_backward)


def test_layout_is_needed() -> None:
    q, k, v, _ = CASE.inputs()
    attention = partial(moba_cp.moba_attention, q, k, v, CASE.config)
    with pytest.raises(TypeError, match="layout"):
        attention()
    with pytest.raises(TypeError, match="layout must be a SequenceLayout, got list"):
        attention(layout=[0, 16])


def all_reduce_after_a_refusal(rank: int, size: int) -> float:
    outcome(good_call(rank) | (BAD_CALLS["unknown comm"][0] if rank == 1 else {}))
    x = torch.tensor(rank + 1.0)
    dist.all_reduce(x)
    return x.item()


def test_other_collectives_of_the_group_work_after_a_refusal() -> None:
    outcomes = run_fresh_ranks(2, all_reduce_after_a_refusal, group_timeout=3.0, timeout=10.0)
    assert [o.result for o in outcomes] == [3.0, 3.0]


def late_and_refusing(rank: int, size: int, late: list[float]) -> tuple[list, tuple]:
    """Calls that ranks 1 and 2 refuse, `late[rank]` seconds after the first; rank 0 refuses the second of them as well."""
    bad = BAD_CALLS["unknown comm"][0]
    outcomes = []
    for everyone in (False, True):
        dist.barrier()
        time.sleep(late[rank])
        outcomes.append(outcome(call_of_three(rank) | (bad if rank or everyone else {})))
        time.sleep(max(late) + 3.0 - late[rank])  # those who waited in vain have given up
    out = moba_cp.moba_attention(**call_of_three(rank))
    return outcomes, out


THREE = SequenceLayout.contiguous([0, 24], 3)


def call_of_three(rank: int) -> dict:
    x = torch.randn(24, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    local = THREE.shard(x, rank)
    return {"q": local, "k": local, "v": local, "config": MoBAConfig(4, 2), "layout": THREE, "comm": "ring"}


@pytest.mark.parametrize("late", [[0.0, 0.0, 0.0], [0.5, 0.0, 1.0], [0.0, 1.0, 0.5]], ids=str)
def test_ranks_that_refuse_at_different_times(late: list[float]) -> None:
    """All raise, and the group works on: the ranks owe the same number of all-gathers whoever gave up waiting."""
    per_rank = run_ranks(3, late_and_refusing, late)
    for rank, (outcomes, _) in enumerate(per_rank):
        one_good, all_bad = outcomes
        assert isinstance(one_good[0], ValueError)
        assert ("refused its input" in str(one_good[0])) == (rank == 0)
        assert isinstance(all_bad[0], ValueError)
        assert "smoke" in str(all_bad[0])
        assert all_bad[1] == 0
    x = torch.randn(24, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = moba_cp.reference.moba_attention(x, x, x, [0, 24], MoBAConfig(4, 2))
    torch.testing.assert_close(THREE.unshard([out for _, out in per_rank]), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(512, 64, 64), (64, 257, 64), (64, 64, 15)], ids=str)
def test_sizes_that_the_triton_kernels_do_not_serve_are_named(sizes: tuple[int, int, int]) -> None:
    dim, value_dim, block_size = sizes
    with pytest.raises(ValueError, match=f"D {dim}, Dv {value_dim}, block_size {block_size}"):
        triton_backend.check_sizes(dim=dim, dim_v=value_dim, block_size=block_size)
    triton_backend.check_sizes(dim=256, dim_v=256, block_size=16)


def test_devices_other_than_cpu_and_cuda_are_refused() -> None:
    layout = SequenceLayout.contiguous([0, 4], 1)
    with FakeTensorMode():  # no build of torch here has such a device
        x = torch.zeros(4, 1, 8, device="xpu")
    with pytest.raises(ValueError, match="xpu"):
        moba_cp.moba_attention(x, x, x, MoBAConfig(2, 2), layout=layout)


def test_the_reference_refuses_what_the_layer_refuses() -> None:
    x = zeros(4, 1, 8)
    with pytest.raises(ValueError, match="gives rank 0 5 tokens, but q has 4"):
        moba_cp.reference.moba_attention(x, x, x, [0, 5], MoBAConfig(2, 2))
    with pytest.raises(ValueError, match=r"q heads \(3\) must be a multiple of the kv heads \(2\)"):
        moba_cp.reference.moba_attention(zeros(4, 3, 8), zeros(4, 2, 8), zeros(4, 2, 8), [0, 4], MoBAConfig(2, 2))
    with pytest.raises(TypeError, match="config must be a MoBAConfig, got tuple"):
        moba_cp.reference.moba_attention(x, x, x, [0, 4], (2, 2))  # type: ignore[arg-type]
