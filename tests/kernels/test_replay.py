"""Replayed calls of attention: the bits of calls that run step by step, with uninitialized memory poisoned."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, operators, pipeline, prepare, replay
from moba_cp.config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from moba_cp.parallel.plan_cache import PLANS
from moba_cp.stages import time_stages
from tests.kernels import interpreter

DEVICE = torch.device("cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu")
GPU = DEVICE.type == "cuda"
STEP_BY_STEP = 3
"""Runs of a pass before the first one that is replayed."""
CASES = [
    # documents, (q heads, kv heads), D, block size, topk
    *([([0, 40], (2, 1), 16, 16, 2), ([0, 3, 39], (2, 2), 16, 16, 2)] if not GPU else []),
    *(
        [
            ([0, 8192], (16, 16), 128, 128, 8),
            ([0, 5000, 8192], (16, 4), 128, 512, 3),
            ([0, 20000], (4, 1), 64, 4096, 12),  # every block is selected
            ([0, 3000], (4, 2), 96, 64, 4),  # portable kernels
            ([0, 6000], (4, 2), 128, 1024, 3),  # dq is summed
            ([0, 20000], (4, 4), 128, 128, 20),  # long bins are cut; a gate of the exact kernel alone
        ]
        if GPU
        else []
    ),
]

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="runs interpreted")] if interpreter.CUDA else []
here = pytest.mark.skipif(
    not GPU and not interpreter.ACTIVE, reason="runs in the process that test_in_interpreter starts"
)
on_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def test_in_interpreter() -> None:
    interpreter.run_module(__file__)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernels also on the CPU; nothing is known at the start; new memory holds NaN or the largest integers."""
    if not GPU:
        from moba_cp.kernels import triton_backend

        for module in (prepare, pipeline, operators):
            monkeypatch.setattr(module, "backend_for", lambda device, dtype: triton_backend)
    PLANS.clear()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
    PLANS.clear()


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that ran step by step, in turn."""
    names: list[str] = []
    for name in ("_forward", "_backward"):
        function = getattr(pipeline, name)
        noted = lambda *a, name=name, function=function: (names.append(name), function(*a))[1]  # noqa: E731
        monkeypatch.setattr(pipeline, name, noted)
    return names


def inputs(case: tuple, seed: int) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    cu_seqlens, (q_heads, kv_heads), dim, _, _ = case
    generator = torch.Generator(DEVICE).manual_seed(seed)
    heads = (q_heads, kv_heads, kv_heads, q_heads)
    return [
        torch.randn(cu_seqlens[-1], h, dim, generator=generator, device=DEVICE, dtype=torch.float32).bfloat16()
        for h in heads
    ]


def attend(case: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cu_seqlens, _, _, *sizes = case
    return moba_attention(q, k, v, MoBAConfig(*sizes), layout=SequenceLayout.contiguous(cu_seqlens, 1))


def both(
    case: tuple, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, function: Callable[..., Tensor] = attend
) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(case, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def expected(case: tuple, *given: Tensor) -> list[Tensor]:
    """The same step by step: calls whose stages are timed are not replayed."""
    with time_stages():
        return both(case, *given)


def same(got: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, right, strict=True))


@here
@pytest.mark.parametrize("case", CASES)
def test_bits(case: tuple, step_by_step: list[str]) -> None:
    seeds = range(STEP_BY_STEP + 2)
    right = [expected(case, *inputs(case, seed)) for seed in seeds]
    step_by_step.clear()
    for seed in seeds:
        assert same(both(case, *inputs(case, seed)), right[seed]), seed
    assert step_by_step == ["_forward", "_backward"] * STEP_BY_STEP


@here
def test_forward_alone_is_recorded_apart(step_by_step: list[str]) -> None:
    """It keeps no lists for backward."""
    case = CASES[0]
    right = expected(case, *inputs(case, 0))[0]
    step_by_step.clear()
    for mode in (torch.no_grad, torch.inference_mode):
        for _ in range(STEP_BY_STEP + 1):
            with mode():
                assert torch.equal(attend(case, *inputs(case, 0)[:3]), right)
    assert step_by_step == ["_forward"] * STEP_BY_STEP


@here
def test_operators_are_replayed_too(step_by_step: list[str]) -> None:
    """Forward as eager calls are; backward for itself, as the operators keep selected blocks in another dtype."""
    case = CASES[0]
    cu_seqlens, _, _, *sizes = case
    described = SequenceLayout.contiguous(cu_seqlens, 1).described

    def operator(_: tuple, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.moba_cp.attention(
            q, k, v, described, None, None, None, *sizes, None, "", "auto", True, False, True, DEFAULT_WORKSPACE_BYTES,
            DEFAULT_EXCHANGE_BYTES, None,
        )[0]  # fmt: skip

    done = []
    for seed in range(STEP_BY_STEP + 1):
        given = inputs(case, seed)
        right = expected(case, *given)
        step_by_step.clear()
        for function in (attend, operator):
            assert same(both(case, *given, function), right)
        done.append(step_by_step.count("_forward"))
    assert done == [2, 1, 0, 0]
    assert step_by_step == []


@here
def test_other_strides_and_alignments(step_by_step: list[str]) -> None:
    """Each kind is recorded for itself, up to a number of kinds."""
    case = CASES[1] if GPU else ([0, 34], (2, 2), 16, 16, 2)
    q, k, v, dout = inputs(case, 2)
    wide = torch.cat([q, k, v], 1)
    heads = (q.shape[1], k.shape[1], v.shape[1])
    shifted = torch.empty(q.numel() + 1, dtype=q.dtype, device=DEVICE)[1:].view_as(q).copy_(q)
    kinds = [
        (q, k, v, dout),
        (*wide.split(heads, 1), dout.transpose(0, 1).contiguous().transpose(0, 1)),
        (shifted, k, v, dout[:1].expand_as(dout)),
        (q, k.transpose(0, 1).contiguous().transpose(0, 1), v, dout),
        (q, k, v.transpose(0, 1).contiguous().transpose(0, 1), dout),
    ]
    rights = [expected(case, *kind) for kind in kinds]
    for _ in range(STEP_BY_STEP + 1):
        for kind, right in zip(kinds, rights, strict=True):
            step_by_step.clear()
            assert same(both(case, *kind), right)
    assert step_by_step == ["_forward", "_backward"]  # the last kind of five
    assert replay.MOST_KINDS == 4


@here
def test_saved_tensors_that_move_and_checkpoints() -> None:
    case = CASES[0]
    moved = lambda *a: [x.clone() for x in both(*a)]  # noqa: E731
    for seed in range(STEP_BY_STEP + 1):
        given = inputs(case, seed)
        right = expected(case, *given)
        with saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
            assert same(moved(case, *given), right)
        again = lambda case, *x: checkpoint(attend, case, *x, use_reentrant=False)  # noqa: E731
        assert same(both(case, *given, again), right)


class Noted(TorchDispatchMode):
    """Names of the operators. Where sums are made, it calls attention itself."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inner: list[Tensor] = []
        self._again = again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func is torch.ops.aten.cumsum.default:
            self.inner.append(self._again())
        return func(*args, **(kwargs or {}))


@here
def test_a_mode_of_the_caller() -> None:
    """It sees the same operators in each call, and what it does itself is not recorded."""
    case = CASES[0]
    given, others = inputs(case, 0), inputs(case, 1)
    right, inner = expected(case, *given), expected(case, *others)[0]
    seen = []
    for call in range(STEP_BY_STEP + 1):
        with Noted(lambda: attend(case, *others[:3])) as mode:
            assert same(both(case, *given), right)
        assert [torch.equal(x, inner) for x in mode.inner] == [True]
        seen.append(mode.names)
        for _ in range(STEP_BY_STEP if call == STEP_BY_STEP - 1 else 0):  # replayed from then on
            assert same(both(case, *given), right)
    assert seen[1:] == seen[:-1]


@here
def test_an_input_given_twice() -> None:
    case = CASES[1] if not GPU else ([0, 3000], (4, 4), 64, 64, 4)
    q, _, _, dout = inputs(case, 0)
    right = expected(case, q, q, q, dout)
    for _ in range(STEP_BY_STEP + 2):
        x = q.detach().requires_grad_()
        out = attend(case, x, x, x)
        out.backward(dout)
        assert torch.equal(out, right[0])
        assert x.grad is not None
        assert torch.equal(x.grad, right[1] + right[2] + right[3]) or GPU  # the order of sums is autograd's


@on_gpu  # the interpreter is for one thread
def test_threads() -> None:
    """Each sees the bits of its own inputs, whichever of them records."""
    case = CASES[0]
    given = [inputs(case, seed) for seed in range(3)]
    rights = [expected(case, *x) for x in given]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [same(both(case, *given[index]), rights[index]) for _ in range(6)]
        wrong.extend(index for right in found if not right)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@here
def test_several_chunks_are_not_replayed(step_by_step: list[str]) -> None:
    """They use streams of their own."""
    case = CASES[1]
    cu_seqlens, _, _, *sizes = case
    layout = SequenceLayout.contiguous(cu_seqlens, 1)
    for _ in range(STEP_BY_STEP + 1):
        moba_attention(*inputs(case, 0)[:3], MoBAConfig(*sizes), layout=layout, workspace_bytes=1)
    assert step_by_step == ["_forward"] * (STEP_BY_STEP + 1)


@on_gpu
def test_a_graph_captures_step_by_step(step_by_step: list[str]) -> None:
    case = CASES[0]
    given = inputs(case, 0)
    for _ in range(STEP_BY_STEP + 1):
        both(case, *given)
    right = expected(case, *inputs(case, 5))
    step_by_step.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both(case, *given)
    assert step_by_step == ["_forward", "_backward"]
    for x, new in zip(given, inputs(case, 5), strict=True):
        x.copy_(new)
    graph.replay()
    assert same(got, right)


@on_gpu
@pytest.mark.parametrize("case", CASES[:2])
def test_memory(case: tuple) -> None:
    """No more than step by step."""
    torch.use_deterministic_algorithms(False)
    given = inputs(case, 0)
    peaks = []
    for run in [expected, *[both] * (STEP_BY_STEP + 2)]:
        gc.collect()  # what earlier tests left would be freed during a run
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(case, *given)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[-1] <= peaks[1]
    assert peaks[-1] == peaks[-2]
