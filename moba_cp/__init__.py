"""MoBA attention (Mixture of Block Attention, arXiv 2502.13189) over a context-parallel group."""

from . import diagnostics, reference
from .attention import moba_attention, moba_attn_varlen
from .config import MoBAConfig
from .memory import KeptMemory, kept_bytes
from .parallel.layout import SequenceLayout
from .report import MoBAReport

__all__ = [
    "KeptMemory",
    "MoBAConfig",
    "MoBAReport",
    "SequenceLayout",
    "diagnostics",
    "kept_bytes",
    "moba_attention",
    "moba_attn_varlen",
    "reference",
]
