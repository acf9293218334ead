"""MoBA attention (Mixture of Block Attention, arXiv 2502.13189) over a context-parallel group."""

from importlib.metadata import PackageNotFoundError, version

from . import diagnostics, operators, reference
from .attention import moba_attention, moba_attn_varlen
from .cached import CachedTokens, CentroidCache, moba_attention_cached
from .config import MoBAConfig
from .memory import KeptMemory, kept_bytes
from .parallel.layout import SequenceLayout
from .report import MoBAReport
from .selection import Selection

try:
    __version__ = version("moba_cp")
except PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0.1.0+checkout"

__all__ = [
    "CachedTokens",
    "CentroidCache",
    "KeptMemory",
    "MoBAConfig",
    "MoBAReport",
    "Selection",
    "SequenceLayout",
    "__version__",
    "diagnostics",
    "kept_bytes",
    "moba_attention",
    "moba_attention_cached",
    "moba_attn_varlen",
    "operators",
    "reference",
]
