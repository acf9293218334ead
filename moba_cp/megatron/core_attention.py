"""Megatron-Core's core attention, computed as MoBA over the layer's context-parallel group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.dense import causal_attention
from moba_cp.validation import COMMS, RefusedTogether

from .heads import full_comm_of, resolve_head_parallel
from .layout import sbhd_layout
from .lengths import pack_lengths
from .partition import is_packed, resolve_packed_partition, resolve_partition
from .parts import LayerParts, refuse_other_parts
from .record import megatron_arguments, packs_of_flags, record_settings
from .settings import COMM_PREFIX, MoBASettings
from .te import build_te_attention
from .unsupported import refuse_dynamic_batching, refuse_extra, refuse_flags, refuse_unsupported


class MoBACoreAttention(MegatronModule):
    """Drop-in for ``DotProductAttention`` or ``TEDotProductAttention`` in a self-attention spec.

    Layers that the settings choose compute full causal attention instead, over the same group and layout, or with
    Transformer Engine's attention.

    It has no parameters and no buffers, so checkpoints do not know whether it is there, and it keeps nothing between
    calls that depends on a rank or a group size. Rotary embedding and any key normalisation happen before it.

    With ``full_attention_backend="te"`` every layer holds Megatron's ``TEDotProductAttention``, MoBA layers too, so that a
    switched layer computes what a full one does; until it is called it costs nothing but its construction. It is no
    submodule: ``TEDotProductAttention`` has no parameters and adds nothing to sharded checkpoints either, and the empty
    ``_extra_state`` that it would add to a plain ``state_dict()`` would set MoBA checkpoints apart from dense ones.

    Args:
        config: the layer's configuration; options that MoBA attention cannot honour are refused here.
        layer_number: 1-based, counted over all pipeline stages.
        attn_mask_type: causal only.
        attention_type: ``"self"`` only.
        settings: MoBA's own settings; put there by :func:`moba_cp.megatron.with_moba`.
        attention_dropout: must be None or 0.
        softmax_scale: scale of the logits; None means the one of ``settings.moba``, by default ``d ** -0.5``.
        cp_comm_type: ``"moba_<comm>"`` chooses the transport of this layer; None and Megatron's default ``"p2p"``
            leave it to the settings. Full attention takes it too (:func:`moba_cp.megatron.heads.full_comm_of`), unless
            ``settings.full_attention_comm`` says another; of transports that bring selected blocks only it knows none and
            decides by size. A full layer of Transformer Engine's takes Transformer Engine's own values.
        pg_collection: process groups of the layer; ``cp`` is used. None takes Megatron's global ones.
        parts: what the rest of the layer consists of, where a spec was made without knowing the configuration.

    Raises:
        ValueError: an option that is not supported, with what to do about it.
        TypeError: an unknown keyword argument that carries a value.
        ImportError: ``full_attention_backend="te"`` without Transformer Engine.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        settings: MoBASettings,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        parts: LayerParts | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(config=config)
        refuse_unsupported(config, layer_number, attn_mask_type, attention_type)
        refuse_dynamic_batching()
        if parts is not None:
            refuse_other_parts(config, parts, layer_number)
        refuse_extra(f"MoBA attention, layer {layer_number}", extra)
        if attention_dropout:
            raise ValueError(f"MoBA attention, layer {layer_number}: attention_dropout={attention_dropout} must be 0")
        self.layer_number = layer_number
        self.partition, self.packed_partition = settings.partition, settings.packed_partition
        self.moba = _with_scale(settings.moba, softmax_scale)
        self._built_for_moba = settings.computes_moba(layer_number, config.num_layers)
        always_te = settings.full_attention_backend == "te" and not self._built_for_moba
        ours = None if always_te else cp_comm_type  # else it may be one of Transformer Engine's values
        self.comm = _resolve_comm(settings, ours)
        self.full_comm = _resolve_full_comm(settings, ours)
        self._te: tuple[torch.nn.Module, ...] = ()  # a tuple, so that it is no submodule
        if settings.full_attention_backend == "te":
            self._te = (
                build_te_attention(
                    config,
                    layer_number,
                    settings,
                    cp_comm_type,
                    attn_mask_type=attn_mask_type,
                    attention_type=attention_type,
                    attention_dropout=attention_dropout,
                    softmax_scale=self.moba.softmax_scale,
                    pg_collection=pg_collection,
                ),
            )
        self._attn_mask_type = attn_mask_type
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
        self.cp_group: torch.distributed.ProcessGroup = pg_collection.cp
        self._settings = settings
        cp_size = self.cp_group.size()
        tp_size = config.tensor_model_parallel_size
        # Of a group of another size, which dynamic context parallelism may choose, the transport decides.
        self._heads_over = resolve_head_parallel(config, settings, self.comm, cp_size, tp_size, layer_number)
        full = self.full_comm if "a2a" in self.full_comm or self.full_comm == "auto" else None
        self._full_heads_over = (
            None if full is None else resolve_head_parallel(config, settings, full, cp_size, tp_size, layer_number)
        )
        resolve_partition(config, settings, self.cp_group.size())
        if (arguments := megatron_arguments()) is not None:
            refuse_flags(arguments, config.context_parallel_size)
            if self.packed_partition is None:
                self.packed_partition = packs_of_flags(arguments)
            record_settings(arguments, settings, config.num_layers, self.moba.softmax_scale)
        self.full_attention = False  # see moba_cp.megatron.schedule
        self.report_to: Callable[..., None] | None = None  # see moba_cp.megatron.reports

    @torch.compiler.disable  # layouts are planned on the host, from values: one graph break around the whole layer
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **extra: Any,
    ) -> torch.Tensor:
        """Attention output of this rank's tokens.

        Args:
            query: ``[s / cp, b, heads, d]``, or packed ``[t / cp, heads, d]``.
            key, value: the same with ``kv heads`` (not repeated) in place of ``heads``.
            attention_mask: must be None, since the causal mask is implied.
            attn_mask_type: None or causal.
            attention_bias: must be None.
            packed_seq_params: cumulative lengths of packed sequences (``qkv_format="thd"``), and the group of this
                micro-batch under dynamic context parallelism.

        Returns:
            ``[s / cp, b, heads * d]``, or packed ``[t / cp, heads * d]``, in the dtype of ``query``.

        Raises:
            ValueError: tensors or lengths that do not fit together, a mask, or a bias; on every rank of the group, but with
                Transformer Engine's attention.
            TypeError: an unknown keyword argument that carries a value; on the same ranks.
        """
        group, cp_size = self._group(packed_seq_params, query, key, value)
        asked = (query, key, value, attention_mask, attn_mask_type, attention_bias, extra)
        if self._te and not self.computes_moba:
            packed = packed_seq_params if is_packed(packed_seq_params) else None
            self._check_call(*asked)
            if packed is not None and cp_size > 1:
                self._packed_layout(packed, query.size(0), cp_size)  # refuses a cut that is not named
            mask_type = self._attn_mask_type if attn_mask_type is None else attn_mask_type
            (te,) = self._te
            return te(query, key, value, None, attn_mask_type=mask_type, packed_seq_params=packed_seq_params)
        with nullcontext() if group is None else RefusedTogether(None, group, query, key, value):
            packed = packed_seq_params if is_packed(packed_seq_params) else None
            self._check_call(*asked)
            layout = self._layout(query, packed, cp_size)
        if packed is not None:
            return self._attend(query, key, value, layout, group).flatten(1)
        length, batch = query.shape[:2]
        if batch == 1:
            q_thd, k_thd, v_thd = query.squeeze(1), key.squeeze(1), value.squeeze(1)
            return self._attend(q_thd, k_thd, v_thd, layout, group).flatten(1).unsqueeze(1)
        # Sequence by sequence, one copy.
        q_thd, k_thd, v_thd = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
        out_thd = self._attend(q_thd, k_thd, v_thd, layout, group)
        return out_thd.flatten(1).unflatten(0, (batch, length)).transpose(0, 1)

    @property
    def computes_moba(self) -> bool:
        """False for a layer that computes full causal attention, by the settings or because it was switched."""
        return self._built_for_moba and not self.full_attention

    def train(self, mode: bool = True) -> MoBACoreAttention:
        """Also for Transformer Engine's attention, which is no submodule."""
        for te in self._te:
            te.train(mode)
        return super().train(mode)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing: there is no state, so checkpoints of dense and of MoBA models are the same."""
        return {}

    def _attend(
        self,
        q_thd: torch.Tensor,
        k_thd: torch.Tensor,
        v_thd: torch.Tensor,
        layout: SequenceLayout,
        group: torch.distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        same_size = layout.cp_size == self.cp_group.size()
        if not self.computes_moba:
            return causal_attention(
                q_thd,
                k_thd,
                v_thd,
                self.moba.softmax_scale,
                layout=layout,
                group=group,
                comm=self.full_comm,
                head_parallel=self._full_heads_over if same_size else None,
            )
        options: dict[str, Any] = {
            "layout": layout,
            "group": group,
            "comm": self.comm,
            "head_parallel": self._heads_over if same_size else None,
        }
        budgets = {name: getattr(self._settings, name) for name in ("workspace_bytes", "exchange_bytes")}
        options |= {name: value for name, value in budgets.items() if value is not None}
        if self.report_to is None:
            return moba_attention(q_thd, k_thd, v_thd, self.moba, **options)
        out_thd, report = moba_attention(q_thd, k_thd, v_thd, self.moba, return_report=True, **options)
        self.report_to(self, report, layout, group)
        return out_thd

    def _group(
        self, packed: PackedSeqParams | None, *tensors: torch.Tensor
    ) -> tuple[torch.distributed.ProcessGroup | None, int]:
        """Context-parallel group of this call and its size. Dynamic context parallelism chooses it per micro-batch.

        Raises:
            ValueError: the pack contradicts it; on every rank of the group.
        """
        local_size = getattr(packed, "local_cp_size", None)
        if local_size is None:
            size = self.cp_group.size()
            return (self.cp_group, size) if size > 1 else (None, 1)
        group = getattr(packed, "cp_group", None)
        size = 1 if group is None else group.size()
        with nullcontext() if size == 1 else RefusedTogether(None, group, *tensors):
            if size != local_size:
                raise ValueError(f"packed_seq_params.local_cp_size={local_size}, but its cp_group has {size} rank(s)")
            resolve_partition(self.config, self._settings, size)  # it may be larger than the layer's own
        return (group, size) if size > 1 else (None, 1)

    def _layout(self, query: torch.Tensor, packed: PackedSeqParams | None, cp_size: int) -> SequenceLayout:
        if packed is not None:
            return self._packed_layout(packed, query.size(0), cp_size)
        if query.dim() != 4:
            raise ValueError(f"query must be [s / cp, b, heads, d] without packing, got {tuple(query.shape)}")
        length, batch = query.shape[:2]
        return sbhd_layout(length, batch, cp_size, self.partition)

    def _packed_layout(self, packed: PackedSeqParams, local_tokens: int, cp_size: int) -> SequenceLayout:
        lengths = pack_lengths(packed, self.layer_number, self.training)
        if lengths.total != local_tokens * cp_size:
            raise ValueError(
                f"packed sequences end at token {lengths.total}, but {cp_size} rank(s) hold {local_tokens} tokens each"
            )
        partition = self.partition
        if cp_size > 1:
            partition = resolve_packed_partition(self.packed_partition, partition, packed, lengths)
        return lengths.layout(cp_size, partition)

    def _check_call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None,
        attention_bias: torch.Tensor | None,
        extra: dict[str, Any],
    ) -> None:
        where = f"MoBA attention, layer {self.layer_number}"
        refuse_extra(where, extra)
        for name, x in (("query", query), ("key", key), ("value", value)):
            if not isinstance(x, torch.Tensor) or x.dim() not in (3, 4):
                got = f"{tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise TypeError(
                    f"{where}: {name} must be a tensor [s / cp, b, heads, d] or [t / cp, heads, d], got {got}"
                )
        if query.size(0) != key.size(0):
            raise ValueError(
                f"{where}: {query.size(0)} queries but {key.size(0)} keys; inference with a key-value cache is "
                "not supported"
            )
        if attn_mask_type not in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(f"{where}: attn_mask_type={attn_mask_type} is not supported, only causal is")
        if attention_bias is not None:
            raise ValueError(f"{where}: attention_bias is not supported")
        if attention_mask is not None:
            raise ValueError(
                f"{where}: got an attention_mask of shape {tuple(attention_mask.shape)}; the causal mask is implied and "
                "others are not supported: pass None (--no-create-attention-mask-in-dataloader)"
            )


def _with_scale(moba: MoBAConfig, softmax_scale: float | None) -> MoBAConfig:
    if softmax_scale is None:
        return moba
    if moba.softmax_scale is not None and not math.isclose(moba.softmax_scale, softmax_scale, rel_tol=1e-6):
        raise ValueError(
            f"softmax_scale={softmax_scale} from Megatron differs from MoBAConfig's {moba.softmax_scale}: set one"
        )
    return dataclasses.replace(moba, softmax_scale=softmax_scale)


def _resolve_comm(settings: MoBASettings, cp_comm_type: str | None) -> str:
    if cp_comm_type is None or cp_comm_type == "p2p":  # "p2p" is what Megatron says when nobody chose
        return settings.comm
    if not cp_comm_type.startswith(COMM_PREFIX):
        raise ValueError(
            f"cp_comm_type={cp_comm_type!r} belongs to Transformer Engine's attention; for MoBA write "
            "moba_<comm>, for example moba_fetch or moba_all_gather"
        )
    comm = cp_comm_type.removeprefix(COMM_PREFIX)
    if comm not in COMMS:
        known = ", ".join(COMM_PREFIX + name for name in COMMS)
        raise ValueError(f"cp_comm_type={cp_comm_type!r} names no transport; there are {known}")
    return comm


def _resolve_full_comm(settings: MoBASettings, cp_comm_type: str | None) -> str:
    """Of a full layer, or of one that is switched."""
    named = (cp_comm_type or "").removeprefix(COMM_PREFIX)
    named = full_comm_of(named) or "auto"
    return named if settings.full_attention_comm == "auto" else settings.full_attention_comm
