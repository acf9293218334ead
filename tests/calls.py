"""A small call on two ranks that tests make bad, and what came of it."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

import moba_cp
from moba_cp import SequenceLayout
from tests.cases import FP64, TO_DEFINITION, Case, assert_close, on_rank, reference, whole
from tests.recorder import recorded

CASE = Case((16,), block_size=4, topk=2, q_heads=4, kv_heads=2, dim=8, v_dim=4)
TWO = SequenceLayout.contiguous([0, 16], 2)


def zeros(*shape: int, dtype: torch.dtype = FP64, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def good_call(rank: int, group: dist.ProcessGroup | None = None) -> dict:
    q, k, v, _ = (TWO.shard(x, rank) for x in CASE.inputs())
    return {"q": q, "k": k, "v": v, "config": CASE.config, "layout": TWO, "group": group, "comm": "fetch"}


def outcome(call: dict) -> tuple[Exception | None, int, float]:
    """The error of a call, how many collectives the rank started, and the seconds it took."""
    begin = time.monotonic()
    with recorded() as started:
        try:
            moba_cp.moba_attention(**call)
            error = None
        except Exception as caught:
            error = caught.with_traceback(None)
            error.__cause__ = error.__context__ = None
    return error, len(started), time.monotonic() - begin


def full_result(rank: int) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv of a good call: the group works."""
    return on_rank(rank, 2, CASE, TWO, "fetch")[0]


def assert_works(results: list[tuple[torch.Tensor, ...]]) -> None:
    assert_close(whole(TWO, results), reference(CASE), TO_DEFINITION)
