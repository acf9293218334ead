"""Models of other kinds: those that MoBA serves in part, those that it must refuse, autocast, and models without numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")
import transformers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    XGLMConfig,
    XGLMForCausalLM,
)

from moba_cp import MoBAConfig
from moba_cp.transformers import configure
from tests.transformers.models import CACHE, CONFIG, TOLERANCE, VOCABULARY, in_chunks, new_cache, text, tiny, whole
from tests.transformers.packed import ENDS, POSITIONS, TOKENS

IMAGE, IMAGE_TOKENS = VOCABULARY - 1, 4


def own_attention(kind: str) -> tuple[Any, type]:
    if kind == "bloom":
        return BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), BloomForCausalLM
    sizes = {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "attention_dropout": 0.0}
    return XGLMConfig(vocab_size=VOCABULARY, **sizes), XGLMForCausalLM


NEW = int(transformers.__version__.split(".")[0]) >= 5
"""Older versions make the masks of such models in other ways, and their rotary embeddings do not run on the meta device."""


@pytest.mark.parametrize("kind", ["bloom", "xglm"])
def test_models_with_attention_of_their_own_are_refused(kind: str) -> None:
    """They would ignore MoBA; or, told of "moba" by their config only, attend to later tokens for want of a mask."""
    config, model_class = own_attention(kind)
    for given in (model_class(config), config):
        with pytest.raises(ValueError, match=f"{model_class.__name__} does not take its attention from transformers'"):
            configure(given, CONFIG)
    assert not hasattr(config, "moba")
    assert config._attn_implementation != "moba"
    if not NEW:
        return
    told = model_class._from_config(config, attn_implementation="moba")
    with pytest.raises(ValueError, match="has no MoBA settings"):
        whole(told, text(1, 9))


def test_encoders_with_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="is causal, but T5Config is of an encoder and a decoder"):
        configure(T5Config(), CONFIG)


def llava() -> LlavaForConditionalGeneration:
    """Layers of text as of `tiny`, behind a vision tower whose attention is bidirectional."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=14, patch_size=7,
        projection_dim=16,
    )  # fmt: skip
    words = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=words, image_token_index=IMAGE, image_token_id=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval()


def images(samples: int) -> dict[str, Tensor]:
    ids = text(samples, 30).clamp(max=IMAGE - 1)
    ids[:, 3 : 3 + IMAGE_TOKENS] = IMAGE
    pixels = torch.randn(samples, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "pixel_values": pixels}


def test_the_text_of_a_vision_language_model(tmp_path: Path) -> None:
    plain, inputs = llava(), images(2)
    model = copy.deepcopy(plain)
    configure(model, MoBAConfig(4, 100))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, **TOLERANCE)
        configure(model, CONFIG)
        logits = model(**inputs).logits
        assert (logits - plain(**inputs).logits).abs().max() > 0.01
        asked = {"max_new_tokens": 6, "do_sample": False}
        found = [model.generate(**inputs, **asked, use_cache=use_cache) for use_cache in (True, False)]
        assert torch.equal(*found)
        assert model.config.vision_config._attn_implementation == "sdpa"
        model.save_pretrained(tmp_path)
        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation={"text_config": "moba"})
        torch.testing.assert_close(loaded(**inputs).logits, logits, rtol=0, atol=0)
        config = llava().config
        configure(config, CONFIG)
        torch.manual_seed(0)
        made = LlavaForConditionalGeneration(config).eval()
        made.load_state_dict(plain.state_dict())
        torch.testing.assert_close(made(**inputs).logits, logits, rtol=0, atol=0)


def test_packing_in_a_model_that_hands_no_positions_on() -> None:
    """transformers tells it by the mask function."""
    torch.manual_seed(0)
    config = GPTBigCodeConfig(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, initializer_range=0.3
    )
    model, ids = GPTBigCodeForCausalLM(config).eval(), text(1, TOKENS)
    configure(model, CONFIG)
    logits = whole(model, ids, position_ids=POSITIONS)
    for begin, end in zip(ENDS[:-1], ENDS[1:], strict=True):
        torch.testing.assert_close(logits[:, begin:end], whole(model, ids[:, begin:end]), **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_documents_with_padding(side: str) -> None:
    """A batch of packed samples, one of them shorter: documents stay apart, and are what they are alone."""
    model, ids, more = tiny(full_last=1), text(2, TOKENS), 9
    content = slice(more, None) if side == "left" else slice(None, TOKENS - more)
    kept = POSITIONS[:, content] if side == "right" else POSITIONS[:, : TOKENS - more]
    mask, positions = torch.zeros_like(ids), torch.ones_like(ids)
    mask[0], positions[0] = 1, POSITIONS[0]
    mask[1, content], positions[1, content] = 1, kept[0]
    logits = whole(model, ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits[:1], whole(model, ids[:1], position_ids=POSITIONS), **TOLERANCE)
    alone = whole(model, ids[1:, content], position_ids=kept)
    torch.testing.assert_close(logits[1:, content], alone, **TOLERANCE)


def test_documents_that_are_given_in_part() -> None:
    model, ids, ends = tiny(), text(1, TOKENS), torch.tensor(ENDS)
    with pytest.raises(ValueError, match="give cu_seq_lens_q with cu_seq_lens_k"):
        whole(model, ids, cu_seq_lens_k=ends)
    with pytest.raises(TypeError, match="cu_seq_lens_q must be a tensor, got list"):
        whole(model, ids, cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS)


def test_a_mask_of_other_length() -> None:
    """All ones or not: missing tokens are padding, and a mask that is too long is refused."""
    model, ids = tiny(), text(1, 20)
    short = model(ids, attention_mask=torch.ones(1, 14), past_key_values=DynamicCache()).logits
    torch.testing.assert_close(short[:, :14], whole(model, ids[:, :14]), **TOLERANCE)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 23\) is longer than the 20 keys"):
        model(ids, attention_mask=torch.ones(1, 23), past_key_values=DynamicCache())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """q and k, which rotary embeddings leave in fp32, are taken in autocast's dtype, as values are."""
    model, ids = tiny(full_last=1), text(2, 24)
    exact = model(ids, labels=ids, use_cache=False).loss
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.autocast("cpu", dtype):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        logits = whole(model, ids)
        pieces = in_chunks(model, ids, [10, 1, 1, 12], new_cache(model, "dynamic"))
        asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        assert model.generate(ids, **asked).shape == (2, 32)
    assert abs(loss - exact) < 0.05 * exact  # 8 bits of mantissa, through three layers
    assert logits.dtype == dtype
    # Blocks whose scores are near may be chosen otherwise where rounding differs, so most logits, not all, are compared.
    near = (pieces - logits).abs() <= 0.1 * logits.abs().max()
    assert near.float().mean() > 0.9


def test_autocast_that_is_switched_between_steps() -> None:
    model, ids = tiny(), text(1, 24)
    cache = new_cache(model, "dynamic")
    step = lambda begin, end: model(ids[:, begin:end], **{CACHE: cache}, use_cache=True).logits  # noqa: E731
    with torch.no_grad():
        step(0, 20)
        with torch.autocast("cpu", torch.bfloat16):
            step(20, 21)
        last = step(21, 22)
    assert last.dtype == torch.float32
    assert last.isfinite().all()


def test_without_numbers() -> None:
    """Shapes are inferred on the meta device and of fake tensors, with gradients, as for other attention."""
    for where in (torch.device("meta"), FakeTensorMode())[0 if NEW else 1 :]:
        with where:
            model, ids = tiny(full_last=1), torch.ones(2, 20, dtype=torch.long)
            assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 20, VOCABULARY)
            model(ids, labels=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss.backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
