"""A Megatron transformer layer for long sequences: one pass over memory between matrices, and recomputation without attention.

It has the parameters of Megatron's layer under their names, so checkpoints do not know it. Use it through
:func:`with_long_layers`, on a spec of the local implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from moba_cp.parallel.layout_input import integer
from moba_cp.validation import RefusedTogether

from . import fused
from .direct import DirectBefore, DirectBehind, Feed, Projection, feed, project
from .offload import host_inputs
from .partition import is_packed
from .recompute import Before, Behind, OnDevice, Source
from .rotation import group_of, rotation_of
from .swap import Spec, Swap


@dataclass(frozen=True)
class LongLayerSettings:
    """How a :class:`LongLayer` spends memory.

    Args:
        recompute: keep the layer's input, attention's output, log-sum-exps and selected blocks between forward and backward, and
            compute the rest again. Attention is computed once. False: keep everything.
        chunk_tokens: sequence positions (of this rank's part of the residual stream) that the projection behind attention and the
            MLP work on at a time, in both directions; 0 for all at once.
        offload: keep the layer's input in pinned host memory; needs ``recompute``.

    Raises:
        TypeError: a value of another type.
        ValueError: a negative number of tokens, or ``offload`` without ``recompute``.
    """

    recompute: bool = False
    chunk_tokens: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        for name in ("recompute", "offload"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if integer("chunk_tokens", self.chunk_tokens) < 0:
            raise ValueError(f"chunk_tokens must not be negative (0: all at once), got {self.chunk_tokens}")
        if self.offload and not self.recompute:
            raise ValueError("offload=True needs recompute=True: only the inputs of layers go to the host")


def with_long_layers(spec: Spec, settings: LongLayerSettings) -> Spec:
    """Copy of a spec of the local implementation in which every transformer layer is a :class:`LongLayer`.

    Raises:
        TypeError: ``settings`` are no :class:`LongLayerSettings`.
        ValueError: there is no transformer layer in the spec, or its layers are long already.

    Example::

        spec = with_moba(get_gpt_layer_local_spec(normalization="RMSNorm"), MoBAConfig(512, 8))
        spec = with_long_layers(spec, LongLayerSettings(recompute=True))
    """
    if not isinstance(settings, LongLayerSettings):
        raise TypeError(f"settings must be LongLayerSettings, got {settings!r}")
    found = 0

    def replaced(node: Any) -> Any:
        nonlocal found
        if isinstance(node, ModuleSpec) and node.module is LongLayer:
            raise ValueError("the layers of the spec are long layers already: with_long_layers takes a spec once")
        if isinstance(node, ModuleSpec) and node.module is TransformerLayer:
            found += 1
            return dataclasses.replace(node, module=LongLayer, params=dict(node.params or {}) | {"settings": settings})
        return None

    copied = replaced(spec)
    if copied is None:
        swap = Swap(lambda name, value: replaced(value))
        copied = swap.copy(spec)
        if not found and isinstance(getattr(copied, "layer_specs", None), list):
            copied.layer_specs = [replaced(layer) or layer for layer in copied.layer_specs]
    if not found:
        raise ValueError(f"no TransformerLayer found in {type(spec).__name__}: is it a layer or block spec?")
    return copied


class LongLayer(TransformerLayer):
    """Megatron's layer, computed as its name says above.

    Args:
        config, submodules, ...: as Megatron's layer takes them.
        settings: how it spends memory.

    Raises:
        ValueError: an option or a submodule that it cannot honour, with what to do about it.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any, *args: Any, settings: LongLayerSettings, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.settings = settings
        _refuse(self)
        self.gated = config.gated_linear_unit
        self._silu = config.activation_func in (F.silu, torch.nn.functional.silu)
        self._one_rank = self.tp_group.size() == 1 and not config.sequence_parallel

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **extra: Any,
    ) -> tuple[Tensor, None]:
        """Output of the layer and no context, as Megatron's layer.

        Args:
            hidden_states: ``[s / cp, b, h]`` (with sequence parallelism ``s / cp / tp`` rows).
            attention_mask: None, since the causal mask is implied.
            rotary_pos_emb: angles, ``[s / cp, 1, 1, d]``, for packed sequences those of the longest whole sequence; or None.
            packed_seq_params: for packed sequences.
            extra: other arguments of Megatron's layer; must be None or False.

        Raises:
            ValueError: an argument that is not supported carries a value.
        """
        given = {name for name, value in extra.items() if value is not None and value is not False}
        if given:
            raise ValueError(f"LongLayer {self.layer_number} does not support {', '.join(sorted(given))}")
        cut = getattr(self.self_attention.core_attention, "packed_partition", None)
        with RefusedTogether(None, group_of(packed_seq_params, self.pg_collection.cp), hidden_states):
            packed = packed_seq_params if is_packed(packed_seq_params) else None
            table = rotation_of(
                rotary_pos_emb, packed, self.layer_number, self.pg_collection.cp, hidden_states.dtype, cut
            )
        attend = partial(self._attend, attention_mask, packed)
        direct = self._written_out(table, hidden_states)
        if not (self.settings.recompute and torch.is_grad_enabled()):
            return self._kept(hidden_states, table, attend, direct), None
        source: Source = OnDevice(hidden_states)
        if self.settings.offload:
            source = host_inputs(hidden_states.device).put(hidden_states, self.layer_number)
        attention = self.self_attention
        if direct is not None:
            segment: Before = DirectBefore(direct[0], source)
            parameters = list(direct[0].parameters)
        else:
            segment = Before(partial(self._before, table), source)
            parameters = _parameters(self.input_layernorm, attention.linear_qkv, *self._qk_norms())
        q, k, v = segment.run(hidden_states, parameters)
        with segment.saving():
            out = attend(q, k, v)
        del q, k, v
        if direct is not None:
            return DirectBehind(direct[1], self.settings.chunk_tokens).run(source, hidden_states, out), None
        inside = [attention.linear_proj] if self._projects_in_chunks else []
        parameters = _parameters(*inside, self.pre_mlp_layernorm, self.mlp.linear_fc1)
        return self._behind().run(source, hidden_states, self._projected(out), parameters), None

    def _kept(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor] | None,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        direct: tuple[Projection, Feed] | None,
    ) -> Tensor:
        """The layer's output where nothing is computed again."""
        if direct is None:
            return self._behind().output(x, self._projected(attend(*self._before(table, x))))
        out = attend(*project(direct[0], x))
        chunk = self.settings.chunk_tokens
        if not 0 < chunk < len(x):
            return feed(direct[1], x, out)
        if torch.is_grad_enabled():
            return self._behind().output(x, out)
        return DirectBehind(direct[1], chunk).output(x, out)

    def _written_out(self, table: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Projection, Feed] | None:
        """The segments of :mod:`.direct`; None where they do not compute what the layer's modules would."""
        attention, mlp = self.self_attention, self.mlp
        linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        first, second = self.input_layernorm, self.pre_mlp_layernorm
        if not (
            self._one_rank
            and self.gated
            and self._silu
            and not any(self._qk_norms())
            and isinstance(first, torch.nn.RMSNorm)
            and isinstance(second, torch.nn.RMSNorm)
            and not self.config.gradient_accumulation_fusion
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(x.device.type)
            and {type(linear) for linear in linears} <= _LINEAR
            and _as_built(*linears, first, second)
        ):
            return None
        assert first.eps is not None
        assert second.eps is not None
        dim = attention.hidden_size_per_attention_head
        before = Projection(
            first.weight, first.eps, linears[0].weight, attention.num_query_groups_per_partition, dim, table
        )
        return before, Feed(linears[1].weight, second.weight, second.eps, linears[2].weight, linears[3].weight)

    def _before(self, table: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the layer's input, rotated."""
        attention = self.self_attention
        x = _norm(self.input_layernorm, x)
        groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        if not any(self._qk_norms()):
            return fused.split_rotate(attention.linear_qkv(x)[0], groups, dim, table)
        q, k, v = attention.get_query_key_value_tensors(x)
        return (q, k, v) if table is None else (fused.rotate(q, *table), fused.rotate(k, *table), v)

    def _attend(
        self, attention_mask: Tensor | None, packed: PackedSeqParams | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Attention's output ``[s / cp, b, heads * d]``."""
        attention = self.self_attention
        if packed is not None:
            q, k, v = (x.squeeze(1) for x in (q, k, v))
        out: Tensor = attention.core_attention(
            q,
            k,
            v,
            attention_mask,
            attn_mask_type=attention.attn_mask_type,
            attention_bias=None,
            packed_seq_params=packed,
        )
        return out.unsqueeze(1) if packed is not None else out

    @property
    def _projects_in_chunks(self) -> bool:
        """Whether the projection behind attention is part of the chunks. With sequence parallelism its output's rows are spread
        over the ranks of the group, so a chunk of its input is no chunk of its output."""
        return not self.config.sequence_parallel

    def _projected(self, out: Tensor) -> Tensor:
        """What the chunks take: attention's output, or its projection."""
        return out if self._projects_in_chunks else self.self_attention.linear_proj(out)[0]

    def _behind(self) -> Behind:
        batch_rows = self.settings.chunk_tokens
        last = _parameters(self.mlp.linear_fc2)
        # Where nothing is communicated behind the last matrix, its sum with the residual is part of the product.
        if self._one_rank and _as_built(self.mlp.linear_fc2):
            return Behind(self._body, self._finish_directly, self._finish_backward, last, batch_rows)
        return Behind(self._body, self._finish, None, last, batch_rows)

    def _body(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Residual behind attention, and the input of the MLP's last matrix."""
        projected = self.self_attention.linear_proj(out)[0] if self._projects_in_chunks else out
        norm = self.pre_mlp_layernorm
        if isinstance(norm, torch.nn.RMSNorm):
            assert norm.weight is not None
            assert norm.eps is not None
            residual, normed = fused.add_rms_norm(x, projected, norm.weight, norm.eps)
        else:
            residual = x + projected
            normed = norm(residual)
        hidden = self.mlp.linear_fc1(normed)[0]
        if not self.gated:
            return residual, self.config.activation_func(hidden)
        if self._silu:
            return residual, fused.swiglu(hidden)
        gate, up = hidden.chunk(2, -1)
        return residual, self.config.activation_func(gate) * up

    def _finish(self, residual: Tensor, hidden: Tensor) -> Tensor:
        return residual + self.mlp.linear_fc2(hidden)[0]

    def _finish_directly(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """The same with one rounding; in the residual's memory where no graph is recorded."""
        flat, weight = residual.flatten(0, 1), self.mlp.linear_fc2.weight
        if torch.is_grad_enabled():
            return torch.addmm(flat, hidden.flatten(0, 1), weight.t()).view_as(residual)
        flat.addmm_(hidden.flatten(0, 1), weight.t())
        return residual

    def _finish_backward(self, hidden: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        flat, weight = dy.flatten(0, 1), self.mlp.linear_fc2.weight
        dhidden = torch.mm(flat, weight).view_as(hidden)
        return dy, dhidden, [torch.mm(flat.t(), hidden.flatten(0, 1))]

    def _qk_norms(self) -> list[torch.nn.Module]:
        norms = (self.self_attention.q_layernorm, self.self_attention.k_layernorm)
        return [norm for norm in norms if norm is not None and not isinstance(norm, IdentityOp)]


_LINEAR = {ColumnParallelLinear, RowParallelLinear}


def _as_built(*modules: torch.nn.Module) -> bool:
    """Whether calling the modules does nothing but their forward functions: no hooks (adapters, gathering of parameters), nothing
    in place of forward; and their weights are parameters that get gradients, and their only ones."""
    for module in modules:
        found = module.__dict__
        if (
            found["_forward_pre_hooks"]
            or found["_forward_hooks"]
            or found["_backward_pre_hooks"]
            or found["_backward_hooks"]
            or "forward" in found
        ):
            return False
        parameters = found["_parameters"]
        weight = parameters.get("weight")
        if weight is None or not weight.requires_grad or parameters.get("bias") is not None:
            return False
    return True


def _norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, torch.nn.RMSNorm):
        assert module.weight is not None
        assert module.eps is not None
        return fused.rms_norm(x, module.weight, module.eps)
    normed: Tensor = module(x)
    return normed


def _parameters(*modules: torch.nn.Module) -> list[Tensor]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


# (config attribute, values under which it is off, what to do)
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("num_moe_experts", (None,), "experts are not supported"),
    ("add_bias_linear", (False,), "set add_bias_linear=False (--disable-bias-linear)"),
    ("hidden_dropout", (0, 0.0), "set hidden_dropout=0 (--hidden-dropout 0)"),
    ("rotary_interleaved", (None, False), "only rotary embedding of halves is supported"),
    ("mrope_section", (None,), "multimodal rotary embedding is not supported"),
    ("yarn_rotary_scaling_factor", (None,), "YaRN is not supported"),
    ("no_rope_freq", (None, 0), "every layer or none has rotary embedding"),
    ("attention_output_gate", (None, False), "gated attention is not supported"),
    ("activation_func_clamp_value", (None,), "clamped activations are not supported"),
    ("glu_linear_offset", (None, 0, 0.0), "an offset of the linear half is not supported"),
    ("apply_residual_connection_post_layernorm", (None, False), "only residuals in front of norms are supported"),
    ("fp8", (None, False), "fp8 is not supported"),
    ("fp4", (None, False), "fp4 is not supported"),
    ("fp32_residual_connection", (None, False), "the residual has the dtype of the layer"),
    ("cpu_offloading", (None, False), "use LongLayerSettings(offload=True)"),
    ("fine_grained_activation_offloading", (None, False), "use LongLayerSettings(offload=True)"),
)


def _refuse(layer: LongLayer) -> None:
    """Raise for what the layer would leave out."""
    config, where = layer.config, f"LongLayer {layer.layer_number}"
    for name, off, advice in _REFUSED:
        value = getattr(config, name, None)
        if not any(value is allowed or value == allowed for allowed in off):
            raise ValueError(f"{where}: {name}={value!r} is not supported; {advice}")
    granularity = config.recompute_granularity
    if granularity == "selective" or (granularity and layer.settings.recompute):
        raise ValueError(
            f"{where}: recompute_granularity={granularity!r} is not supported; leave it out and use "
            "LongLayerSettings(recompute=True), or use 'full' with recompute=False"
        )
    attention = layer.self_attention
    if attention.num_query_groups_per_partition * layer.tp_group.size() != config.num_query_groups:
        raise ValueError(
            f"{where}: {config.num_query_groups} kv heads must be a multiple of the tensor-parallel size "
            f"{layer.tp_group.size()}"
        )
    if type(layer.mlp) is not MLP or not isinstance(layer.cross_attention, IdentityOp):
        raise ValueError(f"{where}: the layer must be self-attention and a dense MLP, got {type(layer.mlp).__name__}")
    for module in (attention.linear_qkv, attention.linear_proj, layer.mlp.linear_fc1, layer.mlp.linear_fc2):
        if not type(module).__module__.startswith("megatron.core.tensor_parallel"):
            raise ValueError(
                f"{where}: {type(module).__name__} is not of the local implementation; Transformer Engine's layers have their "
                "own fusions"
            )
