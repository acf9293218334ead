"""LayerNorm and RMSNorm from torch that also work under Megatron's sequence parallelism.

Megatron's own ``WrappedTorchNorm`` refuses sequence parallelism, because the optimizer does not know that each
tensor-parallel rank saw only its part of the sequence. A tag on the parameters tells it: ``finalize_model_grads`` sums the
gradients of every parameter with ``sequence_parallel = True`` over the tensor-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS: dict[str, type[torch.nn.Module]] = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """Stands where a layer spec expects a norm; building it gives a plain ``torch.nn`` module over ``[..., hidden_size]``.

    Raises:
        ValueError: a kind of norm, or an option of it, that torch does not have.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:  # type: ignore[misc]
        if config.normalization not in _NORMS:
            raise ValueError(f"normalization must be one of {sorted(_NORMS)}, got {config.normalization!r}")
        for option in ("layernorm_zero_centered_gamma", "persist_layer_norm", "memory_efficient_layer_norm"):
            if getattr(config, option, False):
                raise ValueError(f"{option}=True is not supported by torch's norms")
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
