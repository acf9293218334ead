"""The attention of an arm: full causal, MoBA, or a sliding window of the same budget.

Every function takes packed sequences of one length, `q [B * L, Hq, D]`, `k, v [B * L, Hkv, D]`, and returns `[B * L, Hq, D]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from moba_cp import MoBAConfig, MoBAReport, SequenceLayout, moba_attention


@dataclass(frozen=True)
class Attention:
    """One layer's attention.

    Attributes:
        kind: "full", "moba" or "window".
        block_size, topk: of MoBA.
        window: keys a query attends to, its own counted.
        chunk: query rows that share one dense product of the sliding window on a CPU; divides the sequence and the window.
    """

    kind: str
    block_size: int = 0
    topk: int = 0
    window: int = 0
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("full", "moba", "window"):
            raise ValueError(f'kind must be "full", "moba" or "window", got {self.kind!r}')
        if self.kind == "moba":
            MoBAConfig(self.block_size, self.topk)
        if self.kind == "window" and (self.chunk < 1 or self.window < self.chunk or self.window % self.chunk):
            raise ValueError(f"window must be a multiple of chunk, got {self.window} and {self.chunk}")

    def is_full(self, length: int) -> bool:
        """Whether it is full causal attention on sequences of `length` tokens."""
        reach = {"full": length, "moba": self.block_size * self.topk, "window": self.window}[self.kind]
        return reach >= length


@dataclass(frozen=True)
class Phase:
    """What the layers compute from a share of the steps on.

    Attributes:
        start: share of the steps, in [0, 1).
        layers: one `Attention` per layer.
    """

    start: float
    layers: tuple[Attention, ...]


def phases(arm: Mapping[str, Any], n_layers: int) -> list[Phase]:
    """The phases of an arm as a plan describes it.

    `{attention: {kind: moba, block_size: 512, topk: 3}, full_layers: 2, switch: {at: 0.9, attention: {kind: full}}}`: the
    last `full_layers` layers compute full attention, and at the share `at` of the steps the others change over.
    """
    unknown = set(arm) - {"attention", "full_layers", "switch", "cp"}
    if unknown:
        raise ValueError(f"unknown keys of an arm: {sorted(unknown)}")
    last = arm.get("full_layers", 0)
    if not 0 <= last <= n_layers:
        raise ValueError(f"full_layers must be in [0, {n_layers}], got {last}")

    def layers(spec: Mapping[str, Any]) -> tuple[Attention, ...]:
        return (Attention(**spec),) * (n_layers - last) + (Attention("full"),) * last

    made = [Phase(0.0, layers(arm["attention"]))]
    if "switch" in arm:
        made.append(Phase(arm["switch"]["at"], layers(arm["switch"]["attention"])))
    return made


def attend(
    spec: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    length: int,
    group: dist.ProcessGroup | None = None,
    reports: list[MoBAReport] | None = None,
) -> Tensor:
    """Attention of the packed sequences.

    Args:
        spec: what to compute.
        q, k, v: as above; with a group, the rank's own tokens.
        layout: of all sequences over the group.
        length: tokens per sequence.
        group: the context-parallel group; MoBA alone can have one.
        reports: gets the report of a MoBA call.
    """
    if spec.kind == "moba":
        config = MoBAConfig(spec.block_size, spec.topk)
        if reports is None:
            return moba_attention(q, k, v, config, layout=layout, group=group)
        out, report = moba_attention(q, k, v, config, layout=layout, group=group, return_report=True)
        reports.append(report)
        return out
    if layout.cp_size > 1:
        raise ValueError(f"{spec.kind} attention has no context parallelism here, got {layout.cp_size} ranks")
    if spec.kind == "window" and q.is_cuda and not spec.is_full(length):
        return flash_window(q, k, v, length, spec.window)
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    out = full(q, k, v) if spec.kind == "full" else sliding_window(q, k, v, spec.window, spec.chunk)
    return out.transpose(1, 2).flatten(0, 1)


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention `[B, H, L, D]`: cuDNN or flash attention on a GPU."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flash_window(q: Tensor, k: Tensor, v: Tensor, length: int, window: int) -> Tensor:
    """`sliding_window` of packed sequences on a GPU, `[B * L, H, D]`; needs torch 2.11.

    On an H200 it takes a quarter of the time of the masked products of `sliding_window`.
    """
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(0, len(q) + 1, length, device=q.device, dtype=torch.int32)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return varlen_attn(q, k, v, starts, starts, length, length, window_size=(window - 1, 0))


def sliding_window(q: Tensor, k: Tensor, v: Tensor, window: int, chunk: int) -> Tensor:
    """Query i attends to keys i - window + 1 to i, exactly; `[B, H, L, D]`.

    The first `window` rows are plain causal attention. Each later chunk of rows attends to `window + chunk` keys under a
    band mask that all chunks share, so the work grows with `L * (window + chunk)`.
    """
    batch, heads, length, _ = q.shape
    if length <= window:
        return full(q, k, v)
    if length % chunk:
        raise ValueError(f"the sequence must be a multiple of chunk, got {length} and {chunk}")
    group = heads // k.shape[1]
    head = full(q[:, :, :window], k[:, :, :window], v[:, :, :window])
    rows = q[:, :, window:].unflatten(2, (-1, chunk)).transpose(1, 2).flatten(0, 1)  # [B * n, H, chunk, D]

    def seen(x: Tensor) -> Tensor:  # [B * n, H, window + chunk, D]
        pieces = x.unfold(2, window + chunk, chunk).permute(0, 2, 1, 4, 3)  # [B, n, Hkv, window + chunk, D]
        return pieces.repeat_interleave(group, 2).flatten(0, 1)

    mask = _band(window, chunk, q.device)[None, None]
    out = F.scaled_dot_product_attention(rows, seen(k), seen(v), attn_mask=mask)
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([head, out], 2)


@lru_cache(maxsize=4)
def _band(window: int, chunk: int, device: torch.device) -> Tensor:
    """bool `[chunk, window + chunk]`: row i sees columns i + 1 to i + window."""
    ones = torch.ones(chunk, window + chunk, dtype=torch.bool, device=device)
    return ones.triu(1) & ones.tril(window)


def check(spec: Attention, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> float:
    """Largest relative error of output and gradients against dense fp32 attention with the arm's own mask.

    Two sequences of at least 4,096 tokens on a GPU and of 8 blocks elsewhere. MoBA's mask comes from the selection it reports.

    Raises:
        RuntimeError: an error is above 3 % of the tensor's largest value. bf16 inputs give about 1 %.
    """
    unit = max(spec.block_size, spec.chunk, 32)
    length = max(4096, spec.window + unit) if device.type == "cuda" else 8 * unit
    length = -(-length // unit) * unit
    generator = torch.Generator(device).manual_seed(0)
    make = lambda h: torch.randn(2 * length, h, dim, device=device, dtype=dtype, generator=generator)  # noqa: E731
    inputs = [make(heads).requires_grad_(), make(kv_heads).requires_grad_(), make(kv_heads).requires_grad_()]
    reports: list[MoBAReport] = []
    layout = SequenceLayout.contiguous([0, length, 2 * length], 1)
    out = attend(spec, *inputs, layout, length, reports=reports)
    upstream = make(heads)
    found = [out, *torch.autograd.grad(out, inputs, upstream)]
    copies = [x.detach().float().requires_grad_() for x in inputs]
    selected = reports[0].selected.unflatten(1, (2, length)) if reports else None
    expected_out = torch.cat([_dense(spec, copies, b, length, selected) for b in range(2)])
    expected = [expected_out, *torch.autograd.grad(expected_out, copies, upstream.float())]
    worst = max(float((f.float() - e).detach().abs().max() / e.detach().abs().max()) for f, e in zip(found, expected))
    if not worst <= 0.03:
        raise RuntimeError(f"{spec} is off by {worst:.3%} of the largest value against dense fp32 attention")
    return worst


def _dense(spec: Attention, inputs: list[Tensor], sequence: int, length: int, selected: Tensor | None) -> Tensor:
    rows = slice(sequence * length, (sequence + 1) * length)
    q, k, v = (x[rows].transpose(0, 1) for x in inputs)
    group, at = q.shape[0] // k.shape[0], torch.arange(length, device=q.device)
    mask = (at[:, None] >= at[None, :]).expand(q.shape[0], length, length)
    if spec.kind == "window":
        mask = mask & (at[:, None] - at[None, :] < spec.window)
    if selected is not None:
        blocks = length // spec.block_size
        chosen = selected[:, sequence].long() - sequence * blocks  # [Hq, L, topk]
        table = torch.zeros(q.shape[0], length, blocks + 1, dtype=torch.bool, device=q.device)
        table.scatter_(2, chosen.where(chosen >= 0, blocks), True)
        mask = mask & table[:, :, :blocks].repeat_interleave(spec.block_size, 2)
    out = []
    for h in range(q.shape[0]):  # one head at a time: the fp32 scores take L * L * 4 bytes
        scores = (q[h] @ k[h // group].T * q.shape[2] ** -0.5).masked_fill(~mask[h], -torch.inf)
        out.append(scores.softmax(-1) @ v[h // group])
    return torch.stack(out, 1)
