"""The order of backward passes as GPUs compare it: with the next call's message, no collective of its own, all ranks alike.

Gloo ranks read messages late here, as CUDA does: `late`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from moba_cp.dense import causal_attention
from moba_cp.parallel import agreement, backward_order
from tests.ranks import run_ranks
from tests.recorder import Started, recorded

CONFIG, LAYOUT = MoBAConfig(8, 3), SequenceLayout.zigzag([0, 64], 2)
HEADER = Started("all_gather", 1024, 1024)
DIFFERENT = "the ranks of the context-parallel group run backward passes in different orders: "


@contextlib.contextmanager
def late(rounds_at_once: int = 0) -> Iterator[dist.ProcessGroup]:
    """A group of both ranks whose messages are read as on CUDA."""
    group = dist.new_group([0, 1])
    try:
        with (
            mock.patch.object(backward_order, "AT_ONCE", ()),
            mock.patch.object(agreement, "READ_LATE", ("cpu",)),
            mock.patch.object(backward_order, "_ROUNDS_AT_ONCE", rounds_at_once),
        ):
            yield group
    finally:
        dist.destroy_process_group(group)


def inputs(rank: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    whole = torch.randn(64, 2, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return LAYOUT.shard(whole, rank).requires_grad_()


def attend(kind: str, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """One layer `[T, 2, 8]`; "scores" makes two calls, the others one."""
    where = {"layout": LAYOUT, "group": group}
    match kind:
        case "moba":
            return moba_cp.moba_attention(x, x, x, CONFIG, **where, comm="ring")
        case "dense":
            return causal_attention(x, x, x, None, **where, comm="ring")
        case "heads":
            return moba_cp.moba_attention(x, x, x, CONFIG, **where, comm="a2a")
        case "operator":
            description = torch.as_tensor(LAYOUT.description)
            return torch.ops.moba_cp.attention(
                x, x, x, description, None, None, None, 8, 3, None, group.group_name, "ring", True, False,
                torch.is_grad_enabled(), DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES, None,
            )[0]  # fmt: skip
        case "scores":
            out, selection = moba_cp.moba_attention(x, x, x, CONFIG, **where, comm="ring", return_selection=True)
            scores = moba_cp.block_scores(x, x, selection.blocks, CONFIG, **where)
            return out * scores.mean(2).t()[:, :, None].tanh()
    raise AssertionError(kind)


KINDS = ("moba", "dense", "heads", "operator", "scores")
STEPS = (
    "forward", "oldest", "newest", "in a thread", "twice", "fails", "evaluate", "inference", "other group",
)  # fmt: skip


class Program:
    """Micro-batches of a few layers whose forward and backward passes run in any order.

    Args:
        rank, group: of the calls.
        kinds: of the layers.
        recompute: "no", "reentrant" or "non-reentrant" checkpointing of each layer.
        other: the group of some calls between.
    """

    def __init__(
        self,
        rank: int,
        group: dist.ProcessGroup,
        kinds: tuple[str, ...],
        recompute: str = "no",
        other: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.group, self.kinds, self.recompute, self.other = rank, group, kinds, recompute, other
        self.flying: list[tuple[Tensor, Tensor]] = []
        self.fails = False

    def step(self, name: str) -> None:
        """One of `STEPS`; what needs a micro-batch in flight does nothing without."""
        match name:
            case "forward":
                x = inputs(self.rank, len(self.flying))
                self.flying.append((x, self.through(x, self.group).pow(2).sum()))
            case "evaluate" | "inference":
                with torch.no_grad() if name == "evaluate" else torch.inference_mode():
                    self.through(inputs(self.rank), self.group)
            case "other group":
                self.through(inputs(self.rank), self.other).sum().backward()
            case _ if self.flying:
                _, loss = self.flying.pop(-1 if name == "newest" else 0)
                self.backward(name, loss)

    def through(self, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        for kind in self.kinds:
            if self.recompute == "no" or not torch.is_grad_enabled():
                x = attend(kind, x, group)
            else:
                x = checkpoint(attend, kind, x, group, use_reentrant=self.recompute == "reentrant")
            if x.requires_grad:
                x.register_hook(self.hook)
        return x

    def hook(self, gradient: Tensor) -> None:
        if self.fails and gradient.numel():
            self.fails = False
            raise ZeroDivisionError

    def backward(self, name: str, loss: Tensor) -> None:
        match name:
            case "in a thread":
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            case "twice" if self.recompute != "reentrant":  # which runs once only
                loss.backward(retain_graph=True)
                loss.backward()
            case "fails":
                self.fails = True
                with contextlib.suppress(ZeroDivisionError):
                    loss.backward()
            case _:
                loss.backward()


def run_valid(
    rank: int, size: int, kinds: tuple[str, ...], recompute: str, steps: list[str], rounds_at_once: int
) -> tuple[int, int, int]:
    """Messages of 1 KiB, calls, and backward passes of calls that were compared at once."""
    at_once = 0

    def counted(original: Callable) -> Callable:
        def call(*args: object) -> object:
            nonlocal at_once
            at_once += 1
            return original(*args)

        return call

    with (
        late(rounds_at_once) as group,
        late(rounds_at_once) as other,
        mock.patch.object(agreement, "all_facts", counted(agreement.all_facts)),
    ):
        program = Program(rank, group, kinds, recompute, other)
        with recorded() as events:
            for step in [*steps, "forward", "oldest", "forward", "oldest"]:
                program.step(step)
        calls = sum(backward_order._order(g).calls for g in (group, other))
    return events.count(HEADER), calls, at_once


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple),
    st.sampled_from(["no", "reentrant", "non-reentrant"]),
    st.lists(st.sampled_from(STEPS), max_size=12),
    st.sampled_from([0, 0, 2]),
)
def test_valid_programs_raise_nothing_and_add_no_collective(
    kinds: tuple[str, ...], recompute: str, steps: list[str], rounds_at_once: int
) -> None:
    """One message per call; of the first rounds alone, one per backward pass of a call more."""
    results = run_ranks(2, run_valid, kinds, recompute, steps, rounds_at_once)
    assert results[0] == results[1]
    headers, calls, at_once = results[0]
    assert headers == calls + at_once
    assert (at_once > 0) == (rounds_at_once > 0)


def run_swapped(
    rank: int, size: int, kinds: tuple[str, ...], before: int, orders: tuple[list[int], list[int]]
) -> tuple[list[tuple[int, str]], list[Tensor]]:
    """Rounds of two micro-batches; in one of them the ranks take `orders`. (Round, error) and gradients of the last round."""
    errors: list[tuple[int, str]] = []
    with late() as group:
        for round_ in range(before + 6):
            program = Program(rank, group, kinds)
            for _ in range(2):
                program.step("forward")
            (x, first), (y, second) = program.flying
            for index in orders[rank] if round_ == before else [0, 1]:
                try:
                    (first, second)[index].backward()
                except ValueError as error:
                    errors.append((round_ - before, str(error)))
        dist.barrier(group)
    return errors, [x.grad, y.grad]


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(KINDS[:-1]), min_size=1, max_size=3).map(tuple),
    st.integers(0, 2),
    st.sampled_from([([0, 1], [1, 0]), ([1, 0], [0, 1])]),
)
def test_a_swapped_pass_raises_once_on_every_rank_in_the_next_round(
    kinds: tuple[str, ...], before: int, orders: tuple[list[int], list[int]]
) -> None:
    results = run_ranks(2, run_swapped, kinds, before, orders)
    right = run_ranks(2, run_swapped, kinds, 0, ([0, 1], [0, 1]))
    layers = len(kinds)
    # The first backward is that of a micro-batch's last layer.
    first = [2 * layers * before + layers * (1 + order[0]) for order in orders]
    for (errors, gradients), (no_errors, expected) in zip(results, right, strict=True):
        assert not no_errors
        ((round_, message),) = errors
        assert round_ == 1
        assert message == (
            f"{DIFFERENT}rank 0 is at call {first[0]} of the group, rank 1 at call {first[1]}. Gradients would be mixed up"
        )
        for gradient, whole in zip(gradients, expected, strict=True):
            assert torch.equal(gradient, whole), "the group works on"


def one_call_per_round(rank: int, size: int) -> tuple[list[tuple[int, str]], int]:
    """A swapped pass after the rounds that are compared at once: (pass after it, error), and the messages of a steady pass."""
    errors: list[tuple[int, str]] = []
    fails = False
    with late(rounds_at_once=4) as group:

        def call() -> Tensor:
            x = inputs(rank)
            x.register_hook(lambda gradient: gradient if not fails else 1 // 0)
            return attend("moba", x, group).sum()

        for _ in range(3):
            torch.stack([call(), call()]).sum().backward()
        fails = True  # a pass that fails half-way leaves nothing behind
        out = call()
        with contextlib.suppress(ZeroDivisionError):
            out.backward()
        fails = False
        with recorded() as events:
            torch.stack([call(), call()]).sum().backward()
        headers = events.count(HEADER)
        outs = [call(), call()]
        for index in (0, 1) if rank == 0 else (1, 0):
            outs[index].backward()
        for later in range(6):
            try:
                call().backward()  # the group works on
            except ValueError as error:
                errors.append((later, str(error)))
    return errors, headers


def test_a_steady_pass_adds_no_message_and_rounds_of_one_call_raise_one_later() -> None:
    for errors, headers in run_ranks(2, one_call_per_round):
        assert headers == 2, "those of its two calls"
        ((later, message),) = errors
        assert later == 1
        assert "rank 0 is at call 10 of the group, rank 1 at call 11" in message


def recomputed(rank: int, size: int, recompute: str) -> tuple[list[int], int]:
    """For each step of six layers, how many messages were read; and the rounds that were counted."""
    reads: list[int] = []
    with (
        late(rounds_at_once=2) as group,
        mock.patch.object(backward_order, "_read", wraps=backward_order._read) as read,
    ):
        for _ in range(5):
            program = Program(rank, group, ("moba",) * 6, recompute)
            program.step("forward")
            before = read.call_count
            program.step("oldest")
            reads.append(read.call_count - before)
        return reads, backward_order._order(group).rounds


@pytest.mark.parametrize("recompute", ["no", "reentrant", "non-reentrant"])
def test_recomputed_layers_are_no_rounds_and_read_no_messages(recompute: str) -> None:
    """Else the host would wait for the GPU at every layer of a backward pass that recomputes."""
    # Steps 0 and 1 are compared at once, and step 2 has the first numbers of a digest, which the next step's message carries.
    assert run_ranks(2, recomputed, recompute) == [([0, 0, 0, 1, 1], 4)] * 2


def swapped_from(rank: int, size: int, first: int, rounds: int, at_once: int) -> list[int]:
    """Rounds of two calls, swapped from round `first` on, of which `at_once` are compared at once; where it raised."""
    raised = []
    with late(rounds_at_once=at_once) as group:
        for round_ in range(rounds):
            outs = [attend("moba", inputs(rank), group).sum() for _ in range(2)]
            for index in (0, 1) if rank == 0 or round_ < first else (1, 0):
                try:
                    outs[index].backward()
                except ValueError:
                    raised.append(round_)
    return raised


def test_the_first_rounds_are_compared_before_anything_moves() -> None:
    assert run_ranks(2, swapped_from, 3, 4, 4) == [[3, 3]] * 2
    assert run_ranks(2, swapped_from, 4, 5, 4) == [[]] * 2, "the last round of a program is not compared"


def test_after_an_error_rounds_are_compared_at_once_again() -> None:
    """The first error of each pair is a late one, the second one of the same round."""
    assert run_ranks(2, swapped_from, 1, 5, 1) == [[2, 2, 4, 4]] * 2


def beyond_what_is_remembered(rank: int, size: int) -> str:
    with late() as group, mock.patch.object(backward_order, "_SHOWN", 3):
        for _ in range(2):
            outs = [attend("moba", inputs(rank), group).sum() for _ in range(5)]
            for index in (0, 1, 2, 3, 4) if rank == 0 else (0, 1, 2, 4, 3):
                try:
                    outs[index].backward()
                except ValueError as error:
                    return str(error)
    return ""


def test_an_error_says_where_the_first_difference_is_not_remembered() -> None:
    text = "their first 3 are alike since the last comparison, later ones differ. Gradients would be mixed up"
    assert run_ranks(2, beyond_what_is_remembered) == [DIFFERENT + text] * 2


def inference_and_training(rank: int, size: int) -> bool:
    """A message made in inference mode is changed outside of it."""
    with late() as group:
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                attend("moba", inputs(rank), group)
            attend("moba", inputs(rank), group).sum().backward()
        return bool(backward_order._order(group).digest)


def test_messages_are_shared_with_inference_mode() -> None:
    assert run_ranks(2, inference_and_training) == [True, True]


def recomputed_out_of_order(rank: int, size: int) -> str:
    """Calls of unlike sizes, whose recomputations would not even exchange tensors of one size."""
    with late(rounds_at_once=4) as group:
        outs = []
        for tokens in (80, 160):
            layout = SequenceLayout.zigzag([0, tokens], size)
            attend = partial(moba_cp.moba_attention, config=CONFIG, layout=layout, group=group, comm="ring")
            x = torch.ones(layout.local_tokens(rank), 2, 8, requires_grad=True)
            outs.append(checkpoint(attend, x, x, x, use_reentrant=False))
        with pytest.raises(ValueError, match=DIFFERENT) as error:
            outs[1 - rank].sum().backward()
        return str(error.value)


def test_orders_are_compared_before_anything_is_recomputed() -> None:
    first, second = run_ranks(2, recomputed_out_of_order)
    assert first == second
