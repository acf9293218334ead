"""Which rank holds which tokens of the packed sequence, and in what order.

A layout is host data only. Tokens are numbered over all packed documents; each rank holds a list of runs `[start, end)` of
token numbers. Two ranks, one document of 16 tokens::

    contiguous            rank 0: [0, 8)              rank 1: [8, 16)
    zigzag (4 chunks)     rank 0: [0, 4) [12, 16)     rank 1: [4, 8) [8, 12)

Contiguous and zigzag layouts are kept as a rule (`moba_cp.parallel.partition`), so that a rank plans for itself without listing
what the others hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .balance import balanced_runs
from .layout_input import check_cover, check_cp_size, host_cu_seqlens, host_runs, integer, positive
from .outside_graphs import untraced
from .partition import Kind, Partition, as_tensor, chunked, describe, expand_runs, merge_adjacent, partition_of

_SHOWN_RANKS = 8
"""`repr` of a layout shows the token counts of at most this many ranks."""


class SequenceLayout:
    """Tokens of packed documents spread over the ranks of a context-parallel group.

    Make one with `contiguous`, `zigzag`, `balanced` or `from_runs`. Immutable and hashable. Layouts are equal if every rank holds
    the same tokens of the same documents in the same order, however they were made.

    Attributes:
        cu_seqlens: `(0, end of document 0, end of document 1, ...)`; documents may be empty.
        cp_size: number of ranks.
        partition: which rank holds which tokens, as a rule or as lists of runs.
        description: all of it as one read-only int64 array, see `from_description`.
        described: the same memory as a tensor, for graphs. torch has no read-only tensors: do not write to it.

    Example:
        >>> layout = SequenceLayout.zigzag([0, 5, 12], cp_size=2)   # each document is cut into 4 chunks
        >>> layout.local_indices(0).tolist()
        [0, 3, 4, 5, 10, 11]
        >>> layout.local_indices(1).tolist()
        [1, 2, 6, 7, 8, 9]
    """

    partition: Partition
    description: np.ndarray
    described: Tensor
    _ends: int
    _local_tokens: dict[int, int]

    def __init__(self, cu_seqlens: np.ndarray, partition: Partition) -> None:
        description = describe(cu_seqlens, partition)
        self._hold(partition=partition, description=description, _ends=cu_seqlens.size, _local_tokens={})

    def _hold(self, **fields: Any) -> None:
        vars(self).update(fields, described=as_tensor(fields["description"]))
        self.description.flags.writeable = False

    @classmethod
    def contiguous(cls, cu_seqlens: Iterable[int] | Tensor, cp_size: int) -> SequenceLayout:
        """Rank r holds tokens `[r * T // P, (r + 1) * T // P)`.

        Args:
            cu_seqlens: host ints (list, tuple or CPU tensor): 0 and the end of each document.
            cp_size: number of ranks, at least 1.

        Raises:
            TypeError, ValueError: an argument is not as described; the message carries its value.
        """
        cu = host_cu_seqlens(cu_seqlens)
        return cls(cu, chunked(cu, check_cp_size(cp_size), mirrored=False, per_document=False))

    @classmethod
    def zigzag(cls, cu_seqlens: Iterable[int] | Tensor, cp_size: int, per_document: bool = True) -> SequenceLayout:
        """2P chunks; rank r holds chunks r and 2P - 1 - r, in that order (Megatron's layout).

        Args:
            cu_seqlens: host ints: 0 and the end of each document.
            cp_size: number of ranks, at least 1.
            per_document: cut each document into 2P chunks (chunk c of a document of L tokens is
                `[c * L // 2P, (c + 1) * L // 2P)`); False cuts the whole packed sequence instead.

        Raises:
            TypeError, ValueError: an argument is not as described; the message carries its value.
        """
        if not isinstance(per_document, bool):
            raise TypeError(f"per_document must be True or False, got {per_document!r}")
        cu = host_cu_seqlens(cu_seqlens)
        return cls(cu, chunked(cu, check_cp_size(cp_size), mirrored=True, per_document=per_document))

    @classmethod
    def balanced(cls, cu_seqlens: Iterable[int] | Tensor, cp_size: int, block_size: int, topk: int) -> SequenceLayout:
        """Equal attention and scoring work on every rank, and equal numbers of tokens, for callers who slice themselves.

        A rank holds up to two runs of each document, near its start and near its end. `zigzag` gives equal tokens only: at
        (4096, 12) and 256K tokens, one of two ranks then attends to a fifth more keys than the other. Splitting heads
        (`comm="a2a"`) balances every layout, and needs this one for the sequence ranks only.

        Args:
            cu_seqlens: host ints: 0 and the end of each document.
            cp_size: number of ranks, at least 1.
            block_size, topk: of the attention that will run, at least 1. Other values still give a right layout.

        Raises:
            TypeError, ValueError: an argument is not as said; the message carries its value.
        """
        cu, size = host_cu_seqlens(cu_seqlens), check_cp_size(cp_size)
        block_size, topk = (positive(name, x) for name, x in (("block_size", block_size), ("topk", topk)))
        return cls(cu, partition_of(balanced_runs(cu, size, block_size, topk), cu))

    @classmethod
    def from_runs(
        cls, runs: Sequence[Sequence[tuple[int, int]] | np.ndarray], cu_seqlens: Iterable[int] | Tensor
    ) -> SequenceLayout:
        """Any layout: for each rank its runs `(start, end)` of token numbers, in the order it holds them.

        Args:
            runs: one list per rank, of pairs or an integer array `[n, 2]`; a rank may hold nothing. Together they hold each
                token exactly once.
            cu_seqlens: host ints: 0 and the end of each document.

        Raises:
            TypeError, ValueError: an argument is not as described; the message carries its value.
        """
        if isinstance(runs, (str, bytes)) or not isinstance(runs, Sequence):
            raise TypeError(f"runs must be a list with one list of (start, end) for each rank, got {runs!r}")
        if len(runs) < 1:
            raise ValueError("runs must have one list for each rank, got none")
        cu = host_cu_seqlens(cu_seqlens)
        merged = [merge_adjacent(host_runs(rank, r)) for rank, r in enumerate(runs)]
        check_cover(merged, int(cu[-1]))
        return cls(cu, partition_of(merged, cu))

    @classmethod
    def from_description(cls, description: np.ndarray) -> SequenceLayout:
        """The layout with this `description`.

        Raises:
            TypeError, ValueError: it is no layout's.
        """
        if not isinstance(description, np.ndarray) or description.dtype != np.int64 or description.ndim != 1:
            raise TypeError(f"description must be a one-dimensional int64 array, got {description!r}")
        if description.size < 2:
            raise ValueError(f"no layout has the description {description.tolist()}")
        size, kind = divmod(int(description[0]), len(Kind))
        rest = description[1:]
        match kind:
            case Kind.CONTIGUOUS:
                return cls.contiguous(rest.tolist(), size)
            case Kind.ZIGZAG | Kind.ZIGZAG_PER_DOCUMENT:
                return cls.zigzag(rest.tolist(), size, per_document=kind == Kind.ZIGZAG_PER_DOCUMENT)
            case Kind.LISTED:
                counts = rest[:size]
                if (
                    size < 1
                    or counts.size < size
                    or counts.min() < 0
                    or counts.max() > rest.size
                    or 2 * counts.sum() > rest.size - size
                ):
                    raise ValueError(f"no layout has the description {description.tolist()}")
                flat, cu = np.split(rest[size:], [2 * int(counts.sum())])
                return cls.from_runs(np.split(flat.reshape(-1, 2), np.cumsum(counts)[:-1]), cu.tolist())
        raise ValueError(f"no layout has a description that begins with {description[0]}")

    @cached_property
    def runs(self) -> tuple[np.ndarray, ...]:
        """For each rank a read-only int64 array `[n, 2]` of `[start, end)` token numbers, in the rank's own order.

        Lists what every rank holds; `runs_of` does it for one.
        """
        return tuple(self.runs_of(rank) for rank in range(self.cp_size))

    def runs_of(self, rank: int) -> np.ndarray:
        """The runs of one rank: a read-only int64 array `[n, 2]`.

        Raises:
            TypeError, ValueError: there is no such rank.
        """
        runs = self.partition.runs(self._check_rank(rank))
        runs.flags.writeable = False
        return runs

    @property
    def cp_size(self) -> int:
        """Ranks of the group."""
        return self.partition.size

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Boundaries of the documents, in tokens: 0, then where each of them ends."""
        return tuple(self.cu_seqlens_array.tolist())

    @property
    def cu_seqlens_array(self) -> np.ndarray:
        """`cu_seqlens` as a read-only int64 array."""
        return self.description[-self._ends :]  # kept once; there is always one

    @property
    def total_tokens(self) -> int:
        """Tokens of all ranks."""
        return int(self.cu_seqlens_array[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of host memory, without `runs` of a layout kept as a rule."""
        return self.description.nbytes + self.partition.nbytes

    def local_tokens(self, rank: int) -> int:
        """Number of tokens that `rank` holds.

        Raises:
            TypeError, ValueError: there is no such rank.
        """
        rank = self._check_rank(rank)
        if rank not in self._local_tokens:
            runs = self.partition.runs(rank)
            self._local_tokens[rank] = int((runs[:, 1] - runs[:, 0]).sum())
        return self._local_tokens[rank]

    @cached_property
    def all_local_tokens(self) -> tuple[int, ...]:
        """Number of tokens that each rank holds."""
        return tuple(self.partition.tokens().tolist())

    @cached_property
    def most_local_tokens(self) -> int:
        """The most tokens that any rank holds."""
        return max(self.all_local_tokens)

    @untraced
    def local_indices(self, rank: int) -> Tensor:
        """Global token numbers that `rank` holds, in its own order: int64 `[local tokens]`, on the host.

        Raises:
            TypeError, ValueError: there is no such rank.
        """
        return torch.from_numpy(expand_runs(self.runs_of(rank)))

    @untraced
    def shard(self, x: Tensor, rank: int, dim: int = 0) -> Tensor:
        """The tokens of `rank` out of a global tensor of any dtype, which has `total_tokens` along `dim`: a copy on its device,
        `local_tokens(rank)` along `dim`, in the order that the rank holds them.

        Raises:
            TypeError: `x` is no tensor, or `rank` or `dim` no int.
            ValueError: `x` does not have `total_tokens` entries along `dim`, or there is no such rank.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        dim = integer("dim", dim)
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.total_tokens:
            raise ValueError(f"x must have {self.total_tokens} tokens along dim {dim}, got shape {tuple(x.shape)}")
        return x.index_select(dim, self.local_indices(rank).to(x.device))

    @untraced
    def unshard(self, parts: Sequence[Tensor], dim: int = 0) -> Tensor:
        """The global tensor out of every rank's tokens: the inverse of `shard`.

        Raises:
            TypeError: `parts` is no list of tensors of one dtype.
            ValueError: there is not one part for each rank, a part has another number of tokens than its rank holds, or parts
                differ in other dimensions or in their device.
        """
        if not isinstance(parts, Sequence) or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"parts must be a list with the tensor of each rank, got {parts!r}")
        dim = integer("dim", dim)
        if len(parts) != self.cp_size:
            raise ValueError(f"parts must have one tensor for each of {self.cp_size} ranks, got {len(parts)}")
        for rank, part in enumerate(parts):
            if not -part.dim() <= dim < part.dim() or part.shape[dim] != self.local_tokens(rank):
                raise ValueError(
                    f"the part of rank {rank} must have {self.local_tokens(rank)} tokens along dim {dim}, "
                    f"got shape {tuple(part.shape)}"
                )
            if part.dtype != parts[0].dtype:
                raise TypeError(
                    f"parts must have one dtype, got {parts[0].dtype} of rank 0, {part.dtype} of rank {rank}"
                )
            if _others(part, dim) != _others(parts[0], dim):
                raise ValueError(
                    f"parts must agree in all but dim {dim} and lie on one device, got {tuple(parts[0].shape)} on "
                    f"{parts[0].device} of rank 0, {tuple(part.shape)} on {part.device} of rank {rank}"
                )
        order = torch.cat([self.local_indices(rank) for rank in range(self.cp_size)])
        whole = torch.cat(list(parts), dim)
        return whole.index_select(dim, torch.argsort(order).to(whole.device))

    def _check_rank(self, rank: int) -> int:
        rank = integer("rank", rank)
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank must be in [0, {self.cp_size}), got {rank}")
        return rank

    @cached_property
    def digest(self) -> bytes:
        """16 bytes: equal for equal layouts on every rank, different for different ones."""
        h = hashlib.blake2b(digest_size=16)
        h.update(np.int64(self.cu_seqlens_array.size).tobytes() + self.cu_seqlens_array.tobytes() + self.partition.key)
        return h.digest()

    @cached_property
    def mark(self) -> Tensor:
        """A tensor without elements, whose shape is that of no other layout but by a chance of 1 in 2^31. Activation
        checkpointing compares the shapes of what a call saves for backward with those of the call that it repeats."""
        return as_tensor(np.empty((0, int.from_bytes(self.digest[:4], "little") >> 1), np.int8))

    def __getstate__(self) -> dict[str, object]:
        """Without tensors: pickled, they would be second copies, and between processes file descriptors."""
        return {name: value for name, value in self.__dict__.items() if name not in ("described", "mark")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copied, as it may be read-only: `copy.copy` and pickle's protocol 5 share it.
        self._hold(**state | {"description": state["description"].copy()})

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a SequenceLayout is immutable, got {name} = {value!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a SequenceLayout is immutable, got del {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SequenceLayout) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        """Equal for equal layouts. Error messages show it where ranks disagree."""
        shown = [str(self.local_tokens(rank)) for rank in range(min(self.cp_size, _SHOWN_RANKS))]
        more = f", ... on {self.cp_size} ranks" if self.cp_size > _SHOWN_RANKS else ""
        documents = len(self.cu_seqlens_array) - 1
        return f"SequenceLayout({documents} documents, {self.total_tokens} tokens, held [{', '.join(shown)}{more}])"


def _others(x: Tensor, dim: int) -> tuple[object, ...]:
    shape = list(x.shape)
    del shape[dim]
    return *shape, x.device
