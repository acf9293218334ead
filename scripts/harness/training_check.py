"""Whether attention in a training step computed its definition: sampled rows of a layer, of the model that was timed.

A hook keeps sampled rows of q and of the output, their gradients, and the layer's keys and values. `harness.definition` evaluates
these rows in fp64 with plain torch. Besides, the loss of a short sequence is computed with the model's kernels and with attention
by `moba_cp.reference` in every layer: the two differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout, reference
from moba_cp.megatron import MoBACoreAttention
from moba_cp.megatron.layout import sbhd_layout
from moba_cp.megatron.schedule import moba_layers

from .definition import Ranks, SampledRows, check_sampled
from .timing import over_all

ERRORS = ("output_error", "dq_error", "dq_rounding_error", "worst_row_error")


@dataclass
class Seen:
    """What was kept of one call of a layer.

    Attributes:
        config: the layer's; for full attention, one that selects every block (`_full`).
        layout, rank, ranks: of the sequence, the first one of a micro-batch.
        rows: that were sampled.
        tensors: by name: q, out, dout, dq `[n, Hq, D]` and k, v `[T, Hkv, D]`.
    """

    config: MoBAConfig
    layout: SequenceLayout
    rank: int
    ranks: Ranks
    rows: SampledRows
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Watch:
    """Forward hook of one layer's core attention. It keeps the first call that records gradients."""

    def __init__(self) -> None:
        self.seen: Seen | None = None

    def __call__(self, core: MoBACoreAttention, arguments: tuple[Any, ...], output: Tensor) -> None:
        q, k, v = (x[:, 0] for x in arguments[:3])  # [s / cp, b, heads, d]: the micro-batch's first sequence
        if self.seen is not None or not q.requires_grad:  # an earlier call, or one of a pass that is computed again
            return
        group = core.cp_group
        layout = sbhd_layout(len(q), 1, group.size(), core.partition)
        config = core.moba if core.computes_moba else _full(layout, core.moba.softmax_scale)
        rows = SampledRows.of(layout, group.rank(), q.device)
        seen = Seen(config, layout, group.rank(), Ranks(group if group.size() > 1 else None), rows)
        seen.tensors = {"q": rows.take(q.detach()), "k": k.detach(), "v": v.detach()}
        heads = (q.shape[1], v.shape[2])
        seen.tensors["out"] = rows.take(output.detach()[:, 0].unflatten(-1, heads))

        def keep_dout(gradient: Tensor) -> None:
            seen.tensors["dout"] = rows.take(gradient[:, 0].unflatten(-1, heads))

        def keep_dq(gradient: Tensor) -> None:
            seen.tensors["dq"] = rows.take(gradient[:, 0])

        output.register_hook(keep_dout)
        arguments[0].register_hook(keep_dq)
        self.seen = seen


def _full(layout: SequenceLayout, scale: float | None) -> MoBAConfig:
    """Full attention over one document as MoBA that selects every block.

    Blocks are chunks of the zigzag order: over several ranks, dq is a sum of rounded partials of such chunks
    (`definition.Attended`).
    """
    chunks = 2 * layout.cp_size
    return MoBAConfig(-(-layout.total_tokens // chunks), chunks, scale)


@contextmanager
def watching(model: Iterable[torch.nn.Module]) -> Iterator[dict[str, Watch]]:
    """Watch the last layer of each kind ("moba", "full") that this rank holds, during one training step.

    All ranks of a context-parallel group must enter the block together.
    """
    watched = {"moba" if core.computes_moba else "full": core for core in moba_layers(model)}
    watches = {name: Watch() for name in watched}
    with ExitStack() as hooks:
        for name, core in watched.items():
            hooks.callback(core.register_forward_hook(watches[name]).remove)
        yield watches


def errors(watches: dict[str, Watch], device: torch.device) -> dict[str, float | int]:
    """Errors of the watched calls; every rank of the job calls alike.

    Returns:
        output_error, dq_error, dq_rounding_error, worst_row_error: as `definition.check_rows`, the largest over layers and ranks.
        checked_rows: rows times heads compared, the least of any rank.

    Raises:
        RuntimeError: a watched layer was not called, or not with gradients.
    """
    found: dict[str, float] = dict.fromkeys(ERRORS, 0.0)
    checked = 0
    for name, watch in watches.items():
        seen = watch.seen
        if seen is None or not {"dout", "dq"} <= seen.tensors.keys():
            raise RuntimeError(f"no training step went through the watched layer of {name} attention")
        of_layer = check_sampled(
            seen.rows, **seen.tensors, selection=None, config=seen.config, layout=seen.layout, rank=seen.rank, ranks=seen.ranks
        )  # fmt: skip
        checked += int(of_layer["checked_rows"])
        for key in ERRORS:
            found[key] = max(found[key], of_layer[key])
    result: dict[str, float | int] = {key: float(f"{over_all(value, device):.3e}") for key, value in found.items()}
    return result | {"checked_rows": int(-over_all(-checked, device))}


@contextmanager
def defined_attention(model: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the block every attention layer gives what `moba_cp.reference` computes, in plain torch and fp32, without gradients.

    It takes memory for all pairs of tokens of one kv head's queries. All ranks of a context-parallel group must enter together.
    """
    with ExitStack() as hooks:
        for core in moba_layers(model):
            hooks.callback(core.register_forward_hook(_by_definition).remove)
        yield


@torch.no_grad()
def _by_definition(core: MoBACoreAttention, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook: the definition's output in place of `output` `[s / cp, b, heads * d]`."""
    size, rank = core.cp_group.size(), core.cp_group.rank()
    layout = sbhd_layout(len(output), 1, size, core.partition)
    config = core.moba if core.computes_moba else MoBAConfig(layout.total_tokens, 1, core.moba.softmax_scale)
    every = torch.cat([layout.local_indices(n) for n in range(size)]).to(output.device)

    def whole(x: Tensor) -> Tensor:
        """`[s, heads, d]` of all ranks, in order."""
        parts = [torch.empty_like(x) for _ in range(size)] if size > 1 else [x]
        if size > 1:
            dist.all_gather(parts, x, group=core.cp_group)
        return torch.empty_like(torch.cat(parts)).index_copy_(0, every, torch.cat(parts))

    results = []
    for sample in range(output.shape[1]):
        q, k, v = (whole(x[:, sample].contiguous()) for x in arguments[:3])
        group = q.shape[1] // k.shape[1]
        heads = [  # one kv head at a time: scores of all pairs take memory
            reference.moba_attention(
                q[:, n * group : (n + 1) * group], k[:, n : n + 1], v[:, n : n + 1], [0, len(q)], config
            )
            for n in range(k.shape[1])
        ]
        results.append(torch.cat(heads, 1)[layout.local_indices(rank).to(q.device)].flatten(1))
    return torch.stack(results, 1)


def loss_difference(loss: Callable[[], float], model: Iterable[torch.nn.Module], device: torch.device) -> float:
    """Relative difference between the model's loss and the loss with attention by definition; every rank calls alike.

    Args:
        loss: a forward pass over the same tokens each time; NaN on ranks that do not know it (earlier pipeline stages).
        model: its chunks on this rank.
    """
    model = list(model)
    ours = loss()
    with defined_attention(model):
        defined = loss()
    away = 0.0 if math.isnan(ours) and math.isnan(defined) else abs(ours - defined) / abs(defined)
    return float(f"{over_all(away, device):.3e}")
