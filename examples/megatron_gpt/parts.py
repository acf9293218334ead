"""Layers that treat their tokens in parts, as the ranks of a context-parallel group do: a measure of rounding.

A weight's gradient is a sum over tokens. With context parallelism each rank sums its own tokens and rounds, and the ranks'
sums are added; on one rank everything is one sum, rounded once. Neither is more right, and in bf16 the two differ in the third
digit. A model on one rank whose layers work on the same parts differs from the plain one by that alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

_TOKEN_BY_TOKEN = (ColumnParallelLinear, RowParallelLinear, torch.nn.LayerNorm, torch.nn.RMSNorm)


def split_tokens(model: torch.nn.Module, parts: int) -> None:
    """Let every layer of ``model`` that has weights treat its tokens in ``parts`` parts, those of the ranks of a zigzag layout.

    Outputs keep their values; a weight's gradient is the sum of the parts' rounded ones. Sequences must be multiples of
    ``2 * parts`` tokens.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):  # [b, s] -> [b, s, h]; the others [s, b, h] -> [s, b, h']
            module.__dict__["forward"] = partial(_forward_in_parts, module.forward, parts, 1)
        elif isinstance(module, _TOKEN_BY_TOKEN):
            module.__dict__["forward"] = partial(_forward_in_parts, module.forward, parts, 0)


def _forward_in_parts(
    forward: Callable[..., Any], parts: int, dim: int, tokens: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``forward`` of each part of ``tokens`` along ``dim``, put together again; of a tuple, its first entry."""
    chunks = tokens.chunk(2 * parts, dim)
    outputs: list[torch.Tensor] = []
    for rank in range(parts):
        result = forward(torch.cat([chunks[rank], chunks[-1 - rank]], dim), *args, **kwargs)
        output, rest = (result[0], result[1:]) if isinstance(result, tuple) else (result, None)
        outputs[rank:rank] = output.chunk(2, dim)
    whole = torch.cat(outputs, dim)
    return whole if rest is None else (whole, *rest)
