"""Whether a run fits, and what an out-of-memory error says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from examples.megatron_gpt import fit
from examples.megatron_gpt.config import load_config
from examples.megatron_gpt.distributed import TrainingError
from moba_cp.training_memory import GIB, TrainingShape, kept_bytes_per_token, parameters_of_rank, training_peak

CONFIGS = Path(__file__).parents[2] / "configs"
ON_ONE = ["parallel.context=1"]


def test_a_run_that_will_not_fit_is_refused_with_its_parts_and_what_helps() -> None:
    config = load_config(CONFIGS / "gpt_300m_128k.yaml", [*ON_ONE, "run.recompute=none"])
    with pytest.raises(TrainingError) as raised:
        fit.judge(config, 1, 80 * GIB)
    text = str(raised.value)
    assert "will not fit: estimated peak of 12" in text
    for part in ("weights", "gradients", "optimizer", "kept", "working (", "outside torch", "check_memory=false"):
        assert part in text
    assert "run.recompute=all_but_attention: 2" in text
    assert "run.recompute=full" not in text  # only where attention is kept


def test_close_runs_warn_and_others_say_nothing() -> None:
    config = load_config(CONFIGS / "gpt_300m_128k.yaml", ON_ONE)
    peak = training_peak(fit.shape_of(config, 1)).device
    assert fit.judge(config, 1, peak) == ""
    assert fit.judge(config, 1, int(peak / 1.05)).startswith("the run may not fit: estimated peak of")
    with pytest.raises(TrainingError):
        fit.judge(config, 1, int(peak / 1.2))


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("NCCL Error 1: unhandled cuda error\nLast error:\nFailed to CUDA calloc async 608 bytes"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ],
)
def test_errors_of_torch_nccl_driver_and_cublas_name_the_stage(error: RuntimeError) -> None:
    message = "out of GPU memory in forward and backward: "
    with pytest.raises(fit.OutOfMemoryError, match=message) as raised, fit.doing("forward and backward"):
        raise error
    assert raised.value.__cause__ is error
    with pytest.raises(fit.OutOfMemoryError) as again, fit.doing("training"):  # the inner stage is the one named
        raise raised.value
    assert again.value.stage == "forward and backward"


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), fit.doing("forward"):
        raise RuntimeError("shapes do not match")


def shape(**changes: object) -> TrainingShape:
    sizes = {"layers": 24, "hidden": 2048, "heads": 16, "kv_heads": 4, "head_dim": 128, "ffn": 5632, "vocab": 384}
    return TrainingShape(**(sizes | {"tokens": 1 << 18, "context": 4} | changes))  # type: ignore[arg-type]


def test_parts_follow_from_the_sizes() -> None:
    peak = training_peak(shape(recompute="all_but_attention"))
    parameters = parameters_of_rank(shape())
    assert parameters == 24 * (2048 * 128 * 40 + 3 * 2048 * 5632 + 2 * 2048) + 2 * 384 * 2048 + 2048
    assert (peak.weights, peak.gradients, peak.optimizer) == (2 * parameters, 4 * parameters, 3 * parameters)
    # The input and attention's output in bf16, a log-sum-exp and eight selected blocks per head.
    assert kept_bytes_per_token(shape(recompute="all_but_attention")) == 2 * 2 * 2048 + 16 * (4 + 8 * 2)
    assert peak.kept == 24 * (1 << 18) * (8192 + 320)
    assert peak.torch == peak.weights + peak.gradients + peak.optimizer + peak.kept + peak.working


def test_what_saves_memory_saves_it() -> None:
    everything = training_peak(shape())
    kept = training_peak(shape(recompute="all_but_attention"))
    chunks = training_peak(shape(recompute="all_but_attention", chunk_tokens=16384))
    offloaded = training_peak(shape(recompute="all_but_attention", chunk_tokens=16384, offload=True))
    assert everything.kept > 4 * kept.kept
    assert chunks.workings["MLP"] < kept.workings["MLP"] / 4
    assert offloaded.torch < chunks.torch
    assert offloaded.host == 24 * (1 << 18) * 2048 * 2
    assert training_peak(shape(loss_chunk=4096, vocab=131072)).working < training_peak(shape(vocab=131072)).working / 2


def test_gradients_of_scores_count_where_they_are_kept() -> None:
    """128K tokens, blocks of 512, topk 8: partial results of all 16 heads take 4.1 GiB, 8.1 in fp32, and with dS 16.5 GiB. Half
    of the tokens take half of that."""

    def attention(**changes: object) -> int:
        sizes = {"kv_heads": 16, "topk": 8, "tokens": 1 << 17, "context": 1, "block_size": 512}
        return training_peak(shape(**(sizes | changes))).workings["attention"]

    assert attention(workspace_bytes=20 * GIB) > attention() + (16 - 1.25) * GIB
    half = {"tokens": 1 << 16}
    assert attention(workspace_bytes=20 * GIB, **half) > attention(**half) + (8 - 1.25) * GIB
    for changes in (
        {"block_size": 0},
        {"block_size": 500},
        {"context": 2},
        {"bf16": False},
        {"head_dim": 64},
    ):
        assert attention(workspace_bytes=20 * GIB, **changes) < attention(**changes) + 7 * GIB


def test_sums_of_dq_count_twice_what_partial_results_do() -> None:
    """Of blocks above 512 keys, with heads of 128 in bf16."""

    def attention(**changes: object) -> int:
        sizes = {"kv_heads": 16, "topk": 8, "tokens": 1 << 17, "context": 1, "workspace_bytes": 50 * GIB}
        return training_peak(shape(**(sizes | changes))).workings["attention"]

    partials = 16 * 8 * (1 << 17) * 2 * 128  # bytes that four in place of two per number add
    added = attention(block_size=4096) - attention(block_size=4000)
    assert partials <= added <= 1.01 * partials
    assert attention(block_size=4096, head_dim=64) == attention(block_size=4000, head_dim=64)


def test_partial_results_are_of_slots_that_exist() -> None:
    """As many as there are blocks, rounded up to a power of two, and no more than topk."""

    def attention(**changes: object) -> int:
        sizes = {
            "kv_heads": 16,
            "topk": 8,
            "tokens": 8192,
            "context": 1,
            "block_size": 4000,
            "workspace_bytes": 50 * GIB,
        }
        return training_peak(shape(**(sizes | changes))).workings["attention"]

    assert attention() - attention(topk=1) == 16 * 8192 * 3 * (2 * 128 + 8 + 8)  # three blocks are four slots
    assert attention(block_size=8192) == attention(block_size=8192, topk=1)


def test_bad_shapes() -> None:
    with pytest.raises(ValueError, match="recompute must be one of"):
        shape(recompute="some")
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        shape(tokens=0)
    for changes, text in (
        ({"topk": -3}, "topk must be at least 0, got -3"),
        ({"workspace_bytes": 0}, "workspace_bytes must be at least 1, got 0"),
        ({"head_parallel": 0}, "head_parallel must be at least 1, got 0"),
        ({"heads": 16, "kv_heads": 5}, "kv_heads must divide heads, got 5 and 16"),
    ):
        with pytest.raises(ValueError, match=text):
            shape(**changes)
    with pytest.raises(ValueError, match="needs long_layers"):
        shape(recompute="all_but_attention", long_layers=False)
