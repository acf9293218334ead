"""The Megatron model against a GPT of plain torch around ``moba_cp.reference``: the same loss and the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig, reference
from moba_cp.megatron.training.config import TrainConfig, load_config
from tests.ranks import run_fresh_ranks

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LENGTH, BATCH = 200, 2


def rotate(x: torch.Tensor, base: int) -> torch.Tensor:
    """Rotary embedding of ``[tokens, heads, d]``, halves rotated."""
    half = x.size(-1) // 2
    angles = torch.arange(len(x))[:, None] / base ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def plain_gpt(
    weights: dict[str, torch.Tensor], config: TrainConfig, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean loss of one sequence; ``weights`` under Megatron's names."""
    model, moba = config.model, MoBAConfig(config.moba.block_size, config.moba.topk)
    groups, heads = model.num_query_groups, model.num_attention_heads
    dim = model.hidden_size // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (x.size(-1),), weights[name], eps=1e-5)

    x = weights["embedding.word_embeddings.weight"][tokens]
    for number in range(model.num_layers):
        layer = f"decoder.layers.{number}."
        qkv = F.linear(norm(x, layer + "input_layernorm.weight"), weights[layer + "self_attention.linear_qkv.weight"])
        q, k, v = qkv.unflatten(-1, (groups, -1)).split([heads // groups * dim, dim, dim], -1)
        q, k = rotate(q.reshape(len(x), heads, dim), model.rotary_base), rotate(k, model.rotary_base)
        attended = reference.moba_attention(q, k, v, [0, len(x)], moba).flatten(1)
        x = x + F.linear(attended, weights[layer + "self_attention.linear_proj.weight"])
        gate, up = F.linear(
            norm(x, layer + "pre_mlp_layernorm.weight"), weights[layer + "mlp.linear_fc1.weight"]
        ).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, weights[layer + "mlp.linear_fc2.weight"])
    logits = F.linear(norm(x, "decoder.final_layernorm.weight"), weights["output_layer.weight"])
    return F.cross_entropy(logits, labels)


def errors_on_rank(rank: int, world_size: int) -> dict[str, float]:
    """Difference of the losses, and the largest relative difference of each gradient."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel

    from moba_cp.megatron.cpu import use_cpu_as_cuda
    from moba_cp.megatron.training.data import PADDED_VOCAB_SIZE
    from moba_cp.megatron.training.model import block_spec, transformer

    use_cpu_as_cuda()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = load_config(QUICKSTART, ["model.init_std=0.1"])
    transformer_config = transformer(config, torch.device("cpu"))
    model = GPTModel(
        transformer_config,
        block_spec(config, transformer_config),
        PADDED_VOCAB_SIZE,
        LENGTH,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=False,
    )
    tokens, labels = torch.randint(0, PADDED_VOCAB_SIZE, (2, BATCH, LENGTH))
    loss = model(tokens, torch.arange(LENGTH).expand(BATCH, -1), None, labels=labels).mean()
    loss.backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain = sum(plain_gpt(weights, config, tokens[b], labels[b]) for b in range(BATCH)) / BATCH
    plain.backward()
    errors = {"loss": (loss - plain).abs().item()}
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        errors[name] = ((parameter.grad - expected).norm() / expected.norm()).item()
    return errors


def test_megatron_gives_the_loss_and_gradients_of_a_plain_gpt() -> None:
    (outcome,) = run_fresh_ranks(1, errors_on_rank, group_timeout=60)
    assert outcome.exception is None, outcome
    assert len(outcome.result) == 1 + 3 + 2 * 6
    assert max(outcome.result.values()) < 1e-5, outcome.result
