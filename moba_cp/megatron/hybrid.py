"""Specs for Megatron-LM's ``HybridModel`` (attention, Mamba, MLP and expert layers in a pattern; Megatron-Core 0.19 and newer).

``HybridModel`` takes a ``ModuleSpec`` and no callable. For ``pretrain_hybrid.py``: ``--spec moba_cp.megatron.hybrid
moba_hybrid_spec``, or a module of your own with other settings::

    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from moba_cp.megatron import with_moba

    my_spec = with_moba(hybrid_stack_spec, MoBAConfig(block_size=4096, topk=12), layer_pattern=...)

Layers are counted over the whole pattern, so ``layer_pattern`` has an entry for every layer of any kind.
"""

from __future__ import annotations

from typing import Any

from moba_cp import MoBAConfig

from .settings import DEFAULT_MOBA
from .spec import with_moba

try:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
except ModuleNotFoundError as error:
    raise ImportError("HybridModel needs Megatron-Core 0.19 or newer") from error


def hybrid_spec(moba_config: MoBAConfig = DEFAULT_MOBA, **settings: Any) -> Any:
    """Megatron's stack of all kinds of layers, with MoBA in the attention layers.

    Args:
        moba_config, **settings: as for :func:`moba_cp.megatron.with_moba`.
    """
    return with_moba(hybrid_stack_spec, moba_config, **settings)


#: The flags' defaults.
moba_hybrid_spec = hybrid_spec()
