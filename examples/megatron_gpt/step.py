"""One optimizer step, and one evaluation, through Megatron's own schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from moba_cp.megatron.reports import LayerReport, collect_reports
from moba_cp.megatron.routing import routing_statistics

from .batches import MicroBatch
from .config import TrainConfig
from .distributed import Ranks, TrainingError, largest
from .fit import doing
from .model import Trainer


@dataclass(frozen=True)
class StepResult:
    """Figures of one step; the loss is known on ranks of the last pipeline stage, and NaN elsewhere."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool  # the optimizer found a gradient that is not finite


def train_step(trainer: Trainer, batches: Iterator[MicroBatch], config: TrainConfig, ranks: Ranks) -> StepResult:
    """Forward and backward over one global batch, then one optimizer step.

    Raises:
        TrainingError: the loss (before the parameters change) or the gradient norm (after) is NaN or infinite.
    """
    for chunk in trainer.model:
        chunk.train()
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    with doing("forward and backward"):
        loss = _run_batch(trainer, batches, config, ranks, forward_only=False)
    _check_finite("loss", loss if ranks.is_last_stage else 0.0, ranks)
    learning_rate = trainer.optimizer.param_groups[0]["lr"]
    with doing("the optimizer's step"):
        succeeded, grad_norm, _ = trainer.optimizer.step()
    if succeeded:
        _check_finite("gradient norm", float(grad_norm or 0.0), ranks)
        trainer.scheduler.step(increment=config.run.global_batch_size)
    return StepResult(loss, float(grad_norm or 0.0), learning_rate, skipped=not succeeded)


def _check_finite(what: str, value: float, ranks: Ranks) -> None:
    """Raise on every rank if ``value`` is NaN or infinite on any."""
    worst = largest(2 if math.isnan(value) else int(math.isinf(value)), ranks.device)
    if worst:
        raise TrainingError(f"the {what} is {('infinite', 'NaN')[worst - 1]}")


@torch.no_grad()
def evaluate(trainer: Trainer, batches: Iterator[MicroBatch], config: TrainConfig, ranks: Ranks) -> float:
    """Mean loss over ``run.eval_batches`` global batches (NaN before the last pipeline stage)."""
    _evaluation_mode(trainer)
    with doing("evaluation"):
        losses = [
            _run_batch(trainer, batches, config, ranks, forward_only=True) for _ in range(config.run.eval_batches)
        ]
    return sum(losses) / len(losses)


def last_layer_report(
    trainer: Trainer, batches: Iterator[MicroBatch], config: TrainConfig, ranks: Ranks
) -> LayerReport | None:
    """Routing and traffic of this rank's last MoBA layer on the first micro-batch of a global batch; None on ranks of
    earlier pipeline stages, or if no layer there computes MoBA. All ranks of a context-parallel group get the same
    figures, each with its own tokens' selection."""
    reports = _reports(trainer, batches, config, ranks)
    if not ranks.is_last_stage or not reports:
        return None
    last = max(r.layer_number for r in reports)
    return next(r for r in reports if r.layer_number == last)


def routing(
    trainer: Trainer, batches: Iterator[MicroBatch], config: TrainConfig, ranks: Ranks
) -> dict[int, dict[str, float]]:
    """Routing statistics by layer number, of one micro-batch for each data-parallel rank (with virtual pipeline, one for
    each stage too); the same on all ranks. Layers that compute full attention are left out."""
    return routing_statistics(_reports(trainer, batches, config, ranks))


@torch.no_grad()
def _reports(trainer: Trainer, batches: Iterator[MicroBatch], config: TrainConfig, ranks: Ranks) -> list[LayerReport]:
    """Reports of this rank's layers on one micro-batch, or as many as the interleaved schedule runs at the least."""
    _evaluation_mode(trainer)
    count = config.parallel.pipeline if config.parallel.virtual_pipeline > 1 else 1
    with collect_reports(trainer.model) as reports:
        _run_batch(trainer, batches, config, ranks, forward_only=True, num_microbatches=count)
    return reports


def _evaluation_mode(trainer: Trainer) -> None:
    for chunk in trainer.model:
        chunk.eval()


def _run_batch(
    trainer: Trainer,
    batches: Iterator[MicroBatch],
    config: TrainConfig,
    ranks: Ranks,
    forward_only: bool,
    num_microbatches: int | None = None,
) -> float:
    """Mean loss per token over every rank that saw a part of it; of a global batch, unless a number is given."""
    if num_microbatches is None:
        num_microbatches = config.run.global_batch_size // (config.run.micro_batch_size * ranks.dp_size)

    def passes(batches: Iterator[MicroBatch], count: int) -> torch.Tensor:
        chunks = len(trainer.model)
        sums = get_forward_backward_func()(
            forward_step_func=_forward_step,
            # Every chunk goes through the micro-batches on its own; each of them is read once.
            data_iterator=list(tee(batches, chunks)) if chunks > 1 else batches,
            model=trainer.model,
            num_microbatches=count,
            seq_length=config.data.seq_length,
            micro_batch_size=config.run.micro_batch_size,
            forward_only=forward_only,
        )
        if not ranks.is_last_stage:
            return torch.zeros(2, dtype=torch.float64, device=ranks.device)
        return torch.stack([s["loss"] for s in sums]).sum(0)

    if trainer.graph is None or forward_only:
        total = passes(batches, num_microbatches)
    else:
        total = trainer.graph.run(passes, trainer.model[0], trainer.transformer_config, batches, num_microbatches)
    if not ranks.is_last_stage:
        return float("nan")
    dist.all_reduce(total, group=ranks.groups.dp_cp)
    return (total[0] / total[1]).item()


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(batches)
    output = model(batch.tokens, batch.position_ids, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, partial(_loss, batch.counts)


def _loss(
    counts: torch.Tensor | None, per_token: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over this rank's tokens and their number; Megatron divides by the number over all ranks."""
    losses = per_token.float()
    if counts is not None:
        losses = losses.masked_fill(~counts, 0.0)
    loss = losses.sum()
    if counts is not None:
        count = counts.sum().int()
    else:  # filled on the device: a number from the host would be a copy that waits
        count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    return loss, count, {"loss": torch.stack([loss.detach().double(), count.double()])}
