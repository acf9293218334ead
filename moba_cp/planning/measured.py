"""Measurements that calibrate and judge the model: entries of the result files, and the fit to them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DEFAULT_EXCHANGE_BYTES
from .calibration import ASSUMED, LEAST_REVISIT_MS, Calibration, known, non_negative_fit
from .prediction import BACKWARD, CALIBRATED_DIM, FORWARD, NOTHING, REVISITED, features, moved_by, predict, received
from .sizes import Cluster, Layer, Split, busiest

SMALLEST_TOKENS = 32768
"""Shorter sequences are bound by kernel launches, which the model leaves out."""
STAGES = {name: name for name in ("centroids", "gate", "lists", "merge", "delta", "merge dq")} | {
    "attend local": "attend",
    "attend backward local": "attend backward",
}
"""Names of stages in the results of one rank, and in the model."""


@dataclass(frozen=True)
class Measured:
    """One configuration that was timed.

    Attributes:
        layer, split: what.
        forward_ms, forward_backward_ms: of the slowest rank.
        stages: ms by stage; empty where they were not measured.
        peak_gib: of forward and backward; 0 where it was not measured.
        source: the file it stands in.
    """

    layer: Layer
    split: Split
    forward_ms: float
    forward_backward_ms: float
    stages: dict[str, float]
    peak_gib: float
    source: str


def read(paths: Iterable[Path]) -> tuple[str, list[Measured]]:
    """The device, and every timed configuration of result files of `bench_kernels` and `scaling`.

    Raises:
        ValueError: a file is of another kind; files of different devices, or none.
    """
    found: list[Measured] = []
    devices = set()
    for path in paths:
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise TypeError("expected an object")
            devices.add(_text("device", content.get("device") or content["about"]["device"]))
            entries = content["results"] + [
                b for b in content.get("baselines", []) if b.get("baseline") == "equal_work"
            ]
            timed = (e for e in entries if "forward_backward_ms" in e and _size(e, "tokens") >= SMALLEST_TOKENS)
            found += [_measured(entry, path.name) for entry in timed]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            text = f"{path} is no result file of bench_kernels or scaling ({type(error).__name__}: {error})"
            raise ValueError(text) from error
    if len(devices) != 1:
        raise ValueError(f"results of one device are needed, got {sorted(devices)}")
    return devices.pop(), found


def judged(results: Path) -> list[tuple[Calibration, list[Path]]]:
    """Each calibration with the files that judge it: its sources, and every scaling*.json, by device. Files of a device that has
    no calibration are judged with the default one."""
    found = [
        (calibration, [results / name for name in calibration.sources]) for calibration in map(Calibration.of, known())
    ]
    others: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(results.glob("scaling*.json")):
        if path.name not in {name for calibration, _ in found for name in calibration.sources}:
            others[json.loads(path.read_text())["device"]].append(path)
    own = {calibration.device: calibration for calibration, _ in found}
    return found + [(own.get(device, Calibration.default()), paths) for device, paths in others.items()]


def _measured(entry: dict[str, Any], source: str) -> Measured:
    alone = entry.get("baseline") == "equal_work"
    ranks = 1 if alone else entry.get("ranks", 1)
    split = Split.of_comm(
        entry.get("transport", "local"), ranks, entry.get("head_ranks") or entry.get("head_parallel") or ranks,
        entry.get("layout", "zigzag"), entry.get("exchange_bytes", DEFAULT_EXCHANGE_BYTES),
    )  # fmt: skip
    if "workspace_gib" in entry:
        split = replace(split, workspace_bytes=math.ceil(entry["workspace_gib"] * 2**30))
    trained = entry.get("routing") == "trained"
    layer = Layer(
        tokens=_size(entry, "tokens"),
        q_heads=_size(entry, "q_heads"),
        kv_heads=_size(entry, "kv_heads"),
        block_size=_size(entry, "block_size"),
        topk=_size(entry, "topk"),
        head_dim=entry.get("head_dim", 128),
        document=entry.get("document", 0) if trained else 0,
        wanted_share=min(1.0, entry.get("wanted_share", 1.0)) if ranks > 1 else 1.0,
    )
    stages = entry.get("forward_backward_stages_ms") or entry.get("stages_ms_rank0") or {}
    peak = entry.get("peak_gib_forward_backward") or entry.get("forward_backward_peak_gib") or 0.0
    for name, ms in stages.items():
        if _number(name, ms) < 0:
            raise ValueError(f"{name} takes {ms} ms")
    times = [_number(name, _median(entry[name])) for name in ("forward_ms", "forward_backward_ms")]
    if not 0 < times[0] < times[1]:
        raise ValueError(f"times must be positive, and forward less than forward_backward, got {times} ms")
    return Measured(layer, split, times[0], times[1], stages, _number("peak memory", peak), source)


def _median(value: float | dict[str, float]) -> float:
    return value["median"] if isinstance(value, dict) else value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return value


def _size(entry: dict[str, Any], name: str) -> int:
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {value!r}")
    return value


def calibrate(device: str, measured: Sequence[Measured], cluster: Cluster | None = None) -> Calibration:
    """Fit stages to what one rank measured by stage, then each exchange to the rest of the passes of several ranks.

    Args:
        device: name of the GPU.
        measured: configurations; those of one rank need stages.
        cluster: links of the machine that was measured; the number of GPUs follows each measurement.

    Raises:
        ValueError: no measurement of one rank with stages.
    """
    cluster = cluster or Cluster(1)
    rows: dict[str, list[np.ndarray]] = defaultdict(list)
    for one in measured:
        if one.split.ranks == 1:
            of_stage = features(busiest(one.layer, one.split), one.layer.head_dim)
            for name, ms in one.stages.items():
                if name in STAGES and ms > 0:
                    rows[STAGES[name]].append(
                        np.array(of_stage[STAGES[name]]) / ms
                    )  # so that relative errors count alike
    if missing := {*FORWARD, *BACKWARD} - set(rows):
        raise ValueError(f"no measurement of one rank has the stages {', '.join(sorted(missing))}")
    stages = {name: _rounded(non_negative_fit(np.stack(some), np.ones(len(some)))) for name, some in rows.items()}
    backward = stages["attend backward"]
    backward[REVISITED] = max(backward[REVISITED], LEAST_REVISIT_MS)
    zero = {name: {"forward": [0.0] * 3, "backward": [0.0] * 3} for name in ASSUMED}
    exchanges, bare = dict(ASSUMED), Calibration(device, stages, zero)
    fitted = []
    for exchange in ASSUMED:
        both = [m for m in measured if [name for name, _ in moved_by(m.split, NOTHING)] == [exchange]]
        if len(both) < 3:
            continue
        exchanges[exchange] = _fit_exchange(both, bare, cluster)
        fitted.append(exchange)
    assumed = tuple(name for name in ASSUMED if name not in fitted)
    return Calibration(device, stages, exchanges, assumed, tuple(sorted({m.source for m in measured})))


def _fit_exchange(measured: Sequence[Measured], bare: Calibration, cluster: Cluster) -> dict[str, list[float]]:
    """What is left of passes beyond computing and exposed transfer, per partial result, byte and call; in shares of the pass."""
    found = {}
    for backward in (False, True):
        rows, shares = [], []
        for one in measured:
            here = _cluster_of(one, cluster)
            expected = predict(one.layer, one.split, here, bare)
            whole = one.forward_backward_ms - one.forward_ms if backward else one.forward_ms
            rest = whole - sum((expected.backward if backward else expected.forward).values())
            ((_, moved),) = moved_by(one.split, received(one.layer, one.split, here, backward))
            pairs = busiest(one.layer, one.split).pairs * one.layer.head_dim / CALIBRATED_DIM
            rows.append(np.array([pairs, moved, 1.0]) / whole)
            shares.append(rest / whole)
        found["backward" if backward else "forward"] = _rounded(non_negative_fit(np.stack(rows), np.array(shares)))
    return found


def _cluster_of(one: Measured, cluster: Cluster) -> Cluster:
    """The machine with as many GPUs as one measurement had, in one node."""
    ranks = one.split.ranks
    return Cluster(ranks, max(ranks, cluster.gpus_per_node), cluster.link, cluster.fabric, cluster.memory)


def _rounded(x: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in x]


@dataclass(frozen=True)
class Compared:
    """A measurement beside its prediction.

    Attributes:
        measured: what was timed.
        forward_ms, forward_backward_ms: predicted.
    """

    measured: Measured
    forward_ms: float
    forward_backward_ms: float

    @property
    def errors(self) -> tuple[float, float]:
        """Predicted over measured, less 1: forward, and forward with backward."""
        one = self.measured
        return self.forward_ms / one.forward_ms - 1, self.forward_backward_ms / one.forward_backward_ms - 1


def compare(measured: Sequence[Measured], calibration: Calibration, cluster: Cluster | None = None) -> list[Compared]:
    """Every measurement beside its prediction."""
    found = []
    for one in measured:
        predicted = predict(one.layer, one.split, _cluster_of(one, cluster or Cluster(1)), calibration)
        found.append(Compared(one, predicted.forward_ms, predicted.forward_backward_ms))
    return found
