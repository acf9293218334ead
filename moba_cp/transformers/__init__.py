"""MoBA for Hugging Face transformers: training, prefill and decoding with any model that takes an attention implementation.

    from moba_cp import MoBAConfig
    from moba_cp.transformers import configure

    model = AutoModelForCausalLM.from_pretrained(path)
    configure(model, MoBAConfig(block_size=512, topk=8), full_last=3)   # selects "moba", which the import registered
    model.generate(**inputs)

`configure` writes its settings into the model's config, so they are saved with it. To load such a model::

    moba_cp.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="moba")

`attention` is the attention function, `masks` the mask function: what a forward pass hands from the model's mask to every layer;
`kept` keeps centroids beside a cache; `settings` reads and writes the model's config. docs/huggingface.md says what works.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from .attention import moba_attention_forward
from .masks import moba_mask
from .settings import IMPLEMENTATION, Settings, configure

__all__ = ["IMPLEMENTATION", "Settings", "configure", "register"]


def register() -> None:
    """Make `attn_implementation="moba"` known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, moba_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, moba_mask)


register()
