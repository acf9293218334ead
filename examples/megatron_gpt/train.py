"""Train a GPT with MoBA attention on text, its sequences sharded over processes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Generator
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Annotated

if not __package__:  # run by its path: the package is found from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # apex and Transformer Engine are optional
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # new names for old collectives

warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # asked by Megatron

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import typer  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from examples.megatron_gpt import checkpoint, distributed, fit, run_folder  # noqa: E402
from examples.megatron_gpt.batches import MicroBatch, Sharding, micro_batches, sequence_lengths  # noqa: E402
from examples.megatron_gpt.config import TrainConfig, load_config, reading_evaluation  # noqa: E402
from examples.megatron_gpt.data import PADDED_VOCAB_SIZE, Corpus, PackedText  # noqa: E402
from examples.megatron_gpt.model import (  # noqa: E402
    build,
    count_parameters,
    moba_record,
    moba_settings,
    resume_schedule,
    sizes_record,
)
from examples.megatron_gpt.progress import Reporter  # noqa: E402
from examples.megatron_gpt.signals import Stop, note_signals  # noqa: E402
from examples.megatron_gpt.step import evaluate, last_layer_report, routing, train_step  # noqa: E402
from moba_cp import diagnostics  # noqa: E402
from moba_cp.megatron import MoBASchedule  # noqa: E402
from moba_cp.megatron.flops import peak_flops, step_flops  # noqa: E402

READ_AHEAD = 2
"""Micro-batches that a thread reads beside the training."""


def main(
    config_file: Annotated[Path, typer.Argument(help="YAML file, for example configs/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="single keys, as section.key=value")] = None,
) -> None:
    """Train a GPT with MoBA attention on text, its sequences sharded over processes.

    torchrun --nproc-per-node 2 examples/megatron_gpt/train.py configs/quickstart.yaml parallel.context=2 run.name=cp2

    Every key is explained in examples/megatron_gpt/config.py. GPUs are used if there are any, over NCCL; otherwise
    the CPU, over gloo. Started again, a run continues from its newest checkpoint. SIGTERM and SIGINT save and end it.
    """
    try:
        config = load_config(config_file, overrides or [])
    except (OSError, ValueError) as error:
        sys.exit(f"{config_file}: {error}")
    try:
        ranks = distributed.start(config)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"{config_file}: {error}")
    try:
        with note_signals() as stop, run_folder.held(config.run_directory, config.run.timeout_seconds):
            train(config, ranks, stop)
    except fit.OutOfMemoryError as error:  # on one rank: the others wait for it until torchrun ends them
        distributed.end_alone(fit.explain(error, config, ranks))
    except OSError as error:  # on one rank, as above: metrics could not be written, or text not be read
        distributed.end_alone(str(error))
    except distributed.TrainingError as error:  # on every rank
        if ranks.is_reporter:
            print(f"error: {error}", file=sys.stderr, flush=True)
        dist.barrier()  # torchrun ends the others as soon as one has failed
        distributed.stop()
        sys.exit(1)
    distributed.stop()


def train(config: TrainConfig, ranks: distributed.Ranks, stop: Stop) -> None:
    run, data = config.run, config.data

    # Text. Every rank reads the same samples and keeps the tokens that are its own.
    missing = None
    try:
        corpus = Corpus.find(data.paths)
        train_corpus, eval_corpus = corpus.split(data.eval_fraction, run.seed)
        train_text = PackedText(train_corpus, data.seq_length, run.seed)
        eval_text = cache(partial(PackedText, eval_corpus, data.seq_length, run.seed))
        if reading_evaluation(run):
            try:
                eval_text()  # must fill a sequence
            except ValueError as error:
                count, of = len(eval_corpus.paths), len(corpus.paths)
                raise ValueError(
                    f"data.eval_fraction={data.eval_fraction} keeps {count} of {of} documents for evaluation: {error}"
                ) from None
    except (OSError, ValueError) as error:
        missing = f"data.paths={data.paths}: {error}"
    distributed.agree(missing)
    distributed.agree_on({"training text": str(corpus)})
    parallel = config.parallel
    sharding = Sharding(
        ranks.dp_rank,
        ranks.dp_size,
        ranks.cp_rank,
        parallel.context,
        ranks.device,
        sequence_shards=parallel.tensor if parallel.sequence else 1,
    )

    def read(text: PackedText, consumed: int, ahead: int = 0) -> Generator[MicroBatch]:
        return micro_batches(text, run.micro_batch_size, consumed, sharding, data.separate_documents, ahead)

    # Model, optimizer, and where the last attempt got to.
    warning = fit.check(config, ranks)
    with fit.doing("building the model"):
        trainer = build(config, ranks)
    checkpoints = config.run_directory / "checkpoints"
    moba, sizes, notes, restored = moba_record(config), sizes_record(config), list[str](), None
    checkpoint.make_ready(checkpoints, run.resume, notes)
    if run.resume:
        restored = checkpoint.load_latest(
            checkpoints,
            trainer,
            train_corpus.fingerprint,
            moba=moba,
            sizes=sizes,
            allow_moba_change=run.allow_moba_change,
            notes=notes,
        )
    progress = restored or checkpoint.Progress(corpus=train_corpus.fingerprint)
    if restored:
        resume_schedule(trainer, config, progress.step)
    batches = read(train_text, progress.consumed_samples, ahead=READ_AHEAD)

    schedule = MoBASchedule.by_fraction(config.moba.fraction, run.steps)
    settings = moba_settings(config)
    moba_layers = sum(settings.computes_moba(n + 1, config.model.num_layers) for n in range(config.model.num_layers))

    def flops_of(step: int, consumed: int) -> int:
        lengths = sequence_lengths(train_text, consumed, run.global_batch_size, data.separate_documents)
        layers = 0 if schedule.is_full(step) else moba_layers
        return step_flops(trainer.transformer_config, settings.moba, lengths, PADDED_VOCAB_SIZE, layers).total

    peak = peak_flops(ranks.device, torch.bfloat16 if run.precision == "bf16" else torch.float32)
    flops = 0
    with closing(batches), _reporter(config, ranks, progress.step, peak) as reporter:
        reporter.say(describe(config, ranks, train_corpus))
        if warning:
            reporter.say(warning)
        reporter.model(count_parameters(trainer, ranks))
        reporter.moba(moba)
        for note in notes:
            reporter.say(note)
        if restored:
            reporter.say(f"resumed after step {progress.step}")
            if schedule.full_from is not None:
                reporter.say(f"MoBA before step {schedule.full_from}, full attention from there on")
            if progress.step >= run.steps:
                reporter.say(f"run.steps={run.steps} are done: a larger run.steps trains on")
        schedule.apply(trainer.model, max(1, progress.step))  # for what is drawn at the end, where no step is left
        for step in range(progress.step + 1, run.steps + 1):
            schedule.apply(trainer.model, step)
            try:
                result = train_step(trainer, batches, config, ranks)
            except distributed.TrainingError as error:
                raise distributed.TrainingError(f"step {step}: {error}; training stops, nothing is saved") from error
            if ranks.is_reporter:
                flops += flops_of(step, progress.consumed_samples)
            progress = checkpoint.Progress(step, progress.consumed_samples + run.global_batch_size, progress.corpus)
            if step % run.log_interval == 0 or step == run.steps:
                reporter.step(
                    step,
                    flops,
                    distributed.peak_memory(ranks.device),
                    loss=result.loss,
                    grad_norm=result.grad_norm,
                    learning_rate=result.learning_rate,
                )
                flops = 0
            if result.skipped:
                reporter.say(f"step {step}: a gradient was not finite, parameters unchanged")
            if run.eval_interval and (step % run.eval_interval == 0 or step == run.steps):
                with reporter.pause():
                    reporter.evaluation(step, evaluate(trainer, read(eval_text(), 0), config, ranks))
            if run.routing_interval and step % run.routing_interval == 0:
                with reporter.pause():
                    reporter.routing(step, routing(trainer, read(eval_text(), 0), config, ranks))
            stopped = distributed.largest(int(bool(stop.name)), ranks.device)
            due = (run.save_interval and step % run.save_interval == 0) or (run.save_last and step == run.steps)
            if due or stopped:
                with reporter.pause():
                    path = checkpoint.save(
                        checkpoints, trainer, progress, moba=moba, sizes=sizes, keep=run.keep_checkpoints
                    )
                    reporter.say(f"saved {path}")
            if stopped:
                reporter.say(f"stopped by {stop.name or 'a signal to another rank'} after step {step}")
                return

        if run.routing_picture:
            layer = last_layer_report(
                trainer, micro_batches(eval_text(), run.micro_batch_size, 0, sharding), config, ranks
            )
            picture = config.run_directory / "routing.png"
            if layer and ranks.dp_rank == 0 and ranks.tp_rank == 0:
                title = f"Layer {layer.layer_number} after {progress.step} steps"
                diagnostics.plot_block_selection(
                    layer.report, picture, layout=layer.layout, group=layer.group, title=title
                )
            if layer:
                reporter.say(f"which blocks the last layer's queries select: {picture}")
            elif ranks.is_reporter:
                picture.unlink(missing_ok=True)  # of an earlier run in this folder
                reporter.say("no layer computes MoBA at the end: no picture of the blocks that its queries select")


def _reporter(config: TrainConfig, ranks: distributed.Ranks, step: int, peak: float | None) -> Reporter:
    """The reporter of a run that has done so many steps; if one rank cannot write its files, all end."""
    tokens_per_step = config.run.global_batch_size * config.data.seq_length
    made: Reporter | str
    try:
        made = Reporter(
            config.run_directory,
            ranks.is_reporter,
            config.run.steps,
            step,
            tokens_per_step,
            dist.get_world_size(),
            peak,
        )
    except OSError as error:
        made = f"metrics cannot be written: {error}"
    distributed.agree(made if isinstance(made, str) else None)
    assert isinstance(made, Reporter)
    return made


def describe(config: TrainConfig, ranks: distributed.Ranks, corpus: Corpus) -> str:
    """The configuration, the text and where the run runs, for the top of the log."""
    parallel, text = config.parallel, corpus.total_tokens / 1e6
    pipeline = f"{parallel.pipeline}" + f" ({parallel.virtual_pipeline} chunks each)" * bool(parallel.model_chunks)
    whole = ""
    if parallel.context == 1 and ranks.dp_size > 1:
        whole = f"\nparallel.context=1: no sequence is sharded, {ranks.dp_size} model replicas train data-parallel"
    return (
        f"{OmegaConf.to_yaml(OmegaConf.structured(config))}"
        f"{len(corpus.paths):,} documents, {text:.1f} M tokens; {ranks.device.type}, "
        f"tensor {parallel.tensor} x context {parallel.context} x pipeline {pipeline} x data {ranks.dp_size}{whole}"
    )


if __name__ == "__main__":
    typer.run(main)
