"""One case of `scripts.scaling`: the layer timed, counted and checked on the tensors that were timed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moba_cp import moba_attention
from moba_cp.parallel.comm import StageTraffic
from moba_cp.parallel.peer_memory import kept_bytes, release
from moba_cp.report import MoBAReport

from . import definition
from .inputs import correlate, draw_global
from .sweep import Case
from .teams import Team, prepare, time_teams
from .timing import Times, over_all, stage_milliseconds

EXPOSED = ("wait", "return gradients")
"""Beginnings of the names of stages in which the caller's stream waits for communication."""


def measure(case: Case, team: Team, device: torch.device, iterations: int, seconds: float) -> dict[str, Any]:
    """Times of the slowest rank, stages, bytes, memory, errors and fingerprint; every rank of the job calls alike.

    The call that is checked is the last one timed. A rank in no team (`team.rank` is None) keeps time only.

    Returns:
        forward_ms, forward_backward_ms (where the case has it): medians; `*_all` every value, `*_spread` the quartiles.
        stages_ms_rank0: ms on the caller's stream by stage; exposed_ms: of those in which it waits for others, the most of
            any rank.
        traffic_rank0: payload bytes by stage; received_bytes, between_bytes: the most any rank
            received, forward and backward, and of that from other nodes.
        peak_gib_forward, peak_gib_forward_backward: the most of any rank, inputs and shared memory included.
        output_error and what else `definition.check_rows` gives; fingerprint: of the bits of output and dq.

    Raises:
        ValueError, torch.OutOfMemoryError: the call was refused, or did not fit; on every rank of the job.
    """

    def first() -> tuple[_Layer, dict[str, Any]]:
        layer = _Layer(case, team, device)
        return layer, layer.first_call()

    work, found = prepare(first, team, device) or (None, {})
    shared = work.shared_bytes() if work else 0
    timed = {"forward": work.forward if work else None}
    if case.backward:
        timed["forward_backward"] = work.both if work else None
    for name, call in timed.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = time_teams(call, device, iterations, seconds)
        found |= record(f"{name}_ms", times)
        if device.type == "cuda":
            found[f"peak_gib_{name}"] = over_all(torch.cuda.max_memory_allocated(device) + shared, device) / 2**30
    if work:
        stages = stage_milliseconds(work.both if case.backward else work.forward, device, repeats=1)
        found |= {"stages_ms_rank0": stages} | work.check()
        work.close()
    found["exposed_ms"] = over_all(
        sum(ms for name, ms in found.get("stages_ms_rank0", {}).items() if exposed(name)), device
    )
    for name in ("output_error", "worst_row_error", *["dq_error", "dq_rounding_error"] * case.backward):
        found[name] = float(f"{over_all(found.get(name, 0.0), device):.3e}")
    for name in ("received_bytes", "between_bytes"):
        of_stage = [stage[name] for stage in found.get("traffic_rank0", {}).values()]
        found[name] = int(over_all(sum(of_stage), device))
    return found


def exposed(stage: str) -> bool:
    """Whether the caller's stream waits for communication in this stage."""
    return stage.startswith(EXPOSED)


def record(name: str, times: Times) -> dict[str, Any]:
    """Median, quartiles and every value."""
    quartiles = [round(x, 4) for x in times.quartiles]
    return {name: round(times.median, 4), f"{name}_spread": quartiles, f"{name}_all": [round(x, 4) for x in times.all]}


class _Layer:
    """Inputs of one rank, and the calls that are timed."""

    def __init__(self, case: Case, team: Team, device: torch.device) -> None:
        assert team.rank is not None
        self.case, self.device, self.layout = case, device, case.layout
        alone = case.baseline == "equal_work"
        self.ranks, self.rank = (definition.Ranks(None), 0) if alone else (team.ranks, team.rank)
        self.options: dict[str, Any] = {
            "layout": self.layout,
            "group": None if alone else team.group,
            "comm": case.comm,
            "exchange_bytes": case.exchange_bytes,
        }
        if case.head_parallel is not None:
            self.options["head_parallel"] = case.head_parallel
        q, k, v, self.dout = draw_global(self.layout, self.rank, case.q_heads, case.kv_heads, device)
        if case.routing == "correlated":
            correlate(q, k, self.layout, self.rank, case.config)
        self.selection = self._recorded() if case.selections else None
        if self.selection is not None:
            self.options["selection"] = self.selection
            self.options["check_selection"] = False
        self.leaves = [x.requires_grad_(case.backward) for x in (q, k, v)]
        self.out: Tensor | None = None

    def forward(self) -> None:
        self._drop()
        with torch.no_grad():
            self.out = self._attend()

    def both(self) -> None:
        self._drop()
        self.out = self._attend()
        self.out.backward(self.dout)

    def first_call(self) -> dict[str, Any]:
        """Compile and fill caches, with a report: what was chosen, and bytes by stage. Forward alone may divide heads otherwise
        than forward for a backward pass, and then its kernels are others."""
        self._drop()
        with torch.set_grad_enabled(self.case.backward):
            q, k, v = self.leaves
            self.out, report = moba_attention(q, k, v, self.case.config, **self.options, return_report=True)
        if self.case.backward:
            self.out.backward(self.dout)
            self.forward()
        return _reported(report)

    def _attend(self) -> Tensor:
        q, k, v = self.leaves
        out: Tensor = moba_attention(q, k, v, self.case.config, **self.options)
        return out

    def check(self) -> dict[str, Any]:
        """Errors and fingerprint of the last call."""
        q, k, v = self.leaves
        k.grad = v.grad = None  # the check needs memory
        assert self.out is not None
        out = self.out.detach()
        known = [out] if q.grad is None else [out, q.grad]
        found: dict[str, Any] = {"fingerprint": definition.fingerprint(known, self.layout, self.rank, self.ranks)}
        found |= definition.check_rows(
            q, k, v, self.dout, out, q.grad, self.selection, self.case.config, self.layout, self.rank, self.ranks
        )
        return found

    def shared_bytes(self) -> int:
        """Of buffers that other ranks read, which torch does not count."""
        return kept_bytes(self.options["group"]) if self.layout.cp_size > 1 else 0

    def close(self) -> None:
        """Give shared buffers back, so that the next case's are its own."""
        self._drop()
        if self.layout.cp_size > 1:
            release(self.options["group"])

    def _drop(self) -> None:
        """Free what the call before left, so that it is not counted in the peak of the next one."""
        self.out = None
        for x in self.leaves:
            x.grad = None

    def _recorded(self) -> Tensor:
        """int16 `[Hq, T, topk]`: the recorded rows of each document; q heads take the recorded ones in turn."""
        assert self.case.selections is not None
        path, layer = self.case.selections
        with np.load(path) as content:
            recorded = torch.from_numpy(content[layer])
        row = self.layout.local_indices(self.rank) % recorded.shape[1]
        copies = math.ceil(self.case.q_heads / recorded.shape[0])
        return recorded[:, row].repeat(copies, 1, 1)[: self.case.q_heads].to(self.device)


def _reported(report: MoBAReport) -> dict[str, Any]:
    """Of a report after backward, what the results keep."""
    found: dict[str, Any] = {
        "transport": report.transport,
        "head_ranks": report.head_parallel,
        "reason": report.reason,
        "walks": list(report.walks),
        "traffic_rank0": {name: _traffic(stage) for name, stage in report.traffic.stages.items()},
        "wanted_share": round(report.wanted_share, 4),
        "imbalance": round(report.imbalance, 4),
        "attended_keys": report.attended_keys.tolist(),
        "lower_bound_bytes": report.lower_bound_bytes.tolist(),
        "visible_bytes": report.visible_bytes.tolist(),
    }
    return found


def _traffic(stage: StageTraffic) -> dict[str, int]:
    return dict(vars(stage))
