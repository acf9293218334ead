"""Linear layers that treat their tokens in parts, as the ranks of a context-parallel group do: a measure of rounding.

A weight's gradient is a sum over tokens. With context parallelism each rank sums its own tokens and rounds, and the ranks'
sums are added; on one rank everything is one sum, rounded once. Neither is more right, and in bf16 the two differ in the third
digit. A model on one rank whose linear layers work on the same parts differs from the plain one by that alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


def split_linear_layers(model: torch.nn.Module, parts: int) -> None:
    """Let every linear layer of ``model`` treat its tokens in ``parts`` parts, those of the ranks of a zigzag layout.

    Outputs keep their values; a weight's gradient is the sum of the parts' rounded ones. Sequences must be multiples of
    ``2 * parts`` tokens.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.forward = partial(_forward_in_parts, module.forward, parts)


def _forward_in_parts(
    forward: Callable[..., tuple[torch.Tensor, Any]], parts: int, tokens: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, Any]:
    """``forward`` of each part of ``[s, b, h]``, put together again."""
    chunks = tokens.chunk(2 * parts)
    outputs: list[torch.Tensor] = []
    for rank in range(parts):
        part, bias = forward(torch.cat([chunks[rank], chunks[-1 - rank]]), *args, **kwargs)
        outputs[rank:rank] = part.chunk(2)
    return torch.cat(outputs), bias
