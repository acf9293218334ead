"""The Megatron model against a GPT of plain torch around ``moba_cp.reference``: the same loss and the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("megatron.core")

from examples.megatron_gpt.config import load_config
from tests.ranks import run_fresh_ranks

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LENGTH, BATCH = 200, 2


def errors_on_rank(rank: int, world_size: int) -> dict[str, float]:
    """Difference of the losses, and the largest relative difference of each gradient."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel

    from examples.megatron_gpt.data import PADDED_VOCAB_SIZE
    from examples.megatron_gpt.model import block_spec, transformer
    from examples.megatron_gpt.parts import split_tokens
    from examples.megatron_gpt.plain import PlainGPT
    from moba_cp.megatron.cpu import use_cpu_as_cuda

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
    plain_model = PlainGPT(config, dict(model.named_parameters()))
    plain = F.cross_entropy(plain_model.logits(tokens.flatten(), [LENGTH] * BATCH), labels.flatten())
    plain.backward()
    weights = plain_model.weights
    errors = {"loss": (loss - plain).abs().item()}
    compare(errors, model, weights, "")
    # The same model with the tokens of its layers in two parts.
    model.zero_grad()
    split_tokens(model, 2)
    in_parts = model(tokens, torch.arange(LENGTH).expand(BATCH, -1), None, labels=labels).mean()
    in_parts.backward()
    errors["loss in parts"] = (in_parts - plain).abs().item()
    compare(errors, model, weights, " in parts")
    return errors


def compare(errors: dict[str, float], model: torch.nn.Module, weights: dict[str, torch.Tensor], suffix: str) -> None:
    for name, parameter in model.named_parameters():
        expected = weights[name].grad
        errors[name + suffix] = ((parameter.grad - expected).norm() / expected.norm()).item()


def test_megatron_gives_the_loss_and_gradients_of_a_plain_gpt() -> None:
    (outcome,) = run_fresh_ranks(1, errors_on_rank, group_timeout=60)
    assert outcome.exception is None, outcome
    assert len(outcome.result) == 2 * (1 + 3 + 2 * 6)
    assert max(outcome.result.values()) < 1e-5, outcome.result
