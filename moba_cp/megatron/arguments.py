"""MoBA's command-line flags for Megatron scripts, and the layer spec that they describe."""

from __future__ import annotations

import argparse
import math
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from moba_cp import MoBAConfig
from moba_cp.validation import COMMS

from .layout import PACKED_PARTITIONS, PARTITIONS
from .norm import TorchNorm
from .parts import LayerParts
from .settings import BACKENDS, DEFAULT_MOBA, FULL_ATTENTION_COMMS, MoBASettings
from .swap import with_settings
from .te import require_te

_DEFAULTS = MoBASettings(DEFAULT_MOBA)
_TOO_MANY_GIB = 1 << 32
"""As bytes, 62 bits."""


def add_moba_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group ``moba`` to a parser; fits Megatron's ``pretrain(..., extra_args_provider=add_moba_arguments)``."""
    group = parser.add_argument_group("moba", "mixture of block attention")
    group.add_argument("--moba-block-size", type=int, default=_DEFAULTS.moba.block_size, help="tokens per block")
    group.add_argument(
        "--moba-topk",
        type=int,
        default=_DEFAULTS.moba.topk,
        help="blocks that a query attends to, its own included",
    )
    group.add_argument(
        "--moba-comm",
        default=_DEFAULTS.comm,
        choices=COMMS,
        help="how keys and values travel between context-parallel ranks",
    )
    group.add_argument(
        "--moba-head-parallel",
        type=int,
        default=_DEFAULTS.head_parallel,
        help="neighbouring context-parallel ranks that split heads, with a2a transports or auto; by default the first of "
        "--hierarchical-context-parallel-sizes, else the transport decides",
    )
    group.add_argument(
        "--moba-workspace-gib",
        type=float,
        default=None,
        help="GiB of memory for partial results of a layer's attention; where gradients of scores fit too, backward is faster "
        "with blocks of up to 512 tokens",
    )
    group.add_argument(
        "--moba-exchange-gib",
        type=float,
        default=None,
        help="GiB of other ranks' keys, values and gradients that ring and pull may hold, so that these travel once however many "
        "chunks of rows there are; see moba-cp plan",
    )
    group.add_argument(
        "--moba-partition",
        default=_DEFAULTS.partition,
        choices=PARTITIONS,
        help="how a sequence is cut over the context-parallel ranks; contiguous only where Megatron's configuration says "
        "the same",
    )
    group.add_argument(
        "--moba-packed-partition",
        default=_DEFAULTS.packed_partition,
        choices=PACKED_PARTITIONS,
        help="how packed sequences are cut: each by itself, or the pack as a whole (_pack); by default as Megatron does, "
        "and refused where that is not clear",
    )
    group.add_argument(
        "--moba-full-attention-last-n-layers",
        type=int,
        default=_DEFAULTS.full_attention_last_n_layers,
        help="layers at the end with full causal attention",
    )
    group.add_argument(
        "--moba-full-attention-comm",
        default=_DEFAULTS.full_attention_comm,
        choices=FULL_ATTENTION_COMMS,
        help="how keys and values travel for full causal attention",
    )
    group.add_argument(
        "--moba-full-attention-backend",
        default=_DEFAULTS.full_attention_backend,
        choices=BACKENDS,
        help="what computes full causal attention: torch's kernels, or Transformer Engine",
    )
    group.add_argument(
        "--moba-layer-freq",
        type=layer_pattern,
        default=_DEFAULTS.layer_pattern,
        help="N: every Nth layer computes MoBA, the others full attention; or a list with one entry per layer, "
        "1 for MoBA and 0 for full attention, as a Python expression: '([1]*3+[0])*4'",
    )
    return parser


def layer_pattern(text: str) -> int | tuple[int, ...]:
    """Value of ``--moba-layer-freq``: an integer, or a list of 0 and 1 written with ``[...]``, ``*``, ``+`` and brackets.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if not text or set(text) - set("0123456789[]()+*, ") or "**" in text:
        raise argparse.ArgumentTypeError(f"expected N or a list like ([1]*3+[0])*4, got {text!r}")
    try:
        pattern = eval(text, {"__builtins__": {}})  # digits, brackets, + and * only
    except (SyntaxError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise argparse.ArgumentTypeError(f"expected N or a list like ([1]*3+[0])*4, got {text!r}") from error
    if not isinstance(pattern, list) or set(pattern) - {0, 1}:
        raise argparse.ArgumentTypeError(f"expected a list of 0 and 1, got {text!r}")
    return tuple(pattern)


def settings_from_arguments(arguments: argparse.Namespace, num_layers: int | None = None) -> dict[str, Any]:
    """Keyword arguments of :func:`moba_cp.megatron.with_moba`, ``moba_config`` among them.

    Args:
        arguments: parsed flags of :func:`add_moba_arguments`.
        num_layers: layers of the model; by default ``arguments.num_layers``. Needed if the frequency is a number.

    Raises:
        ValueError: values that do not go together.
    """
    pattern = arguments.moba_layer_freq
    if isinstance(pattern, int):
        layers = num_layers if num_layers is not None else getattr(arguments, "num_layers", None)
        if layers is None:
            raise ValueError(f"--moba-layer-freq {pattern} needs the number of layers")
        if pattern > layers:
            raise ValueError(f"--moba-layer-freq {pattern} leaves none of the {layers} layers to MoBA")
        pattern = tuple(int((number + 1) % pattern == 0) for number in range(layers))
    workspace, exchange = arguments.moba_workspace_gib, arguments.moba_exchange_gib
    if workspace is not None and not 0 < workspace < math.inf:
        raise ValueError(f"--moba-workspace-gib must be above 0, got {workspace}")
    if exchange is not None and not 0 <= exchange < math.inf:
        raise ValueError(f"--moba-exchange-gib must not be negative, got {exchange}")
    for name, gib in (("workspace", workspace), ("exchange", exchange)):
        if gib is not None and gib >= _TOO_MANY_GIB:
            raise ValueError(f"--moba-{name}-gib must be below {_TOO_MANY_GIB}, got {gib}")
    optional = {
        "packed_partition": arguments.moba_packed_partition,
        "head_parallel": arguments.moba_head_parallel,
        "workspace_bytes": None if workspace is None else math.ceil(workspace * 2**30),
        "exchange_bytes": None if exchange is None else math.ceil(exchange * 2**30),
    }
    return {name: value for name, value in optional.items() if value is not None} | {
        "moba_config": MoBAConfig(arguments.moba_block_size, arguments.moba_topk),
        "comm": arguments.moba_comm,
        "partition": arguments.moba_partition,
        "full_attention_last_n_layers": arguments.moba_full_attention_last_n_layers,
        "layer_pattern": pattern,
        "full_attention_comm": arguments.moba_full_attention_comm,
        "full_attention_backend": arguments.moba_full_attention_backend,
    }


def layer_spec_from_arguments(arguments: argparse.Namespace) -> ModuleSpec:
    """Layer spec with MoBA for the flags of MoBA and those of Megatron's that decide a layer's parts.

    Reads ``transformer_impl``, ``normalization``, ``qk_layernorm``, ``qk_l2_norm``, ``num_experts`` and ``num_layers``. What
    other flags, a YAML file or a checkpoint's arguments ask for in addition is refused when the layers are built.

    Raises:
        ValueError: mixture of experts, or an implementation other than ``local`` and ``transformer_engine``.
        ImportError: ``transformer_engine`` is not installed.
    """
    if getattr(arguments, "num_experts", None):
        raise ValueError(
            f"--num-experts {arguments.num_experts}: build the spec of the experts' layers yourself and pass it to "
            "moba_cp.megatron.with_moba"
        )
    chosen = settings_from_arguments(arguments)
    settings = MoBASettings(chosen.pop("moba_config"), **chosen)
    norms = {name: bool(getattr(arguments, name, False)) for name in ("qk_layernorm", "qk_l2_norm")}
    name = "python -m moba_cp.megatron.pretrain with this version of Megatron"
    implementation = getattr(arguments, "transformer_impl", "local")
    if implementation == "transformer_engine":
        require_te("--transformer-impl transformer_engine, the default,", "--transformer-impl local")
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        spec = get_gpt_layer_with_transformer_engine_spec(**norms)
        return with_settings(spec, settings, LayerParts(name, transformer_engine=True, **norms))
    if implementation != "local":
        raise ValueError(f"--transformer-impl {implementation} is not supported, local and transformer_engine are")
    layer = get_gpt_layer_local_spec(normalization=getattr(arguments, "normalization", None) or "LayerNorm", **norms)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchNorm
    return with_settings(layer, settings, LayerParts(name, **norms))
