"""A recording does what the pass did, for other tensors; what cannot be done again is not recorded."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _python_dispatch

from moba_cp.kernels import recording
from moba_cp.kernels.recording import Recorder, Recording

FIXED = torch.arange(4.0)
Pass = Callable[..., Sequence[Tensor]]


def record(pass_: Pass, *inputs: Tensor) -> Recording | None:
    with torch.no_grad(), Recorder(inputs) as recorder:
        results = pass_(*inputs)
    return recorder.recording(results)


def tensors(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)


def operators(x: Tensor, y: Tensor) -> Sequence[Tensor]:
    """Allocations, views of what is given, made and fixed, results in place, and an argument that is a result."""
    out = torch.empty(4, 3).t()
    out[:, :1].fill_(2)
    out.copy_(x[:, :1] + FIXED.expand(3, 4)[:, 1:2])
    total = torch.cumsum(torch.zeros(3, 4) + y, 1, dtype=torch.float64)
    return out, total, x, torch.empty_like(y).copy_(y), FIXED[1:]


def test_other_inputs_give_what_the_pass_gives() -> None:
    found = record(operators, *tensors(0))
    assert found is not None
    for seed in range(1, 4):
        inputs = tensors(seed)
        for got, expected in zip(found.run(inputs), operators(*inputs), strict=True):
            assert got.stride() == expected.stride()
            assert torch.equal(got, expected)


def test_two_recordings_agree_until_a_decision_differs() -> None:
    first, second = (record(operators, *tensors(seed)) for seed in range(2))
    other = record(lambda x, y: [*operators(x, y)[:-1], FIXED[2:]], *tensors(0))
    scaled = [record(lambda x, y, n=n: [x * n], *tensors(0)) for n in (2, 2, 3)]
    assert None not in (first, second, other, *scaled)
    assert first.agrees(second)
    assert not first.agrees(other)
    assert scaled[0].agrees(scaled[1])
    assert not scaled[0].agrees(scaled[2])


def test_a_tensor_made_unnoticed_does_not_agree() -> None:
    """numpy makes it, and so does the next pass, in other memory while the first recording exists."""
    make = lambda x, y: [x + torch.from_numpy(np.full(4, 2.0, dtype=np.float32))]  # noqa: E731
    first, second = record(make, *tensors(0)), record(make, *tensors(0))
    assert first is not None
    assert second is not None
    assert not first.agrees(second)


@pytest.mark.parametrize(
    "pass_",
    [
        lambda x, y: [x * float(y.sum())],
        lambda x, y: [x[x > 0]],
        lambda x, y: [torch.cat([x[0], y])],
        lambda x, y: [torch.randn(3) * 2],
        lambda x, y: list(x.unbind()),
        lambda x, y: [torch.from_numpy(x.numpy()) * 2],
    ],
    ids=["numbers on the host", "sizes by numbers", "lists of tensors", "random", "several results", "through numpy"],
)
def test_not_recorded(pass_: Pass) -> None:
    assert record(pass_, *tensors(0)) is None


def test_writes_to_what_is_fixed_are_done_again() -> None:
    total = torch.zeros(4)
    found = record(lambda x, y: [total.zero_().add_(y) * 1], *tensors(0))
    assert found is not None
    for seed in range(1, 3):
        assert torch.equal(found.run(tensors(seed))[0], tensors(seed)[1])


def test_one_tensor_given_twice_is_not_recorded() -> None:
    """Which of the two was read cannot be told."""
    x, _ = tensors(0)
    assert record(lambda x, y: [x + y], x, x) is None


def test_long_passes_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_STEPS", 2)
    assert record(lambda x, y: [x * 2 + y], *tensors(0)) is not None
    assert record(lambda x, y: [x * 2 + y - 1], *tensors(0)) is None


def test_a_recorder_that_gave_up_holds_nothing() -> None:
    """An interrupt may leave one active, at its entry or exit."""
    alive: list[weakref.ref] = []

    def pass_(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        for _ in range(recording.MOST_STEPS + 1):
            unnoticed = torch.from_numpy(np.ones(4, dtype=np.float32))
            alive.append(weakref.ref(unnoticed))
            y.mul_(unnoticed)
        del unnoticed
        assert not any(ref() is not None for ref in alive)
        assert recording.recorder() is None
        return [y]

    assert record(pass_, *tensors(0)) is None


def test_launches_and_calls() -> None:
    """In order, each on the tensors of its run. What a launch does besides is not noted, and a launch in it neither."""
    log: list[tuple[str, float]] = []

    def launch(x: Tensor) -> None:
        assert recording.recorder() is None
        log.append(("launch", float(x.clone().sum())))

    def pass_(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        now = recording.recorder()
        made = torch.empty(4).copy_(y)
        if now is None:
            launch(made)
            log.append(("call", 1.0))
        else:
            now.launch(launch, ("launch",), [made])
            now.call(log.append, ("call", 1.0))
        return [made]

    found = record(pass_, *tensors(0))
    assert found is not None
    log.clear()
    pass_(*tensors(1))
    expected = log.copy()
    log.clear()
    found.run(tensors(1))
    assert log == expected


def test_calls_are_made_to_the_end_when_a_pass_fails() -> None:
    """So ranges for profilers close."""
    log: list[str] = []

    def launch(x: Tensor) -> None:
        if x[0] > 0:
            raise MemoryError

    def pass_(x: Tensor) -> Sequence[Tensor]:
        now = recording.recorder()
        assert now is not None
        for name in ("first", "second"):
            now.call(log.append, name)
            now.launch(launch, (), [x])
            now.call(log.append, f"end of {name}")
        return [x]

    found = record(pass_, torch.zeros(1))
    assert found is not None
    expected = log.copy()
    log.clear()
    with pytest.raises(MemoryError):
        found.run([torch.ones(1)])
    assert log == expected


def test_what_is_not_returned_is_freed_after_its_last_use() -> None:
    alive: list[weakref.ref] = []
    before: list[int] = []

    def launch(x: Tensor) -> None:
        before.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(x))

    def pass_(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        now = recording.recorder()
        assert now is not None
        for _ in range(3):
            now.launch(launch, (), [torch.empty(4)])
        return [y]

    found = record(pass_, *tensors(0))
    assert found is not None
    found.run(tensors(1))
    assert before == [0] * 6  # in the recorded pass as well
    assert [ref() for ref in alive] == [None] * 6


def test_recorders_in_two_threads_leave_no_flag() -> None:
    """While torch believes that a mode is active, some versions of it compile nothing, in any thread."""
    entered, left = threading.Event(), threading.Event()

    def work() -> None:
        with Recorder([]):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=work)
    with Recorder([]):
        thread.start()
        entered.wait(10)
    left.set()
    thread.join()
    assert not _python_dispatch.is_in_torch_dispatch_mode()
