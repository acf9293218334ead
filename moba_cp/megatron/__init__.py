"""MoBA attention inside Megatron-Core: swap the core attention of a layer spec, keep everything else."""

from __future__ import annotations

from .core_attention import MoBACoreAttention
from .norm import TorchNorm
from .packing import Packing, slice_packed
from .reports import LayerReport, collect_reports
from .schedule import MoBASchedule, use_full_attention
from .settings import MoBASettings
from .spec import moba_layer_spec, moba_spec, moba_spec_builder, with_moba
from .swap import swap_core_attention

__all__ = [
    "LayerReport",
    "MoBACoreAttention",
    "MoBASchedule",
    "MoBASettings",
    "Packing",
    "TorchNorm",
    "collect_reports",
    "moba_layer_spec",
    "moba_spec",
    "moba_spec_builder",
    "slice_packed",
    "swap_core_attention",
    "use_full_attention",
    "with_moba",
]
