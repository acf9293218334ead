"""What each exchange sends, to the byte: by the library's own count and by recording torch.distributed.

`tests/exchange_cases.py` has the worked case.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moba_cp
from moba_cp import SequenceLayout
from moba_cp.kernels.torch_backend import accumulate_dtype
from tests.cases import TRANSPORTS, Case, comms_for, every_layout
from tests.exchange_cases import (
    BARRIER,
    CASE,
    CENTROIDS,
    GIB,
    HEADER,
    TOKEN,
    TWO,
    routed,
    stages,
)
from tests.recorder import Started


def test_all_gather_bytes() -> None:
    for forward, backward, *_ in stages(CASE, TWO, "all_gather"):
        assert forward == {"centroids": CENTROIDS, "all_gather keys and values": (1, 8 * 2 * TOKEN, 8 * 2 * TOKEN)}
        assert backward == {
            "all_gather keys and values": (1, 8 * 2 * TOKEN, 8 * 2 * TOKEN),
            "all_gather gradients": (1, 8 * 2 * TOKEN, 8 * 2 * TOKEN),
        }


def test_ring_bytes() -> None:
    """Three ranks hold 5, 5 and 6 tokens in blocks of 1, so nothing is padded and the ring's messages differ."""
    case, layout = replace(CASE, block_size=1), SequenceLayout.contiguous([0, 16], 3)
    held = [5, 5, 6]
    for rank, (forward, backward, *_) in enumerate(stages(case, layout, "ring")):
        before, after = held[rank - 1], held[(rank + 1) % 3]
        sent = (held[rank] + before) * 2 * TOKEN  # its own, then its neighbour's
        received = (before + after) * 2 * TOKEN  # what comes from before, then from before that
        assert forward["ring keys and values"] == (2, sent, received)
        assert backward["ring keys and values"] == (2, sent, received)
        # Gradients leave for whom the part belongs to next: those of the ranks before; its own arrive in the end.
        assert backward["ring gradients"] == (2, received, (after + held[rank]) * 2 * TOKEN)
        assert set(forward) == {"centroids", "ring keys and values"}
        assert set(backward) == {"ring keys and values", "ring gradients"}


def test_fetch_moves_each_wanted_pair_once_and_nothing_else() -> None:
    """topk 2: on rank 1 the queries of kv head 0 all prefer block 0, those of kv head 1 prefer block 2, then 1. So the
    rows of block 2 want (1, block 1), those of block 3 have block 2 at home: two pairs of 4 tokens go to rank 1."""
    case = replace(CASE, topk=2)
    inputs = routed(case, [[0, 1, 2], [2, 1, 0]])
    first, second = stages(case, TWO, "fetch", inputs=inputs)
    masks = (1, 2, 2)  # for each of 2 heads 4 blocks, 8 to a byte
    pairs = 2 * 4 * TOKEN
    assert first[0] == {"centroids": CENTROIDS, "wanted pairs": masks, "fetch keys and values": (1, pairs, 0)}
    assert second[0] == {"centroids": CENTROIDS, "wanted pairs": masks, "fetch keys and values": (1, 0, pairs)}
    assert first[1] == {"fetch keys and values": (1, pairs, 0), "fetch gradients": (1, 0, pairs)}
    assert second[1] == {"fetch keys and values": (1, 0, pairs), "fetch gradients": (1, pairs, 0)}
    assert first[4]["bound"] == [0, pairs]
    assert first[4]["visible"] == [0, 8 * 2 * TOKEN]


@pytest.mark.parametrize("name", every_layout([0, 1], 1))
def test_fetch_receives_the_lower_bound(name: str) -> None:
    """Any layout: the bytes of the wanted remote pairs, counted here from the selected blocks."""
    case = Case((29, 0, 3, 22), block_size=5, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)
    layout = every_layout(case.cu_seqlens, 3)[name]
    results = stages(case, layout, "fetch")
    plan = moba_cp.parallel.home_plan(layout, case.block_size)
    for rank, (forward, backward, _, _, figures) in enumerate(results):
        selected = figures["selected"].unflatten(0, (2, 2))
        wanted = {(h, b) for h in range(2) for b in selected[h].unique().tolist() if b >= 0 and plan.home[b] != rank}
        expected = sum(int(plan.blocks.length[b]) for _, b in wanted) * TOKEN
        assert forward["fetch keys and values"][2] == expected
        assert figures["bound"][rank] == expected
        assert expected <= figures["visible"][rank]
        assert backward.get("fetch gradients", (0, 0, 0))[1] == expected  # what came goes back, in fp64


@pytest.mark.parametrize("comm", TRANSPORTS)
def test_routing_exchanges_centroids_only(comm: str) -> None:
    """Of the keys and values nothing moves before the gate: one all-gather of one centroid for each block and kv head
    that can be chosen, and with topk = 1, where there is nothing to choose, none."""
    for result in stages(CASE, TWO, comm):
        assert result[0]["centroids"] == CENTROIDS
        started = [event for event in result[2] if event != BARRIER]
        assert started[:2] == [HEADER, Started("all_gather", 256, 256)]
        assert "centroids" not in result[1]  # backward reuses the selection
    for result in stages(replace(CASE, topk=1), TWO, comm):
        assert "centroids" not in result[0]


def test_fetch_moves_no_key_where_every_block_is_at_home() -> None:
    for forward, backward, *_ in stages(replace(CASE, topk=1), TWO, "fetch"):
        assert sum(s[1] + s[2] for s in forward.values()) == 2 * 2  # the masks of wanted pairs
        assert sum(s[1] + s[2] for s in backward.values()) == 0


@pytest.mark.parametrize("comm", TRANSPORTS)
def test_gqa_is_not_expanded_on_the_wire(comm: str) -> None:
    """Four times the q heads, the same bytes in every stage (topk covers everything, so the wanted pairs are the same)."""
    few, many = (stages(replace(CASE, q_heads=h), TWO, comm) for h in (2, 8))
    assert [r[:4] for r in few] == [r[:4] for r in many]


@pytest.mark.parametrize("comm", ["all_gather", "ring", "fetch"])
def test_keys_and_values_travel_in_their_dtype_and_gradients_in_fp32(comm: str) -> None:
    for forward, backward, *_ in stages(CASE, TWO, comm, torch.bfloat16):
        for at in (1, 2):
            values = forward[f"{comm} keys and values"][at]
            assert values in (0, 8 * 2 * 12 * 2)
            assert backward[f"{comm} keys and values"][at] == values
            assert backward[f"{comm} gradients"][3 - at if comm == "fetch" else at] == values * 2


def test_fragments_of_straddling_blocks_go_home_once() -> None:
    """Blocks of 8 over 20 tokens cut at 10: two tokens of block 1 go to rank 1, and their gradients back."""
    case, layout = replace(CASE, lengths=(20,), block_size=8), SequenceLayout.contiguous([0, 20], 2)
    first, second = stages(case, layout, "fetch")
    fragment = 2 * 2 * TOKEN
    assert first[0]["home blocks"] == (1, fragment, 0)
    assert second[0]["home blocks"] == (1, 0, fragment)
    assert first[1]["home gradients"] == (1, 0, fragment)
    assert second[1]["home gradients"] == (1, fragment, 0)
    assert "home blocks" not in stages(CASE, TWO, "fetch")[0][0]  # none where no block straddles


@pytest.mark.parametrize("workspace", [1, GIB])
@pytest.mark.parametrize("comm", comms_for(6, 3))
def test_counts_agree_with_what_torch_distributed_was_asked(comm: str, workspace: int) -> None:
    """Collectives and bytes of each rank in forward and backward, whatever the transport, on uneven ranks."""
    case = replace(CASE, lengths=(150, 0, 3, 171), topk=2, q_heads=6)  # more rows than a chunk of 128
    layout = SequenceLayout.zigzag(case.cu_seqlens, 3)
    for forward, backward, in_forward, in_backward, _ in stages(case, layout, comm, workspace=workspace):
        header = Started("all_gather", 2 * 1024, 2 * 1024)
        assert in_forward[0] == header
        assert in_backward[0] == header  # of the same form, and says which call this is the backward of
        for counted, recorded_ in ((forward, in_forward[1:]), (backward, in_backward[1:])):
            assert sum(s[0] for s in counted.values()) == len(recorded_)
            assert sum(s[1] for s in counted.values()) == sum(r.sent for r in recorded_)
            # What is read out of peers' memory is in no collective.
            received = sum(s[2] for s in counted.values() if s[0])
            assert received == sum(r.received for r in recorded_)


def test_head_groups_move_the_same_bytes_in_more_collectives() -> None:
    """A workspace for one kv head at a time: two exchanges of half the bytes."""
    for comm in TRANSPORTS:
        for whole, split in zip(stages(CASE, TWO, comm), stages(CASE, TWO, comm, workspace=1), strict=True):
            name = f"{comm} keys and values"
            assert split[0][name] == (2 * whole[0][name][0], *whole[0][name][1:])
            name, nothing = f"{comm} gradients", (0, 0, 0)  # rank 1 reads none: rank 0 has none for it
            assert split[1].get(name, nothing)[1:] == whole[1].get(name, nothing)[1:]


def test_a_group_of_one_starts_nothing() -> None:
    alone = SequenceLayout.contiguous([0, 16], 1)
    ((forward, backward, in_forward, in_backward, figures),) = stages(CASE, alone, "auto")
    assert (forward, backward, in_forward, in_backward) == ({}, {}, [], [])
    assert figures["transport"] == "local"
    assert figures["bound"] == figures["visible"] == [0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_travel_in_what_the_kernels_accumulate_in(dtype: torch.dtype) -> None:
    for _, backward, *_ in stages(CASE, TWO, "ring", dtype):
        assert backward["ring gradients"][1] == 8 * 2 * 12 * accumulate_dtype(dtype).itemsize
