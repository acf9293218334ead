"""Packed sequences (THD) without Transformer Engine: padding, Megatron's parameters, and each rank's slice.

Sequences of 5 and 4 tokens over two ranks, padded to multiples of four (``2 * cp``)::

    packed     a b c d e - - - A B C D        cu_seqlens 0 5 9, padded 0 8 12
    rank 0     a b         - - A     D
    rank 1         c d e -       B C

Padding is never attended to, and whoever computes the loss leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from moba_cp import SequenceLayout
from moba_cp.parallel.layout_input import integer, positive

from .layout import host_integers, packed_layout


@dataclass(frozen=True)
class Packing:
    """How sequences lie in a pack; both tuples are cumulative and start at 0."""

    cu_seqlens: tuple[int, ...]
    cu_seqlens_padded: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int], cp_size: int, sequence_shards: int = 1) -> Packing:
        """Pack sequences of these lengths, each padded to a multiple of ``2 * cp_size`` (of 1 if ``cp_size`` is 1).

        Args:
            lengths: true tokens of each sequence.
            cp_size: ranks of the context-parallel group.
            sequence_shards: tensor-parallel size under sequence parallelism, which cuts each rank's tokens into that many
                equal parts; a last sequence of padding alone makes the total fit, where it does not.

        Raises:
            TypeError, ValueError: a length is no integer, or negative; another argument is no positive integer.
        """
        cp_size, sequence_shards = positive("cp_size", cp_size), positive("sequence_shards", sequence_shards)
        lengths = [integer("a length", length) for length in lengths]
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths must not be negative, got {lengths}")
        multiple = 2 * cp_size if cp_size > 1 else 1
        padded = [-(-length // multiple) * multiple for length in lengths]
        if missing := -sum(padded) % math.lcm(multiple, cp_size * sequence_shards):
            lengths, padded = [*lengths, 0], [*padded, missing]
        return cls(tuple(accumulate(lengths, initial=0)), tuple(accumulate(padded, initial=0)))

    def layout(self, cp_size: int) -> SequenceLayout:
        """Who holds which token of the padded pack: zigzag for each sequence."""
        return packed_layout(self.cu_seqlens, self.cu_seqlens_padded, cp_size)

    def parameters(self, device: torch.device) -> PackedSeqParams:
        """The pack as Megatron's ``PackedSeqParams``; its lengths are int32 on ``device``."""
        true, padded = (
            torch.tensor(c, dtype=torch.int32, device=device) for c in (self.cu_seqlens, self.cu_seqlens_padded)
        )
        longest = max((b - a for a, b in pairwise(self.cu_seqlens_padded)), default=0)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=true,
            cu_seqlens_kv=true,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def pad(self, x: torch.Tensor, fill: int | float = 0) -> torch.Tensor:
        """``[tokens, ...]`` without padding to ``[padded tokens, ...]``.

        Raises:
            ValueError: another number of tokens than the pack's, or a ``fill`` that integers cannot hold.
        """
        if isinstance(fill, float) and not (x.is_floating_point() or fill.is_integer()):
            raise ValueError(f"a tensor of {x.dtype} cannot hold fill={fill}")
        if x.size(0) != self.cu_seqlens[-1]:
            raise ValueError(f"the pack has {self.cu_seqlens[-1]} tokens, got a tensor of {tuple(x.shape)}")
        padded = x.new_full((self.cu_seqlens_padded[-1], *x.shape[1:]), fill)
        for (start, end), to in zip(pairwise(self.cu_seqlens), self.cu_seqlens_padded, strict=False):
            padded[to : to + end - start] = x[start:end]
        return padded


def slice_packed(
    x: torch.Tensor, packed: PackedSeqParams, cp_group: torch.distributed.ProcessGroup, dim: int
) -> torch.Tensor:
    """This rank's tokens of a tensor of a whole padded pack, as Megatron's own slicer (which needs TE) takes them.

    Args:
        x: any tensor with all ``cu_seqlens_q_padded[-1]`` tokens along ``dim``: ids, labels, masks, positions.
        packed: the global parameters of the pack.
        cp_group: the context-parallel group.
        dim: the dimension of the tokens.

    Raises:
        ValueError: another number of tokens, or sequences that are not padded to multiples of ``2 * cp``.
    """
    true = host_integers(packed.cu_seqlens_q)
    padded = true if packed.cu_seqlens_q_padded is None else host_integers(packed.cu_seqlens_q_padded)
    return packed_layout(true, padded, cp_group.size()).shard(x, cp_group.rank(), dim)
