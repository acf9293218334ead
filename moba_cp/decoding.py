"""Steps of decoding: one query per sample against a cache. What one step tells about the next, which is most often of its kind.

A model takes one step per layer and token. Where a step has the shapes, dtypes and strides of the one before, nothing is checked
again, and the launches are those of the step before with other addresses.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import MoBAConfig
from .kernels import Backend, DecodeStep
from .strides import unit_stride

if TYPE_CHECKING:
    from .cached import CachedTokens, CentroidCache


@dataclass
class Step:
    """What a decoding step leaves for the next one, which is most often of the same kind.

    Attributes:
        facts: of the latest step whose arguments were checked (see `step_facts`).
        strides: of that step's tensors (see `strides_of`).
        run: launches bound to both.
    """

    facts: tuple[Hashable, ...] | None = None
    strides: tuple[Hashable, ...] | None = None
    run: DecodeStep | None = None


def strides_of(q: Tensor, k: Tensor, v: Tensor, tokens: CachedTokens) -> tuple[Hashable, ...] | None:
    """All that a step's launches depend on beside `step_facts`; None where they would need copies.

    The stream is among them: memory that a cache keeps for steps goes back to the stream that it was taken on.
    """
    of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    if not of_q[3] == of_k[3] == of_v[3] == 1:
        return None
    of_tokens = (tokens.slots, tokens.before, tokens.lengths, tokens.position)
    stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
    return (stream, k.shape[1], of_q, of_k, of_v, *[(x.dtype, x.stride(0)) for x in of_tokens])


def step_facts(
    q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, tokens: CachedTokens, workspace_bytes: int
) -> tuple[Hashable, ...] | None:
    """All values that the checks of a decoding step depend on, but for the number of slots; None where the checks must run.

    Steps follow each other by the thousand, with equal facts. The checks cost as much host time as the step's launches.
    """
    if not q.__class__ is k.__class__ is v.__class__ is Tensor or workspace_bytes.__class__ is not int:
        return None
    if config.__class__ is not MoBAConfig or workspace_bytes < 1:
        return None
    if q.is_nested or k.is_nested or v.is_nested or torch._C._len_torch_dispatch_stack():
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    of_q, of_k, of_v, table = q.shape, k.shape, v.shape, tokens.slots
    if len(of_q) != 4 or len(of_k) != 4 or len(of_v) != 4 or of_q[1] != 1 or torch._is_functional_tensor(q):
        return None
    if of_k[1] != of_v[1] or table.shape != of_k[:2] or tokens.query_position.shape != of_q[:2] or table.stride(1) != 1:
        return None
    kinds = (q.dtype, k.dtype, v.dtype, q.device, k.device, v.device, table.device, q.layout, k.layout, v.layout)
    return (of_q, of_k[0], of_k[2:], of_v[0], of_v[2:], config, *kinds)


def made(x: Tensor | None) -> Tensor:
    """A tensor that `CentroidCache.make_room` has made."""
    assert x is not None
    return x


def most_slots(config: MoBAConfig, blocks: int) -> int:
    """Slots per row: no more than a sample can have blocks."""
    return min(config.topk, blocks)


def decode(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, tokens: CachedTokens,
    centroids: CentroidCache, bind: bool,
) -> tuple[Tensor, DecodeStep | None]:  # fmt: skip
    """The output of one step; with `bind`, also what computes further steps of the same kind, where the backend has it."""
    means, count, arrived = made(centroids.values), made(centroids.count), centroids.arrived
    blocks, scale = means.shape[1], config.scale(q.shape[3])
    q = unit_stride(q.select(1, 0))
    block_size, topk = config.block_size, most_slots(config, blocks)
    selected = backend.select_for_decoding(
        q, k, slots=tokens.slots, before=tokens.before, lengths=tokens.lengths, position=tokens.position, count=count,
        arrived=arrived, centroids=means, block_size=block_size, topk=topk,
    )  # fmt: skip
    out = backend.attend_selected(
        q, k, v, slots=tokens.slots, position=tokens.position, selected=selected, arrived=arrived, blocks=blocks,
        block_size=block_size, scale=scale,
    ).unsqueeze(1)  # fmt: skip
    if not bind:
        return out, None
    return out, backend.decode_step(
        q, k, v, slots=tokens.slots, before=tokens.before, lengths=tokens.lengths, position=tokens.position,
        count=count, arrived=arrived, centroids=means, block_size=block_size, topk=topk, scale=scale,
    )  # fmt: skip
