"""Whether a run fits its GPUs: said before it starts, and where memory ran out, with what to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from moba_cp.config import DEFAULT_WORKSPACE_BYTES
from moba_cp.training_memory import GIB, TrainingShape, training_peak

from .config import TrainConfig, uses_long_layers
from .data import PADDED_VOCAB_SIZE
from .distributed import Ranks, TrainingError

TOLERANCE = 0.1
"""How far estimates may be from what a run takes."""

_OUT_OF_MEMORY = re.compile(
    r"out of memory|cuda calloc|cudamalloc|cudahostalloc|cublas_status_(alloc_failed|not_initialized)|unhandled cuda error",
    re.IGNORECASE,
)
"""How torch, cuBLAS, NCCL and the driver (symmetric memory) say that they got none: NCCL mostly as "unhandled cuda error"."""


class OutOfMemoryError(RuntimeError):
    """A GPU had no memory left; ``stage`` says in what."""

    def __init__(self, stage: str, cause: str) -> None:
        super().__init__(f"out of GPU memory in {stage}: {cause}")
        self.stage = stage


@contextmanager
def doing(stage: str) -> Iterator[None]:
    """Name what runs inside, for an `OutOfMemoryError` in place of the errors that torch, NCCL and the driver raise."""
    try:
        yield
    except RuntimeError as error:  # torch.cuda.OutOfMemoryError and torch.distributed.DistBackendError are of these
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(stage, _first_line(error)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a GPU has no memory left."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def check(config: TrainConfig, ranks: Ranks) -> str:
    """Compare the estimated peak with the GPU's memory; a warning if it is close, else nothing. Every rank finds the same.

    Raises:
        TrainingError: the run will not fit; the message holds the parts and what to change.
    """
    if ranks.device.type != "cuda" or not config.run.check_memory:
        return ""
    return judge(config, ranks.dp_size, torch.cuda.get_device_properties(ranks.device).total_memory)


def judge(config: TrainConfig, data: int, total: int) -> str:
    """The same for GPUs with ``total`` bytes and so many data-parallel replicas."""
    peak = training_peak(shape_of(config, data))
    if peak.device <= total:
        return ""
    text = (
        f"estimated peak of {peak.device / GIB:.1f} GiB, the GPU has {total / GIB:.1f} GiB\n{peak.table()}\n"
        f"{advice(config, data)}"
    )
    if peak.device > (1 + TOLERANCE) * total:
        raise TrainingError(f"the run will not fit: {text}\nrun.check_memory=false starts it all the same")
    return f"the run may not fit: {text}"


def explain(error: OutOfMemoryError, config: TrainConfig, ranks: Ranks) -> str:
    """What a user needs to know: where, how much was held by whom, the estimate, and what to change."""
    free, total = torch.cuda.mem_get_info(ranks.device)
    held, reserved = torch.cuda.memory_allocated(ranks.device), torch.cuda.memory_reserved(ranks.device)
    peak = training_peak(shape_of(config, ranks.dp_size))
    return (
        f"{error}\n"
        f"  of {total / GIB:.1f} GiB: torch's tensors {held / GIB:.1f} (at most "
        f"{torch.cuda.max_memory_allocated(ranks.device) / GIB:.1f}), torch's unused blocks {(reserved - held) / GIB:.1f}, "
        f"others (NCCL, shared buffers, CUDA) {(total - free - reserved) / GIB:.1f}, free {free / GIB:.1f}\n"
        f"estimate:\n{peak.table()}\n{advice(config, ranks.dp_size)}"
    )


def advice(config: TrainConfig, data: int) -> str:
    """Settings that lower the estimated peak, with the estimate for each."""
    shape, run = shape_of(config, data), config.run
    now = training_peak(shape).device
    kept = replace(shape, long_layers=True, recompute="all_but_attention")
    chunks = replace(kept, chunk_tokens=16384)
    choices: list[tuple[str, TrainingShape]] = [
        ("run.recompute=all_but_attention", kept),
        ("the same and run.chunk_tokens=16384", chunks),
        (
            "the same, run.loss_chunk=16384 and run.offload_inputs=true",
            replace(chunks, loss_chunk=16384, offload=True),
        ),
        (
            f"parallel.context={2 * shape.context}",
            replace(shape, context=2 * shape.context, tokens=-(-shape.tokens // 2)),
        ),
    ]
    if run.recompute == "all_but_attention":
        choices.append(("run.recompute=full", replace(shape, recompute="full", offload=False)))
    if run.micro_batch_size > 1:
        smaller = replace(shape, tokens=-(-shape.tokens // run.micro_batch_size))
        choices.append(("run.micro_batch_size=1", smaller))
    lines = [
        f"  {name}: {estimate / GIB:.1f} GiB"
        for name, changed in choices
        if (estimate := training_peak(changed).device) < 0.97 * now
    ]
    return "what would help, with the estimated peak:\n" + "\n".join(lines) if lines else "more GPUs are needed"


def shape_of(config: TrainConfig, data: int) -> TrainingShape:
    """Sizes of a configuration, with so many data-parallel replicas."""
    model, parallel, run = config.model, config.parallel, config.run
    micro_batches = run.global_batch_size // max(1, run.micro_batch_size * data)
    return TrainingShape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_heads=model.num_query_groups,
        head_dim=model.hidden_size // model.num_attention_heads,
        ffn=model.ffn_hidden_size,
        vocab=PADDED_VOCAB_SIZE,
        tokens=run.micro_batch_size * config.data.seq_length // parallel.context,
        topk=config.moba.topk,
        gated=model.swiglu,
        tied=model.tie_embeddings,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context,
        data=data,
        sequence_parallel=parallel.sequence,
        distributed_optimizer=parallel.distributed_optimizer,
        bf16=run.precision == "bf16",
        recompute=run.recompute,
        long_layers=uses_long_layers(config),
        chunk_tokens=run.chunk_tokens * run.micro_batch_size,
        loss_chunk=run.loss_chunk * run.micro_batch_size,
        offload=run.offload_inputs,
        head_parallel=parallel.context if config.moba.comm == "a2a" else max(1, config.moba.head_parallel),
        in_flight=max(1, min(parallel.pipeline, micro_batches)),
        workspace_bytes=config.moba.workspace_bytes or DEFAULT_WORKSPACE_BYTES,
        block_size=config.moba.block_size,
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if _OUT_OF_MEMORY.search(line)), lines[0] if lines else type(error).__name__)
