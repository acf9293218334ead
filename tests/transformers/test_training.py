"""Training: gradients of the definition, packing, padding, gradient checkpointing, context parallelism."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
import transformers

import moba_cp.transformers.attention as attention_module
from moba_cp import MoBAConfig, SequenceLayout
from tests.transformers.models import KINDS, TOLERANCE, text, tiny, use_reference, whole
from tests.transformers.packed import ENDS, POSITIONS, TOKENS


def gradients(model: transformers.PreTrainedModel, ids: Tensor, **more: object) -> dict[str, Tensor]:
    """Gradients of the mean loss by parameter."""
    model.train()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False, **more).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= relative * gradient.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_reference(kind: str) -> None:
    model, ids = tiny(kind, full_last=1), text(2, 30)
    ours = gradients(model, ids)
    use_reference(model)
    assert_same(ours, gradients(model, ids), 1e-4)  # fp32 sums in another order, through three layers


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, ids = tiny(full_last=1), text(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for more in ({}, {"attention_mask": mask}):
        model.gradient_checkpointing_disable()
        plain = gradients(model, ids, **more)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert_same(gradients(model, ids, **more), plain, 0)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens"])
def test_packed_documents_do_not_see_each_other(how: str) -> None:
    model, ids = tiny(full_last=1), text(1, TOKENS)
    more: dict[str, object] = {"position_ids": POSITIONS}
    if how == "cu_seq_lens":
        ends = torch.tensor(ENDS, dtype=torch.int32)
        more |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends.clone(), "max_length_q": 17, "max_length_k": 17}
    logits = whole(model, ids, **more)
    for begin, end in zip(ENDS[:-1], ENDS[1:], strict=True):
        torch.testing.assert_close(logits[:, begin:end], whole(model, ids[:, begin:end]), **TOLERANCE)


def test_positions_that_are_written_to_are_read_again() -> None:
    """What was read from a tensor of positions is kept for the layers of one forward pass, not longer."""
    model, ids = tiny(), text(1, TOKENS)
    positions = torch.arange(TOKENS)[None].clone()
    whole(model, ids, position_ids=positions)
    positions.copy_(POSITIONS)
    expected = whole(model, ids, position_ids=POSITIONS)
    torch.testing.assert_close(whole(model, ids, position_ids=positions), expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q"])
def test_writes_that_raise_no_version_are_read_again(how: str) -> None:
    """As `dist.broadcast`, numpy and `.data` write."""
    model, ids = tiny(), text(1, TOKENS)
    new = {"position_ids": POSITIONS, "cu_seq_lens_q": torch.tensor(ENDS)}[how]
    old = {"position_ids": torch.arange(TOKENS)[None], "cu_seq_lens_q": torch.tensor([0, 1, 2, 3, 36])}[how].to(
        new.dtype
    )
    buffer, more = old.clone(), {} if how == "position_ids" else {"position_ids": POSITIONS}
    whole(model, ids, **more | {how: buffer})
    buffer.numpy()[:] = new.numpy()
    torch.testing.assert_close(
        whole(model, ids, **more | {how: buffer}), whole(model, ids, **more | {how: new}), rtol=0, atol=0
    )


def test_a_tensor_on_a_gpu_is_read_once_per_forward_pass() -> None:
    """By the first layer; the one after the last layer of a pass begins another."""
    tensor = SimpleNamespace(is_inference=lambda: False, device=torch.device("cuda"), _version=0)
    reads: list[int] = []
    for layer in (0, 1, 3, 0, 1, 1, 2):
        attention_module._on_host(tensor, layer, "ends", lambda x, layer=layer: reads.append(layer) or reads)
    assert reads == [0, 0, 1]


def test_packed_samples_of_a_batch() -> None:
    """Each sample has documents of its own."""
    model, ids = tiny(), text(2, TOKENS)
    positions = torch.cat([POSITIONS, torch.arange(TOKENS)[None]])
    logits = whole(model, ids, position_ids=positions)
    torch.testing.assert_close(logits[1:], whole(model, ids[1:]), **TOLERANCE)
    torch.testing.assert_close(logits[:1], whole(model, ids[:1], position_ids=POSITIONS), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gets_no_gradient_and_changes_none(side: str) -> None:
    model, ids = tiny(full_last=1), text(1, 30)
    padding = torch.zeros(1, 8, dtype=torch.long)
    order = (padding, ids) if side == "left" else (ids, padding)
    mask = torch.cat([torch.zeros_like(padding) if x is padding else torch.ones_like(ids) for x in order], 1)
    padded = torch.cat(order, 1)
    labels = padded.masked_fill(mask == 0, -100)
    if side == "left":
        labels[:, 8] = -100  # the last padding token would predict it
    model.train()
    found = []
    for inputs, targets, more in (
        (padded, labels, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}),
        (ids, ids, {}),
    ):
        model.zero_grad()
        model(inputs, labels=targets, use_cache=False, **more).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_same(found[0], found[1], 1e-4)  # fp32 sums in another order


def test_keys_reach_attention_unexpanded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    function = attention_module.moba_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, **more: object) -> Tensor:
        seen.append((q.shape[1], k.shape[1], v.shape[1]))
        return function(q, k, v, config, **more)

    monkeypatch.setattr(attention_module, "moba_attention", spy)
    whole(tiny(), text(1, 20))
    assert seen == [(4, 2, 2)] * 3


def test_the_scale_is_the_models() -> None:
    model, ids = tiny(full_last=1), text(1, 30)
    plain = whole(model, ids)
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.9
    scaled = whole(model, ids)
    use_reference(model)
    torch.testing.assert_close(scaled, whole(model, ids), **TOLERANCE)
    assert (plain - scaled).abs().max() > 0.01


@pytest.mark.heavy
def test_the_layout_reaches_every_layer() -> None:
    """As an argument of the model's forward pass, also through gradient checkpointing."""
    model, ids = tiny(full_last=1), text(1, TOKENS)
    more = {"position_ids": POSITIONS}
    plain = gradients(model, ids, **more)
    model.gradient_checkpointing_enable()
    more |= {"moba_layout": SequenceLayout.contiguous(ENDS, 1)}
    assert_same(gradients(model, ids, **more), plain, 0)
    with pytest.raises(ValueError, match="36 tokens"):
        whole(model, ids[:, :20], moba_layout=more["moba_layout"])
