"""What a Megatron layer has to be told about MoBA, in one frozen object that travels with the layer spec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moba_cp import MoBAConfig
from moba_cp.dense import COMMS as FULL_ATTENTION_COMMS
from moba_cp.parallel.layout_input import integer
from moba_cp.validation import COMMS, check_config, check_integer

from .layout import PACKED_PARTITIONS, PARTITIONS

DEFAULT_MOBA = MoBAConfig(block_size=512, topk=8)
"""Default of the flags and of the ready specs."""
COMM_PREFIX = "moba_"
"""Prefix of a ``cp_comm_type`` that names one of our transports."""
BACKENDS = ("torch", "te")
"""What may compute full attention: our own over torch's kernels, or Transformer Engine."""


@dataclass(frozen=True)
class MoBASettings:
    """Settings shared by every attention layer of a model.

    Args:
        moba: block size, top-k and softmax scale.
        comm: how keys and values travel between the ranks of the context-parallel group; any value that
            ``moba_cp.moba_attention`` accepts. Megatron's own ``cp_comm_type`` overrides it for a layer where it is
            ``moba_<comm>``, for example ``--cp-comm-type moba_fetch``.
        partition: how a sequence is cut over the context-parallel ranks. ``"zigzag"`` is Megatron's: ``2 * cp`` chunks,
            rank ``r`` holds chunks ``r`` and ``2 * cp - 1 - r``. ``"contiguous"`` is for programs that slice the batch
            and the rotary embedding that way, and say so in ``config.cp_partition_mode``.
        packed_partition: how packed sequences (``qkv_format="thd"``) are cut. ``"zigzag"`` and ``"contiguous"`` cut
            every padded sequence of the pack, ``"zigzag_pack"`` and ``"contiguous_pack"`` the pack as if it were one
            sequence. None: as Megatron does where the pack shows it; other packs are refused
            (:mod:`moba_cp.megatron.partition`).
        full_attention_last_n_layers: this many layers at the end compute full causal attention (the published
            one-million-token setting: 3).
        layer_pattern: instead, one entry per layer: 1 for MoBA, 0 for full causal attention. Layers are counted over all
            pipeline stages.
        full_attention_comm: how keys and values travel for full causal attention: ``"ring"``, ``"all_gather"``, ``"a2a"``,
            ``"a2a+ring"``, ``"a2a+all_gather"``, or ``"auto"``, which decides by size.
        full_attention_backend: what computes full causal attention: ``"torch"``, or ``"te"`` for Transformer Engine.
        head_parallel: neighbouring context-parallel ranks that split heads, with ``"a2a..."`` or ``"auto"``.
            None: what Megatron's ``hierarchical_context_parallel_sizes`` says (:mod:`moba_cp.megatron.heads`), else the
            transport decides.
        workspace_bytes, exchange_bytes: as for ``moba_cp.moba_attention``, whose defaults None stands for.

    Raises:
        TypeError: ``moba`` is no ``MoBAConfig``, or a number no integer.
        ValueError: an unknown name, or a choice of layers that makes no sense.
    """

    moba: MoBAConfig
    comm: str = "auto"
    partition: str = "zigzag"
    packed_partition: str | None = None
    full_attention_last_n_layers: int = 0
    layer_pattern: tuple[int, ...] | None = None
    full_attention_comm: str = "auto"
    full_attention_backend: str = "torch"
    head_parallel: int | None = None
    workspace_bytes: int | None = None
    exchange_bytes: int | None = None

    def __post_init__(self) -> None:
        check_config(self.moba)
        if integer("full_attention_last_n_layers", self.full_attention_last_n_layers) < 0:
            raise ValueError(f"full_attention_last_n_layers must not be negative: {self.full_attention_last_n_layers}")
        if self.layer_pattern is not None:
            if not isinstance(self.layer_pattern, Iterable):
                raise TypeError(f"layer_pattern must be a sequence of 1 and 0, got {self.layer_pattern!r}")
            object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
            if self.full_attention_last_n_layers:
                raise ValueError("give full_attention_last_n_layers or layer_pattern, not both")
            if set(self.layer_pattern) - {0, 1}:
                raise ValueError(f"layer_pattern must hold 1 (MoBA) and 0 (full), got {list(self.layer_pattern)}")
        for name, known in (
            ("comm", COMMS),
            ("partition", PARTITIONS),
            ("full_attention_comm", FULL_ATTENTION_COMMS),
            ("full_attention_backend", BACKENDS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, got {getattr(self, name)!r}")
        if self.head_parallel is not None and integer("head_parallel", self.head_parallel) < 1:
            raise ValueError(f"head_parallel must be None or at least 1, got {self.head_parallel}")
        if self.workspace_bytes is not None:
            check_integer("workspace_bytes", self.workspace_bytes, least=1)
        if self.exchange_bytes is not None:
            check_integer("exchange_bytes", self.exchange_bytes, least=0)
        if self.packed_partition is not None and self.packed_partition not in PACKED_PARTITIONS:
            raise ValueError(
                f"packed_partition must be None or one of {PACKED_PARTITIONS}, got {self.packed_partition!r}"
            )
        if self.full_attention_backend == "te" and self.full_attention_comm != "auto":
            raise ValueError(
                f"full_attention_comm={self.full_attention_comm!r} is for full_attention_backend='torch'; Transformer "
                "Engine's own transport is chosen by cp_comm_type"
            )

    def computes_moba(self, layer_number: int, num_layers: int) -> bool:
        """Whether a layer computes MoBA.

        Args:
            layer_number: from 1, over all pipeline stages.
            num_layers: layers of the whole model.

        Raises:
            ValueError: the settings name another number of layers than there are.
        """
        if self.layer_pattern is not None:
            if len(self.layer_pattern) != num_layers:
                raise ValueError(f"layer_pattern has {len(self.layer_pattern)} entries, the model {num_layers} layers")
            return self.layer_pattern[layer_number - 1] == 1
        if self.full_attention_last_n_layers > num_layers:
            raise ValueError(
                f"full_attention_last_n_layers={self.full_attention_last_n_layers}, the model has {num_layers} layers"
            )
        return layer_number <= num_layers - self.full_attention_last_n_layers
