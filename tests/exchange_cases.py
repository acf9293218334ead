"""The worked case of the tests of exchanges, and what its ranks sent.

16 tokens of one document in blocks of 4, contiguous on two ranks, fp64, 2 kv heads, D = 8, Dv = 4. Blocks 0 and 1 are at home on
rank 0, blocks 2 and 3 on rank 1. A token of one kv head is 12 numbers, 96 bytes.
"""

from __future__ import annotations

import torch

import moba_cp
from moba_cp import SequenceLayout
from tests.cases import Case
from tests.ranks import run_ranks
from tests.recorder import Started, recorded

CASE = Case((16,), block_size=4, topk=4, q_heads=4, kv_heads=2, dim=8, v_dim=4)
TWO = SequenceLayout.contiguous([0, 16], 2)
TOKEN = 96  # bytes of a token's key and value of one kv head
HEADER = Started("all_gather", 1024, 1024)  # what two ranks exchange once per call, to see that they agree
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
        "once_bytes": report.once_bytes,
        "text": moba_cp.diagnostics.format_report(report),
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
