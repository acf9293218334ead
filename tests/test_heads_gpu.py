"""On several GPUs: heads split over ranks give the bits of one GPU, in any slabs, by NCCL and through the GPUs' memory."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, wide
from moba_cp.parallel import heads
from tests.test_attention_gpu import CASES, differences, layouts, make

pytestmark = pytest.mark.gpu


def splits(q_heads: int, size: int) -> list[tuple[str, int]]:
    """Each way to split heads over a node of `size` GPUs."""
    found = []
    for u in range(2, size + 1):
        if size % u == 0 and q_heads % u == 0:
            found += [("a2a", u)] if u == size else [(f"a2a+{x}", u) for x in ("ring", "fetch", "all_gather", "pull")]
    return found


def on_rank(rank: int, size: int, port: int, cases: list[tuple], nccl: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    heads.THROUGH_MEMORY = not nccl
    failures = []
    for case in cases:
        cu, config = case[0], MoBAConfig(*case[1:3])
        *qkv, dout = make(case)

        def run(layout: SequenceLayout, at: int, *, qkv=qkv, dout=dout, config=config, **options):
            local = [layout.shard(x, at).requires_grad_() for x in qkv]
            out = moba_attention(*local, config, layout=layout, **options)
            out.backward(layout.shard(dout, at))
            return out.detach(), *(x.grad for x in local)

        alone = run(SequenceLayout.contiguous(cu, 1), 0)
        for layout in layouts(cu, size):
            mine = [layout.shard(x, rank) for x in alone]
            for comm, u in splits(case[3], size):
                for wide.SLAB_BYTES in (1, 32 << 20):  # in several slabs, and in one
                    options = {"comm": comm, "head_parallel": u}
                    got, again = run(layout, rank, **options), run(layout, rank, **options)
                    where = f"{case} {layout} {comm} {u} slabs of {wide.SLAB_BYTES} rank {rank}"
                    failures += differences(got, again, mine, where)
    dist.destroy_process_group()
    assert not failures, f"{len(failures)} failures, the first:\n" + "\n".join(failures[:20])


def run_on_all(cases: list[tuple], nccl: bool) -> None:
    """`on_rank` on four GPUs, or on two; heads travel by NCCL, or through the GPUs' memory."""
    size = 4 if torch.cuda.device_count() >= 4 else 2
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(on_rank, (size, port, cases, nccl), nprocs=size)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("nccl", [True, False])
def test_splits_give_the_bits_of_one_gpu(nccl: bool) -> None:
    run_on_all(CASES, nccl)
