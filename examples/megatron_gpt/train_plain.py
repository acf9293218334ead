"""Train the GPT of a configuration in plain torch, from the weights that examples/megatron_gpt/train.py would begin with."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

if not __package__:  # run by its path: the package is found from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import typer
from megatron.core.utils import unwrap_model

from examples.megatron_gpt import distributed
from examples.megatron_gpt.config import load_config
from examples.megatron_gpt.data import Corpus, PackedText
from examples.megatron_gpt.model import build
from examples.megatron_gpt.plain import PlainGPT


def main(
    config_file: Annotated[Path, typer.Argument(help="YAML file, as for examples/megatron_gpt/train.py")],
    overrides: Annotated[list[str] | None, typer.Argument(help="single keys, as section.key=value")] = None,
) -> None:
    """Train the GPT of a configuration on one process, in plain torch around moba_cp.reference.

    torchrun --nproc-per-node 1 examples/megatron_gpt/train_plain.py configs/quickstart.yaml run.name=plain run.device=cpu

    Weights and learning rates are those of Megatron; the rest is torch. Losses go to the run's metrics.jsonl.
    """
    try:
        config = load_config(config_file, overrides or [])
        if "LOCAL_RANK" not in os.environ:
            sys.exit(f"start this with torchrun: torchrun --nproc-per-node 1 {sys.argv[0]} {config_file}")
        if os.environ["WORLD_SIZE"] != "1":
            raise ValueError(f"this trains on one process, and torchrun started {os.environ['WORLD_SIZE']}")
        if config.moba.fraction < 1:
            raise ValueError(f"moba.fraction={config.moba.fraction}: this uses MoBA from the first step to the last")
        run, data = config.run, config.data
        train_corpus, eval_corpus = Corpus.find(data.paths).split(data.eval_fraction, run.seed)
        text = PackedText(train_corpus, data.seq_length, run.seed)
        unseen = PackedText(eval_corpus, data.seq_length, run.seed) if data.eval_fraction else None
        ranks = distributed.start(config)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"{config_file}: {error}")
    trainer = build(config, ranks)
    (whole,) = unwrap_model(trainer.model)
    model = PlainGPT(config, dict(whole.named_parameters()))

    config.run_directory.mkdir(parents=True, exist_ok=True)
    with (config.run_directory / "metrics.jsonl").open("w") as log:
        for step in range(1, run.steps + 1):
            learning_rate = trainer.optimizer.param_groups[0]["lr"]
            loss, norm = model.step(text, (step - 1) * run.global_batch_size, learning_rate)
            trainer.scheduler.step(increment=run.global_batch_size)
            log.write(json.dumps({"kind": "train", "step": step, "loss": loss, "grad_norm": norm}) + "\n")
        if unseen is not None:
            with torch.no_grad():
                losses = [
                    model.loss(unseen, i * run.global_batch_size, run.global_batch_size)
                    for i in range(run.eval_batches)
                ]
            loss = torch.stack(losses).mean().item()
            log.write(json.dumps({"kind": "eval", "step": run.steps, "loss": loss}) + "\n")
    distributed.stop()


if __name__ == "__main__":
    typer.run(main)
