"""What a call keeps for backward goes through autograd's saved tensors, so that checkpointing frees it and hooks move it."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from tests.ranks import run_ranks

CONFIG = MoBAConfig(16, 16)


def tensor_bytes() -> int:
    """Of all tensors alive that were made since `gc.freeze`, once it does not change any more: gloo's threads drop what they
    sent a little later, on a busy machine much later."""
    found: list[int] = []
    while len(found) < 3 or (len(set(found[-3:])) > 1 and len(found) < 100):
        time.sleep(0.05)
        gc.collect()
        found.append(sum(x.numel() * x.itemsize for x in gc.get_objects() if type(x) is Tensor))
    return found[-1]


def inputs(layout: SequenceLayout, rank: int) -> list[Tensor]:
    return [torch.randn(layout.local_tokens(rank), heads, 8, requires_grad=True) for heads in (4, 1, 1)]


def kept_on_rank(rank: int, size: int, comm: str) -> tuple[int, int, int]:
    """Bytes of tensors alive after forward, besides the output: plain, checkpointed, and with saved tensors moved away."""
    layout = SequenceLayout.contiguous([0, 512], size)
    q, k, v = inputs(layout, rank)
    gc.collect()
    gc.freeze()  # what is there already is not looked at again: hundreds of thousands of objects of torch

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return moba_cp.moba_attention(q, k, v, CONFIG, layout=layout, comm=comm)

    def kept(run) -> int:
        before = tensor_bytes()
        out = run()
        bytes_ = tensor_bytes() - before - out.numel() * out.itemsize
        out.sum().backward()
        return bytes_

    kept(lambda: call(q, k, v))  # caches are filled
    moved: list = []

    def away(x: Tensor) -> int:
        moved.append(x.numpy(force=True).copy())  # no tensor: stands for the memory of another device
        return len(moved) - 1

    def offloaded() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(away, lambda i: torch.from_numpy(moved[i])):
            return call(q, k, v)

    found = kept(lambda: call(q, k, v)), kept(lambda: checkpoint(call, q, k, v, use_reentrant=False)), kept(offloaded)
    gc.unfreeze()
    return found


@pytest.mark.parametrize(
    ("size", "comm"), [(1, "auto"), (2, "ring"), (2, "fetch"), (2, "pull"), (2, "all_gather"), (2, "a2a")]
)
def test_nothing_is_kept_beside_saved_tensors(size: int, comm: str) -> None:
    """512 rows of 4 heads with 16 slots: 2 bytes each of the selection, 4 of the lists. Only counters stay."""
    for plain, checkpointed, offloaded in run_ranks(size, kept_on_rank, comm):
        assert plain > 6 * 512 * 4 * 16 // size
        assert checkpointed < 8192  # checkpoint keeps the state of the random generator, 5,056 bytes
        assert offloaded < 4096


def saved_on_rank(rank: int, size: int, comm: str) -> int:
    """Numbers in saved tensors of the width of values and outputs."""
    layout = SequenceLayout.contiguous([0, 512], size)
    tokens = layout.local_tokens(rank)
    q, k, v = (torch.randn(tokens, heads, width, requires_grad=True) for heads, width in ((4, 8), (2, 8), (2, 12)))
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.dim() == 3 and x.shape[2] == 12:
            found[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        moba_cp.moba_attention(q, k, v, CONFIG, layout=layout, comm=comm).sum()
    return sum(found.values())


@pytest.mark.parametrize("comm", ["ring", "a2a"])
def test_one_output_is_saved(comm: str) -> None:
    """That of the rank's own tokens, which the next layer keeps anyway; beside it 2 heads of values."""
    assert run_ranks(2, saved_on_rank, comm) == [256 * (4 + 2) * 12] * 2


def changed_output_on_rank(rank: int, size: int, comm: str) -> str:
    """What backward says of an output that was changed in place."""
    layout = SequenceLayout.contiguous([0, 512], size)
    out = moba_cp.moba_attention(*inputs(layout, rank), CONFIG, layout=layout, comm=comm)
    out.mul_(2)
    try:
        out.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("comm", ["ring", "a2a"])
def test_a_changed_output_is_refused(comm: str) -> None:
    for said in run_ranks(2, changed_output_on_rank, comm):
        assert "modified by an inplace operation" in said


class Live(TorchDispatchMode):
    """Counts bytes of the tensors that operations made and that are alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def walks_on_rank(rank: int, size: int, comm: str) -> list[tuple[int, int]]:
    """Walks of a backward pass and the most bytes of tensors alive in it, for chunks of 512 rows and of 128."""
    layout = SequenceLayout.contiguous([0, 3072], size)
    found = []
    for rows in (512, 128):
        q, k, v = inputs(layout, rank)
        out, report = moba_cp.moba_attention(
            q, k, v, MoBAConfig(16, 2), layout=layout, comm=comm, return_report=True,
            workspace_bytes=rows * 4 * 2 * 4 * (8 + 1), exchange_bytes=0,
        )  # fmt: skip
        with Live() as live:
            out.sum().backward()
        found.append((report.walks[1], live.most))
    return found


@pytest.mark.parametrize("comm", ["ring", "pull"])
def test_backward_takes_no_more_memory_for_more_walks(comm: str) -> None:
    gradients = 1536 * 16 * 4  # fp32, of the keys and values of one rank
    for (few, of_few), (many, of_many) in run_ranks(2, walks_on_rank, comm):
        assert (few, many) == (3, 12)
        assert of_many < of_few + 3 * gradients  # gloo's threads hold what they sent a little longer
