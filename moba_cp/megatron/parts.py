"""Specs that do not see Megatron's configuration: what their layers consist of, checked against it when layers are built.

A spec that is an object, not a callable, is finished before Megatron reads its flags. ``--spec`` takes it as it is, so flags
that choose the parts of a layer (experts, normalised queries and keys, ...) would be ignored without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerParts:
    """What a finished spec has built into every layer.

    Args:
        spec: name for messages.
        qk_layernorm: queries and keys have norms with parameters.
        qk_l2_norm: queries and keys are divided by their root mean square.
        transformer_engine: linear layers are Transformer Engine's, which know fp8 and fp4.
    """

    spec: str
    qk_layernorm: bool = False
    qk_l2_norm: bool = False
    transformer_engine: bool = False


def refuse_other_parts(config: Any, parts: LayerParts, layer_number: int) -> None:
    """Raise where the configuration asks for other layers than the spec has.

    Args:
        config: Megatron's ``TransformerConfig``.
        parts: of the spec.
        layer_number: 1-based number of the layer, for the message.

    Raises:
        ValueError: names the option, its value and what to do.
    """
    built = {
        "num_moe_experts": False,
        "qk_layernorm": parts.qk_layernorm,
        "qk_l2_norm": parts.qk_l2_norm,
        "heterogeneous_block_specs": False,
        "use_kitchen": False,
    }
    if not parts.transformer_engine:
        built |= {"fp8": False, "fp4": False}
    for name, there in built.items():
        value = getattr(config, name, None)
        if bool(value) != there:
            raise ValueError(
                f"MoBA attention, layer {layer_number}: {name}={value!r}, but {parts.spec} builds layers "
                f"{'with' if there else 'without'} it and would ignore that; pass the spec of such layers to "
                "moba_cp.megatron.with_moba"
            )
