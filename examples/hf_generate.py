# python examples/hf_generate.py [a model's folder or name]
"""Generate with MoBA from a model of Hugging Face: a padded batch, a prompt in chunks, and the same tokens without a cache."""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

from moba_cp import MoBAConfig
from moba_cp.transformers import configure

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.manual_seed(0)
if len(sys.argv) > 1:
    try:
        model, moba = AutoModelForCausalLM.from_pretrained(sys.argv[1]), MoBAConfig(block_size=512, topk=8)
    except (OSError, ValueError) as error:  # ValueError: a kind of model that this version does not know
        raise SystemExit(f"no model could be loaded from {sys.argv[1]!r}: {str(error).splitlines()[0]}") from None
else:  # a small random one
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, initializer_range=0.1, eos_token_id=None, **sizes)
    model, moba = AutoModelForCausalLM.from_config(config), MoBAConfig(block_size=32, topk=3)
model = model.eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
configure(model, moba, full_last=1)  # the last layer keeps full attention

# Two prompts, the second one shorter: padding on the left. Blocks are counted from content.
prompts = torch.randint(1, 512, (2, 240), device=device)
mask = torch.ones_like(prompts)
mask[1, :57] = 0
begin = time.perf_counter()
answers = model.generate(
    prompts,
    attention_mask=mask,
    max_new_tokens=16,
    do_sample=False,
    cache_implementation="static",
    disable_compile=True,
)
seconds = time.perf_counter() - begin
print(f"{2 * 16} tokens in {seconds:.2f} s; each attends to at most {moba.topk} blocks of {moba.block_size} tokens")

alone = model.generate(prompts[1:, 57:], max_new_tokens=16, do_sample=False, use_cache=False)
print("the shorter prompt alone, without a cache: same tokens:", torch.equal(alone[0, -16:], answers[1, -16:]))

# A prompt in chunks: queries at an offset, against keys that are in the cache already.
cache, last = StaticCache(config=model.config, max_cache_len=240), None
with torch.no_grad():
    for chunk in prompts[:1].split(100, dim=1):
        last = model(chunk, past_key_values=cache, use_cache=True).logits[0, -1]
    whole = model(prompts[:1], use_cache=False).logits[0, -1]
print(f"chunks of 100 against one forward pass: largest difference of logits {(last - whole).abs().max():.1e}")
