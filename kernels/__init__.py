"""What runs on one device: centroids, gate, routing lists, block attention, merge. Knows no ranks.

`backend_for` returns the primitives for tensors of one kind; `backend.Backend` describes them. Names of axes and sizes, in all
files:

=============  ========================================================================================================
row            a query row: one (token, q head). Of keys and values: one position of a `KVPart`
key            one key of a block; in the gate, what scores are sorted by
slot           one of the `topk` blocks that a row selected; the last one is its own block
block, n_blocks  `block_size` consecutive keys of a document; blocks in all, over all documents
bin            one (kv head, block) pair
head, group    `q_head` or `kv_head`; q heads per kv head
entry          one (token, q head, slot) in the routing lists, packed into bit fields
item           a work item: a run of entries of one bin
D, DV          head size of q and k, of v; `D_PADDED`, `DV_PADDED`: rounded up to a power of two, at least 16
ROWS, KEYS     rows and keys per tile; `TILES` tiles of keys per block
x_head         stride of tensor `x` from one head to the next, in elements; likewise `x_token`, `x_row`, `x_slot`
first_key      first row of a block's keys in the part, from `start`; `held`, from `length`: keys in the block
=============  ========================================================================================================

Files are named after the operation; launch configurations are in `configs.py` and, of lists, in `list_configs.py`, the choice
between kernels in `dispatch.py`, and what is known about GPUs in `gpu.py`. `*_sm90.py` are Gluon kernels for Hopper.
"""

import torch

from . import torch_backend
from .backend import Backend, DecodeStep
from .types import KVPart, ListShape, QueryRows, RoutingLists, query_rows

__all__ = ["Backend", "DecodeStep", "KVPart", "ListShape", "QueryRows", "RoutingLists", "backend_for", "query_rows"]


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """The primitives for tensors of this kind: Triton for bf16 and fp16 on CUDA, else plain torch."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from . import triton_backend  # imported only where it runs: Triton needs Linux

        return triton_backend
    return torch_backend
