"""What a Megatron layer has to be told about MoBA, in one frozen object that travels with the layer spec."""

from __future__ import annotations

from dataclasses import dataclass

from moba_cp import MoBAConfig

PARTITIONS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class MoBASettings:
    """Settings shared by every attention layer of a model.

    Args:
        moba: block size, top-k and softmax scale.
        comm: how keys and values travel between the ranks of the context-parallel group; any value that
            ``moba_cp.moba_attention`` accepts. Megatron's own ``cp_comm_type`` overrides it for a layer where it is
            ``moba_<comm>``, for example ``--cp-comm-type moba_fetch``.
        partition: which tokens of a sequence a context-parallel rank holds. ``"zigzag"`` is Megatron's: ``2 * cp``
            chunks, rank ``r`` holds chunks ``r`` and ``2 * cp - 1 - r``, for every sequence of the micro-batch (or, if
            sequences are packed, for every padded sequence of the pack). ``"contiguous"`` is for callers who slice the
            batch and the rotary embedding that way themselves.

    Raises:
        ValueError: unknown ``partition``.
    """

    moba: MoBAConfig
    comm: str = "auto"
    partition: str = "zigzag"

    def __post_init__(self) -> None:
        if self.partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {PARTITIONS}, got {self.partition!r}")
