"""Train the GPT of a configuration in plain torch, from the weights that scripts/train.py would begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from megatron.core.utils import unwrap_model

from moba_cp.megatron.training import distributed
from moba_cp.megatron.training.config import load_config
from moba_cp.megatron.training.data import Corpus, PackedText
from moba_cp.megatron.training.model import build
from moba_cp.megatron.training.plain import PlainGPT


def main(
    config_file: Annotated[Path, typer.Argument(help="YAML file, as for scripts/train.py")],
    overrides: Annotated[list[str] | None, typer.Argument(help="single keys, as section.key=value")] = None,
) -> None:
    """Train the GPT of a configuration on one process, in plain torch around moba_cp.reference.

    torchrun --nproc-per-node 1 scripts/train_plain.py configs/quickstart.yaml run.name=plain run.device=cpu

    Weights and learning rates are those of Megatron; the rest is torch. Losses go to the run's metrics.jsonl.
    """
    config = load_config(config_file, overrides or [])
    ranks = distributed.start(config)
    trainer = build(config, ranks)
    run, data = config.run, config.data
    train_corpus, eval_corpus = Corpus.find(data.paths).split(data.eval_fraction, run.seed)
    text, unseen = (PackedText(corpus, data.seq_length, run.seed) for corpus in (train_corpus, eval_corpus))
    (whole,) = unwrap_model(trainer.model)
    model = PlainGPT(config, dict(whole.named_parameters()))

    config.run_directory.mkdir(parents=True, exist_ok=True)
    with (config.run_directory / "metrics.jsonl").open("w") as log:
        for step in range(1, run.steps + 1):
            learning_rate = trainer.optimizer.param_groups[0]["lr"]
            loss, norm = model.step(text, (step - 1) * run.global_batch_size, learning_rate)
            trainer.scheduler.step(increment=run.global_batch_size)
            log.write(json.dumps({"kind": "train", "step": step, "loss": loss, "grad_norm": norm}) + "\n")
        with torch.no_grad():
            losses = [
                model.loss(unseen, i * run.global_batch_size, run.global_batch_size) for i in range(run.eval_batches)
            ]
        log.write(json.dumps({"kind": "eval", "step": run.steps, "loss": torch.stack(losses).mean().item()}) + "\n")
    distributed.stop()


if __name__ == "__main__":
    typer.run(main)
