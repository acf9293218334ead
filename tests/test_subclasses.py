"""Tensor subclasses: a TypeError that names the class and the way out, from every entry; parameters and buffers are fine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.dense import causal_attention
from tests.ranks import run_ranks

CONFIG = MoBAConfig(4, 2)
TWO, ONE = SequenceLayout.contiguous([0, 16], 2), SequenceLayout.contiguous([0, 8], 1)


class Labelled(Tensor):
    """Overrides nothing but `__torch_function__`, by inheriting it."""


def tensors(tokens: int = 8) -> list[Tensor]:
    return [torch.randn(tokens, heads, 8) for heads in (4, 2, 2)]


def refusals_of_dtensors(rank: int, size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (size,))
    found = []
    for number in range(3):
        qkv = tensors()
        qkv[number] = DTensor.from_local(qkv[number], mesh, [Shard(0)])
        calls = (
            lambda qkv=qkv: moba_cp.moba_attention(*qkv, CONFIG, layout=TWO),
            lambda qkv=qkv: causal_attention(*qkv, None, layout=TWO),
            lambda qkv=qkv: moba_cp.moba_attn_varlen(*qkv, torch.tensor([0, 8]), 8, 4, 2),
            lambda qkv=qkv: moba_cp.reference.moba_attention(*qkv, [0, 8], CONFIG),
        )
        for call in calls:
            with pytest.raises(TypeError) as caught:
                call()
            found.append(f"{number} {caught.value}")
    dist.barrier()
    local = [DTensor.from_local(x, mesh, [Shard(0)]).to_local() for x in tensors()]
    assert moba_cp.moba_attention(*local, CONFIG, layout=TWO).shape == (8, 4, 8)
    return found


def test_dtensors_are_refused_by_name() -> None:
    for found in run_ranks(2, refusals_of_dtensors):
        assert len(found) == 12
        for text in found:
            name = "qkv"[int(text[0])]
            assert f"{name} must be a plain tensor, got DTensor" in text
            assert f"{name}.to_local()" in text


def test_other_subclasses_are_refused_by_name() -> None:
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"v must be a plain tensor, got Labelled: .*v\.as_subclass\(torch\.Tensor\)"):
        moba_cp.moba_attention(q, k, v.as_subclass(Labelled), CONFIG, layout=ONE)


def test_parameters_and_buffers_are_plain_tensors() -> None:
    q, k, v = tensors()
    expected = moba_cp.moba_attention(q, k, v, CONFIG, layout=ONE)
    found = moba_cp.moba_attention(torch.nn.Parameter(q), torch.nn.Buffer(k), torch.nn.Parameter(v), CONFIG, layout=ONE)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
