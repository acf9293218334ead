"""Switching all attention layers between MoBA and full attention while a model trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import torch

from moba_cp.parallel.layout_input import integer, positive

from .core_attention import MoBACoreAttention


def use_full_attention(model: torch.nn.Module | Iterable[torch.nn.Module], full: bool) -> int:
    """Make every MoBA layer compute full causal attention (``full=True``), or what it was built for (False).

    Parameters, their names, optimizer state and checkpoints stay as they are. All ranks must switch at the same step, and not
    between a forward pass and its backward: what Megatron computes again there would be the other attention.

    Args:
        model: a model, or the list of model chunks that Megatron's virtual pipeline makes.
        full: which of the two.

    Returns:
        Number of layers on this rank that compute full attention from now on.

    Raises:
        TypeError: ``full`` is no bool.
    """
    if not isinstance(full, bool):
        raise TypeError(f"full must be a bool, got {full!r}")
    layers = moba_layers(model)
    for layer in layers:
        layer.full_attention = full
    return sum(not layer.computes_moba for layer in layers)


def moba_layers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[MoBACoreAttention]:
    """The MoBA layers of a model or of a list of model chunks, those that compute full attention too."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, MoBACoreAttention)]


@dataclass(frozen=True)
class MoBASchedule:
    """MoBA for the first part of a training run, full attention for the rest.

    Args:
        full_from: first step (counted from 1) with full attention; None: never.

    Raises:
        TypeError, ValueError: ``full_from`` is no integer, or below 1.
    """

    full_from: int | None = None

    def __post_init__(self) -> None:
        if self.full_from is not None and integer("full_from", self.full_from) < 1:
            raise ValueError(f"full_from must be at least 1, got {self.full_from}")

    @classmethod
    def by_fraction(cls, moba_fraction: float, total_steps: int) -> MoBASchedule:
        """MoBA for this fraction of ``total_steps``: 0 is never MoBA, 1 is always.

        Raises:
            TypeError, ValueError: a fraction that is no number from 0 to 1, or ``total_steps`` that are no positive integer.
        """
        if isinstance(moba_fraction, bool) or not isinstance(moba_fraction, Real):
            raise TypeError(f"moba_fraction must be a number, got {moba_fraction!r}")
        if not 0 <= moba_fraction <= 1:
            raise ValueError(f"moba_fraction must be between 0 and 1, got {moba_fraction}")
        total_steps = positive("total_steps", total_steps)
        first = round(moba_fraction * total_steps) + 1
        return cls(first if first <= total_steps else None)

    def is_full(self, step: int) -> bool:
        """Whether step number ``step`` (from 1) computes full attention; 0, before training, is as step 1.

        Raises:
            TypeError, ValueError: ``step`` is no integer, or negative.
        """
        step = integer("step", step)
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return self.full_from is not None and max(step, 1) >= self.full_from

    def apply(self, model: torch.nn.Module | Iterable[torch.nn.Module], step: int) -> None:
        """Put the model into the state of step number ``step``; cheap enough to call before every step."""
        use_full_attention(model, self.is_full(step))
