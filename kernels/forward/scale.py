"""The scale of the scores as the forward kernels take it."""

from __future__ import annotations

from ..sizes import LOG2E


def base_2(scale: float) -> tuple[float, bool]:
    """Positive factor in base 2, and whether scores change sign. 0 becomes tiny: 0 * -inf (a masked score) is NaN."""
    return max(abs(scale) * LOG2E, 1e-30), scale < 0
