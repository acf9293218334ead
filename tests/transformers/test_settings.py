"""Settings in a model's config, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.transformers import Settings, configure, register
from moba_cp.transformers.attention import moba_attention_forward
from moba_cp.transformers.masks import moba_mask
from tests.transformers.models import CONFIG, LAYERS, TOLERANCE, text, tiny, whole


def test_saved_with_the_model(tmp_path: Path) -> None:
    model, ids = tiny(layer_pattern=(1, 0, 1), decode="full"), text(1, 20)
    model.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "config.json").read_text())["moba"]
    assert kept == {"block_size": 4, "topk": 3, "layer_pattern": [1, 0, 1], "full_last": 0, "decode": "full"}
    register()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba").eval()
    assert torch.equal(whole(loaded, ids), whole(model, ids))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert (whole(plain, ids) - whole(model, ids)).abs().max() > 0.01


def test_a_config_before_the_model() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    configure(config, CONFIG, full_last=1)
    model = LlamaForCausalLM(config).eval()
    assert model.config._attn_implementation == "moba"
    assert whole(model, text(1, 9)).shape == (1, 9, 64)


@pytest.mark.parametrize(
    ("settings", "moba"),
    [({}, [1, 1, 1]), ({"full_last": 2}, [1, 0, 0]), ({"layer_pattern": [0, 1, 0]}, [0, 1, 0])],
    ids=str,
)
def test_which_layers(settings: dict[str, Any], moba: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    import moba_cp.transformers.attention as module

    calls: list[int] = []
    for name, kind in (("moba_attention", 1), ("causal_attention", 0)):
        function = getattr(module, name)
        spy = lambda *a, function=function, kind=kind, **k: (calls.append(kind), function(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    whole(tiny(**settings), text(1, 20))
    assert calls == moba


@pytest.mark.parametrize(
    ("arguments", "text_of_error"),
    [
        ({"full_last": 4}, "full_last is 4, the model has 3 layers"),
        ({"full_last": -1}, "full_last must be a number of layers, got -1"),
        ({"layer_pattern": [1, 0]}, "layer_pattern has 2 entries, the model 3 layers"),
        ({"layer_pattern": [1, 0, 2]}, r"layer_pattern must hold 1 \(MoBA\) and 0 \(full\), got \[1, 0, 2\]"),
        ({"layer_pattern": [1, 0, 1], "full_last": 1}, "not both"),
        ({"decode": "sparse"}, r"decode must be one of \('moba', 'full'\), got 'sparse'"),
        ({"config": MoBAConfig(4, 3, softmax_scale=0.5)}, "softmax_scale must be None.*got 0.5"),
    ],
    ids=str,
)
def test_settings_that_are_refused(arguments: dict[str, Any], text_of_error: str) -> None:
    with pytest.raises(ValueError, match=text_of_error):
        tiny(**arguments)


def test_types_are_named() -> None:
    with pytest.raises(TypeError, match="layer_pattern must be a list with one entry per layer, got 3"):
        tiny(layer_pattern=3)
    for bad in (None, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=f"a model of transformers or its config, got {type(bad).__name__}"):
            configure(bad, MoBAConfig(4, 3))


def test_models_that_are_refused() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no sliding_window, but the model's config says 8"):
        configure(config, CONFIG)
    with pytest.raises(TypeError, match="MoBAConfig"):
        configure(LlamaConfig(), {"block_size": 4})
    config.sliding_window = None
    configure(config, CONFIG)
    config.sliding_window = 8  # behind the back of `configure`
    with pytest.raises(ValueError, match="no sliding"):
        whole(MistralForCausalLM(config).eval(), text(1, 9))


def test_a_window_of_no_tokens_is_none() -> None:
    """Qwen2-MoE writes 0 into its config where no layer has a window, and asks for a mask of it all the same."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, pad_token_id=0,
    )  # fmt: skip
    model, ids = Qwen2MoeForCausalLM(config).eval(), text(1, 9)
    expected = whole(model, ids)
    configure(model, MoBAConfig(4, 3))  # covers the text
    torch.testing.assert_close(whole(model, ids), expected, **TOLERANCE)
    mask = moba_mask(1, 9, 9, local_size=0)
    q, k = torch.zeros(1, 4, 9, 8), torch.zeros(1, 2, 9, 8)
    with pytest.raises(ValueError, match="not custom masks"):
        moba_attention_forward(model.model.layers[0].self_attn, q, k, k, mask)


@pytest.mark.parametrize("number", [None, -1])
def test_an_attention_module_that_several_layers_share(number: int | None) -> None:
    """As in Zamba and Zamba2. Which of them calls is not known: settings and centroids would be of another layer."""
    model = tiny(full_last=1)
    model.model.layers[2].self_attn.layer_idx = number
    with pytest.raises(ValueError, match=rf"LlamaAttention does not say which layer it is \(layer_idx is {number}\)"):
        whole(model, text(1, 9))


def test_no_settings() -> None:
    model = tiny()
    del model.config.moba
    with pytest.raises(ValueError, match=r"has no MoBA settings .*configure\(model"):
        whole(model, text(1, 9))
    model.config.moba = {"block": 4}
    with pytest.raises(ValueError, match="must hold the fields of Settings, got {'block': 4}"):
        whole(model, text(1, 9))


def test_dropout() -> None:
    model, ids = tiny(), text(1, 9)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    whole(model, ids)  # in eval mode there is none
    with pytest.raises(ValueError, match="no dropout, got 0.1"):
        model.train()(ids)


def test_masks_that_are_refused() -> None:
    model, ids = tiny(), text(1, 9)
    with pytest.raises(ValueError, match=r"not custom masks.*\(1, 1, 9, 9\) torch.bool for 9 queries and 9 keys"):
        whole(model, ids, attention_mask=torch.ones(1, 1, 9, 9).tril().bool())
    with pytest.raises(ValueError, match="bidirectional"):
        moba_mask(1, 9, 9, allow_is_bidirectional_skip=True)
    with pytest.raises(ValueError, match="local_size=7"):
        moba_mask(1, 9, 9, local_size=7)
    with pytest.raises(ValueError, match="or_mask_function"):
        moba_mask(1, 9, 9, mask_function=lambda *index: index[3] >= 0)
    with pytest.raises(ValueError, match="longer than the 9 keys"):
        moba_mask(1, 8, 9, attention_mask=torch.ones(1, 10).bool())


@pytest.mark.parametrize(
    ("arguments", "text_of_error"),
    [
        ({"sliding_window": 16}, "no sliding_window, got 16"),
        ({"softcap": 30.0}, "no softcap, got 30.0"),
        ({"s_aux": torch.zeros(4)}, r"no s_aux, got a tensor \(4,\)"),
        ({"sinks": torch.zeros(2, 4, 9, 1)}, r"no sinks, got a tensor \(2, 4, 9, 1\)"),
        ({"indices": torch.zeros(2, 9, 5)}, r"no indices, got a tensor \(2, 9, 5\)"),
        ({"block_indices": torch.zeros(2, 2, 9, 3)}, r"no block_indices, got a tensor \(2, 2, 9, 3\)"),
        ({"position_bias": torch.zeros(1, 4, 9, 9)}, r"no position_bias, got a tensor \(1, 4, 9, 9\)"),
        ({"output_attentions": True}, "no attention weights"),
        ({"is_causal": False}, "is causal: LlamaAttention computes cross-attention"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9])}, "cu_seq_lens are for one sample, got 2"),
        ({"moba_layout": SequenceLayout.contiguous([0, 9], 1)}, r"one sample.*q \(2, 9, 4, 8\)"),
        ({"moba_group": object()}, "moba_group needs moba_layout"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_that_are_refused(arguments: dict[str, Any], text_of_error: str) -> None:
    module = tiny().model.layers[0].self_attn
    q, k = torch.zeros(2, 4, 9, 8), torch.zeros(2, 2, 9, 8)
    with pytest.raises(ValueError, match=text_of_error):
        moba_attention_forward(module, q, k, k, None, **arguments)


def test_cross_attention_and_keys_without_a_mask() -> None:
    module = tiny().model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 9, 8)
    with pytest.raises(ValueError, match="3 queries and 9 keys need the mask of moba_mask, got none: cross-attention"):
        moba_attention_forward(module, q, k, k, None)
    different = {"cu_seq_lens_q": torch.tensor([0, 4, 9]), "cu_seq_lens_k": torch.tensor([0, 5, 9])}
    with pytest.raises(ValueError, match=r"same documents, got \[0, 4, 9\] and \[0, 5, 9\]"):
        moba_attention_forward(module, torch.zeros(1, 4, 9, 8), k, k, None, **different)
    both = {"moba_layout": SequenceLayout.contiguous([0, 9], 1), "cu_seq_lens_k": torch.tensor([0, 4, 9])}
    with pytest.raises(ValueError, match="give cu_seq_lens or moba_layout, not both"):
        moba_attention_forward(module, torch.zeros(1, 4, 9, 8), k, k, None, **both)


def test_settings_by_layer() -> None:
    assert [Settings(4, 3, full_last=1).computes_moba(i, LAYERS) for i in range(LAYERS)] == [True, True, False]
