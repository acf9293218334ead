"""The primitives in Triton: bf16 and fp16 on CUDA devices. Same names, arguments and meaning as `torch_backend`.

Partial results are kept in the inputs' dtype, normalised, with fp32 log-sum-exps in base 2 (here and in `new_lse`: they
never leave the backend except to come back in its own backward). No primitive reads device data on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backward import attend_backward, delta
from .centroids import centroids
from .forward import attend
from .gate import select_blocks
from .gradients import add_gradients
from .lists import RoutingLists, route
from .merge import merge, merge_dq
from .torch_backend import Partials
from .wanted import wanted_pairs

__all__ = [
    "NAME",
    "Partials",
    "RoutingLists",
    "add_gradients",
    "attend",
    "attend_backward",
    "bytes_per_slot",
    "centroids",
    "check_sizes",
    "delta",
    "merge",
    "merge_dq",
    "new_lse",
    "new_partials",
    "route",
    "select_blocks",
    "wanted_pairs",
]

NAME = "triton"


MOST_DIM = 256
LEAST_BLOCK = 16


def check_sizes(dim: int, value_dim: int, block_size: int) -> None:
    """Raise ValueError for sizes that this backend does not serve."""
    if max(dim, value_dim) > MOST_DIM or block_size < LEAST_BLOCK:
        raise ValueError(
            f"bf16 and fp16 on CUDA need head sizes of at most {MOST_DIM} and blocks of at least {LEAST_BLOCK} tokens; got "
            f"D {dim}, Dv {value_dim}, block_size {block_size}. fp32 and fp64 take any"
        )


def bytes_per_slot(dim: int, dtype: torch.dtype) -> int:
    """Workspace bytes that one (q head, row, slot) takes for partials of last size `dim`."""
    return dtype.itemsize * dim + 4


def new_partials(selected: Tensor, dim: int, dtype: torch.dtype, *, backward: bool = False) -> Partials:
    """Room for the partials of `selected` `[Hq, T, topk]`; `dtype` is the inputs'. Contiguous, for the kernels."""
    out = torch.empty(*selected.shape, dim, dtype=dtype, device=selected.device)
    lse = torch.empty((0,) if backward else selected.shape, dtype=torch.float32, device=selected.device)
    return Partials(out, lse)


def new_lse(q: Tensor) -> Tensor:
    """Room for the log-sum-exps (base 2) of `q` `[T, Hq, D]`: fp32 `[Hq, T]`."""
    return torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
