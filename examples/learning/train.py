"""One run: train a model with an arm's attention, measure it, write the result.

Started by `examples.learning.run`, one process per rank; `--task` names a JSON file with everything the run needs. Results go to
`<work>/results/<name>.json` (and `.npz` for selections), a checkpoint of an unfinished run to `<work>/checkpoints`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import typer
from torch import Tensor

from moba_cp import SequenceLayout

from . import measure
from .attention import Phase, check, phases
from .corpus import Corpus
from .model import GPT, Sizes
from .needles import ASKED, TEXT
from .optimizers import learning_rate_share, optimizers
from .task import Task, common_start, phase_at, write_json
from .windows import Batches, data_order, lengths_of_steps, pairs_of, weights_of

ANSWERS_EVERY = 20
"""Steps over which the loss of answers is averaged in the result."""
MEASURES = ("held-out loss", "recorded selections", "retrieval")
"""What follows training, in order. `lacks` of a result names those that an error or the time limit prevented."""


class Run:
    """Model, optimizer and data of a run."""

    def __init__(self, task: Task) -> None:
        self.task, self.config = task, task.config
        self.began = time.time()
        self.cp = task.spec.get("cp", 1)
        self.group, self.rank = None, 0
        cuda = torch.cuda.is_available()
        self.gpus = min(self.cp, torch.cuda.device_count()) if cuda else self.cp
        if self.cp > 1:
            self.rank = int(os.environ["RANK"])
            if cuda:
                torch.cuda.set_device(self.rank % self.gpus)
            dist.init_process_group("nccl" if cuda else "gloo", rank=self.rank, world_size=self.cp)
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        data, optimizer = self.config["data"], self.config["optimizer"]
        self.length, self.batch, self.steps = data["length"], data["batch"], optimizer["steps"]
        sizes = Sizes(**self.config["model"])
        self.corpus = Corpus(Path(task.corpus))
        if self.corpus.facts["vocabulary"] != sizes.vocabulary:
            raise ValueError(f"vocabulary is {sizes.vocabulary}, the corpus has {self.corpus.facts['vocabulary']}")
        self.phases = phases(task.spec, sizes.layers)
        self.tokens = torch.from_numpy(self.corpus.tokens.astype(np.int32)).to(self.device)
        dtype = torch.bfloat16 if cuda else torch.float32
        kinds = dict.fromkeys(spec for phase in self.phases for spec in phase.layers)
        self.errors = {str(s): check(s, self.device, dtype, sizes.heads, sizes.kv_heads, sizes.head_dim) for s in kinds}
        self.model = GPT(sizes, task.seed, compiled=cuda, dtype=dtype)
        self.init_hash = self.model.weights_hash()
        self.model.to(self.device)
        self.optimizers = optimizers(self.model, optimizer)
        self.tokens_per_step = self.batch * self.length
        self.batches = [self._batches(*each) for each in lengths_of_steps(data, self.steps)]
        self.weights = torch.tensor(weights_of(data), device=self.device) if "pairs" in data else None
        self.curve, self.norms, self.answers = torch.full((3, self.steps), math.nan, device=self.device)
        self.step, self.train_seconds, self.timed_steps = 0, 0.0, 0
        self.routing: list[dict[str, Any]] = []
        self.recorded: dict[str, Any] = {}
        self.diverged = False
        self.began_from: str | None = None

    @property
    def checkpoint(self) -> Path:
        return Path(self.task.work) / "checkpoints" / f"{self.task.name}.pt"

    @property
    def common_start(self) -> Path | None:
        """`common_start` of the task; a run over several ranks begins from it and does not write it."""
        path = common_start(self.task, self.phases)
        return path if path is not None and (self.cp == 1 or path.exists()) else None

    def phase(self, step: int) -> Phase:
        return phase_at(self.phases, self.steps, step)

    def _batches(self, first: int, steps: int, length: int) -> Batches:
        windows = self.tokens_per_step // length
        starts = data_order(self.corpus, length, windows * steps, self.task.seed).reshape(steps, windows)
        cu_seqlens = [i * length for i in range(windows + 1)]
        make = SequenceLayout.contiguous if self.cp == 1 else SequenceLayout.zigzag
        layout = make(cu_seqlens, self.cp)
        pairs = pairs_of(self.config["data"], self.corpus, length, windows * steps, self.task.seed)
        return Batches(first, length, starts, layout, layout.local_indices(self.rank).to(self.device), pairs)

    def train(self) -> bool:
        """Train to the last step; False where the deadline came first."""
        self._load()
        measured = {round(share * self.steps) for share in self.config["measures"]["routing_at"]}
        long = self.batches[-1].first  # timed alone
        clock, clock_step = None, 0
        for step in range(self.step, self.steps):
            self._train_step(step)
            self.step = step + 1
            if clock is None and step >= long + 5:
                self._wait()
                clock, clock_step = time.time(), self.step
            if self.step in measured and self.cp == 1:
                self._pause(clock, clock_step)
                self._measure_routing()
                self._wait()
                clock, clock_step = None if clock is None else time.time(), self.step
            if long and self.step == long:
                print(
                    f"{self.task.name}: {long} steps of short windows after {time.time() - self.began:.1f} s",
                    flush=True,
                )
            if self.step == long and self.common_start and not self.common_start.exists():
                self._save(self.common_start)
            if self.step % 25 == 0:
                if not math.isfinite(float(self.curve[step])):  # waits for the GPU
                    self.diverged = True
                    break
                if self._late():
                    self._pause(clock, clock_step)
                    self._save(self.checkpoint)
                    return False
        self._pause(clock, clock_step)
        return True

    def _late(self) -> bool:
        """Whether the deadline has come, decided on the first rank for all."""
        late = torch.tensor([time.time() > self.task.deadline], device=self.device, dtype=torch.int32)
        if self.cp > 1:
            dist.broadcast(late, 0)
        return bool(late.item())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _pause(self, clock: float | None, first: int) -> None:
        """Add the time since `clock` to the time of training."""
        self._wait()
        if clock is not None:
            self.train_seconds += time.time() - clock
            self.timed_steps += self.step - first

    def _train_step(self, step: int) -> None:
        optimizer = self.config["optimizer"]
        batches = [each for each in self.batches if step >= each.first][-1]
        kinds = None
        if batches.pairs is None:
            inputs, targets = measure.window_batch(self.tokens, batches.starts[step - batches.first], batches.length)
        else:
            rows, kinds_of_rows = (self._sent(x) for x in batches.with_pairs(self.corpus, step))
            inputs, targets, kinds = rows[:, :-1].flatten(), rows[:, 1:].flatten(), kinds_of_rows[:, 1:].flatten()
            counts = torch.stack([(kinds == kind).sum() for kind in (TEXT, ASKED)])
            kinds = kinds[batches.share]
        inputs, targets = inputs[batches.share], targets[batches.share]
        x = self.model.hidden(inputs, self.phase(step).layers, batches.layout, batches.length, group=self.group)
        losses = self.model.losses(x, targets)
        weighted = losses if kinds is None else losses * self.weights[kinds]
        loss = weighted.sum() / self.tokens_per_step
        loss.backward()
        if kinds is None:
            shown = loss.detach().view(1)
        else:  # the mean loss of text, and of answers that the window tells
            shown = torch.stack([(losses.detach() * (kinds == kind)).sum() for kind in (TEXT, ASKED)]) / counts
        if self.cp > 1:
            gradients = [w.grad for w in self.model.parameters()]
            flat = torch.cat([shown.float(), *[g.flatten() for g in gradients]])
            dist.all_reduce(flat)
            shown, *parts = flat.split([shown.numel(), *[g.numel() for g in gradients]])
            for g, part in zip(gradients, parts):
                g.copy_(part.view_as(g))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), optimizer["clip"], foreach=True)
        for each in self.optimizers:
            for group in each.param_groups:
                group["lr"] = group["peak_lr"] * learning_rate_share(optimizer, step)
            each.step()
            each.zero_grad(set_to_none=True)
        self.curve[step], self.norms[step] = shown[0], norm
        if kinds is not None:
            self.answers[step] = shown[1]

    def _sent(self, values: np.ndarray) -> Tensor:
        """int64 on the device; the copy does not wait for what the GPU has to do."""
        if self.device.type == "cuda":
            return torch.from_numpy(values.astype(np.int32)).pin_memory().to(self.device, non_blocking=True).long()
        return torch.from_numpy(values.astype(np.int64))

    def _measure_routing(self) -> None:
        layers = self.phase(self.step - 1).layers
        if all(spec.kind != "moba" for spec in layers):
            return
        starts = self.corpus.windows(self.length, evaluation=True)[: self.batch]
        inputs, _ = measure.window_batch(self.tokens, starts, self.length)
        facts, selections = measure.routing(self.model, layers, inputs, self.length)
        self.routing += [{"step": self.step, **fact} for fact in facts]
        chosen = self.config["measures"]["recorded_layers"]
        self.recorded = {f"layer_{f['layer']}": s for f, s in zip(facts, selections) if f["layer"] in chosen}
        block_size = next(spec.block_size for spec in layers if spec.kind == "moba")  # one for all layers of a phase
        self.recorded |= {"block_size": block_size, "kv_heads": self.model.sizes.kv_heads, "step": self.step}

    def _save(self, path: Path) -> None:
        if self.rank:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [each.state_dict() for each in self.optimizers],
            "curve": self.curve,
            "norms": self.norms,
            "answers": self.answers,
            "step": self.step,
            "seconds": self.train_seconds,
            "timed": self.timed_steps,
            "routing": self.routing,
            "hashes": self._hashes(),
        }
        part = path.with_suffix(f".{self.task.name}")  # other runs look for `path`
        torch.save(state, part)
        part.replace(path)

    def _load(self) -> None:
        path = next((x for x in (self.checkpoint, self.common_start) if x is not None and x.exists()), None)
        if path is None:
            return
        self.began_from = path.stem
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["hashes"] != self._hashes():
            raise ValueError(f"{path} is of other data or weights: {state['hashes']} != {self._hashes()}")
        self.model.load_state_dict(state["model"])
        for each, saved in zip(self.optimizers, state["optimizers"], strict=True):
            each.load_state_dict(saved)
        self.curve, self.norms, self.answers = state["curve"], state["norms"], state["answers"]
        self.step, self.routing = state["step"], state["routing"]
        self.train_seconds, self.timed_steps = state["seconds"], state["timed"]

    def _hashes(self) -> dict[str, str]:
        return {
            "data": self.corpus.facts["fingerprint"],
            "order": hashlib.sha256(b"".join(x.digest(self.corpus) for x in self.batches)).hexdigest(),
            "init": self.init_hash,
            "config": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
        }

    def result(self, complete: bool) -> dict[str, Any]:
        """Everything the run says about itself; measures of a complete run included."""
        curve = self.curve[: self.step].double().cpu().numpy()
        finite = bool(np.isfinite(curve).all())
        if finite and self.step > 100:
            self.diverged |= bool(curve[-20:].mean() > curve[80:100].mean() + 0.1)
        # Ranks that share a GPU wait for each other's turns on it: their time says nothing about attention.
        timed = self.gpus == self.cp and self.timed_steps > 0
        rate = self.timed_steps * self.tokens_per_step / self.train_seconds if timed else None
        cuda = self.device.type == "cuda"
        result: dict[str, Any] = {
            "arm": self.task.arm,
            "seed": self.task.seed,
            "complete": complete and not self.diverged,
            "diverged": self.diverged or not finite,
            "parameters": sum(w.numel() for w in self.model.parameters()),
            "steps": self.step,
            "tokens": self.step * self.tokens_per_step,
            "spec": self.task.spec,
            "config": self.config,
            "began_from": self.began_from,
            "hashes": self._hashes(),
            "attention_check": {k: round(v, 5) for k, v in self.errors.items()},
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "gpus": self.gpus,
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "tokens_per_second": rate,
            "seconds_per_step": self.train_seconds / self.timed_steps if timed else None,
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "loss_curve": [round(float(x), 4) if math.isfinite(x) else None for x in curve],
            "gradient_norms": [
                round(x, 3) if math.isfinite(x) else None for x in self.norms[: self.step : 10].double().cpu().tolist()
            ],
            "routing": self.routing,
        }
        if self.weights is not None:
            sentences, every = self.corpus.sentences, min(ANSWERS_EVERY, self.step or 1)
            means = self.answers[: self.step // every * every].view(-1, every).double().nanmean(1).cpu().tolist()
            result["pairs"] = {
                "fingerprint": sentences.fingerprint,
                "names": len(sentences.questions),
                "weights": self.weights.tolist(),
                "answer_curve_every": every,
                "answer_curve": [round(x, 3) if math.isfinite(x) else None for x in means],
            }
        return result

    def measures(self) -> dict[str, Any]:
        """Held-out loss and retrieval of the trained model, on one rank."""
        layers, settings = self.phase(self.steps - 1).layers, self.config["measures"]
        found = measure.held_out(
            self.model, layers, self.tokens, self.corpus, self.length, self.batch, settings["eval_windows"]
        )
        return found

    def retrieval(self) -> list[dict[str, Any]]:
        settings = self.config["measures"]
        trials = settings["retrieval_trials"]
        return measure.retrieval(
            self.model,
            self.phase(self.steps - 1).layers,
            self.tokens,
            self.corpus,
            trained_length=self.length,
            lengths=settings["retrieval_lengths"],
            trials=trials if isinstance(trials, list) else [trials] * len(settings["retrieval_lengths"]),
            needles=tuple(settings.get("retrieval_needles", (0, 1, 4))),
            most_tokens=max(self.batch * self.length, max(settings["retrieval_lengths"])),
        )


def execute(task: Task) -> None:
    """The run from start to end. What fails is in the result; what was measured before stays."""
    path = Path(task.work) / "results" / f"{task.name}.json"
    result: dict[str, Any] = {"arm": task.arm, "seed": task.seed, "spec": task.spec, "complete": False}
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = Run(task)
        print(
            f"{task.name}: ready after {time.time() - run.began:.0f} s, attention within {max(run.errors.values()):.2%}",
            flush=True,
        )
        done = run.train()
        result = run.result(done)
        if rank == 0:
            measured = done and not run.diverged
            if measured:
                result["lacks"] = list(MEASURES)
            write_json(path, result)
            speed = result["tokens_per_second"]  # None on a CPU, and where ranks share a GPU
            print(f"{task.name}: {run.step} steps" + (f", {speed} tokens/s" if speed else ""), flush=True)
            if measured:
                result |= run.measures()
                result["lacks"].remove("held-out loss")
                write_json(path, result)
                if run.recorded and task.seed == 0:
                    np.savez_compressed(path.with_suffix(".npz"), **run.recorded)
                result["lacks"].remove("recorded selections")
                result["retrieval"] = run.retrieval()
                del result["lacks"]
                run.checkpoint.unlink(missing_ok=True)
        result["wall_seconds"] = time.time() - run.began
    except Exception as error:  # the result must say so; other runs go on
        result["error"] = f"{type(error).__name__}: {error}"[:2000]
        traceback.print_exc()
    if rank == 0:
        write_json(path, result)
    if dist.is_initialized():
        dist.destroy_process_group()


def main(
    task: Annotated[Path, typer.Option(help="JSON file of the fields of `Task`", exists=True, dir_okay=False)],
) -> None:
    """Execute one run."""
    execute(Task(**json.loads(task.read_text())))


if __name__ == "__main__":
    typer.run(main)
