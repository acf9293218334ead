"""What runs on one device: centroids, gate, routing lists, block attention, merge. Knows no ranks."""

from types import ModuleType

import torch

from . import torch_backend
from .types import KVPart, QueryRows, query_rows

__all__ = ["KVPart", "QueryRows", "backend_for", "query_rows"]


def backend_for(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of primitives that serves tensors of this kind: Triton for bf16 and fp16 on CUDA, else plain torch."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from . import triton_backend

        return triton_backend
    return torch_backend
