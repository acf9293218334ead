"""Bits of output and dq that every later commit must reproduce: hashes saved in `tests/data/`.

Commit 1c91dde made them, 58ca743 those of dq with blocks of more than 512 keys and D = 128, and f0d9ff6 those of blocks that
forward computes in several tiles of keys.

    python -m tests.saved_bits tests/data/bits_sm90.json    # on the commit that decides; uses the GPUs that are there

Inputs come from numpy's legacy generator, whose stream is frozen, and are hashed too. Cases that share sizes share compiled
kernels. Only the public interface is used, so the file runs on any commit.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import moba_cp

PATH = Path(__file__).parent / "data" / "bits_sm90.json"
PROCESSES = 14


@dataclass(frozen=True)
class BitsCase:
    """One attention problem; `dim` is `(D, Dv)`."""

    lengths: tuple[int, ...]
    heads: tuple[int, int]
    dim: tuple[int, int]
    dtype: str
    block_size: int
    topk: int
    seed: int

    @property
    def cu_seqlens(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))

    @property
    def config(self) -> moba_cp.MoBAConfig:
        return moba_cp.MoBAConfig(self.block_size, self.topk)

    def inputs(self) -> list[Tensor]:
        """q, k, v and the gradient of the output, of all tokens, on the host."""
        random, (q_heads, kv_heads), (dim, value_dim) = np.random.RandomState(self.seed), self.heads, self.dim
        shapes = ((q_heads, dim), (kv_heads, dim), (kv_heads, value_dim), (q_heads, value_dim))
        dtype = getattr(torch, self.dtype)
        return [torch.from_numpy(random.standard_normal((sum(self.lengths), *s))).to(dtype) for s in shapes]


_SIZES = [
    ((128, 128), "bfloat16", 128, 8),
    ((128, 128), "bfloat16", 512, 8),
    ((128, 128), "bfloat16", 1024, 3),
    ((128, 128), "bfloat16", 4096, 12),
    ((128, 128), "bfloat16", 64, 4),
    ((128, 128), "bfloat16", 96, 3),
    ((64, 64), "bfloat16", 128, 8),
    ((64, 64), "bfloat16", 512, 3),
    ((128, 128), "float16", 128, 8),
    ((128, 128), "float16", 512, 8),
    ((128, 64), "bfloat16", 128, 3),
    ((80, 80), "bfloat16", 32, 8),
    ((256, 256), "bfloat16", 128, 8),
    ((128, 128), "bfloat16", 16, 1),
]
_PROBLEMS = [
    ((4096,), (4, 4)),
    ((1000, 0, 7, 3001, 1), (8, 2)),
    ((9000, 640), (4, 1)),
    ((20000,), (2, 2)),
]
CASES = [
    BitsCase(lengths, heads, dim, dtype, block, topk, 100 * i + j)
    for i, (dim, dtype, block, topk) in enumerate(_SIZES)
    for j, (lengths, heads) in enumerate(_PROBLEMS)
]


def digest(x: Tensor) -> str:
    """Of the bytes of a tensor."""
    return hashlib.blake2b(x.contiguous().cpu().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def hashes(case: BitsCase, inputs: list[Tensor], out: Tensor, dq: Tensor) -> dict[str, Any]:
    """What is saved of a case."""
    return asdict(case) | {"inputs": "".join(digest(x)[:8] for x in inputs), "out": digest(out), "dq": digest(dq)}


def alone(case: BitsCase, device: torch.device) -> dict[str, Any]:
    """Hashes of the case on one GPU."""
    inputs = case.inputs()
    q, k, v, dout = (x.to(device) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    layout = moba_cp.SequenceLayout.contiguous(case.cu_seqlens, 1)
    out = moba_cp.moba_attention(q, k, v, case.config, layout=layout)
    out.backward(dout)
    assert q.grad is not None
    return hashes(case, inputs, out.detach(), q.grad)


def of_sizes(index: int) -> list[dict[str, Any]]:
    """All cases of one group of sizes, which share kernels."""
    device = torch.device("cuda", index % torch.cuda.device_count())
    first = index * len(_PROBLEMS)
    return [alone(case, device) for case in CASES[first : first + len(_PROBLEMS)]]


def all_alone() -> list[dict[str, Any]]:
    """Hashes of all cases, one GPU each; processes share the work of compiling."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(PROCESSES, len(_SIZES), os.cpu_count() or 1)) as pool:
        return [x for group in pool.map(of_sizes, range(len(_SIZES)), chunksize=1) for x in group]


def main(path: str) -> None:
    """Save the hashes of this commit."""
    found = all_alone()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cases": found}
    Path(path).write_text(json.dumps(about, indent=1) + "\n")
    print(f"{len(found)} cases in {path}")


if __name__ == "__main__":
    main(sys.argv[1])
