"""On a GPU: calls of one token to a million. The routing of all rows is checked, and the results of sampled rows and blocks."""

import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from scripts.harness.checks import check_run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("block_size", [128, 512])
@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 511, 513, 4097, 65_537, 1_000_000])
def test_length(tokens: int, block_size: int) -> None:
    heads, topk = (2, 1), 8
    generator = torch.Generator("cuda").manual_seed(tokens)
    shapes = [(heads[0], 128), (heads[1], 128), (heads[1], 128), (heads[0], 128)]
    q, k, v, dout = (torch.randn(tokens, *s, device="cuda", dtype=torch.bfloat16, generator=generator) for s in shapes)
    config = MoBAConfig(block_size, topk)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = moba_attention(*inputs, config, layout=SequenceLayout.contiguous([0, tokens], 1))
    lse, selected = out.grad_fn.saved_tensors[4:6]
    gradients = torch.autograd.grad(out, inputs, dout)
    assert all(x.isfinite().all() for x in (out, *gradients))
    if tokens <= 2:
        return  # gradients cancel to zero and have no relative error
    found = check_run(q, k, v, dout, out, gradients, lse, selected, MoBAConfig(block_size, selected.shape[2]))
    assert found["wrong_rows"] == 0
    # Each bf16 partial has a relative error up to 2 ** -9, averaged over a row; gradients are rounded once more.
    assert found["out_error"] < 3e-3
    assert max(found["dq_error"], found["dk_error"], found["dv_error"]) < 4e-3
