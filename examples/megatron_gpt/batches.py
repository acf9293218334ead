"""Micro-batches as a rank reads them: its samples, its tokens, whole sequences or documents kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moba_cp.megatron.layout import sbhd_layout
from moba_cp.megatron.packing import Packing

from .data import SEPARATOR, PackedText


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
    text: PackedText, micro_batch_size: int, consumed: int, sharding: Sharding, separate_documents: bool = False
) -> Iterator[MicroBatch]:
    """Micro-batches of this process from sample number ``consumed`` on, without end.

    Args:
        text: the samples.
        micro_batch_size: samples of a micro-batch.
        consumed: samples that all processes together have read before.
        sharding: what of it this process reads.
        separate_documents: no token attends to another document: documents become packed sequences (THD). Otherwise a
            sample is one sequence, and attention crosses from a document into the ones before it.
    """
    make = _packed if separate_documents else _unpacked
    while True:
        first = consumed + sharding.dp_rank * micro_batch_size
        samples = torch.stack([text.sample(first + i) for i in range(micro_batch_size)])
        yield make(samples, sharding)
        consumed += micro_batch_size * sharding.dp_size


def sequence_lengths(text: PackedText, first: int, count: int, separate_documents: bool) -> list[int]:
    """Tokens of each sequence of samples ``first`` to ``first + count`` within which attention happens."""
    if not separate_documents:
        return [text.seq_length] * count
    return [length for n in range(first, first + count) for length in document_lengths(text.sample(n)[None, :-1])]


def _unpacked(samples: torch.Tensor, sharding: Sharding) -> MicroBatch:
    batch, length = len(samples), samples.size(1) - 1
    # Sequences of a micro-batch are cut alike, so the indices of one do for all.
    held = sbhd_layout(length // sharding.cp_size, 1, sharding.cp_size).local_indices(sharding.cp_rank)
    tokens, labels = (samples[:, offset + held].to(sharding.device) for offset in (0, 1))
    return MicroBatch(tokens, labels, held.expand(batch, -1).to(sharding.device))


def _packed(samples: torch.Tensor, sharding: Sharding) -> MicroBatch:
    tokens, labels = samples[:, :-1], samples[:, 1:]
    lengths = document_lengths(tokens)
    packing = Packing.of(lengths, sharding.cp_size, sharding.sequence_shards)
    held = packing.layout(sharding.cp_size).local_indices(sharding.cp_rank)
    positions = torch.cat([torch.arange(length) for length in lengths])
    counts = torch.ones(tokens.numel(), dtype=torch.bool)

    def mine(x: torch.Tensor) -> torch.Tensor:
        return packing.pad(x.flatten())[held][None].to(sharding.device)

    packed = packing.parameters(sharding.device)
    return MicroBatch(mine(tokens), mine(labels), mine(positions), mine(counts), packed)


def document_lengths(tokens: torch.Tensor) -> list[int]:
    """Lengths of the documents, or parts of documents, in samples ``[samples, tokens]`` that lie behind each other."""
    ends = tokens == SEPARATOR
    ends[:, -1] = True  # a sample ends whatever document it cuts
    return ends.flatten().nonzero().flatten().diff(prepend=torch.tensor([-1])).tolist()
