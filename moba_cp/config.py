"""What a MoBA attention layer computes, in one frozen dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_BLOCK = 2**62
"""Token numbers and their sums are int64."""

DEFAULT_WORKSPACE_BYTES = 1280 << 20
"""Default of `workspace_bytes`: 1.25 GiB holds 128K tokens of one group of four q heads at topk 8 and D = 128."""

DEFAULT_EXCHANGE_BYTES = 4 << 30
"""Default of `exchange_bytes`: 4 GiB holds 2.7M remote tokens of one kv head with their gradients at D = Dv = 128."""


@dataclass(frozen=True)
class MoBAConfig:
    """Mixture of Block Attention (arXiv 2502.13189), section 2.2.

    Attributes:
        block_size: tokens per block, from 1 to 2^62.
        topk: most blocks that a query attends to, its own block included; at least 1. With `topk=1` a query attends to its
            own block only. Where `topk * block_size` covers a document, this is full causal attention.
        softmax_scale: factor on the attention scores (not on the routing scores); None stands for `D ** -0.5`.

    Raises:
        TypeError: a field is not of its type.
        ValueError: a field is out of range.
    """

    block_size: int
    topk: int
    softmax_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "topk"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.block_size > LARGEST_BLOCK:
            raise ValueError(f"block_size must be at most {LARGEST_BLOCK}, got {self.block_size}")
        object.__setattr__(self, "softmax_scale", checked_scale(self.softmax_scale))

    def scale(self, head_dim: int) -> float:
        """Factor on attention scores for heads of size `head_dim`."""
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


def checked_scale(scale: object) -> float | None:
    """`scale` as a float, or None.

    Raises:
        TypeError, ValueError: it is not a number, or not finite.
    """
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"softmax_scale must be a float or None, got {scale!r} ({type(scale).__name__})")
    try:
        value = float(scale)
    except OverflowError:  # an int beyond every float
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"softmax_scale must be finite, got {scale}")
    return value
