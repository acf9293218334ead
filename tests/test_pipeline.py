"""What the pipeline does to tensors before kernels see them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, chunks, moba_attention
from moba_cp.call import Call, head_ranges, is_one_chunk
from moba_cp.kernels import Backend, torch_backend
from moba_cp.kernels.sizes import aligned
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.parallel.comm import CommGroup
from moba_cp.stages import Stages
from moba_cp.strides import readable

BASE = torch.zeros(10, 4, 3 * 64 + 8, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "copied"),
    [
        (torch.zeros(10, 4, 64), False),
        (torch.zeros(10, 4, 128)[:, :, :64], False),  # strided, but every row is aligned
        (torch.zeros(10, 4, 72), False),  # no new tensor would be aligned either
        (BASE[:, :, 64:128], True),  # rows of 200 elements
        (torch.zeros(10 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(10, 4, 64), True),  # begins 2 bytes late
        (torch.zeros(64, 4, 10).transpose(0, 2), True),
        (torch.zeros(10, 4, 1).expand(10, 4, 64), True),
    ],
)
def test_variants_of_kernels_do_not_depend_on_strides(x: torch.Tensor, copied: bool) -> None:
    """Every tensor whose copy would be aligned is aligned, so all parts of a call take the same variant."""
    y = readable(x)
    assert torch.equal(x, y)
    assert (y.data_ptr() != x.data_ptr()) == copied
    assert y.stride(2) == 1
    assert aligned(y) or x.shape[2] % 16


def test_a_tensor_is_not_copied_for_rows_that_lie_as_far_apart_in_a_copy() -> None:
    far = torch.empty(1 << 26, 16, 128, device="meta")  # 2^37 elements: the portable kernels read it
    assert not aligned(far)
    assert readable(far) is far
    assert readable(far[:1000]) is not far
    spread = torch.empty(1 << 26, 16, 128, device="meta")[:: 1 << 25]
    assert readable(spread).is_contiguous()


TOKENS, HEADS, TOPK = 2048, 6, 4
MIB = 1 << 20
SLOTS = TOKENS * 2 * TOPK * 4 * 65
"""Bytes of the partial results of one kv head and its two q heads, in fp32: 4.06 MiB."""


def plain_call(workspace_bytes: int, kept_bytes: int) -> Call:
    """A call of one rank, on a backend that takes `kept_bytes` to keep the gradients of scores of one kv head."""
    plan = rank_plan(home_plan(SequenceLayout.contiguous([0, TOKENS], 1), 256), 0)
    backend = SimpleNamespace(
        bytes_per_slot=torch_backend.bytes_per_slot,
        dq_bytes=torch_backend.dq_bytes,
        kept_ds_bytes=lambda *_, rows, **__: kept_bytes * rows // TOKENS,
    )
    return Call(
        MoBAConfig(256, TOPK), plan, CommGroup(None, 1), cast(Backend, backend), "auto", workspace_bytes, 1 << 30,
        Stages(torch.device("cpu")), True, 0,
    )  # fmt: skip


def heads_at_once(call: Call, backward: bool = False) -> list[int]:
    """Kv heads of each range, all of whose rows are worked on together."""
    q, k = torch.empty(TOKENS, 2 * HEADS, 64), torch.empty(TOKENS, HEADS, 64)
    ranges = head_ranges(call, q, k, k, backward=backward)
    assert all(len(chunks) == 1 for _, chunks in ranges)
    return [heads.stop - heads.start for heads, _ in ranges]


@pytest.mark.parametrize(
    ("workspace", "without", "keeping"),
    [
        (HEADS * SLOTS, [6], [3, 3]),  # all partial results fit; with gradients of scores no more memory is taken
        (HEADS * SLOTS - 1, [5, 1], [3, 3]),
        (12 * MIB, [2, 2, 2], [2, 2, 2]),
        (12 * MIB - 1, [2, 2, 2], [1] * 6),
    ],
)
def test_gradients_of_scores_are_kept_within_the_workspace(
    workspace: int, without: list[int], keeping: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS)
    assert heads_at_once(plain_call(workspace, 0)) == without
    call = plain_call(workspace, 6 * MIB)
    assert heads_at_once(call) == heads_at_once(call, backward=True) == keeping


@pytest.mark.parametrize(
    ("of_dq", "workspace", "forward", "backward"),
    [
        ((4 * 65, 0), HEADS * SLOTS, [6], [6]),  # as of partial outputs
        ((8 * 65, 0), HEADS * SLOTS, [6], [3, 3]),
        ((8 * 65, 1), HEADS * SLOTS, [6], [2, 2, 2]),  # one byte more for each block of a kv head
        ((1, SLOTS // 8), HEADS * SLOTS, [6], [3, 3]),  # there are eight blocks
    ],
)
def test_partial_dq_of_a_pass_that_trains(
    of_dq: tuple[int, int], workspace: int, forward: list[int], backward: list[int]
) -> None:
    """It may take more than partial outputs, and then decides; forward has its ranges where backward takes the lists."""
    call = plain_call(workspace, 0)
    call = replace(call, backend=cast(Backend, SimpleNamespace(**vars(call.backend) | {"dq_bytes": lambda *_: of_dq})))
    assert heads_at_once(call) == heads_at_once(call, backward=True) == backward
    alone = replace(call, keep_lists=False)
    assert heads_at_once(alone) == forward
    assert heads_at_once(alone, backward=True) == backward


def test_gradients_of_scores_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward alone has chunks of rows then: forward's would be shorter than they need be."""
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS)
    monkeypatch.setattr(chunks, "LEAST_CHUNK_BYTES", 6 * MIB)
    call = plain_call(6 * MIB, 12 * MIB)
    q, k = torch.empty(TOKENS, 2 * HEADS, 64), torch.empty(TOKENS, HEADS, 64)
    assert heads_at_once(call) == [1] * 6
    ranges = head_ranges(call, q, k, k, backward=True)
    assert [heads.stop - heads.start for heads, _ in ranges] == [1] * 6
    for _, of_range in ranges:
        assert [(c.rows.start, c.rows.stop) for c in of_range] == [(0, TOKENS // 2), (TOKENS // 2, TOKENS)]
        assert all(c.keeps_ds for c in of_range)


def test_chunks_of_backward_alone_make_a_call_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a call is not recorded: with several chunks lists are made on a side stream."""
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS)
    monkeypatch.setattr(chunks, "LEAST_CHUNK_BYTES", MIB)
    q, k = torch.empty(TOKENS, 2 * HEADS, 64), torch.empty(TOKENS, HEADS, 64)
    assert is_one_chunk(plain_call(HEADS * SLOTS, 0), q, k, k)
    call = plain_call(HEADS * SLOTS, 60 * MIB)
    assert head_ranges(call, q, k, k)[0][1][0].whole
    assert not is_one_chunk(call, q, k, k)
    assert is_one_chunk(replace(call, keep_lists=False), q, k, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_call_whose_backward_alone_has_chunks_of_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backend that says that it keeps gradients of scores; what it does with them, GPU tests show."""
    tokens, kept = 512, []
    monkeypatch.setattr(chunks, "LONG_ROWS", 1)
    monkeypatch.setattr("moba_cp.call.least_chunk_of_ds", lambda *_: 0)
    layout = SequenceLayout.contiguous([0, tokens], 1)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, heads, 16, generator=g, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)]

    def results() -> list[torch.Tensor]:
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        out = moba_attention(q, k, v, MoBAConfig(32, 3), layout=layout, workspace_bytes=1 << 19)
        out.backward(inputs[3])
        return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    expected = results()
    new_dq_partials = torch_backend.new_dq_partials

    def noted(*arguments: Any, keeps_ds: bool = False) -> Any:
        kept.append(arguments[0].shape[1] if keeps_ds else None)
        return new_dq_partials(*arguments)

    monkeypatch.setattr(torch_backend, "kept_ds_bytes", lambda *_, rows, **__: rows << 12)
    monkeypatch.setattr(torch_backend, "new_dq_partials", noted)
    got = results()
    assert kept == [128] * 8  # two kv heads, four chunks of rows each
    assert torch.equal(got[0], expected[0])
    for mine, other in zip(got[1:], expected[1:], strict=True):  # sums in another order, rounded once
        assert (mine - other).norm() <= (1e-14 if dtype == torch.float64 else 2e-3) * other.norm()


def test_who_keeps_gradients_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes, and forward passes whose lists these take; not those of several ranks, nor where that is little work."""
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS)
    call = plain_call(12 * MIB - 1, 6 * MIB)
    made_again = replace(call, keep_lists=False)
    assert heads_at_once(call) == heads_at_once(made_again, backward=True) == [1] * 6
    assert heads_at_once(made_again) == [2, 2, 2]
    several = replace(call, comm=cast(CommGroup, SimpleNamespace(size=2)))
    assert heads_at_once(several) == heads_at_once(several, backward=True) == [2, 2, 2]
    monkeypatch.setattr(chunks, "LONG_ROWS", TOKENS + 1)
    assert heads_at_once(call) == [2, 2, 2]
