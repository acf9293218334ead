"""Process group, device and Megatron's parallel groups for one process of a run started by torchrun."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from moba_cp.megatron.cpu import use_cpu_as_cuda

from .config import TrainConfig

PROGRAM = "examples/megatron_gpt/train.py"
RESERVED_BYTES = int(2.5 * (1 << 30))
"""Memory that torch leaves to NCCL, to buffers that ranks share, and to the CUDA context, where there are several ranks."""

LOCAL_SETTINGS = ("data.paths", "run.directory")
"""Settings that hosts may have each for itself. The text itself is compared, see `Corpus.fingerprint`."""


class TrainingError(ValueError):
    """The run cannot go on. Raised on every rank with the same message, which the program prints once."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands."""

    device: torch.device
    groups: ProcessGroupCollection

    @property
    def dp_rank(self) -> int:
        """Rank among the processes that read different samples."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Processes that read different samples."""
        return self.groups.dp.size()

    @property
    def cp_rank(self) -> int:
        """Rank among the processes that share each sequence."""
        return self.groups.cp.rank()

    @property
    def tp_rank(self) -> int:
        """Rank among the processes that share each layer's weights."""
        return self.groups.tp.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def is_reporter(self) -> bool:
        """The one process that prints and writes metrics; it is in the last pipeline stage, which knows the loss."""
        return dist.get_rank() == dist.get_world_size() - 1


def start(config: TrainConfig) -> Ranks:
    """Join the other processes, choose the device and build Megatron's groups.

    GPUs with NCCL where there are any, else the CPU with gloo and :func:`moba_cp.megatron.cpu.use_cpu_as_cuda`.

    Raises:
        RuntimeError: not started by torchrun, no GPU where one was asked for, or more processes than GPUs.
        ValueError: sizes that do not fit the number of processes, or other settings on another rank.
    """
    if "LOCAL_RANK" not in os.environ:
        raise RuntimeError(f"start this with torchrun: torchrun --nproc-per-node N {PROGRAM} configs/NAME.yaml")
    # Megatron demands it below compute capability 10, so that overlapped collectives start before the next kernel. The
    # driver reads it when CUDA is first asked for anything.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Long sequences free and ask for blocks of many sizes; without this, a third of the memory may lie idle between them.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    timeout = timedelta(seconds=config.run.timeout_seconds)
    device = _choose_device(config.run.device, int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu":
        if config.run.cuda_graphs:
            raise ValueError("run.cuda_graphs=true needs a GPU, and there is none")
        use_cpu_as_cuda()
        dist.init_process_group("gloo", timeout=timeout)
    else:
        torch.cuda.set_device(device)
        if dist_size() > 1:  # what torch took, NCCL and shared buffers could not have
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(1 - RESERVED_BYTES / total, device)
        # Without device_id: with it, all of Megatron's groups, dozens, would open NCCL communicators now; most are never
        # used.
        dist.init_process_group("nccl", timeout=timeout)
    sections = asdict(config)
    settings = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    try:
        agree_on({name: value for name, value in settings.items() if name not in LOCAL_SETTINGS})
        _check_sizes(config, dist.get_world_size())
    except ValueError:  # on every rank
        dist.destroy_process_group()
        raise
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        virtual_pipeline_model_parallel_size=config.parallel.model_chunks,
        context_parallel_size=config.parallel.context,
        distributed_timeout_minutes=config.run.timeout_seconds / 60,  # Megatron's groups have their own
    )
    seed(config.run.seed)
    return Ranks(device, ProcessGroupCollection.use_mpu_process_groups())


def seed(number: int) -> None:
    """Seed torch and Megatron's generators, from which weights are drawn: models built after equal seeds start alike."""
    torch.manual_seed(number)
    tensor_parallel.model_parallel_cuda_manual_seed(number)


def dist_size() -> int:
    """Processes of the run, before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def stop() -> None:
    """Leave the groups; the last thing a process does when all do."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def end_alone(error: str) -> NoReturn:
    """Print the error of this rank alone, and end its process.

    NCCL's groups stay: leaving them waits for ranks that wait for this one. gloo's do not wait, and a process that ends while its
    threads run may be aborted.
    """
    print(f"error: rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)  # first: others may fail as it leaves
    if dist.get_backend() == "gloo":
        stop()
    sys.exit(1)


def largest(value: int, device: torch.device) -> int:
    """The largest ``value`` of any rank; every rank must call this."""
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def agree(error: str | None) -> None:
    """Pass if no rank brings an error; every rank must call this.

    Raises:
        TrainingError: the first error by rank, on every rank.
    """
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for first in filter(None, errors):
        raise TrainingError(first)


def agree_on(values: dict[str, Any]) -> None:
    """Pass if all ranks bring the same values by name; every rank must call this.

    Raises:
        TrainingError: they do not; with the first name and the values of two ranks, on every rank.
    """
    found: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, values)
    for name, first in found[0].items():
        for rank, other in enumerate(found):
            if other[name] != first:
                raise TrainingError(f"ranks have different {name}: rank 0 has {first}, rank {rank} has {other[name]}")


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that torch has held at once on a GPU since the run started, over all ranks; None on CPU. Every rank must
    call this."""
    if device.type == "cpu":
        return None
    return largest(torch.cuda.max_memory_allocated(device), device)


def _choose_device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise RuntimeError(
            f"process {local_rank} of this machine has no GPU: {count} visible; start fewer processes, or hide the "
            'GPUs with CUDA_VISIBLE_DEVICES="" to run on CPU'
        )
    return torch.device("cuda", local_rank)


def _check_sizes(config: TrainConfig, world_size: int) -> None:
    parallel, run = config.parallel, config.run
    model_size = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % model_size:
        raise ValueError(
            f"{world_size} process(es) cannot be divided into groups of tensor={parallel.tensor} x "
            f"context={parallel.context} x pipeline={parallel.pipeline}"
        )
    if run.cuda_graphs and world_size > 1:
        raise ValueError(f"run.cuda_graphs=true is for one process, got {world_size}")
    per_step, what = run.micro_batch_size * (world_size // model_size), "micro_batch_size x data-parallel size"
    if parallel.virtual_pipeline > 1:  # the interleaved schedule runs micro-batches in groups of one a stage
        per_step, what = per_step * parallel.pipeline, f"{what} x parallel.pipeline (for virtual_pipeline > 1)"
    if run.global_batch_size % per_step:
        raise ValueError(f"run.global_batch_size={run.global_batch_size} must be a multiple of {what} = {per_step}")
