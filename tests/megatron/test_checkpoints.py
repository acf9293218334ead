"""Checkpoints of models with Megatron's stock attention load into MoBA models, and back."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

LENGTH, VOCAB = 96, 128


def build(moba_block_size: int | None) -> Any:
    """A GPT with stock ``DotProductAttention``, or with MoBA of this block size."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moba_cp import MoBAConfig
    from moba_cp.megatron import with_moba
    from tests.megatron_models import transformer_config

    spec = get_gpt_layer_local_spec()
    if moba_block_size is not None:
        spec = with_moba(spec, MoBAConfig(moba_block_size, topk=3))
    config = transformer_config(init_method_std=0.2)
    return GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="rope")


def both_ways(directory: str) -> dict[str, Any]:
    """Save and load both ways in a process of its own; what was found."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel

    from moba_cp.megatron import MoBACoreAttention
    from moba_cp.megatron.cpu import use_cpu_as_cuda

    use_cpu_as_cuda()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    def save(model: Any, name: str) -> str:
        path = Path(directory) / name
        path.mkdir()
        dist_checkpointing.save({"model": model.sharded_state_dict()}, str(path))
        return str(path)

    def load(model: Any, path: str) -> None:
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, path)
        model.load_state_dict(state["model"])  # strict: no name may be missing or left over

    def same(a: Any, b: Any) -> bool:
        pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
        return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)

    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(LENGTH).expand(2, -1)
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    dense, sparse, everything, back = build(None), build(8), build(LENGTH // 2), build(None)
    differed = not same(dense, sparse) and not same(dense, back)
    path = save(dense, "dense")
    load(sparse, path)
    load(everything, path)
    load(back, save(sparse, "moba"))
    with torch.no_grad():
        expected = dense(tokens, positions, causal)
        error_everything = (everything(tokens, positions, None) - expected).abs().max().item()
        error_sparse = (sparse(tokens, positions, None) - expected).abs().max().item()
        equal_back = torch.equal(back(tokens, positions, causal), expected)
    return {
        "names": [list(m.sharded_state_dict()) == list(dense.sharded_state_dict()) for m in (sparse, back)],
        "parameters": [[name for name, _ in m.named_parameters()] for m in (dense, sparse)],
        "stock": sum(isinstance(m, MoBACoreAttention) for m in dense.modules()),
        "moba": sum(isinstance(m, MoBACoreAttention) for m in sparse.modules()),
        "differed": differed,
        "same": [same(dense, m) for m in (sparse, everything, back)],
        "errors": (error_everything, error_sparse),
        "equal_back": equal_back,
    }


def test_dense_checkpoints_load_into_moba_models_and_back(tmp_path: Path) -> None:
    # Megatron's checkpoint writer starts processes, which the pool of ranks does not allow its own to do.
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        found = pool.submit(both_ways, str(tmp_path)).result(timeout=240)
    assert (found["stock"], found["moba"]) == (0, 2)
    dense, sparse = found["parameters"]
    assert dense == sparse
    assert found["names"] == [True, True]
    assert found["differed"]
    assert found["same"] == [True, True, True]
    assert found["equal_back"]
    # Two blocks and top-k 3: MoBA is full causal attention. Twelve blocks: it is not.
    everything, few = found["errors"]
    assert everything < 1e-4 < few
