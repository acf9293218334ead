"""Dense causal attention over several GPUs as users have it, for comparison: torch's ring, and heads by all-to-all.

`dense_ring`: `torch.distributed.tensor.experimental.context_parallel`, cuDNN, torch's own load balancing. CUDA only.
`dense_heads`: all-to-all to whole sequences of some heads (Ulysses), torch's `scaled_dot_product_attention` with cuDNN there,
and back. Both hold bf16 tensors of equal parts of one sequence; GQA stays GQA where the backend takes it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from .inputs import draw_inputs
from .layer_case import record
from .sweep import Case
from .teams import Team, prepare, time_teams
from .timing import over_all

LONGEST_S = 60.0
"""A pass that would take longer by the first call is timed once."""


def measure(case: Case, team: Team, device: torch.device, iterations: int, seconds: float) -> dict[str, Any]:
    """Times of the slowest rank, and peak memory; every rank of the job calls alike.

    Raises:
        ValueError, torch.OutOfMemoryError: the case cannot run here, or did not fit; on every rank of the job.
    """
    if case.tokens % case.ranks:
        raise ValueError(f"dense baselines cut {case.tokens} tokens into equal parts, not into {case.ranks}")

    def inputs() -> dict[str, Callable[[], None] | None]:
        assert team.rank is not None
        q, k, v, dout = draw_inputs(case.tokens // case.ranks, case.q_heads, case.kv_heads, 1 + team.rank, device)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attend = _ring(case, team, device) if case.baseline == "dense_ring" else _heads(case, team, device)

        def forward() -> None:
            with torch.no_grad():
                attend(q, k, v, None)

        def both() -> None:
            for x in leaves:
                x.grad = None
            attend(q, k, v, dout)

        return {"forward": forward, "forward_backward": both}

    calls = prepare(inputs, team, device) or {"forward": None, "forward_backward": None}
    found: dict[str, Any] = {}
    for name, call in calls.items():
        if name == "forward_backward" and not case.backward:
            continue
        warm = time_teams(call, device, 1, 0.0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = time_teams(call, device, iterations, seconds) if warm.median < 1e3 * LONGEST_S else warm
        found |= record(f"{name}_ms", times)
        if device.type == "cuda":
            found[f"peak_gib_{name}"] = over_all(torch.cuda.max_memory_allocated(device), device) / 2**30
    return found


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`[1, H, T, D]` each."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


@contextlib.contextmanager
def _fast(device: torch.device) -> Iterator[None]:
    """cuDNN on GPUs; what torch takes elsewhere."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else contextlib.nullcontext():
        yield


def _ring(case: Case, team: Team, device: torch.device) -> Attend:
    if device.type != "cuda":
        raise ValueError("dense_ring needs CUDA: torch's context_parallel has no attention for the CPU")
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cuda", (team.size,)) if team.group is None else DeviceMesh.from_group(team.group, "cuda")
    copies = case.q_heads // case.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None) -> None:
        # The buffer only tells torch how to balance: q, k and v are the parts that its shards would be.
        buffer = torch.empty(case.tokens, device=device, dtype=torch.uint8)
        with (
            context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[0], no_restore_buffers={buffer}),
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        ):
            query, key, value = (
                x.transpose(0, 1)[None] for x in (q, *(x.repeat_interleave(copies, 1) for x in (k, v)))
            )
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            if dout is not None:
                out.backward(dout.transpose(0, 1)[None])

    return attend


def _heads(case: Case, team: Team, device: torch.device) -> Attend:
    size, group = team.size, team.group
    copies = size // math.gcd(size, case.kv_heads)  # of each kv head: as few as give all ranks equally many

    def attend(q: Tensor, k: Tensor, v: Tensor, dout: Tensor | None) -> None:
        parts = (_HeadsIn.apply(x, size, group) for x in (q, *(x.repeat_interleave(copies, 1) for x in (k, v))))
        query, key, value = (x.transpose(0, 1)[None] for x in parts)
        with _fast(device):
            out = _sdpa(query, key, value)[0].transpose(0, 1)
            out = _HeadsOut.apply(out, size, group)
            if dout is not None:
                out.backward(dout)

    return attend


def _split_heads(x: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """`[T, H, D]` of some tokens -> `[size * T, H / size, D]`."""
    if size == 1:
        return x
    sent = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.flatten(0, 1)


def _join_heads(x: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
    """The inverse of `_split_heads`."""
    if size == 1:
        return x
    sent = x.contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.unflatten(0, (size, -1)).transpose(0, 1).flatten(1, 2)


class _HeadsIn(torch.autograd.Function):
    """All tokens of some heads, from all heads of some tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.where = size, group
        return _split_heads(x, size, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _join_heads(gradient, *ctx.where), None, None


class _HeadsOut(torch.autograd.Function):
    """All heads of some tokens, from all tokens of some heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.where = size, group
        return _join_heads(x, size, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _split_heads(gradient, *ctx.where), None, None
