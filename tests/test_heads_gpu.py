"""On several GPUs: heads split over ranks give the bits of one GPU, in any slabs, by NCCL and through the GPUs' memory."""

from __future__ import annotations

import pytest

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, wide
from moba_cp.parallel import heads
from tests.gpu_ranks import group_size, run_gpu_ranks, share_gpus
from tests.test_attention_gpu import CASES, differences, layouts, make

pytestmark = pytest.mark.gpu


def splits(q_heads: int, size: int) -> list[tuple[str, int]]:
    """Each way to split heads over a node of `size` ranks."""
    between = ["ring", "fetch", "all_gather"] + ["pull"] * (not share_gpus(size))
    found = []
    for u in range(2, size + 1):
        if size % u == 0 and q_heads % u == 0:
            found += [("a2a", u)] if u == size else [(f"a2a+{x}", u) for x in between]
    return found


def on_rank(rank: int, size: int, cases: list[tuple], nccl: bool) -> None:
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
    assert not failures, f"{len(failures)} failures, the first:\n" + "\n".join(failures[:20])


@pytest.mark.timeout(600)  # each call takes a tenth of a second and more where ranks share a GPU
@pytest.mark.parametrize("nccl", [True, False])
def test_splits_give_the_bits_of_one_gpu(nccl: bool) -> None:
    """Heads travel by NCCL, or through the GPUs' memory."""
    size = group_size()
    if not nccl and share_gpus(size):
        pytest.skip("ranks that share a GPU cannot read each other's memory")
    run_gpu_ranks(size, on_rank, CASES[:2] if share_gpus(size) else CASES, nccl)
