"""Full causal attention with heads split over ranks: the definition, whatever the layout, and what crosses, to the byte."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moba_cp import SequenceLayout, dense
from moba_cp.parallel.comm import Traffic
from moba_cp.parallel.cost import CallSizes
from moba_cp.wide_dense import choose_heads, in_order
from tests.cases import Case, assert_close, every_layout, full_on_rank, reference, whole
from tests.ranks import run_ranks

# A block that holds the longest document is full attention by the definition.
CASE = Case((13, 0, 1, 26), block_size=26, topk=1, q_heads=8, kv_heads=2, dim=8, v_dim=5)


def on_rank(rank: int, world_size: int, case: Case, options: list[dict]) -> list[dict[str, tuple]]:
    layouts = every_layout(case.cu_seqlens, world_size)
    return [{name: full_on_rank(rank, case, layout, **given) for name, layout in layouts.items()} for given in options]


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, [{"comm": "a2a"}, {"comm": "a2a+ring"}]),
        (2, [{"comm": "a2a"}, {"comm": "a2a+ring"}, {"comm": "auto", "head_parallel": 2}]),
        (4, [{"comm": "a2a"}, *({"comm": f"a2a+{x}", "head_parallel": 2} for x in ("ring", "all_gather"))]),
    ],
)
def test_every_layout_gives_the_definition(world_size: int, options: list[dict]) -> None:
    expected = reference(CASE)
    per_rank = run_ranks(world_size, on_rank, CASE, options)
    for number, given in enumerate(options):
        for name, layout in every_layout(CASE.cu_seqlens, world_size).items():
            results = whole(layout, [of_rank[number][name] for of_rank in per_rank])
            assert_close(results, expected, 1e-13, (name, given))  # fp64 sums of 26 terms at most, in another order


def kernels_and_bytes(rank: int, world_size: int) -> tuple[int, int, int]:
    """Pairs of shards of a zigzag sequence, and bytes received in forward and in both directions."""
    case = Case((64,), block_size=64, topk=1, q_heads=4, kv_heads=2, dim=8, v_dim=8)
    layout = SequenceLayout.zigzag(case.cu_seqlens, world_size)
    traffic = Traffic()
    with mock.patch.object(dense.dense, "attend", wraps=dense.dense.attend) as attend:
        *qkv, dout = (layout.shard(x, rank).to(torch.float32) for x in case.inputs(torch.float32))
        for x in qkv:
            x.requires_grad_()
        out = dense.causal_attention(*qkv, None, layout=layout, comm="a2a", traffic=traffic)
        forward = traffic.received_bytes
        out.backward(dout)
    return attend.call_count, forward, traffic.received_bytes


def test_one_kernel_per_sequence_and_every_byte_once() -> None:
    for calls, forward, both in run_ranks(2, kernels_and_bytes):
        assert calls == 1
        # 32 tokens of the other rank: half of q, k and v come in (2 + 1 + 1 heads of 8), half of the output comes back.
        assert forward == 32 * 8 * 4 * (2 + 1 + 1 + 2)
        assert both == 2 * forward


def refusal(rank: int, world_size: int, options: dict) -> str:
    with pytest.raises(ValueError) as raised:
        full_on_rank(rank, CASE, SequenceLayout.zigzag(CASE.cu_seqlens, world_size), **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comm": "a2a+pull"}, "a2a+pull"),
        ({"comm": "ring", "head_parallel": 2}, "does not split heads"),
        ({"comm": "a2a", "head_parallel": 3}, "must divide the 2 ranks"),
    ],
)
def test_refusals_on_every_rank(options: dict, message: str) -> None:
    assert all(message in text for text in run_ranks(2, refusal, options))


def test_fewest_bytes_decide() -> None:
    sizes = CallSizes(8, 1 << 17, 16, 4, 128, 128, 2, 4, True)
    assert choose_heads(sizes, (1, 2, 4, 8)) == 8
    few_queries = CallSizes(2, 1 << 17, 64, 1, 128, 128, 2, 4, True)
    assert choose_heads(few_queries, (1, 2)) == 1
    assert choose_heads(sizes, (1,)) == 1


def test_positions_of_a_head_group_are_in_order() -> None:
    layout = SequenceLayout.from_runs([[(0, 4), (12, 16), (4, 12)]], [0, 16])
    ordered = in_order(layout, 0)
    assert ordered.layout.runs_of(0).tolist() == [[0, 16]]
    assert ordered.order is not None
    assert layout.local_indices(0)[torch.from_numpy(ordered.order).long()].tolist() == list(range(16))
    assert in_order(SequenceLayout.contiguous([0, 16], 1), 0).order is None
