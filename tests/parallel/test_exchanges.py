"""What each exchange sends, to the byte, and when: by the library's own count and by recording torch.distributed.

The worked case: 16 tokens of one document in blocks of 4, contiguous on two ranks, fp64, 2 kv heads, D = 8, Dv = 4.
Blocks 0 and 1 are at home on rank 0, blocks 2 and 3 on rank 1. A token of one kv head is 12 numbers, 96 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

import moba_cp
from moba_cp import SequenceLayout
from moba_cp.kernels.torch_backend import accumulate_dtype
from moba_cp.parallel.comm import SideStream
from moba_cp.parallel.exchanges import pull
from tests.cases import TRANSPORTS, Case, comms_for, every_layout, on_rank
from tests.ranks import run_ranks
from tests.recorder import Started, recorded

CASE = Case((16,), block_size=4, topk=4, q_heads=4, kv_heads=2, dim=8, v_dim=4)
TWO = SequenceLayout.contiguous([0, 16], 2)
TOKEN = 96  # bytes of a token's key and value of one kv head
HEADER = Started("all_gather", 1024, 1024)  # what two ranks exchange to find that they agree, once a call
NUMBER = Started("all_gather", 8, 8)  # the call's number, by which two ranks find that they run the same backward pass
BARRIER = Started("all_gather", 1, 1)  # how two ranks that pull tell each other that something is ready
GIB = 1 << 30

Stages = dict[str, tuple[int, int, int]]


def stages_on_rank(
    rank: int,
    size: int,
    case: Case,
    layout: SequenceLayout,
    comm: str,
    dtype: torch.dtype,
    workspace: int,
    inputs: tuple,
    kept: int,
) -> tuple[Stages, Stages, list, list, dict]:
    """(collectives, bytes sent, bytes received) by stage: after forward and those that backward adds; the recorded
    collectives of both; and figures of the report."""
    options = {"layout": layout, "comm": comm, "workspace_bytes": workspace, "exchange_bytes": kept}

    def local() -> list[torch.Tensor]:
        return [layout.shard(x, rank).requires_grad_() for x in (inputs or case.inputs(dtype))[:3]]

    out, report = moba_cp.moba_attention(*local(), case.config, return_report=True, **options)
    forward = {n: (s.collectives, s.sent_bytes, s.received_bytes) for n, s in report.traffic.stages.items()}
    out.sum().backward()
    both = {n: (s.collectives, s.sent_bytes, s.received_bytes) for n, s in report.traffic.stages.items()}
    nothing = (0, 0, 0)
    added = {n: tuple(a - b for a, b in zip(s, forward.get(n, nothing), strict=True)) for n, s in both.items()}
    with recorded() as in_forward:
        out = moba_cp.moba_attention(*local(), case.config, **options)
    with recorded() as in_backward:
        out.sum().backward()
    figures = {
        "bound": report.lower_bound_bytes.tolist(),
        "visible": report.visible_bytes.tolist(),
        "selected": report.selected,
        "transport": report.transport,
        "walks": report.walks,
    }
    return forward, {n: s for n, s in added.items() if any(s)}, in_forward, in_backward, figures


def stages(
    case: Case,
    layout: SequenceLayout,
    comm: str,
    dtype=torch.float64,
    workspace: int = GIB,
    inputs: tuple = (),
    kept=GIB,
) -> list:
    return run_ranks(layout.cp_size, stages_on_rank, case, layout, comm, dtype, workspace, inputs, kept)


def routed(case: Case, best: list[list[int]]) -> tuple[torch.Tensor, ...]:
    """Inputs for which the queries of kv head h prefer blocks in the order `best[h]`: one-hot centroids."""
    q, k, v, dout = case.inputs()
    q[:], k[:] = 0, 0
    for head, order in enumerate(best):
        for rank, block in enumerate(order):
            k[block * case.block_size : (block + 1) * case.block_size, head, block] = 1
            q[:, head * 2 : head * 2 + 2, block] = len(order) - rank
    return q, k, v, dout


# Two candidate blocks on rank 0, one on rank 1: the messages are padded to two, of 2 heads x 8 x 8 bytes.
CENTROIDS = (1, 256, 256)


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
    plan = moba_cp.attention.home_plan(layout, case.block_size)
    for rank, (forward, backward, _, _, figures) in enumerate(results):
        selected = figures["selected"].unflatten(0, (2, 2))
        wanted = {(h, b) for h in range(2) for b in selected[h].unique().tolist() if b >= 0 and plan.home[b] != rank}
        expected = sum(int(plan.blocks.length[b]) for _, b in wanted) * TOKEN
        assert forward["fetch keys and values"][2] == expected
        assert figures["bound"][rank] == expected
        assert expected <= figures["visible"][rank]
        assert backward.get("fetch gradients", (0, 0, 0))[1] == expected  # what came goes back, in fp64


EIGHT = Case((32,), block_size=4, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)


def test_pull_reads_each_wanted_pair_once_and_nobody_sends() -> None:
    """Of the four blocks at home on rank 0, rank 1 wants (0, block 0) and (1, block 1): a quarter, so not whole parts."""
    layout, pairs = SequenceLayout.contiguous([0, 32], 2), 2 * 4 * TOKEN
    first, second = stages(EIGHT, layout, "pull", inputs=routed(EIGHT, [[0], [1]]))
    for rank, (forward, backward, *_, figures) in enumerate((first, second)):
        assert figures["bound"] == [0, pairs]
        assert set(forward) == {"centroids", "pull barriers", "pull keys and values"}
        # A barrier stands before the memory is written and before it is read; in backward also before gradients are.
        assert forward["pull barriers"] == (2, 2, 2)
        assert backward["pull barriers"] == (3, 3, 3)
        assert forward["pull keys and values"] == (0, 0, figures["bound"][rank])
        assert backward.get("pull keys and values", (0, 0, 0)) == (0, 0, figures["bound"][rank])
        assert backward.get("pull gradients", (0, 0, 0)) == (0, 0, figures["bound"][1 - rank])


def test_pull_reads_whole_what_is_mostly_wanted() -> None:
    """topk covers everything: rank 1 wants all of rank 0 and reads it in one piece, rank 0 nothing of rank 1."""
    whole = 8 * 2 * TOKEN
    first, second = stages(CASE, TWO, "pull")
    assert first[0]["pull keys and values"] == (0, 0, 0)
    assert first[1] == {"pull barriers": (3, 3, 3), "pull gradients": (0, 0, whole)}
    assert second[0]["pull keys and values"] == (0, 0, whole)
    assert second[1] == {"pull barriers": (3, 3, 3), "pull keys and values": (0, 0, whole)}


def whole_or_not(rank: int, size: int, case: Case, layout: SequenceLayout, workspace: int) -> list[tuple]:
    """Results of this rank where it reads wanted pairs only, where it reads parts whole, and where the even ranks do so."""
    results = []
    for share in (2.0, 0.0, 2.0 * (rank % 2)):
        with mock.patch.object(pull, "WHOLE_SHARE", share):
            results += on_rank(rank, size, case, layout, "pull", workspace_bytes=workspace)
    return results


@pytest.mark.parametrize("workspace", [1, GIB])
@pytest.mark.parametrize("name", every_layout([0, 1], 1))
def test_what_pull_reads_changes_no_bit(name: str, workspace: int) -> None:
    case = Case((29, 0, 3, 122), block_size=5, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)
    for results in run_ranks(4, whole_or_not, case, every_layout(case.cu_seqlens, 4)[name], workspace):
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def where_starts_are_made(rank: int, size: int, case: Case, layout: SequenceLayout) -> list[bool]:
    """For each look-up of starts by `pull`: whether the side stream, which reads them, was the current one."""
    inside, seen = [False], []
    use, home_start = SideStream.use, pull.home_start

    @contextlib.contextmanager
    def noted_use(side: SideStream) -> Iterator[None]:
        inside.append(True)
        with use(side):
            yield
        inside.pop()

    def noted_start(*args: object) -> torch.Tensor:
        seen.append(inside[-1])
        return home_start(*args)  # type: ignore[arg-type]

    with mock.patch.object(SideStream, "use", noted_use), mock.patch.object(pull, "home_start", noted_start):
        on_rank(rank, size, case, layout, "pull")
    return seen


def test_pull_makes_starts_on_the_stream_that_reads_them() -> None:
    """Starts come from a kernel the first time: on the caller's stream it may run long after the side stream reads."""
    for seen in run_ranks(2, where_starts_are_made, EIGHT, SequenceLayout.contiguous([0, 32], 2)):
        assert len(seen) >= 2  # forward and backward
        assert all(seen)


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


def test_pull_reads_keys_and_values_in_their_dtype_and_gradients_in_fp32() -> None:
    first, second = stages(CASE, TWO, "pull", torch.bfloat16)
    assert second[0]["pull keys and values"][2] == 8 * 2 * 12 * 2
    assert first[1]["pull gradients"][2] == 8 * 2 * 12 * 4


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
        assert in_backward[0] == Started("all_gather", 2 * 8, 2 * 8)
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


CHUNKED = replace(CASE, lengths=(900,), block_size=16, topk=3)
THREE = SequenceLayout.zigzag([0, 900], 3)  # 300 rows per rank: three chunks of 128 rows where the workspace holds one


def moved(counted: Stages, stage: str) -> tuple[int, int]:
    """Bytes sent and received in one stage."""
    return counted.get(stage, (0, 0, 0))[1:]


@pytest.mark.parametrize("comm", TRANSPORTS)
def test_each_byte_crosses_once_however_many_chunks_of_rows(comm: str) -> None:
    """The same bytes of keys, values and gradients with one chunk and with three."""
    for whole, chunked in zip(stages(CHUNKED, THREE, comm), stages(CHUNKED, THREE, comm, workspace=1), strict=True):
        assert whole[4]["walks"] == chunked[4]["walks"] == (1, 1)
        for counted, expected in ((chunked[0], whole[0]), (chunked[1], whole[1])):
            for stage in (f"{comm} keys and values", f"{comm} gradients"):
                assert moved(counted, stage) == moved(expected, stage)


@pytest.mark.parametrize("comm", ["ring", "pull"])
@pytest.mark.parametrize(("kept", "walks"), [(0, (3, 3)), (3 * 320 * TOKEN, (1, 3))])
def test_bytes_beyond_what_may_be_kept_cross_once_per_chunk(comm: str, kept: int, walks: tuple[int, int]) -> None:
    """At most 320 tokens are at home on a rank; the second budget holds the keys and values of one kv head of three such
    ranks, and not their gradients, which take as many bytes again. The report says what travels again."""
    once = stages(CHUNKED, THREE, comm)
    for whole, chunked in zip(once, stages(CHUNKED, THREE, comm, workspace=1, kept=kept), strict=True):
        assert chunked[4]["walks"] == walks
        for at, stage, times in (
            (0, "keys and values", walks[0]),
            (1, "keys and values", walks[1]),
            (1, "gradients", walks[1]),
        ):
            expected = moved(whole[at], f"{comm} {stage}")
            assert moved(chunked[at], f"{comm} {stage}") == tuple(n * times for n in expected)


def kept_or_not(rank: int, size: int, case: Case, layout: SequenceLayout, comm: str) -> list[tuple]:
    """Results of this rank in three chunks: everything kept, keys and values kept, nothing kept."""
    return [
        on_rank(rank, size, case, layout, comm, workspace_bytes=1, exchange_bytes=kept)[0] for kept in (GIB, 10**5, 0)
    ]


@pytest.mark.parametrize("comm", ["ring", "pull"])
def test_what_is_kept_for_later_chunks_changes_no_result(comm: str) -> None:
    for kept, keys_only, nothing in run_ranks(3, kept_or_not, CHUNKED, THREE, comm):
        for other in (keys_only, nothing):
            assert torch.equal(kept[0], other[0])
            assert torch.equal(kept[1], other[1])
            for a, b in zip(kept[2:], other[2:], strict=True):  # dk, dv: the same terms in another order
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def steps_on_rank(rank: int, size: int, case: Case, layout: SequenceLayout, comm: str) -> tuple[list[str], list[str]]:
    q, k, v, _ = (layout.shard(x, rank).requires_grad_() for x in case.inputs())
    # Once before: pull sets up its memory.
    moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm).sum().backward()
    with recorded(steps=True) as forward:
        out = moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm)
    with recorded(steps=True) as backward:
        out.sum().backward()
    return tuple([e if isinstance(e, str) else e.name for e in events] for events in (forward, backward))


def test_ring_starts_the_next_shift_before_it_computes_the_current_part() -> None:
    layout = SequenceLayout.contiguous([0, 16], 4)
    gate = ["all_gather", "all_gather", "wait"]  # agreement and centroids
    for forward, backward in run_ranks(4, steps_on_rank, CASE, layout, "ring"):
        step = ["shift", "compute", "wait"]
        assert forward == [*gate, *step, *step, *step, "compute"]
        # The same, and each step's gradients travel behind it while the next part is computed.
        assert backward == [
            "all_gather",
            *["shift", "compute", "wait"],
            *["shift", "compute", "shift", "wait"],
            *["shift", "compute", "wait", "shift", "wait"],
            *["compute", "wait", "shift", "wait"],
        ]


def test_all_gather_is_under_way_while_the_local_part_is_computed() -> None:
    for forward, backward in run_ranks(2, steps_on_rank, CASE, TWO, "all_gather"):
        assert forward[3:] == ["all_gather", "compute", "wait", "compute"]
        assert backward == ["all_gather", "all_gather", "compute", "wait", "compute", "all_to_all", "wait"]


def test_fetch_waits_after_the_local_part() -> None:
    for forward, backward in run_ranks(2, steps_on_rank, CASE, TWO, "fetch"):
        assert forward[3:] == ["all_gather", "wait", "compute", "all_to_all", "wait", "compute"]
        assert backward == ["all_gather", "compute", "all_to_all", "wait", "compute", "all_to_all", "wait"]


def test_pull_waits_for_nobody_but_at_barriers() -> None:
    barrier, gate = ["all_gather", "wait"], ["all_gather", "wait"]
    for forward, backward in run_ranks(2, steps_on_rank, CASE, TWO, "pull"):
        assert forward == ["all_gather", *barrier, *gate, *barrier, "compute", "compute"]
        assert backward == ["all_gather", *barrier, *barrier, "compute", "compute", *barrier]


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
