"""A model of long layers against one of Megatron's own: the same losses and gradients, whatever is recomputed or chunked."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from examples.megatron_gpt.config import load_config
from tests.ranks import run_fresh_ranks

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
LENGTH, BATCH = 96, 2
LONG = ["run.layers=long"]
KEPT = [*LONG, "run.recompute=all_but_attention"]
VARIANTS = {
    "megatron": ["run.layers=megatron"],
    "long": LONG,
    "recomputed": KEPT,
    "recomputed by Megatron": [*LONG, "run.recompute=full"],
    "chunks": [*LONG, "run.chunk_tokens=20"],
    "recomputed chunks": [*KEPT, "run.chunk_tokens=20"],
    "offloaded": [*KEPT, "run.offload_inputs=true"],
    "loss in chunks": [*LONG, "run.loss_chunk=20"],
    "everything": [*KEPT, "run.chunk_tokens=20", "run.offload_inputs=true", "run.loss_chunk=36"],
}
OTHERS = {
    "LayerNorm, GELU": ["model.normalization=LayerNorm", "model.swiglu=false"],
    "tied": ["model.tie_embeddings=true"],
    "full attention": ["moba.full_last_layers=4"],
}


def build_model(overrides: list[str]) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel

    from examples.megatron_gpt.model import block_spec, transformer
    from moba_cp.megatron.loss import ChunkedLossGPT

    config = load_config(QUICKSTART, ["model.init_std=0.1", "model.num_layers=4", *overrides])
    transformer_config = transformer(config, torch.device("cpu"))
    transformer_config.params_dtype = torch.float64
    arguments: dict[str, Any] = {"loss_chunk": config.run.loss_chunk} if config.run.loss_chunk else {}
    torch.manual_seed(1)
    return (ChunkedLossGPT if arguments else GPTModel)(
        transformer_config,
        block_spec(config, transformer_config),
        384,
        LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        **arguments,
    ).double()


def run(
    overrides: list[str], batches: int = 1, hooks: tuple[str, ...] = (), frozen: tuple[str, ...] = ()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a model of fp64, over micro-batches whose backward passes come after all forward passes.

    Modules of ``hooks`` have a hook that does nothing; parameters of ``frozen`` get no gradients.
    """
    model = build_model(overrides)
    for name, module in model.named_modules():
        if name.endswith(hooks) and hooks:
            module.register_forward_hook(lambda *_: None)
    for name, parameter in model.named_parameters():
        if name.endswith(frozen) and frozen:
            parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(batches):
        tokens, labels = torch.randint(0, 384, (2, BATCH, LENGTH), generator=generator)
        losses.append(model(tokens, torch.arange(LENGTH).expand(BATCH, -1), None, labels=labels))
    loss = torch.stack(losses).double().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def start_megatron() -> None:
    from megatron.core import parallel_state, tensor_parallel

    from moba_cp.megatron.cpu import use_cpu_as_cuda

    use_cpu_as_cuda()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def all_variants(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    start_megatron()
    return {name: run(overrides) for name, overrides in VARIANTS.items()}


def other_models(rank: int, world_size: int) -> dict[str, list[Any]]:
    start_megatron()
    return {
        name: [run([*other, *VARIANTS[kind]], batches=2) for kind in ("megatron", "everything")]
        for name, other in OTHERS.items()
    }


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in a)


def same_bits(a: tuple[Any, dict[str, torch.Tensor]], b: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][n], b[1][n]) for n in a[1])


def test_every_variant_gives_the_losses_and_gradients_of_megatron() -> None:
    (outcome,) = run_fresh_ranks(1, all_variants, group_timeout=120)
    assert outcome.exception is None, outcome
    found = outcome.result
    expected_loss, expected = found["megatron"]
    for name, (loss, gradients) in found.items():
        # Cross entropy is in fp32, so losses and what follows agree to its rounding; between the others fp64 is seen below.
        assert abs(loss - expected_loss) < 1e-6, name
        assert largest_difference(gradients, expected) < 1e-6, name
    # Recomputation: the same functions of the same values in the same chunks.
    assert same_bits(found["recomputed"], found["long"])
    assert same_bits(found["recomputed by Megatron"], found["long"])
    assert same_bits(found["offloaded"], found["long"])
    assert torch.equal(found["recomputed chunks"][0], found["chunks"][0])
    # Chunks sum weights' gradients in another order: rounding of fp64.
    for name in ("chunks", "recomputed chunks", "loss in chunks", "everything"):
        assert largest_difference(found[name][1], found["long"][1]) < 1e-12, name


def test_other_models_and_several_micro_batches_in_flight() -> None:
    (outcome,) = run_fresh_ranks(1, other_models, group_timeout=120)
    assert outcome.exception is None, outcome
    for name, (ours, theirs) in outcome.result.items():
        assert abs(ours[0] - theirs[0]) < 1e-6, name
        assert largest_difference(ours[1], theirs[1]) < 1e-6, name


def what_is_kept(rank: int, world_size: int) -> dict[str, Any]:
    """Calls of attention, and whether its inputs live on behind the forward pass."""
    start_megatron()
    model = build_model(VARIANTS["recomputed chunks"])
    storages: list[Any] = []

    def note(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        storages.extend(weakref.ref(x) for x in arguments[:3])  # batches of one: attention takes views

    for layer in model.decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(note)
    tokens, labels = torch.randint(0, 384, (2, 1, LENGTH))
    loss = model(tokens, torch.arange(LENGTH)[None], None, labels=labels).sum()
    gc.collect()
    after_forward = sum(reference() is not None for reference in storages)
    calls = len(storages) // 3
    loss.backward()
    return {"alive": after_forward, "calls": calls, "calls with backward": len(storages) // 3}


def test_attention_is_computed_once_and_its_inputs_are_not_kept() -> None:
    (outcome,) = run_fresh_ranks(1, what_is_kept, group_timeout=60)
    assert outcome.exception is None, outcome
    assert outcome.result == {"alive": 0, "calls": 4, "calls with backward": 4}


def refusals(rank: int, world_size: int) -> list[str]:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moba_cp.megatron.layer import LongLayerSettings, with_long_layers

    start_megatron()
    found, spec = [], get_gpt_layer_local_spec(normalization="RMSNorm")
    for call in (
        lambda: LongLayerSettings(chunk_tokens=-1),
        lambda: LongLayerSettings(offload=True),
        lambda: with_long_layers(3, LongLayerSettings()),
        lambda: second_backward(),
        lambda: LongLayerSettings(recompute="false"),
        lambda: LongLayerSettings(chunk_tokens=1.5),
        lambda: with_long_layers(spec, {"recompute": True}),
        lambda: with_long_layers(with_long_layers(spec, LongLayerSettings()), LongLayerSettings()),
    ):
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            found.append(str(error))
    return found


def second_backward() -> None:
    from moba_cp.megatron.offload import HostInputs

    inputs = HostInputs(torch.device("cpu"))
    kept = inputs.put(torch.ones(3), layer_number=2)
    assert torch.equal(kept.get(), torch.ones(3))
    kept.release()
    assert inputs.put(torch.zeros(3), layer_number=3).get().sum() == 0
    assert inputs.bytes == 12  # the second took the buffer of the first
    kept.get()


def test_refusals() -> None:
    (outcome,) = run_fresh_ranks(1, refusals, group_timeout=60)
    assert outcome.exception is None, outcome
    negative, alone, nothing, gone, text, part, mapping, twice = outcome.result
    assert "chunk_tokens must not be negative" in negative
    assert "offload=True needs recompute=True" in alone
    assert "no TransformerLayer found in int" in nothing
    assert "is gone after one backward pass" in gone
    assert text == "recompute must be a bool, got 'false'"
    assert "chunk_tokens must be an int" in part
    assert mapping == "settings must be LongLayerSettings, got {'recompute': True}"
    assert "long layers already" in twice


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.layers=long", "run.recompute=selective"], "run.layers=long does not go with run.recompute=selective"),
        (["run.layers=megatron", "run.chunk_tokens=64"], "run.chunk_tokens=64 needs run.layers=long"),
        (["run.offload_inputs=true"], "needs run.recompute=all_but_attention"),
        (["run.token_parts=2", "run.recompute=all_but_attention"], "does not go with run.token_parts=2"),
        (["run.loss_chunk=-1"], "run.loss_chunk must not be negative"),
    ],
)
def test_settings_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(QUICKSTART, overrides)


def both_paths(rank: int, world_size: int) -> dict[str, list[Any]]:
    """By variant: with gradients that are written out, and with those of Megatron's modules, where hooks want to see them."""
    start_megatron()
    from moba_cp.megatron import direct

    calls = []
    applied = direct.Feed.body
    direct.Feed.body = lambda *arguments: calls.append(1) or applied(*arguments)  # type: ignore[method-assign]
    found = {}
    for name in ("long", "recomputed", "recomputed chunks", "everything"):
        results: list[Any] = []
        for hooked in (False, True):
            calls.clear()
            results.append(run(VARIANTS[name], hooks=("linear_qkv", "linear_fc2") if hooked else ()))
            assert bool(calls) == (not hooked), name
        found[name] = results
    frozen: list[Any] = [run(LONG, frozen=frozen) for frozen in ((), ("linear_fc1.weight",))]
    assert not any("linear_fc1" in name for name, gradient in frozen[1][1].items() if gradient is not None)
    found["frozen"] = [(loss, {n: g for n, g in of.items() if "linear_fc1" not in n}) for loss, of in frozen]
    return found


def test_written_out_gradients_are_those_of_megatrons_modules() -> None:
    """In fp64, up to its rounding; modules with hooks are called, and a frozen weight gets no gradient."""
    (outcome,) = run_fresh_ranks(1, both_paths, group_timeout=120)
    assert outcome.exception is None, outcome
    for name, ((loss, gradients), (expected_loss, expected)) in outcome.result.items():
        assert abs(loss - expected_loss) < 1e-6, name
        assert largest_difference(gradients, expected) < 1e-6, name


def changed_weights(rank: int, world_size: int) -> list[str]:
    """What backward raises where a weight was changed in place after forward; by variant and weight."""
    start_megatron()
    messages = []
    for name in ("long", "recomputed", "loss in chunks"):
        for weight in ("linear_qkv", "linear_proj", "pre_mlp_layernorm", "linear_fc2", "output_layer"):
            model = build_model(VARIANTS[name])
            tokens = torch.arange(LENGTH).expand(1, -1)
            loss = model(tokens, tokens, None, labels=tokens).mean()
            next(p for n, p in model.named_parameters() if weight in n).detach().add_(1)
            try:
                loss.backward()
                messages.append(f"{name} {weight}: nothing")
            except RuntimeError as error:
                messages.append(str(error))
    return messages


def test_a_weight_changed_before_backward_raises() -> None:
    (outcome,) = run_fresh_ranks(1, changed_weights, group_timeout=120)
    assert outcome.exception is None, outcome
    assert all("modified by an inplace operation" in message for message in outcome.result), outcome.result
