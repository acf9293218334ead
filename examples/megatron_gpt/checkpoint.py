"""Checkpoints with Megatron's distributed checkpointing: saved by any parallel sizes, resumed bit for bit by the same ones.

``<run>/checkpoints/step_00000100/`` holds the sharded model and optimizer; ``latest`` names the newest complete one and
is written last, so a run that dies while saving resumes from the one before. Nothing random happens after
initialisation (no dropout, and the data order follows from the seed), so there is no random state to keep.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from .model import Trainer

# Optimizer state as one tensor per parameter, whatever the sizes of the parallel groups.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0
    corpus: str = ""  # fingerprint of the training text


def save(directory: Path, trainer: Trainer, progress: Progress) -> Path:
    """Write a checkpoint; every rank must call this. Returns its folder."""
    target = directory / f"step_{progress.step:08d}"
    if dist.get_rank() == 0:
        target.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _sharded_state(trainer, is_loading=False) | {"progress": asdict(progress)}
    dist_checkpointing.save(state, str(target), content_metadata=_FORMAT)
    dist.barrier()
    if dist.get_rank() == 0:
        pointer = directory / "latest.tmp"
        pointer.write_text(target.name + "\n")
        os.replace(pointer, directory / "latest")
    dist.barrier()
    return target


def load_latest(directory: Path, trainer: Trainer, corpus: str) -> Progress | None:
    """Restore the newest checkpoint, or return None if there is none; every rank must call this.

    Raises:
        ValueError: the checkpoint was trained on other text than ``corpus`` (a fingerprint).
    """
    pointer = directory / "latest"
    if not pointer.exists():
        return None
    path = directory / pointer.read_text().strip()
    _allocate_adam_state(trainer.optimizer)
    state = dist_checkpointing.load(_sharded_state(trainer, is_loading=True), str(path))
    progress = Progress(**state["progress"])
    if progress.corpus != corpus:
        raise ValueError(f"the training text has changed since {path} was saved: resuming would not continue that run")
    for number, chunk in enumerate(unwrap_model(trainer.model)):
        chunk.load_state_dict(state[f"model{number}"])
    _load_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    return progress


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restore the optimizer, one part (no experts).

    With torch's Adam, Megatron's distributed optimizer looks for each parameter's step count among the saved tensors,
    where it is not, and afterwards all parameters share one counter, which each of them would increment.
    """
    tensors = state.pop("param_state", None)
    optimizer.load_state_dict(state)
    part = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    steps = {parameter: values.pop("step") for parameter, values in part.optimizer.state.items() if "step" in values}
    if tensors is not None:
        part.load_parameter_state_from_fully_reshardable(tensors)
    for parameter, step in steps.items():
        part.optimizer.state[parameter]["step"] = step.clone()


def _allocate_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam its state before the first step; Megatron's loader counts on it being there."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            continue  # the fused ones of Transformer Engine and apex do it themselves
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _sharded_state(trainer: Trainer, is_loading: bool) -> dict[str, Any]:
    metadata = dict(_FORMAT)
    # Saved names hold the layer's number in the whole model, not the chunk: chunks may be cut otherwise when loading.
    chunks = enumerate(unwrap_model(trainer.model))
    model = {f"model{number}": chunk.sharded_state_dict(metadata=metadata) for number, chunk in chunks}
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return model | {"optimizer": optimizer, "scheduler": trainer.scheduler.state_dict()}
