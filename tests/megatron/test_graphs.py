"""Passes over micro-batches as one CUDA graph: what it replays, what it refuses; on a GPU, losses as without it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("omegaconf")

from examples.megatron_gpt.batches import MicroBatch
from examples.megatron_gpt.config import load_config
from examples.megatron_gpt.graphs import MicroBatchGraph

ROOT = Path(__file__).parents[2]


def micro_batch(number: int) -> MicroBatch:
    return MicroBatch(*(torch.full((1, 4), number) for _ in range(3)))


class Recorded:
    """A model of one gradient, and CUDA graphs that run again what ran during their capture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gradient = torch.zeros(())
        self.calls: list[int] = []
        self.finalized: list[int] = []
        self.config = SimpleNamespace(finalize_model_grads_func=self.finalize)
        recorder = self

        class Graph:
            def replay(self) -> None:
                recorder.sums.copy_(recorder.one(recorder.static))

        @contextlib.contextmanager
        def capture(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
            before = self.gradient.clone()
            yield
            self.gradient.copy_(before)  # a capture runs nothing

        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)

    def one(self, batch: MicroBatch) -> torch.Tensor:
        self.gradient += batch.tokens.sum()
        return torch.tensor([float(batch.labels.sum()), batch.tokens.numel()], dtype=torch.float64)

    def passes(self, batches: Iterator[MicroBatch], count: int) -> torch.Tensor:
        self.calls.append(count)
        total = torch.zeros(2, dtype=torch.float64)
        for _ in range(count):
            self.static = next(batches)
            total += self.one(self.static)
        if self.config.finalize_model_grads_func is not None:
            self.config.finalize_model_grads_func([self], total[1].int())
        self.sums = total
        return total

    def finalize(self, model: list[object], tokens: torch.Tensor) -> None:
        assert model == [self]
        self.finalized.append(int(tokens))


def test_batches_are_replayed_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Recorded(monkeypatch)
    graph = MicroBatchGraph()
    batches = iter([micro_batch(n) for n in range(9)])
    for step in range(3):
        model.gradient.zero_()
        total = graph.run(model.passes, model, model.config, batches, 3)  # type: ignore[arg-type]
        expected = 4 * sum(range(3 * step, 3 * step + 3))
        assert total.tolist() == [expected, 12]
        assert model.gradient.item() == expected
    assert model.calls == [3, 1]  # the first global batch, and the capture
    assert model.finalized == [12, 12, 12]
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["parallel.context=2"], "parallel.context=2"),
        (["parallel.tensor=2"], "parallel.tensor=2"),
        (["parallel.pipeline=2"], "parallel.pipeline=2"),
        (["data.separate_documents=true"], "data.separate_documents=true"),
        (["moba.fraction=0.5"], "moba.fraction=0.5"),
        (["run.offload_inputs=true", "run.recompute=all_but_attention"], "run.offload_inputs=true"),
        (["run.layers=megatron"], "run.layers=long"),
        (["run.device=cpu"], "run.device=cpu"),
    ],
)
def test_what_cannot_be_replayed_is_refused(changes: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=f"run.cuda_graphs=true does not go with .*{why}"):
        load_config(ROOT / "configs" / "quickstart.yaml", ["run.cuda_graphs=true", *changes])


def losses(out: Path, *overrides: str) -> list[float]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    line += ["--nproc-per-node", "1", "-m", "scripts.training_speed", "configs/quickstart.yaml", "--out", str(out)]
    line += ["--attention", "moba:64:4", "--warmup", "2", "--steps", "3", "--no-profile", "run.precision=bf16"]
    line += ["data.seq_length=2048", "run.global_batch_size=3", "optimizer.warmup_steps=1", *overrides]
    done = subprocess.run(line, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())["runs"][0]["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "all_but_attention"])
def test_losses_are_those_without_graphs(tmp_path: Path, recompute: str) -> None:
    shared = f"run.recompute={recompute}"
    eager = losses(tmp_path / "eager.json", shared)
    assert losses(tmp_path / "graphs.json", shared, "run.cuda_graphs=true") == eager
    assert eager[-1] < eager[0] - 0.1
