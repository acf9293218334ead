"""What a model's config says about MoBA: block size, top-k, which layers, how to decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ..config import MoBAConfig
from ..validation import check_config

IMPLEMENTATION = "moba"
"""Name of the attention implementation, and of the entry in a model's config."""
DECODE = ("moba", "full")


@dataclass(frozen=True)
class Settings:
    """MoBA in one model, as its config keeps it.

    Attributes:
        block_size, topk: as in `MoBAConfig`.
        layer_pattern: one entry per layer: 1 for MoBA, 0 for full causal attention. None: MoBA in all but the last layers.
        full_last: with no pattern, this many layers at the end compute full causal attention.
        decode: "moba": a new token attends to its selected blocks. "full": to all of the cache, as in MoonshotAI/MoBA, where
            only prefill is sparse; this concerns forward passes with one query per sequence that use a cache.

    Raises:
        TypeError, ValueError: a field is not as said.
    """

    block_size: int
    topk: int
    layer_pattern: Sequence[int] | None = None
    full_last: int = 0
    decode: str = "moba"

    def __post_init__(self) -> None:
        MoBAConfig(self.block_size, self.topk)
        if isinstance(self.full_last, bool) or not isinstance(self.full_last, int) or self.full_last < 0:
            raise ValueError(f"full_last must be a number of layers, got {self.full_last!r}")
        if self.layer_pattern is not None:
            if isinstance(self.layer_pattern, str) or not isinstance(self.layer_pattern, Sequence):
                raise TypeError(f"layer_pattern must be a list with one entry per layer, got {self.layer_pattern!r}")
            object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
            if self.full_last:
                raise ValueError(f"give layer_pattern or full_last, not both: {self.layer_pattern}, {self.full_last}")
            if any(entry not in (0, 1) for entry in self.layer_pattern):
                raise ValueError(f"layer_pattern must hold 1 (MoBA) and 0 (full), got {list(self.layer_pattern)}")
        if self.decode not in DECODE:
            raise ValueError(f"decode must be one of {DECODE}, got {self.decode!r}")

    def check_layers(self, layers: int) -> None:
        """Raise ValueError unless the settings are for a model of so many layers."""
        if self.layer_pattern is not None and len(self.layer_pattern) != layers:
            raise ValueError(f"layer_pattern has {len(self.layer_pattern)} entries, the model {layers} layers")
        if self.full_last > layers:
            raise ValueError(f"full_last is {self.full_last}, the model has {layers} layers")

    def computes_moba(self, layer: int, layers: int) -> bool:
        """Whether layer `layer` of `layers`, counted from 0, computes MoBA."""
        if self.layer_pattern is not None:
            return self.layer_pattern[layer] == 1
        return layer < layers - self.full_last


def configure(
    model_or_config: Any,
    config: MoBAConfig,
    *,
    layer_pattern: Sequence[int] | None = None,
    full_last: int = 0,
    decode: str = "moba",
) -> None:
    """Write MoBA's settings into a model's config, from where they are saved, and select `attn_implementation="moba"`.

    Args:
        model_or_config: a model of transformers, or a config to make one from. Of a model with several configs, that of its
            text model is meant: other parts, such as a vision tower, keep their attention.
        config: block size and top-k. The scale of the scores is the model's own, so `softmax_scale` must be None.
        layer_pattern, full_last, decode: see `Settings`.

    Raises:
        TypeError, ValueError: an argument is not as said, or the model has another number of layers; or the model's config asks
            for what MoBA attention does not compute; or the model does not take its attention from transformers' interface.
    """
    check_config(config)
    if config.softmax_scale is not None:
        raise ValueError(
            f"softmax_scale must be None, since the model passes its own scale; got {config.softmax_scale}"
        )
    settings = Settings(config.block_size, config.topk, layer_pattern, full_last, decode)
    is_model = isinstance(model_or_config, torch.nn.Module)
    whole = getattr(model_or_config, "config", None) if is_model else model_or_config
    if not isinstance(whole, PretrainedConfig):
        raise TypeError(f"configure takes a model of transformers or its config, got {type(model_or_config).__name__}")
    text = whole.get_text_config(decoder=True)
    settings.check_layers(text.num_hidden_layers)
    for name in ("sliding_window", "attn_logit_softcapping", "attention_chunk_size"):
        value = getattr(text, name, None)
        if value is not None and (name, value) != ("sliding_window", 0):  # Qwen2-MoE writes 0 for no window
            raise ValueError(f"MoBA attention has no {name}, but the model's config says {value!r}")
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"MoBA attention is causal, but {type(whole).__name__} is of an encoder and a decoder")
    _check_interface(model_or_config if is_model else None, text)
    setattr(text, IMPLEMENTATION, asdict(settings))
    if is_model and whole is text:
        model_or_config.set_attn_implementation(IMPLEMENTATION)
    else:
        text._attn_implementation = IMPLEMENTATION


def _check_interface(model: Any, text: PretrainedConfig) -> None:
    """The classes of a model, or those that its config stands for, call the attention that the config names.

    Others would ignore MoBA, or compute attention of their own without the causal mask, which MoBA does not make.

    Raises:
        ValueError: a class has attention of its own.
    """
    if model is None:
        classes: list[Any] = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)]
    else:
        classes = [type(x) for x in model.modules() if isinstance(x, PreTrainedModel) and x.config is text]
    for kind in classes:
        can_set = getattr(kind, "_can_set_attn_implementation", None)
        if can_set is not None and not can_set():
            raise ValueError(f"{kind.__name__} does not take its attention from transformers' attention interface")


def check_configured(config: Any) -> dict[str, Any]:
    """What `configure` wrote into the config of a text model.

    Raises:
        ValueError: it wrote nothing.
    """
    kept = getattr(config, IMPLEMENTATION, None)
    if not isinstance(kept, dict):
        raise ValueError(
            f"the model's config has no MoBA settings (config.{IMPLEMENTATION} is {kept!r}): call "
            "moba_cp.transformers.configure(model, MoBAConfig(...)) first"
        )
    return kept


def settings_of(module: Any) -> tuple[Settings, bool]:
    """The settings in the config of an attention module, and whether its layer computes MoBA.

    Kept with the module until they change: decoding asks for them in every layer of every token.

    Raises:
        ValueError: there are none, they are wrong, or for another number of layers; or the module does not say which layer it is.
    """
    kept, layers = getattr(module.config, IMPLEMENTATION, None), module.config.num_hidden_layers
    known = getattr(module, "_moba_settings", None)
    if known is not None and known[0] == (kept, layers):
        return known[1]
    kept = check_configured(module.config)
    try:
        settings = Settings(**kept)
    except TypeError as error:
        raise ValueError(f"config.{IMPLEMENTATION} must hold the fields of Settings, got {kept!r}") from error
    settings.check_layers(layers)
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int) or layer < 0:  # of Zamba and Zamba2: their layers share attention modules
        raise ValueError(
            f"{type(module).__name__} does not say which layer it is (layer_idx is {layer!r}), so it can have no MoBA settings "
            "of its own, and no centroids beside a cache"
        )
    found = settings, settings.computes_moba(layer, layers)
    module._moba_settings = ((dict(kept), layers), found)
    return found
