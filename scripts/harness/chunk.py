"""One chunk of heads, routed: what kernels behind the gate are launched with when they are tuned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_cp import SequenceLayout
from moba_cp.kernels import KVPart, QueryRows, RoutingLists, backend_for
from moba_cp.kernels.types import Partials
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.pipeline import device_rows

from .inputs import HEAD_DIM, draw_inputs

SCALE = HEAD_DIM**-0.5


@dataclass(frozen=True)
class Chunk:
    """Inputs of one chunk of heads, routed; what kernels after the gate take."""

    q: Tensor
    dout: Tensor
    part: KVPart
    rows: QueryRows
    selected: Tensor
    lists: RoutingLists
    partials: Partials
    factor: float

    @property
    def attend_arguments(self) -> tuple[Tensor, KVPart, RoutingLists, QueryRows, float, Partials]:
        return self.q, self.part, self.lists, self.rows, SCALE, self.partials


def make_chunk(tokens: int, heads: int, at_once: int, group: int, block_size: int, topk: int) -> Chunk:
    """`at_once` of `heads` kv heads, N(0, 1), one document: views, as the pipeline takes them."""
    device = torch.device("cuda")
    q, k, v, dout = draw_inputs(tokens, heads * group, heads, 0, device)
    q, dout = q[:, : at_once * group], dout[:, : at_once * group]
    k, v = k[:, :at_once], v[:, :at_once]
    backend = backend_for(device, q.dtype)
    plan = rank_plan(home_plan(SequenceLayout.contiguous([0, tokens], 1), block_size), 0)
    rows, blocks = device_rows(plan, device), plan.plan.blocks
    start, length = (torch.tensor(x, dtype=torch.int32, device=device) for x in (blocks.start, blocks.length))
    centroids = backend.centroids(k, start=start, block_size=block_size)
    selected = backend.select_blocks(q, centroids=centroids, rows=rows, topk=topk)
    lists = backend.route(selected, n_blocks=len(blocks), kv_heads=at_once, block_size=block_size)
    part = KVPart(k, v, start.expand(at_once, -1), length)
    partials = backend.new_partials(selected, HEAD_DIM, q.dtype)
    return Chunk(q, dout, part, rows, selected, lists, partials, heads / at_once)
