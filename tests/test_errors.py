"""Bad input: an error that carries the values, on every rank, before any collective; and a group that works on."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from statistics import median
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.kernels import triton_backend
from moba_cp.parallel import notes
from tests.calls import CASE, assert_works, full_result, good_call, outcome, zeros
from tests.ranks import RankOutcome, run_fresh_ranks, run_ranks


def blocks(heads: int, tokens: int, count: int, number: int = -1) -> torch.Tensor:
    return torch.full((heads, tokens, count), number)


def of_inference(*shape: int) -> torch.Tensor:
    with torch.inference_mode():
        return zeros(*shape)


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
    "selection is a list": ({"selection": [1]}, TypeError, "selection must be a tensor, got list"),
    "selection of floats": (
        {"selection": zeros(1, 8, 2)},
        TypeError,
        "selection must be int16, int32 or int64, got torch.float64",
    ),
    "selection of other rows": ({"selection": blocks(1, 7, 2)}, ValueError, r"8 tokens, k\] .* got \(1, 7, 2\)"),
    "selection of other heads": (
        {"selection": blocks(3, 8, 2)},
        ValueError,
        r"with Hq \(4\), Hkv \(2\), 1 heads, got \(3, 8, 2\)",
    ),
    "selection of more than topk": (
        {"selection": blocks(1, 8, 3)},
        ValueError,
        r"1 to topk \(2\) blocks per row, got 3",
    ),
    "selection elsewhere": (
        {"selection": blocks(1, 8, 2).to("meta")},
        ValueError,
        "selection must be where q is, got selection on meta, q on cpu",
    ),
    "selection of later blocks": (
        {"selection": blocks(1, 8, 2, 4)},
        ValueError,
        r"selection holds a block after the row's own: head 0, row 0, whose own block is \d .* lists \[4, 4\] \(8 rows",
    ),
    "selection of a block below -1": (
        {"selection": blocks(2, 8, 1, -2)},
        ValueError,
        r"holds a number below -1: .* lists \[-2\] \(16 rows",
    ),
    "selection of a block twice": (
        {"selection": blocks(4, 8, 2, 0)},
        ValueError,
        r"lists a block twice: head 0, row 0, .* lists \[0, 0\]",
    ),
    "selection and routing": (
        {"selection": blocks(1, 8, 2), "routing": (zeros(8, 1, 2), zeros(8, 1, 2))},
        ValueError,
        "pass selection or routing, not both",
    ),
    "check_selection is a word": (
        {"check_selection": "no"},
        TypeError,
        "check_selection must be True or False, got 'no'",
    ),
    "return_selection is None": (
        {"return_selection": None},
        TypeError,
        "return_selection must be True or False, got None",
    ),
    "routing is one tensor": ({"routing": zeros(8, 1, 2)}, TypeError, r"pair \(q_gate, k_gate\), got Tensor"),
    "routing of numbers": ({"routing": (1, 2)}, TypeError, "q_gate must be a tensor, got int"),
    "routing of integers": (
        {"routing": (blocks(8, 1, 2), blocks(8, 1, 2))},
        TypeError,
        "q_gate must be fp64, fp32, bf16 or fp16, got torch.int64",
    ),
    "routing of other rows": (
        {"routing": (zeros(8, 1, 2), zeros(9, 1, 2))},
        ValueError,
        r"k_gate must have shape \[8 tokens, heads, Dg\], got \(9, 1, 2\)",
    ),
    "routing of two widths": (
        {"routing": (zeros(8, 1, 2), zeros(8, 1, 3))},
        ValueError,
        r"same head size, got q_gate \(8, 1, 2\), k_gate \(8, 1, 3\)",
    ),
    "routing of two dtypes": (
        {"routing": (zeros(8, 1, 2), zeros(8, 1, 2, dtype=torch.float32))},
        TypeError,
        "q_gate and k_gate must have one dtype, got torch.float64 and torch.float32",
    ),
    "routing of other heads": (
        {"routing": (zeros(8, 8, 2), zeros(8, 1, 2))},
        ValueError,
        r"q_gate must have Hq \(4\), Hkv \(2\), 1 heads, got q_gate \(8, 8, 2\)",
    ),
    "routing heads that do not divide": (
        {"routing": (zeros(8, 4, 2), zeros(8, 3, 2))},
        ValueError,
        r"heads of q_gate must be a multiple of those of k_gate, got q_gate \(8, 4, 2\), k_gate \(8, 3, 2\)",
    ),
    "q of inference mode with gradients": (
        {"q": of_inference(8, 4, 8), "k": zeros(8, 2, 8).requires_grad_()},
        ValueError,
        r"gradients are wanted, and q was made under torch.inference_mode\(\): .* pass q.clone\(\)",
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


def refusing_ranks(rank: int, size: int, names: list[str], bad_ranks: list[int], pause: float) -> tuple[list, tuple]:
    """A call that is bad on `bad_ranks`, for each name; then a good one. A rank pauses after it refused.

    Per call its `outcome`, and by the clock that all processes share when it ended and when the rank goes on.
    """
    outcomes = []
    for name in names:
        bad = rank in bad_ranks
        found = outcome(good_call(rank) | (BAD_CALLS[name][0] if bad else {}))
        ended = time.monotonic()
        time.sleep(pause if bad else 0)
        outcomes.append((*found, ended, time.monotonic()))
    return outcomes, full_result(rank)


LONG_GRACE_S = 30.0
"""More than a refusal takes on a busy machine."""


def refusing_together(rank: int, size: int) -> tuple[list, tuple]:
    with mock.patch.object(notes, "GRACE_S", LONG_GRACE_S):
        return refusing_ranks(rank, size, list(BAD_CALLS), [0, 1], 0.0)


def test_every_rank_refuses_bad_input_before_any_collective() -> None:
    per_rank = run_ranks(2, refusing_together)
    for outcomes, _ in per_rank:
        for (name, (_, error, text)), (raised, started, seconds, *_) in zip(BAD_CALLS.items(), outcomes, strict=True):
            with pytest.raises(error, match=text):
                raise raised
            assert started == 0, name
            assert seconds < LONG_GRACE_S, name  # no rank waits to find out what the others do
    assert_works([good for _, good in per_rank])


ALL_BUT_GROUPS = [name for name in BAD_CALLS if "group" not in name]


# The bad rank, its calls, and how long it pauses after each. Without a pause its next call comes at once. The other waits for
# 0.3 s before it looks for a refusal, so each half takes 9 s.
ALONE = [
    (0, ALL_BUT_GROUPS[::2], 0.0),
    (1, ALL_BUT_GROUPS[1::2], 0.0),
    (0, ["layout of other tokens", "unknown comm"], 2.5),
    (1, ["dtypes differ"], 2.5),
]


def refusing_alone(bad_rank: int, names: list[str], pause: float) -> list[RankOutcome]:
    return run_fresh_ranks(2, refusing_ranks, names, [bad_rank], pause, group_timeout=120.0, timeout=120.0)


@pytest.fixture(scope="module")
def found_alone() -> list[list[RankOutcome]]:
    """Fresh ranks for all of `ALONE` at once: they wait most of the time."""
    with ThreadPoolExecutor(len(ALONE)) as pool:
        return list(pool.map(refusing_alone, *zip(*ALONE)))


@pytest.mark.parametrize("number", range(len(ALONE)))
def test_one_rank_alone_with_bad_input_ends_the_others_too(number: int, found_alone: list[list[RankOutcome]]) -> None:
    """It takes part in nothing but the question whether the ranks agree; the other hears of it in a fraction of a second, with
    its message; the group works on."""
    check_alone(*ALONE[number], found_alone[number])


@pytest.mark.heavy
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_the_other_rank_alone(bad_rank: int) -> None:
    names = ALL_BUT_GROUPS[1 - bad_rank :: 2]
    check_alone(bad_rank, names, 0.0, refusing_alone(bad_rank, names, 0.0))


def check_alone(bad_rank: int, names: list[str], pause: float, found: list[RankOutcome]) -> None:
    assert None not in [rank.result for rank in found], found
    of_bad, of_other = (found[rank].result[0] for rank in (bad_rank, 1 - bad_rank))
    for name, bad, other in zip(names, of_bad, of_other, strict=True):
        _, error, text = BAD_CALLS[name]
        with pytest.raises(error, match=text):
            raise bad[0]
        assert bad[1] <= 1
        with pytest.raises(ValueError, match=f"rank {bad_rank} refused its input: {error.__name__}: .*{text}"):
            raise other[0]
        assert other[1] == 1  # the question whether the ranks agree
        if pause:  # heard before the refusing rank goes on
            assert other[3] < bad[4]
        # No single call waits for the group's timeout; how long they usually take is below.
        assert max(bad[2], other[2]) < 20, name
    assert median(bad[2] for bad in of_bad) < notes.GRACE_S + 0.5
    # A later call of the other waits out the pause of the refusing rank first.
    assert median(other[2] - (pause if number else 0) for number, other in enumerate(of_other)) < 1.5
    assert_works([rank.result[1] for rank in found])


def refusing_again_and_again(rank: int, size: int) -> tuple[list, tuple]:
    """Three bad calls in a row on rank 1 without a good one of its own in between, and then one that rank 0 refuses."""
    bad = BAD_CALLS["unknown comm"][0]
    outcomes = [outcome(good_call(rank) | (bad if rank == r else {})) for r in (1, 1, 1, 0, 1)]
    return outcomes, full_result(rank)


def test_refusals_in_a_row() -> None:
    per_rank = run_ranks(2, refusing_again_and_again)
    for outcomes, _ in per_rank:
        assert all(isinstance(error, ValueError) for error, _, _ in outcomes)
        assert median(seconds for _, _, seconds in outcomes) < 4
        assert all(seconds < 20 for _, _, seconds in outcomes)  # the group's timeout is 120 s
    assert_works([good for _, good in per_rank])


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


def over_a_fake_group(rank: int, size: int) -> None:
    """torch's fake backend, of dry runs and estimates: its collectives never end."""
    import_module("torch.testing._internal.distributed.fake_pg")  # registers it
    group, layout = dist.new_group(backend="fake"), SequenceLayout.contiguous([0, 16], size)
    q, k, v = (zeros(8, 2, 8) for _ in range(3))
    with pytest.raises(ValueError, match="fake backend, which moves nothing, got a group of .*cpu.*fake"):
        moba_cp.moba_attention(q, k, v, MoBAConfig(4, 2), layout=layout, group=group)


def test_a_fake_group_is_refused() -> None:
    run_ranks(2, over_a_fake_group)
