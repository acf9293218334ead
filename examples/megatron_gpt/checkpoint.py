"""Checkpoints with Megatron's distributed checkpointing: saved by any parallel sizes, resumed bit for bit by the same ones.

A checkpoint is written to a folder that ends in ``.tmp``, renamed, and only then named by ``latest``
(:mod:`.checkpoint_files`), so a run that dies while saving resumes from the one before. Nothing random happens after
initialisation (no dropout, and the data order follows from the seed), so there is no random state to keep.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from . import checkpoint_files as files
from .distributed import TrainingError, agree, largest
from .model import Trainer

MAY_CHANGE = {
    "model.rotary_base": "",
    "data.seq_length": ": the text is cut and drawn anew from here on",
    "run.seed": ": the text is drawn anew from here on",
    "run.global_batch_size": ": learning rates go on by steps",
}
"""Settings that a resumed run may change, with what follows."""
FROM_CONFIGURATION = ("max_lr", "min_lr", "betas", "eps")
"""What Megatron's loader takes from the checkpoint, and a resumed run from its configuration, like the rest of `optimizer`."""
# Optimizer state as one tensor per parameter, whatever the sizes of the parallel groups.
_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    consumed_samples: int = 0
    corpus: str = ""  # fingerprint of the training text


def save(
    directory: Path,
    trainer: Trainer,
    progress: Progress,
    *,
    moba: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
    keep: int = 0,
) -> Path:
    """Write a checkpoint; every rank must call this. Returns its folder.

    Args:
        directory: folder of the run's checkpoints.
        trainer: what to save.
        progress: recorded with it.
        moba: settings of attention, from :func:`.model.moba_record`; recorded with it.
        sizes: the model and how its text is read, from :func:`.model.sizes_record`; recorded with it.
        keep: checkpoints that stay, this one included; 0 for all.

    Raises:
        TrainingError: a parameter is not finite, or a rank could not write (a full disk). ``latest`` still names the
            checkpoint before, and nothing of this one is left.
    """
    device = next(trainer.model[0].parameters()).device
    broken = not all(bool(p.isfinite().all()) for chunk in trainer.model for p in chunk.parameters())
    if largest(int(broken), device):
        raise TrainingError(f"parameters are not finite after step {progress.step}: not saved")
    name, is_first = f"step_{progress.step:08d}", dist.get_rank() == 0
    with _together(directory, name):
        if is_first:
            files.prepare(directory, name)
    unfinished = directory / f"{name}.tmp"
    with _together(directory, name):
        state = _sharded_state(trainer, is_loading=False) | {
            "progress": asdict(progress),
            "moba": moba,
            "sizes": sizes,
        }
        dist_checkpointing.save(state, str(unfinished), content_metadata=_FORMAT)
    with _together(directory, name):
        if is_first:
            files.publish(directory, name, keep)
    return directory / name


@contextmanager
def _together(directory: Path, name: str) -> Iterator[None]:
    """Errors of the ``with`` block on one rank become one `TrainingError` on all, and the unfinished folder goes."""
    error = None
    try:
        yield
    except (Exception, CheckpointException) as raised:  # torch's is no Exception
        lines = [line for line in str(_cause(raised)).splitlines() if line.strip()]
        error = f"checkpoint {directory / name} could not be written: {lines[-1].strip() if lines else repr(raised)}"
    try:
        agree(error)
    except TrainingError:
        if dist.get_rank() == 0 and directory.is_dir():
            with suppress(OSError):
                files.remove_unfinished(directory)
        raise


def _cause(error: BaseException) -> BaseException:
    """What an error of a checkpoint writer started with; torch gathers the errors of the ranks in one."""
    failures = getattr(error, "failures", None)
    if failures:
        return _cause(next(iter(failures.values()))[0])
    return _cause(error.__cause__) if error.__cause__ is not None else error


def make_ready(directory: Path, resume: bool, notes: list[str]) -> None:
    """Find out before training whether checkpoints can be written; every rank must call this.

    Args:
        directory: folder of the run's checkpoints.
        resume: whether the run goes on from them. If not, checkpoints that are there are set aside.
        notes: receives what the user should know, one line each.

    Raises:
        TrainingError: they cannot.
    """
    error: str | None = None
    moved: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            aside = None if resume else files.set_aside(directory)
            moved = [None if aside is None else f"run.resume=false: earlier checkpoints are now in {aside}"]
            files.check_writable(directory)
        except OSError as raised:
            error = f"checkpoints cannot be written: {raised}"
    agree(error)
    dist.broadcast_object_list(moved, src=0)
    notes.extend(filter(None, moved))


def load_latest(
    directory: Path,
    trainer: Trainer,
    corpus: str,
    *,
    moba: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
    allow_moba_change: bool = False,
    notes: list[str] | None = None,
) -> Progress | None:
    """Restore the newest whole checkpoint, or return None if there is none; every rank must call this.

    Args:
        directory: folder of the run's checkpoints.
        trainer: what to restore.
        corpus: fingerprint of the training text.
        moba: settings of attention, from :func:`.model.moba_record`; None: do not compare them.
        sizes: the model and how its text is read, from :func:`.model.sizes_record`; None: do not compare them.
        allow_moba_change: report other settings in ``notes`` instead of refusing them.
        notes: receives what the user should know, one line each.

    Raises:
        TrainingError: no checkpoint is whole, or the chosen one holds another model, or was trained on other text or with other
            settings.
    """
    notes = [] if notes is None else notes
    path = _choose(directory, notes)
    if path is None:
        return None
    problem = None
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
        progress = Progress(**common["progress"])
        if progress.corpus != corpus:
            raise TrainingError(
                f"the training text has changed since {path} was saved: resuming would not continue that run"
            )
        _compare_sizes(path, common.get("sizes"), sizes, notes)
        _compare_moba(path, common.get("moba"), moba, allow_moba_change, notes)
    except TrainingError as error:
        problem = str(error)
    except (Exception, CheckpointException) as error:  # whatever unpickling damaged bytes raises
        problem = f"checkpoint {path} is damaged: what it says of the run cannot be read ({_cause(error)!r})"
    agree(problem)
    _allocate_adam_state(trainer.optimizer)
    state = {}
    try:
        state = dist_checkpointing.load(_sharded_state(trainer, is_loading=True), str(path))
    except (CheckpointingException, CheckpointException) as error:  # torch's is no Exception
        cause = _cause(error)
        is_damage = isinstance(
            cause, (pickle.UnpicklingError, EOFError, FileNotFoundError)
        ) or "metadata read failed" in str(cause)
        problem = f"checkpoint {path} {'is damaged' if is_damage else 'does not fit this model'}: {cause}"
    agree(problem)
    for number, chunk in enumerate(unwrap_model(trainer.model)):
        chunk.load_state_dict(state[f"model{number}"])
    _load_optimizer(trainer.optimizer, state["optimizer"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    return progress


def _choose(directory: Path, notes: list[str]) -> Path | None:
    """Rank 0 looks at the files, for all ranks."""
    found: list[Any] = [None, [], None]
    if dist.get_rank() == 0:
        try:
            found[:2] = files.choose(directory)
        except (OSError, ValueError) as error:
            found[2] = str(error)
    dist.broadcast_object_list(found, src=0)
    path, said, problem = found
    if problem:
        raise TrainingError(problem)
    notes.extend(said)
    return path


def _compare_sizes(path: Path, saved: dict[str, Any] | None, wanted: dict[str, Any] | None, notes: list[str]) -> None:
    """Refuse another model. Note what may change in the middle of a run, and what it changes."""
    if saved is None or wanted is None:
        return
    changes = {name: f"{name} {saved[name]} -> {wanted[name]}" for name in saved if saved[name] != wanted.get(name)}
    if sharding := changes.pop("parallel.distributed_optimizer", None):
        raise TrainingError(f"{path} holds optimizer state of another form: {sharding}; choose another run.name")
    refused = [text for name, text in changes.items() if name.startswith("model.") and name not in MAY_CHANGE]
    if refused:
        raise TrainingError(f"{path} holds another model: {', '.join(refused)}; choose another run.name")
    notes.extend(
        f"{path} was trained with {text.replace(' -> ', ', now ')}" + MAY_CHANGE.get(name, "")
        for name, text in changes.items()
    )


def _compare_moba(
    path: Path, saved: dict[str, Any] | None, wanted: dict[str, Any] | None, allowed: bool, notes: list[str]
) -> None:
    """Refuse settings that change what the weights compute; transports and the schedule do not."""
    if saved is None or wanted is None:
        return
    changes = [
        f"moba.{name} {saved[name]} -> {wanted[name]}"
        for name in ("block_size", "topk", "layers")
        if saved[name] != wanted[name]
    ]
    if not changes:
        return
    line = f"{path} was trained with other settings: {', '.join(changes)}"
    if not allowed:
        raise TrainingError(f"{line}; run.allow_moba_change=true resumes all the same")
    notes.append(line)


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Restore the optimizer, one part (no experts).

    With torch's Adam, Megatron's distributed optimizer looks for each parameter's step count among the saved tensors,
    where it is not, and afterwards all parameters share one counter, which each of them would increment.
    """
    tensors = state.pop("param_state", None)
    part = getattr(optimizer, "chained_optimizers", [optimizer])[0]
    configured = {name: part.optimizer.param_groups[0][name] for name in FROM_CONFIGURATION}
    optimizer.load_state_dict(state)
    for group in part.optimizer.param_groups:
        group.update(configured)
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
