"""Layer specs: swap the core attention of any Megatron-Core spec for MoBA, and leave everything else as it is.

Megatron-LM's own scripts take a spec by name, ``--spec MODULE NAME``, and no settings with it. ``moba_layer_spec`` and
``moba_spec`` are ready to use; for other settings put a module of your own on ``PYTHONPATH``::

    # my_specs.py, for --spec my_specs long_context
    from moba_cp import MoBAConfig
    from moba_cp.megatron import moba_spec_builder

    long_context = moba_spec_builder(MoBAConfig(block_size=4096, topk=12), full_attention_last_n_layers=3)
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from moba_cp import MoBAConfig

from .builders import SpecBuilder, moba_spec, moba_spec_builder
from .parts import LayerParts
from .settings import DEFAULT_MOBA, MoBASettings
from .swap import Spec, with_settings

__all__ = ["SpecBuilder", "moba_layer_spec", "moba_spec", "moba_spec_builder", "with_moba"]


def with_moba(spec: Spec, moba_config: MoBAConfig, **settings: Any) -> Spec:
    """Copy of a spec in which every self-attention computes MoBA; the spec that was passed in stays as it was.

    Args:
        spec: a layer spec, a ``TransformerBlockSubmodules`` or any other spec that contains layers, built for the local
            implementation or for Transformer Engine.
        moba_config: block size, top-k and softmax scale.
        **settings: the other fields of :class:`moba_cp.megatron.MoBASettings` (``comm``,
            ``partition``, ``packed_partition``, ``full_attention_last_n_layers``, ``layer_pattern``,
            ``full_attention_comm``, ``full_attention_backend``, ``head_parallel``, ``workspace_bytes``, ``exchange_bytes``).

    Returns:
        A spec of the same kind. Parameter names and checkpoints do not change.

    Raises:
        ValueError: there is no core attention in the spec.

    Example::

        spec = with_moba(get_gpt_layer_local_spec(), MoBAConfig(block_size=512, topk=8), comm="fetch")
        model = GPTModel(config, spec, ...)
    """
    return with_settings(spec, MoBASettings(moba_config, **settings))


#: For ``--spec moba_cp.megatron moba_layer_spec``: local implementation, the flags' defaults. A model that asks for layers
#: with other parts is refused.
moba_layer_spec = with_settings(get_gpt_layer_local_spec(), MoBASettings(DEFAULT_MOBA), LayerParts("moba_layer_spec"))
