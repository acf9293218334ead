"""A Megatron layer with MoBA under torch.compile on a GPU: the numbers of the eager layer, for new lengths too.

On the CPU, Megatron's layers run through `moba_cp.megatron.cpu`, which turns the compiler off; `test_core_attention.py` compiles
the attention alone there.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig
from tests.megatron_models import transformer_config
from tests.ranks import run_fresh_ranks

LENGTHS = (256, 320, 192)


def differences(rank: int, world_size: int, dtype: torch.dtype) -> tuple[dict[str, float], int]:
    """By length and tensor: norm of compiled minus eager over the norm; and how many graphs were compiled."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module
    from torch._dynamo.utils import counters

    from moba_cp.megatron import with_moba

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = transformer_config(
        hidden_size=256, params_dtype=dtype, bf16=dtype == torch.bfloat16, use_cpu_initialization=False
    )
    layer = build_module(with_moba(get_gpt_layer_local_spec(), MoBAConfig(64, 3)), config=config, layer_number=1)
    layer = layer.cuda().to(dtype)  # as Megatron's Float16Module does: norms are built in fp32
    compiled = torch.compile(layer)
    found = {}
    counters.clear()
    for length in LENGTHS:
        x = torch.randn(length, 1, 256, device="cuda", dtype=dtype).requires_grad_()
        results = []
        for call in (layer, compiled):
            out = call(x, attention_mask=None)[0]
            parameters = dict(layer.named_parameters())
            gradients = torch.autograd.grad(out.float().square().sum(), [x, *parameters.values()], allow_unused=True)
            results.append({"out": out, "x": gradients[0]} | dict(zip(parameters, gradients[1:], strict=True)))
        for name, eager in results[0].items():
            if eager is not None:
                error = (results[1][name].float() - eager.float()).norm() / eager.float().norm()
                found[f"{length} {name}"] = error.item()
    return found, counters["stats"]["unique_graphs"]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)], ids=str)
def test_inductor_gives_the_numbers_of_the_eager_layer(dtype: torch.dtype, most: float) -> None:
    """Fused kernels round less often: in bf16 by a few units in the last place (2 ** -8) of each of a dozen operations. fp32
    may use TF32 in products."""
    (outcome,) = run_fresh_ranks(1, differences, dtype, group_timeout=200, timeout=280)
    assert outcome.exception is None, outcome.exception
    found: dict[str, float]
    found, graphs = outcome.result
    assert graphs >= 2  # before and after the attention: it is not the eager layer that ran
    assert len(found) > 8 * len(LENGTHS)
    assert max(found.values()) < most, found
