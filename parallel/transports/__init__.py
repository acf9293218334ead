"""Ways for keys and values to travel, behind one interface (`Transport`)."""

from .all_gather import AllGather
from .base import LocalOnly, Part, PartGradient, Transport, of_heads
from .fetch import Fetch
from .pull import Pull
from .ring import Ring

__all__ = ["AllGather", "Fetch", "LocalOnly", "Part", "PartGradient", "Pull", "Ring", "Transport", "of_heads"]
