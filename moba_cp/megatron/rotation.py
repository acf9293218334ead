"""Cosine and sine of the rotary embedding of a micro-batch, made once and used by every layer."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .fused import rotation_table
from .lengths import PackLengths, peek_lengths

Table = tuple[Tensor, Tensor]
_of_angles = WeakIdKeyDictionary()
"""By tensor of angles: its ``_version``, and the table by dtype. Megatron makes angles once per length and changes them never."""
_of_packs = WeakIdKeyDictionary()
"""By pack: the lengths and the angles for which a table was made, and the table."""


def rotation_of(
    freqs: Tensor | None,
    packed: PackedSeqParams | None,
    layer_number: int,
    cp_group: torch.distributed.ProcessGroup,
    dtype: torch.dtype,
    cut: str | None,
) -> Table | None:
    """Table of :func:`moba_cp.megatron.fused.split_rotate` for this rank's tokens; None without angles.

    Args:
        freqs: Megatron's angles ``[s, 1, 1, d]``: of this rank's tokens, or for packs of a whole sequence.
        packed: parameters of packed sequences, or None.
        layer_number: of the layer that asks.
        cp_group: the context-parallel group.
        dtype: of queries and keys.
        cut: how packs are cut, if the settings say so.

    Raises:
        ValueError: packs are cut otherwise than zigzag, each sequence by itself.
    """
    if freqs is None:
        return None
    whole = _table(freqs, dtype)
    if packed is None:
        return whole
    group = group_of(packed, cp_group)
    if cut not in (None, "zigzag") and group is not None and group.size() > 1:
        raise ValueError(
            f"long layers rotate packs of which each sequence is cut zigzag, got packed_partition={cut!r}: use Megatron's "
            "layers, whose rotary embedding your program replaces, or no rotary embedding"
        )
    lengths = peek_lengths(packed, layer_number)
    made = _of_packs.get(packed)
    if made is None or made[0] is not lengths or made[1] is not whole:
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        places = torch.from_numpy(positions(lengths, size, rank))
        if freqs.is_cuda:
            places = places.pin_memory().to(freqs.device, non_blocking=True)
        cos, sin = whole
        made = _of_packs[packed] = (lengths, whole, (cos[places], sin[places]))
    return made[2]


def group_of(
    packed: PackedSeqParams | None, cp_group: torch.distributed.ProcessGroup
) -> torch.distributed.ProcessGroup | None:
    """The context-parallel group of a micro-batch: under dynamic context parallelism that of its pack."""
    return getattr(packed, "cp_group", None) if getattr(packed, "local_cp_size", None) is not None else cp_group


def positions(lengths: PackLengths, cp_size: int, cp_rank: int) -> np.ndarray:
    """Position of each of a rank's tokens in its sequence, int64, where every padded sequence is cut zigzag."""
    cumulative = np.asarray(lengths.true if lengths.padded is None else lengths.padded, dtype=np.int64)
    parts = [np.zeros(0, dtype=np.int64)]
    for length in np.diff(cumulative).tolist():
        if cp_size == 1:
            parts.append(np.arange(length))
            continue
        chunk = length // (2 * cp_size)
        numbers = (cp_rank, 2 * cp_size - 1 - cp_rank)
        parts += [np.arange(number * chunk, (number + 1) * chunk) for number in numbers]
    return np.concatenate(parts)


def _table(freqs: Tensor, dtype: torch.dtype) -> Table:
    version = 0 if freqs.is_inference() else freqs._version
    known = _of_angles.get(freqs)
    if known is None or known[0] != version:
        known = _of_angles[freqs] = (version, {})
    wide = dtype == torch.float64
    if wide not in known[1]:
        known[1][wide] = rotation_table(freqs, dtype)
    table: Table = known[1][wide]
    return table
