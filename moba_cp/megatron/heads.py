"""Two-dimensional context parallelism in Megatron's words: over how many ranks heads are split, the sequence over the others."""

from __future__ import annotations

from typing import Any

from moba_cp.dense import COMMS as FULL_ATTENTION_COMMS
from moba_cp.parallel.splits import HEADS, HYBRIDS

from .settings import MoBASettings


def resolve_head_parallel(
    config: Any, settings: MoBASettings, comm: str, cp_size: int, tp_size: int, layer_number: int
) -> int | None:
    """Ranks over which a layer splits heads, U; None where ``comm`` decides.

    Megatron's ``hierarchical_context_parallel_sizes`` is ``[U, S]``: groups of U neighbours split heads, S of them the sequence.
    Tensor parallelism comes first: what it leaves on a rank is what U divides.

    Args:
        config: the layer's configuration.
        settings: MoBA's; their ``head_parallel`` must not contradict.
        comm: the layer's transport.
        cp_size, tp_size: sizes of the context- and tensor-parallel groups.
        layer_number: for messages.

    Raises:
        ValueError: sizes that do not fit each other, the group, the heads or ``comm``.
    """
    where = f"MoBA attention, layer {layer_number}"
    size, name = settings.head_parallel, "head_parallel"
    levels = getattr(config, "hierarchical_context_parallel_sizes", None)
    splits = comm == HEADS or comm in HYBRIDS
    if levels and (splits or comm == "auto") and cp_size > 1:
        levels = [int(level) for level in levels]
        if len(levels) != 2 or levels[0] * levels[1] != cp_size or min(levels) < 1:
            raise ValueError(
                f"{where}: hierarchical_context_parallel_sizes={levels} must be [ranks that split heads, ranks that split the "
                f"sequence], with product {cp_size}, the context-parallel size"
            )
        if size is not None and size != levels[0]:
            raise ValueError(
                f"{where}: head_parallel={size} contradicts hierarchical_context_parallel_sizes={levels}; set one"
            )
        size, name = levels[0], f"hierarchical_context_parallel_sizes={levels}"
    if size is not None and not splits and comm != "auto" and size > 1:
        raise ValueError(f"{where}: comm={comm!r} does not split heads, got {name}={size}; use 'a2a+{comm}'")
    if comm == HEADS and size not in (None, cp_size):
        raise ValueError(
            f"{where}: comm={HEADS!r} splits heads over all {cp_size} ranks, but {name} says {size}; name what moves keys and "
            f"values between head groups: cp_comm_type {', '.join('moba_' + name for name in HYBRIDS)}; if comm comes from "
            f"full_attention_comm, that as {', '.join(name for name in FULL_ATTENTION_COMMS if name in HYBRIDS)}"
        )
    over = size or (cp_size if comm == HEADS else 1)
    if cp_size % over:
        raise ValueError(f"{where}: {name}={size} must divide the {cp_size} context-parallel ranks")
    heads = config.num_attention_heads // tp_size
    if heads % over:
        raise ValueError(
            f"{where}: {config.num_attention_heads} heads over {tp_size} tensor-parallel ranks leave {heads} on a rank, which "
            f"cannot be split over {over} (comm={comm!r}, {name}={size})"
        )
    return size


def full_comm_of(named: str) -> str | None:
    """Transport of a full layer for the one that ``cp_comm_type`` names; None where full attention has none like it.

    Heads are split as named. Exchanges of selected blocks have no counterpart: keys and values go round a ring then.
    """
    if named in FULL_ATTENTION_COMMS:
        return named
    return f"{HEADS}+ring" if named in HYBRIDS else None
