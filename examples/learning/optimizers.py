"""The optimizers of a run and their learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch

from .model import GPT


def optimizers(model: GPT, settings: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers where `settings` has `muon_lr`, AdamW for all other weights.

    Each group holds its peak learning rate as `peak_lr`. Muon's updates are scaled to the size of AdamW's.
    """
    weights = list(model.parameters())
    of_muon = [w for w in model.layers.parameters() if w.dim() == 2] if "muon_lr" in settings else []
    chosen = {id(w) for w in of_muon}
    of_adam = [w for w in weights if id(w) not in chosen]
    decay, lr = settings["weight_decay"], settings["lr"]
    groups = [
        {"params": [w for w in of_adam if w.dim() == 2], "weight_decay": decay, "peak_lr": lr},
        {"params": [w for w in of_adam if w.dim() == 1], "weight_decay": 0.0, "peak_lr": lr},
    ]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(settings["beta1"], settings["beta2"]), lr=lr, fused=True)
    ]
    if of_muon:
        group = {"params": of_muon, "peak_lr": settings["muon_lr"]}
        made.append(
            torch.optim.Muon([group], lr=settings["muon_lr"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return made


def learning_rate_share(optimizer: dict[str, Any], step: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `min_lr_share`."""
    warmup, steps, low = optimizer["warmup"], optimizer["steps"], optimizer["min_lr_share"]
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
