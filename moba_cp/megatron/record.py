"""MoBA's settings among Megatron's own arguments, which Megatron writes into its checkpoints and to TensorBoard.

Programs on ``megatron.training`` keep their parsed arguments in one global namespace. Layers put their settings there as
they are built, under the names of MoBA's flags (``moba_block_size``, ...), and ``moba_layers`` says which layers compute
MoBA. Where a checkpoint is to be loaded, settings that change the meaning of its weights are compared with its own.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import load_common_state_dict

from .settings import MoBASettings

_COMPARED = ("moba_block_size", "moba_topk", "moba_softmax_scale", "moba_layers")
"""What changes the function that a checkpoint's weights compute. Transports and cuts do not."""

_compared: list[Any] = []  # argument namespaces whose checkpoint has been looked at


def megatron_arguments() -> Any:
    """The parsed arguments of a program on ``megatron.training``; None in other programs."""
    module = sys.modules.get("megatron.training.global_vars")
    return None if module is None else getattr(module, "_GLOBAL_ARGS", None)


def packs_of_flags(arguments: Any) -> str | None:
    """How the program's own data loader cuts packs, as far as its flags say: ``"zigzag"`` under ``--sft``."""
    by_document = getattr(arguments, "sft", False) and not getattr(arguments, "hybrid_context_parallel", False)
    return "zigzag" if by_document else None


def record_settings(arguments: Any, settings: MoBASettings, num_layers: int, softmax_scale: float | None) -> None:
    """Put the settings of a layer into Megatron's arguments, and compare them with those of the checkpoint to load.

    Layers with different settings are recorded as a list of the different values.

    Args:
        arguments: from :func:`megatron_arguments`.
        settings: of the layer.
        num_layers: of the whole model.
        softmax_scale: of the layer, with Megatron's own taken into account.

    Warns:
        UserWarning: the checkpoint was trained with other settings.
    """
    values = {
        "moba_block_size": settings.moba.block_size,
        "moba_topk": settings.moba.topk,
        "moba_softmax_scale": softmax_scale,
        "moba_comm": settings.comm,
        "moba_partition": settings.partition,
        "moba_packed_partition": settings.packed_partition,
        "moba_full_attention_comm": settings.full_attention_comm,
        "moba_full_attention_backend": settings.full_attention_backend,
        "moba_layers": [int(settings.computes_moba(number, num_layers)) for number in range(1, num_layers + 1)],
    }
    first = not any(seen is arguments for seen in _compared)
    for name, value in values.items():
        recorded = getattr(arguments, name, value)
        if first or recorded == value:
            setattr(arguments, name, value)
        elif name != "moba_layers" and value not in (several := recorded if isinstance(recorded, list) else [recorded]):
            setattr(arguments, name, [*several, value])
    if first:
        _compared.append(arguments)
        if (trained_with := _checkpoint_arguments(arguments)) is not None:
            compare_settings(arguments, trained_with)


def compare_settings(arguments: Any, trained_with: Any) -> None:
    """Warn where a checkpoint was trained with other settings; one without MoBA settings (a dense one) is fine.

    Args:
        arguments: of this run.
        trained_with: of the checkpoint.
    """
    changed = [
        f"{name} {getattr(trained_with, name)} -> {getattr(arguments, name)}"
        for name in _COMPARED
        if hasattr(trained_with, name) and getattr(trained_with, name) != getattr(arguments, name)
    ]
    if changed:
        warnings.warn(
            f"the checkpoint in {arguments.load} was trained with other MoBA settings: {', '.join(changed)}",
            stacklevel=2,
        )


def _checkpoint_arguments(arguments: Any) -> Any:
    """Arguments in the distributed checkpoint that Megatron is about to load, on rank 0; None if there are none.

    Involves no other rank: a pipeline stage may hold no attention layer, and so never get here.
    """
    folder = _checkpoint_folder(arguments)
    if folder is None or not (folder / "metadata.json").is_file() or (dist.is_initialized() and dist.get_rank() != 0):
        return None
    return load_common_state_dict(str(folder)).get("args")


def _checkpoint_folder(arguments: Any) -> Path | None:
    load, step = getattr(arguments, "load", None), getattr(arguments, "ckpt_step", None)
    if not load:
        return None
    if step is None:
        tracker = Path(load) / "latest_checkpointed_iteration.txt"
        text = tracker.read_text().strip() if tracker.is_file() else ""
        if text == "release":
            return Path(load) / text
        if not text.isdecimal():
            return None
        step = int(text)
    return Path(load) / f"iter_{step:07d}"
