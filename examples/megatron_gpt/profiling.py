"""Where the GPU's time of a training step goes: kernels of a ``torch.profiler`` trace by category.

Kernels overlap (communication beside computation), so a category's time is that of its kernels' union less what categories
before it already cover: attention, matrices, elementwise, communication. Shares and idle time therefore add up to the step.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType

CATEGORIES = ("attention", "matrices", "elementwise", "communication")
"""Busy categories, in the order in which they claim overlapping time."""

_ATTENTION = re.compile(r"flash|fmha|sdpa|attention")
_MATRICES = re.compile(r"gemm|nvjet|xmma|cublas|splitk|cutlass")
_COMMUNICATION = re.compile(r"nccl|memcpy ptop|symm(etric)?_mem|multimem")
_BACKWARD = re.compile(r"bwd|backward|bprop")
KERNELS = {
    "gate": ("centroids", "arrange", "gate", "gate_exact", "scores", "update_centroids", "select"),
    "lists": ("place", "count", "item", "scatter", "scatter_few", "wanted"),
    "forward": ("stream_rows", "hold_rows", "own_blocks", "attend_selected"),
    "merge": ("merge", "delta", "merge_dq"),
    "backward": ("dkdv_dq", "dkdv_dq_tiles", "dkdv", "dq", "dq_of_ds", "find_segments", "sum_segments"),
    "exchange": ("_pack", "_pack_pairs", "_add_pairs", "_heads", "_wanted", "add_gradients"),
}
"""Names of the package's kernels, without `_kernel`, by stage. Exchange kernels move rows, or add gradients that arrived."""
_STAGE = {f"{name}_kernel": label for label, names in KERNELS.items() for name in names}


@dataclass(frozen=True)
class Span:
    """One kernel on the GPU: its name, and when it ran in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Shares:
    """GPU time of one training step.

    Attributes:
        step_ms: from the first kernel to the end of the last.
        busy_ms: time during which any kernel ran.
        by_category: milliseconds of each of `CATEGORIES`, and ``idle``; they sum to ``step_ms``.
        by_stage: milliseconds of attention's kernels by stage (sums of kernels, overlap counted twice).
        top: the longest kernels: name, category, milliseconds, calls.
    """

    step_ms: float
    busy_ms: float
    by_category: dict[str, float]
    by_stage: dict[str, float]
    top: list[tuple[str, str, float, int]]

    @property
    def busy(self) -> float:
        """Share of the step during which the GPU worked."""
        return self.busy_ms / self.step_ms


def category(name: str) -> str:
    """Category of a kernel (or copy) by its name."""
    lowered, own = name.lower(), _STAGE.get(_plain_name(name))
    if own == "exchange" or _COMMUNICATION.search(lowered):
        return "communication"
    if own or _ATTENTION.search(lowered):
        return "attention"
    return "matrices" if _MATRICES.search(lowered) else "elementwise"


def stage(name: str) -> str:
    """Stage of attention that a kernel of category ``attention`` belongs to."""
    other = "backward" if _BACKWARD.search(name.lower()) else "forward"
    return _STAGE.get(_plain_name(name), other)


def spans_of(profiler: torch.profiler.profile) -> list[Span]:
    """Kernels and copies on the GPU of a finished profile, by start."""
    events = (e for e in profiler.events() or [] if e.device_type == DeviceType.CUDA and not _is_range(e))
    return sorted((Span(e.name, e.time_range.start, e.time_range.end) for e in events), key=lambda s: s.start)


def shares(spans: Iterable[Span], top: int = 15) -> Shares:
    """Time by category of the kernels of one step.

    Args:
        spans: kernels.
        top: how many of the longest kernels are listed.

    Raises:
        ValueError: no kernels.
    """
    spans = list(spans)
    if not spans:
        raise ValueError("the profile holds no kernels: was the step run on a GPU?")
    begin, end = min(s.start for s in spans), max(s.end for s in spans)
    covered: list[tuple[float, float]] = []
    by_category, by_stage = {}, defaultdict[str, float](float)
    before = 0.0
    for label in CATEGORIES:
        covered = _union(covered + [(s.start, s.end) for s in spans if category(s.name) == label])
        busy = sum(b - a for a, b in covered)
        by_category[label] = (busy - before) / 1e3
        before = busy
    by_category["idle"] = (end - begin - before) / 1e3
    totals = defaultdict[str, list[float]](lambda: [0.0, 0])
    for span in spans:
        totals[span.name][0] += (span.end - span.start) / 1e3
        totals[span.name][1] += 1
        if category(span.name) == "attention":
            by_stage[stage(span.name)] += (span.end - span.start) / 1e3
    longest = sorted(totals.items(), key=lambda item: -item[1][0])[:top]
    return Shares(
        (end - begin) / 1e3,
        before / 1e3,
        by_category,
        dict(by_stage),
        [(name[:120], category(name), round(time, 3), int(calls)) for name, (time, calls) in longest],
    )


def _union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The intervals merged where they overlap, by start."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _plain_name(name: str) -> str:
    """A kernel's function name: without Triton's or C++'s decorations."""
    return re.sub(r"(_\d+(d|de|c)*)+$", "", name.split("(")[0].split("<")[0].split(" ")[-1])


def _is_range(event: Any) -> bool:
    """Whether an event on the device is the shadow of a ``record_function`` range and no kernel."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(("ProfilerStep", "## "))
