"""Micro-batches as a rank reads them: its samples, its tokens, whole sequences or documents kept apart."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moba_cp.megatron.layout import sbhd_layout
from moba_cp.megatron.packing import Packing

from .data import SEPARATOR, PackedText

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """This rank's tokens of a micro-batch.

    ``tokens``, ``labels`` and ``position_ids`` are ``int64 [samples, tokens of this rank]``; if documents are kept apart,
    the samples lie behind each other in one row, ``[1, tokens of this rank]``, and ``packed`` says where documents begin.
    ``counts`` is ``bool`` of the same shape: False for padding, which has no loss; None if there is none.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    counts: torch.Tensor | None = None
    packed: PackedSeqParams | None = None

    def pinned(self) -> MicroBatch:
        """The same in pinned memory, from which copies to a GPU run beside everything else."""
        return self._each(lambda x: x.pin_memory())

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``, but for the lengths in ``packed``, which stay on the host: layouts are planned there."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        names = ("tokens", "labels", "position_ids", "counts")
        return replace(self, **{name: change(x) for name in names if (x := getattr(self, name)) is not None})


@dataclass(frozen=True)
class Sharding:
    """Which part of every global batch this process reads.

    Data-parallel rank ``d`` takes samples ``d * m .. d * m + m`` of each group of ``dp_size * m``, and of those samples
    the tokens that Megatron's zigzag gives to its context-parallel rank.
    """

    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    device: torch.device
    sequence_shards: int = 1  # tensor-parallel size under sequence parallelism, which must divide a rank's tokens


def micro_batches(
    text: PackedText,
    micro_batch_size: int,
    consumed: int,
    sharding: Sharding,
    separate_documents: bool = False,
    ahead: int = 0,
) -> Generator[MicroBatch]:
    """Micro-batches of this process from sample number ``consumed`` on, without end.

    Args:
        text: the samples.
        micro_batch_size: samples of a micro-batch.
        consumed: samples that all processes together have read before.
        sharding: what of it this process reads.
        separate_documents: no token attends to another document: documents become packed sequences (THD). Otherwise a
            sample is one sequence, and attention crosses from a document into the ones before it.
        ahead: so many micro-batches are read by a thread before they are asked for; 0: each when it is asked for.
    """

    def read() -> Generator[MicroBatch]:
        make, begin = _packed if separate_documents else _unpacked, consumed
        while True:
            first = begin + sharding.dp_rank * micro_batch_size
            samples = torch.stack([text.sample(first + i) for i in range(micro_batch_size)])
            batch = make(samples, sharding)
            yield batch.pinned() if sharding.device.type == "cuda" else batch
            begin += micro_batch_size * sharding.dp_size

    with closing(read_ahead(read(), ahead) if ahead else read()) as batches:
        for batch in batches:
            yield batch.to(sharding.device)


def read_ahead(items: Iterator[T], count: int) -> Generator[T]:
    """The items, up to ``count`` of them made by a thread before they are asked for. What making one raises is raised here, in
    its turn. Closing the iterator ends the thread, and must come before the program's end: a thread in the middle of a torch
    operation while Python shuts down aborts the process."""
    made: queue.Queue[tuple[bool, Any]] = queue.Queue(count)
    closed = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not closed.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, item)):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="read ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = made.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        closed.set()
        thread.join()


def sequence_lengths(text: PackedText, first: int, count: int, separate_documents: bool) -> list[int]:
    """Tokens of each sequence of samples ``first`` to ``first + count`` within which attention happens."""
    if not separate_documents:
        return [text.seq_length] * count
    return [length for n in range(first, first + count) for length in document_lengths(text.sample(n)[None, :-1])]


def _unpacked(samples: torch.Tensor, sharding: Sharding) -> MicroBatch:
    batch, length = len(samples), samples.size(1) - 1
    # Sequences of a micro-batch are cut alike, so the indices of one do for all.
    held = sbhd_layout(length // sharding.cp_size, 1, sharding.cp_size).local_indices(sharding.cp_rank)
    tokens, labels = (samples[:, offset + held] for offset in (0, 1))
    return MicroBatch(tokens, labels, held.expand(batch, -1))


def _packed(samples: torch.Tensor, sharding: Sharding) -> MicroBatch:
    tokens, labels = samples[:, :-1], samples[:, 1:]
    lengths = document_lengths(tokens)
    packing = Packing.of(lengths, sharding.cp_size, sharding.sequence_shards)
    held = packing.layout(sharding.cp_size).local_indices(sharding.cp_rank)
    positions = torch.cat([torch.arange(length) for length in lengths])
    counts = torch.ones(tokens.numel(), dtype=torch.bool)

    def mine(x: torch.Tensor) -> torch.Tensor:
        return packing.pad(x.flatten())[held][None]

    packed = packing.parameters(torch.device("cpu"))
    return MicroBatch(mine(tokens), mine(labels), mine(positions), mine(counts), packed)


def document_lengths(tokens: torch.Tensor) -> list[int]:
    """Lengths of the documents, or parts of documents, in samples ``[samples, tokens]`` that lie behind each other."""
    ends = tokens == SEPARATOR
    ends[:, -1] = True  # a sample ends whatever document it cuts
    return ends.flatten().nonzero().flatten().diff(prepend=torch.tensor([-1])).tolist()
