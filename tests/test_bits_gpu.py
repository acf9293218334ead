"""On Hopper GPUs: output and dq have the bits that were saved once, for any number of ranks, layout and exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import moba_cp
from moba_cp import SequenceLayout
from tests.cases import comms_for
from tests.gpu_ranks import group_size, run_gpu_ranks, share_gpus
from tests.saved_bits import CASES, PATH, BitsCase, all_alone, hashes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="bits were saved on sm_90"
    ),
]


def saved() -> list[dict]:
    return json.loads(PATH.read_text())["cases"]


def as_json(found: list[dict]) -> list[dict]:
    return json.loads(json.dumps(found))


def test_one_gpu() -> None:
    assert as_json(all_alone()) == saved()


def comms(case: BitsCase, size: int) -> tuple[str, ...]:
    """Every exchange that the ranks of these GPUs can use, and heads split where they can be."""
    return tuple(x for x in comms_for(case.heads[0], size)[1:] if "pull" not in x or not share_gpus(size))


def cases_of(size: int) -> list[tuple[BitsCase, dict]]:
    """Cases and what is saved of them; where ranks take turns on a GPU, every ninth, which has all of `_PROBLEMS`."""
    return list(zip(CASES, saved(), strict=True))[:: 9 if share_gpus(size) else 1]


def on_rank(rank: int, size: int, folder: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    found = []
    for number, (case, _) in enumerate(cases_of(size)):
        cu, inputs = case.cu_seqlens, case.inputs()
        layouts = [
            SequenceLayout.zigzag(cu, size),
            SequenceLayout.contiguous(cu, size),
            SequenceLayout.zigzag(cu, size, per_document=False),
        ]
        layout = layouts[number % 3]
        for comm in comms(case, size):
            q, k, v, dout = (layout.shard(x, rank).to(device) for x in inputs)
            for x in (q, k, v):
                x.requires_grad_()
            out = moba_cp.moba_attention(q, k, v, case.config, layout=layout, comm=comm, workspace_bytes=32 << 20)
            out.backward(dout)
            whole = [gathered(x, layout, rank) for x in (out.detach(), q.grad)]
            if rank == 0:
                found.append((comm, hashes(case, inputs, *whole)))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def gathered(x: torch.Tensor, layout: SequenceLayout, rank: int) -> torch.Tensor:
    """All ranks' tokens."""
    parts = [x.new_empty(layout.local_tokens(r), *x.shape[1:]) for r in range(layout.cp_size)]
    for source, part in enumerate(parts):
        if source == rank:
            part.copy_(x)
        dist.broadcast(part, source)
    return layout.unshard(parts)


@pytest.mark.timeout(900)
def test_groups(tmp_path: Path) -> None:
    """Every exchange on every case; the workspace is small enough for several ranges of heads and chunks of rows."""
    size = group_size()
    run_gpu_ranks(size, on_rank, str(tmp_path))
    expected = [x for case, x in cases_of(size) for _ in comms(case, size)]
    wrong = [
        (comm, right)
        for (comm, got), right in zip(json.loads((tmp_path / "found.json").read_text()), expected, strict=True)
        if got != right
    ]
    assert not wrong
