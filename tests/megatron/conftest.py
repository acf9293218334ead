"""Ranks of these tests find Megatron imported: most of their time would be its import."""

import torch

from tests import ranks

if not torch.cuda.is_available():  # with a GPU, the import starts CUDA, which does not survive the fork
    ranks.preload("examples.megatron_gpt.train", "megatron.core.models.gpt.gpt_layer_specs")
