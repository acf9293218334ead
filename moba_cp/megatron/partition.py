"""How the batch was cut over the context-parallel ranks: stated by the caller, or refused.

A layer sees its rows and, for packs, the global lengths. Neither tells which tokens the rows are: a pack cut sequence by
sequence and one cut as a whole have the same shapes. A wrong guess gives wrong numbers without an error, so:

- One sequence per row of the batch: Megatron's zigzag. ``"contiguous"`` is computed only where Megatron's own configuration
  says the same (``cp_partition_mode``, which newer versions have), because stock Megatron slices zigzag.
- Packs: ``packed_partition`` of the settings names the cut. Without it, a pack that states padded lengths
  (``cu_seqlens_q_padded``) is cut sequence by sequence, as Megatron does it; a pack of one sequence leaves no choice; any
  other is refused.
- ``cp_partition_mode`` of the configuration or of a pack must agree with the settings.
"""

from __future__ import annotations

from typing import Any

from .layout import PARTITIONS, WHOLE_PACK
from .lengths import PackLengths
from .settings import MoBASettings

_NAME_IT = (
    "set packed_partition (--moba-packed-partition) to 'zigzag' or 'contiguous' if every sequence is cut, to 'zigzag_pack' "
    "or 'contiguous_pack' if the pack is cut as a whole"
)


def resolve_partition(config: Any, settings: MoBASettings, cp_size: int) -> str:
    """Cut of the layer's sequences, checked against what Megatron's configuration says.

    Args:
        config: the layer's ``TransformerConfig``.
        settings: MoBA's settings.
        cp_size: ranks of the layer's context-parallel group.

    Raises:
        ValueError: the two disagree, or a contiguous cut that the configuration does not confirm.
    """
    stated = getattr(config, "cp_partition_mode", None)
    if stated is not None and stated != settings.partition:
        raise ValueError(
            f"cp_partition_mode={stated!r} in Megatron's configuration, but MoBA's is {settings.partition!r}: set "
            f"partition (--moba-partition) to {stated!r}"
        )
    if settings.partition == "contiguous" and stated is None and max(cp_size, config.context_parallel_size) > 1:
        raise ValueError(
            "partition='contiguous' (--moba-partition contiguous): this Megatron slices batches and rotary embeddings "
            "zigzag, so tokens would see their future. Leave it out; or, if your program slices both contiguously, say so "
            "in Megatron's configuration: config.cp_partition_mode = 'contiguous'"
        )
    return settings.partition


def is_packed(packed: Any) -> bool:
    """Whether the rows of a call are packed sequences.

    Args:
        packed: Megatron's ``PackedSeqParams``, or None.

    Raises:
        TypeError: neither of them.
        ValueError: lengths with another format than ``"thd"``, which MoBA would have to ignore.
    """
    if packed is not None and not hasattr(packed, "qkv_format"):
        raise TypeError(f"packed_seq_params must be PackedSeqParams or None, got {type(packed).__name__}")
    if packed is None or packed.qkv_format == "thd":
        return packed is not None
    if packed.cu_seqlens_q is not None:
        raise ValueError(
            f"packed_seq_params has cu_seqlens_q with qkv_format={packed.qkv_format!r}: only 'thd' is supported"
        )
    return False


def resolve_packed_partition(named: str | None, partition: str, packed: Any, lengths: PackLengths) -> str:
    """Cut of one pack over more than one rank.

    Args:
        named: ``packed_partition`` of the settings.
        partition: cut of sequences that are not packed, from :func:`resolve_partition`.
        packed: Megatron's ``PackedSeqParams``.
        lengths: what it says on the host.

    Returns:
        One of :data:`moba_cp.megatron.layout.PACKED_PARTITIONS`.

    Raises:
        ValueError: the cut is not named, or what is named disagrees with ``packed.cp_partition_mode``.
    """
    mode = getattr(packed, "cp_partition_mode", None)
    if mode is not None and mode not in PARTITIONS:
        raise ValueError(f"packed_seq_params.cp_partition_mode={mode!r} is not supported, only {PARTITIONS} are")
    rule = partition if named is None else named.removesuffix(WHOLE_PACK)
    if mode is not None and mode != rule:
        raise ValueError(
            f"packed_seq_params.cp_partition_mode={mode!r}, but MoBA's settings say partition={partition!r} and "
            f"packed_partition={named!r}: {_NAME_IT}"
        )
    if named is not None:
        return named
    if rule == "contiguous":
        raise ValueError(f"a contiguous pack of {lengths.sequences} sequence(s), partition={partition!r}: {_NAME_IT}")
    by_megatron = lengths.padded is not None and getattr(packed, "local_cp_size", None) is None
    if lengths.sequences > 1 and not by_megatron:
        raise ValueError(
            f"packed_seq_params has {lengths.sequences} sequences, and nothing says whether each of them is cut over the "
            f"context-parallel ranks or the pack as a whole (as by --dataloader-inter-document-masking): {_NAME_IT}"
        )
    return "zigzag"
