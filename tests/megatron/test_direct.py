"""Segments whose gradients are written out, on a GPU: the numbers of Megatron's modules (on the CPU: `test_layer.py`)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig
from tests.megatron_models import transformer_config
from tests.ranks import run_fresh_ranks

VARIANTS = ((False, 0), (True, 0), (True, 100))
"""Recomputation, and rows of a chunk."""
MOST = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""The same products and kernels in the same order: apart by the rounding of sums (bf16: half a unit, 2 ** -8)."""


def differences(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    """By case and tensor: norm of the difference between both paths over the norm."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return {f"{dtype} {variant}": of_layer(dtype, *variant) for dtype in MOST for variant in VARIANTS}


def of_layer(dtype: torch.dtype, recompute: bool, chunk: int) -> dict[str, float]:
    from megatron.core.models.common.embeddings import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from moba_cp.megatron import with_moba
    from moba_cp.megatron.layer import LongLayerSettings, with_long_layers
    from moba_cp.megatron.norm import TorchNorm

    config = transformer_config(
        hidden_size=256,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=False,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = TorchNorm
    spec = with_long_layers(with_moba(spec, MoBAConfig(64, 3)), LongLayerSettings(recompute, chunk))
    layer = build_module(spec, config=config, layer_number=1).cuda().to(dtype)
    angles = RotaryEmbedding(64, 1.0)(320)
    x = torch.randn(320, 2, 256, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn_like(x)
    results = []
    for hooked in (False, True):
        if hooked:
            layer.mlp.linear_fc1.register_forward_hook(lambda *_: None)
        out = layer(x, attention_mask=None, rotary_pos_emb=angles)[0]
        parameters = dict(layer.named_parameters())
        gradients = torch.autograd.grad((out * weight).sum(), [x, *parameters.values()])
        results.append({"out": out, "x": gradients[0]} | dict(zip(parameters, gradients[1:], strict=True)))
    return {
        name: ((results[0][name].float() - theirs.float()).norm() / theirs.float().norm()).item()
        for name, theirs in results[1].items()
    }


@pytest.mark.gpu
def test_numbers_of_megatrons_modules() -> None:
    (outcome,) = run_fresh_ranks(1, differences, group_timeout=200, timeout=280)
    assert outcome.exception is None, outcome.exception
    found: dict[str, dict[str, float]] = outcome.result
    assert len(found) == len(MOST) * len(VARIANTS)
    for dtype, most in MOST.items():
        for variant in VARIANTS:
            of_tensor = found[f"{dtype} {variant}"]
            assert len(of_tensor) == 8
            assert max(of_tensor.values()) < most, (dtype, variant, of_tensor)
