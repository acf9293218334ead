"""Coefficients of the model: fitted to result files, kept as JSON, committed for the GPUs that were measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

DEFAULT = "h100"
ASSUMED = {
    "a2a": {"forward": [6.46e-8, 1.6e-9, 1.37], "backward": [1.73e-7, 0.0, 0.0]},
    "all_gather": {"forward": [0.0, 0.5e-9, 3.0], "backward": [0.0, 3.0e-9, 2.5]},
    "ring": {"forward": [3e-8, 2e-9, 1.0], "backward": [5e-8, 3e-9, 1.0]},
    "fetch": {"forward": [2e-7, 2e-9, 2.0], "backward": [2e-7, 3e-9, 1.5]},
    "pull": {"forward": [9e-8, 1e-9, 0.5], "backward": [1e-7, 1.5e-9, 0.5]},
}
"""Overhead of exchanges that no result file measured: ms per partial result, byte and call. `Prediction.assumed` names them.
That of a2a is of two H200, where heads move through memory."""

LEAST_REVISIT_MS = 5.3e-7
"""Backward, ms per key and kv head that a further chunk of query rows visits, at least: 2,560 bytes at 4.8 TB/s, of keys and
values in bf16 and of sums of their gradients in fp32, read and written. Two H200 took 5.9e-7."""


@dataclass(frozen=True)
class Calibration:
    """What one kind of GPU takes.

    Attributes:
        device: its name.
        stages: coefficients of `prediction.features` by stage, ms.
        exchanges: by exchange and pass, ms per partial result, per byte received, and per call.
        assumed: exchanges whose coefficients were not measured.
        sources: the result files it was fitted to.
    """

    device: str
    stages: dict[str, list[float]]
    exchanges: dict[str, dict[str, list[float]]]
    assumed: tuple[str, ...] = ()
    sources: tuple[str, ...] = field(default=())

    def stage_ms(self, name: str, features: Sequence[float]) -> float:
        """Milliseconds of a stage."""
        return float(np.dot(self.stages[name], features))

    def exchange_ms(self, name: str, backward: bool, features: Sequence[float]) -> float:
        """Milliseconds that an exchange adds to a pass beyond what of its transfer is exposed."""
        return float(np.dot(self.exchanges[name]["backward" if backward else "forward"], features))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """The inverse of `to_json`.

        Raises:
            ValueError: `text` is not the JSON of a calibration.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            return cls(
                content["device"],
                content["stages"],
                content["exchanges"],
                tuple(content["assumed"]),
                tuple(content["sources"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a calibration: {type(error).__name__} {error}") from error

    @classmethod
    def default(cls) -> Calibration:
        """The committed one of H100 SXM."""
        return cls.of(DEFAULT)

    @classmethod
    def of(cls, name: str) -> Calibration:
        """A committed one, by a name of `known`.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in known():
            raise ValueError(f"device must be one of {', '.join(known())}, got {name!r}")
        return cls.from_json((files(__package__) / f"{name}.json").read_text())


def known() -> list[str]:
    """Names of the committed calibrations."""
    return sorted(x.name.removesuffix(".json") for x in files(__package__).iterdir() if x.name.endswith(".json"))


def non_negative_fit(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 with `matrix @ x` nearest to `target` by squares, by coordinate descent."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    unit = matrix / scale
    gram, wanted = unit.T @ unit, unit.T @ target
    x = np.zeros(unit.shape[1])
    for _ in range(20000):
        before = x.copy()
        for j in range(len(x)):
            if gram[j, j] > 0:
                x[j] = max(0.0, x[j] + (wanted[j] - gram[j] @ x) / gram[j, j])
        if np.abs(x - before).max() < 1e-12:
            break
    return x / scale
