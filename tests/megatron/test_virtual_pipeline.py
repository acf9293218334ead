"""Two pipeline stages of two model chunks each: layers, losses, routing reports, and checkpoints, over two processes."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from scripts.harness.training import hosted_store

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.init_std=0.1",
    "moba.block_size=16",
    "moba.layer_pattern=[0,1,1,0]",
    "data.seq_length=112",
    "run.device=cpu",
    "run.steps=4",
    "run.eval_batches=1",
    "optimizer.warmup_steps=1",
]
INTERLEAVED = ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]


class Run:
    """One training run of this process, from its start or from the newest checkpoint in a folder."""

    def __init__(self, directory: Path, text: Any, overrides: list[str], store: dict[str, str], resume: bool) -> None:
        from examples.megatron_gpt import checkpoint, distributed, model
        from examples.megatron_gpt.batches import Sharding, micro_batches
        from examples.megatron_gpt.config import load_config

        os.environ |= store
        self.directory = directory
        self.config = load_config(QUICKSTART, [*SMALL, *overrides])
        self.ranks = distributed.start(self.config)
        self.trainer = model.build(self.config, self.ranks)
        restored = checkpoint.load_latest(directory, self.trainer, "text") if resume else None
        self.progress = restored or checkpoint.Progress(corpus="text")
        sharding = Sharding(self.ranks.dp_rank, self.ranks.dp_size, 0, 1, torch.device("cpu"))
        self.batches = micro_batches(text, 1, self.progress.consumed_samples, sharding)
        self.unseen = micro_batches(text, 1, 1000, sharding)

    def step(self) -> tuple[float, float]:
        """Loss (NaN on the first stage) and gradient norm."""
        from examples.megatron_gpt.checkpoint import Progress
        from examples.megatron_gpt.step import train_step

        result = train_step(self.trainer, self.batches, self.config, self.ranks)
        self.progress = Progress(self.progress.step + 1, self.progress.consumed_samples + 4, "text")
        return result.loss, result.grad_norm

    def save(self) -> None:
        from examples.megatron_gpt.checkpoint import save

        save(self.directory, self.trainer, self.progress)


def train(rank: int, directory: str, stores: list[dict[str, str]]) -> None:
    """What one process found, as a JSON file in ``directory``."""
    from examples.megatron_gpt import distributed
    from examples.megatron_gpt.data import Corpus, PackedText
    from examples.megatron_gpt.step import evaluate, routing
    from moba_cp.megatron import MoBASchedule
    from moba_cp.megatron.schedule import moba_layers

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    text = PackedText(Corpus.find([str(Path(__file__).parent / "*.py")]), 112, seed=0)
    folder = Path(directory)
    found: dict[str, Any] = {}

    run = Run(folder, text, INTERLEAVED, stores[0], resume=False)
    chunks = [moba_layers(chunk) for chunk in run.trainer.model]
    found["layers"] = [[layer.layer_number for layer in layers] for layers in chunks]
    found["moba"] = [[layer.computes_moba for layer in layers] for layers in chunks]
    run.step()
    run.save()
    found["through"] = [run.step(), run.step()]
    found["evaluation"] = evaluate(run.trainer, run.unseen, run.config, run.ranks)
    found["routing"] = sorted(routing(run.trainer, run.unseen, run.config, run.ranks))
    MoBASchedule(full_from=1).apply(run.trainer.model, 1)
    found["switched"] = [layer.computes_moba for layer in moba_layers(run.trainer.model)]
    distributed.stop()

    run = Run(folder, text, INTERLEAVED, stores[1], resume=True)
    found["resumed"] = [run.step(), run.step()]
    distributed.stop()

    run = Run(folder, text, [], stores[2], resume=True)  # two data-parallel processes with all layers each
    found["whole"] = [run.step(), run.step()]
    found["whole_evaluation"] = evaluate(run.trainer, run.unseen, run.config, run.ranks)
    distributed.stop()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_model_chunks_train_like_the_whole_model_and_resume_exactly(tmp_path: Path) -> None:
    # Not the pool of ranks: Megatron's checkpoint writer starts processes of its own.
    stores = [hosted_store(2, 240.0) for _ in range(3)]
    arguments = (str(tmp_path), [variables for _, variables in stores])
    torch.multiprocessing.start_processes(train, arguments, nprocs=2, start_method="forkserver")
    first, last = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert (first["layers"], last["layers"]) == ([[1], [3]], [[2], [4]])
    assert (first["moba"], last["moba"]) == ([[False], [True]], [[True], [False]])
    assert first["routing"] == last["routing"] == [2, 3]
    assert first["switched"] == last["switched"] == [False, False]

    # The same sizes: the same bits. The loss is known on the last stage.
    assert last["resumed"] == last["through"]
    assert [norm for _, norm in first["resumed"]] == [norm for _, norm in last["through"]]
    # All layers on each process, from the same checkpoint: equal to rounding.
    for ours, theirs in zip(last["through"], last["whole"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert last["evaluation"] == pytest.approx(last["whole_evaluation"], rel=1e-5)
