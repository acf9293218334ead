"""Lengths of packs on the host: never stale, and read from the device once per pass over the layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("megatron.core")

from megatron.core.packed_seq_params import PackedSeqParams

from moba_cp import reference
from moba_cp.megatron import lengths
from moba_cp.megatron.lengths import pack_lengths
from tests.megatron.test_core_attention import MOBA, TO_DEFINITION, build, random_qkv
from tests.ranks import run_ranks

TOKENS = 20
FIRST, SECOND = [0, 7, 20], [0, 15, 20]


def pack(cu_seqlens: torch.Tensor, padded: torch.Tensor | None = None) -> PackedSeqParams:
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
    )


def error_to_definition(core: Any, packed: PackedSeqParams, cu_seqlens: list[int]) -> float:
    qkv = random_qkv(TOKENS)
    wanted = reference.moba_attention(*qkv, cu_seqlens, MOBA).flatten(1)
    return (core(*qkv, packed_seq_params=packed) - wanted).abs().max().item()


def broadcast_on_rank(rank: int, world_size: int, one_object: bool) -> float:
    """Rank 0 fills a buffer for every micro-batch, the others receive it: collectives do not raise ``_version``."""
    core = build(SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    buffer = torch.zeros(3, dtype=torch.int32)
    packed, worst = pack(buffer), 0.0
    for cu_seqlens in (FIRST, SECOND):
        if rank == 0:
            buffer.copy_(torch.tensor(cu_seqlens))
        dist.broadcast(buffer, 0)
        worst = max(worst, error_to_definition(core, packed if one_object else pack(buffer), cu_seqlens))
    return worst


@pytest.mark.parametrize("one_object", [False, True])
def test_a_buffer_that_is_filled_by_a_collective_is_read_anew(one_object: bool) -> None:
    assert max(run_ranks(2, broadcast_on_rank, one_object)) < TO_DEFINITION


def by_data(buffer: torch.Tensor, values: list[int]) -> None:
    buffer.data.copy_(torch.tensor(values))


def by_numpy(buffer: torch.Tensor, values: list[int]) -> None:
    buffer.numpy()[:] = values


def by_torch(buffer: torch.Tensor, values: list[int]) -> None:
    buffer.copy_(torch.tensor(values))


@pytest.mark.parametrize("write", [by_data, by_numpy, by_torch])
@pytest.mark.parametrize("on_device", [False, True])
def test_writes_that_torch_does_not_see(write: Any, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        monkeypatch.setattr(lengths, "on_host", lambda tensors: False)
    core, buffer = build(), torch.tensor(FIRST)
    packed = pack(buffer)
    assert error_to_definition(core, packed, FIRST) < TO_DEFINITION
    write(buffer, SECOND)
    assert error_to_definition(core, packed, SECOND) < TO_DEFINITION
    assert error_to_definition(core, pack(buffer), SECOND) < TO_DEFINITION


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors as if they were on a GPU; holds one entry per time that they were read."""
    count: list[int] = []
    read = lengths._read
    monkeypatch.setattr(lengths, "on_host", lambda tensors: False)
    monkeypatch.setattr(lengths, "_read", lambda tensors: (count.append(1), read(tensors))[1])
    return count


def ask(packed: PackedSeqParams, *layers: int) -> list[tuple[int, ...]]:
    return [pack_lengths(packed, layer, training=True).true for layer in layers]


def test_device_tensors_are_read_once_per_micro_batch(reads: list[int]) -> None:
    first, second = pack(torch.tensor(FIRST)), pack(torch.tensor(SECOND))
    assert ask(first, 1, 2, 3, 4) == [tuple(FIRST)] * 4
    assert len(reads) == 1
    # The next chunk of a virtual pipeline, after another micro-batch, and layers of other kinds in between.
    assert ask(second, 1, 2) == [tuple(SECOND)] * 2
    assert ask(first, 9, 12) == [tuple(FIRST)] * 2
    assert len(reads) == 2


def test_a_refilled_object_is_read_anew_on_every_pass(reads: list[int]) -> None:
    buffer = torch.tensor(FIRST)
    packed = pack(buffer)
    assert ask(packed, 1, 2) == [tuple(FIRST)] * 2
    by_data(buffer, SECOND)
    assert ask(packed, 1, 2) == [tuple(SECOND)] * 2
    by_data(buffer, FIRST)  # the first micro-batch again, in the next chunk of a virtual pipeline
    assert ask(packed, 5, 6) == [tuple(FIRST)] * 2
    assert len(reads) == 3
    packed.cu_seqlens_q = packed.cu_seqlens_kv = torch.tensor(SECOND)
    assert ask(packed, 7) == [tuple(SECOND)]
    by_torch(packed.cu_seqlens_q, FIRST)
    assert ask(packed, 8) == [tuple(FIRST)]


def test_different_tensors_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "on_host", lambda tensors: False)
    calls: list[int] = []
    read = lengths.host_integers
    monkeypatch.setattr(lengths, "host_integers", lambda values: (calls.append(1), read(values))[1])
    both = pack(torch.tensor(FIRST, dtype=torch.int32), torch.tensor([0, 8, 24]))
    found = pack_lengths(both, 1, training=True)
    assert (found.true, found.padded, found.total, found.sequences) == (tuple(FIRST), (0, 8, 24), 24, 2)
    assert len(calls) == 1


def gradients(core: Any, packs: list[PackedSeqParams], recompute: bool, between: Any = None) -> list[torch.Tensor]:
    """All forward passes, then all backward passes: gradients of each micro-batch's queries."""
    queries, losses = [], []
    for index, packed in enumerate(packs):
        if between is not None:
            between(index)
        q, k, v = random_qkv(TOKENS)
        q.requires_grad_()

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSeqParams = packed) -> torch.Tensor:
            return core(q, k, v, packed_seq_params=packed)

        out = checkpoint(run, q, k, v, use_reentrant=True) if recompute else run(q, k, v)
        queries.append(q)
        losses.append(out.square().sum())
    for loss in losses:
        loss.backward()
    return [q.grad for q in queries]


@pytest.mark.parametrize("on_device", [False, True])
def test_recomputation_takes_the_lengths_of_its_own_forward_pass(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        monkeypatch.setattr(lengths, "on_host", lambda tensors: False)
    core = build()
    packs = [pack(torch.tensor(FIRST)), pack(torch.tensor(SECOND))]
    for got, wanted in zip(gradients(core, packs, True), gradients(core, packs, False), strict=True):
        assert torch.equal(got, wanted)


def test_recomputation_reads_no_device_tensor(reads: list[int]) -> None:
    core = build()
    gradients(core, [pack(torch.tensor(FIRST)), pack(torch.tensor(SECOND))], True)
    assert len(reads) == 2


@pytest.mark.parametrize("one_object", [False, True])
def test_lengths_that_are_gone_when_they_are_recomputed_are_refused(one_object: bool) -> None:
    buffer = torch.tensor(FIRST)
    packs = [pack(buffer)] * 2 if one_object else [pack(buffer), pack(buffer)]
    with pytest.raises(ValueError, match="layer 1: recomputation needs the lengths of the forward pass.*of its own"):
        gradients(build(), packs, True, between=lambda index: by_data(buffer, [FIRST, SECOND][index]))


def test_one_object_may_be_refilled_after_the_backward_pass() -> None:
    core, buffer = build(), torch.tensor(FIRST)
    packed = pack(buffer)
    for values in (FIRST, SECOND):
        by_data(buffer, values)
        (got,) = gradients(core, [packed], True)
        (wanted,) = gradients(core, [pack(torch.tensor(values))], False)
        assert torch.equal(got, wanted)


def test_nothing_is_kept_of_a_micro_batch_that_is_gone() -> None:
    before = len(lengths._packs)
    packed = pack(torch.tensor(FIRST))
    ask(packed, 1)
    assert len(lengths._packs) == before + 1
    del packed
    assert len(lengths._packs) == before


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([FIRST]), r"one-dimensional integer tensor, got torch.int64 of shape \(1, 3\)"),
        (torch.tensor([0.0, 4.0]), "got torch.float32"),
        (torch.tensor([], dtype=torch.int32), "must start at 0, got an empty tensor"),
        (torch.tensor(FIRST, device="meta"), "cu_seqlens_q has no values"),
        (FakeTensorMode().from_tensor(torch.tensor(FIRST)), "cu_seqlens_q has no values"),
    ],
)
def test_tensors_that_are_no_lengths_are_refused(cu_seqlens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(pack(cu_seqlens), 1)


@pytest.mark.parametrize("make", [list, np.array])
def test_lengths_that_are_no_tensors_are_refused(make: Any) -> None:
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=make(FIRST), cu_seqlens_kv=make(FIRST))
    with pytest.raises(TypeError, match="cu_seqlens_q must be a tensor, got (list|ndarray)"):
        ask(packed, 1)


def test_a_fake_run_takes_the_true_lengths_and_leaves_nothing_behind() -> None:
    """Such as an estimate of memory: shapes, then the same micro-batch with other lengths for real."""
    core, packed, qkv = build(), pack(torch.tensor(FIRST)), random_qkv(FIRST[-1])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = core(*(mode.from_tensor(x) for x in qkv), packed_seq_params=packed)
    assert fake.shape == qkv[0].flatten(1).shape
    assert packed.cu_seqlens_q is not None
    for true in (FIRST, SECOND):
        packed.cu_seqlens_q.copy_(torch.tensor(true))
        wanted = reference.moba_attention(*qkv, true, MOBA).flatten(1)
        assert (core(*qkv, packed_seq_params=packed) - wanted).abs().max() < TO_DEFINITION


@pytest.mark.gpu
def test_layers_after_the_first_do_not_wait_for_the_gpu() -> None:
    packed = pack(torch.tensor(FIRST, dtype=torch.int32, device="cuda"), torch.tensor([0, 8, 24], device="cuda"))
    ask(packed, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert ask(packed, *range(2, 33)) == [tuple(FIRST)] * 31
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert packed.cu_seqlens_q is not None
    packed.cu_seqlens_q.data.copy_(torch.tensor(SECOND, dtype=torch.int32))
    assert ask(packed, 1) == [tuple(SECOND)]
