"""Ways for keys, values and gradients to travel, behind one interface (`base.Exchange`); `registry` lists them."""

from .base import Arrived, Exchange, Part, PartGradient, Route, Visit, Work, of_heads
from .registry import EXCHANGES, open_backward, open_forward

__all__ = [
    "EXCHANGES",
    "Arrived",
    "Exchange",
    "Part",
    "PartGradient",
    "Route",
    "Visit",
    "Work",
    "of_heads",
    "open_backward",
    "open_forward",
]
