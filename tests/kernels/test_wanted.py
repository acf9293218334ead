"""Wanted pairs: a (kv head, block) pair is wanted if any row of the kv head's q heads selected the block."""

from __future__ import annotations

import pytest
import torch

from moba_cp.kernels import torch_backend, wanted
from moba_cp.kernels.types import selection_dtype
from tests.kernels import interpreter

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"


def test_in_interpreter():
    interpreter.run_module(__file__)


def check(q_heads, kv_heads, tokens, topk, n_blocks):
    generator = torch.Generator().manual_seed(tokens)
    selected = torch.randint(
        -1, n_blocks, (q_heads, tokens + 3, topk), generator=generator, dtype=selection_dtype(n_blocks)
    )
    selected = selected.to(DEVICE)[:, 2 : tokens + 2]
    actual = wanted.wanted_pairs(selected, n_blocks=n_blocks, kv_heads=kv_heads)
    assert torch.equal(actual, torch_backend.wanted_pairs(selected, n_blocks=n_blocks, kv_heads=kv_heads))
    for head in range(kv_heads):
        of_head = selected.unflatten(0, (kv_heads, -1))[head]
        assert actual[head].nonzero().flatten().tolist() == sorted(set(of_head.flatten().tolist()) - {-1})


@interpreter.interpreted
@pytest.mark.parametrize(
    "sizes", [(4, 2, 9, 3, 40), (1, 1, 1, 1, 1), (2, 2, 700, 2, 5000), (3, 1, 0, 4, 7), (2, 1, 5, 3, 40000)], ids=str
)
def test_small(sizes):
    check(*sizes)


class TestGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("sizes", [(8, 2, 5000, 5, 300), (16, 16, 4096, 8, 8192)], ids=str)
    def test_equals_torch(self, sizes):
        check(*sizes)
