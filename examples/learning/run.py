"""Take the runs of a plan in order of priority, one process per rank, until all are done or the time is up.

    python -m examples.learning.run --plan configs/learning/first.yaml --corpus .cache/learning --out out --time-limit 560

`<out>/learning.json` holds every result so far and is replaced whenever one arrives. Each result names its commit and the GPUs of
its machine. `--previous` names an earlier file, whose finished runs are kept and not repeated, except those that lack a measure.
Selections of seed 0 go to `<out>/selections_<arm>.npz`.
Checkpoints of unfinished runs stay in `--work`: where that folder outlives the call, the next call resumes them, elsewhere they
begin again. On a machine without a GPU runs go one after the other. Where a run has more ranks than the machine has GPUs, its
ranks share them: the same numbers, several times as slow, so its speed is left out of the result.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.distributed import TCPStore

from .attention import phases
from .corpus import DETAILS, Corpus
from .reading import PLAN, read_yaml
from .summary import every_run, finished
from .task import Task, common_start, write_json

MARGIN_S = 20
"""Between the deadline that runs are told and the limit: time to write a checkpoint and to stop. A run is started if it should
end before its deadline, so that only a run that takes longer than others of its arm is cut."""
SHARED_SLOWDOWN = 6.0
"""How much longer a run takes, at a guess, whose ranks share GPUs: each collective waits for every rank's turn on the GPU."""
NO_LIMIT = 1e9
"""Seconds that no run takes."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    plan: Path
    corpus: Path
    out: Path
    work: Path
    previous: Path | None
    time_limit: float
    steps: int | None
    only: list[str] | None
    commit: str | None


@dataclass
class Started:
    """A run under way."""

    task: Task
    gpus: list[int]
    began: float
    expected: float
    store: TCPStore
    """Where the ranks meet, held by this process as by torchrun's agent."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    trained: bool = False


class Plan:
    """Runs to do, results so far, and what runs."""

    def __init__(self, args: Options) -> None:
        self.args, self.limit = args, time.time() + args.time_limit
        self.plan = read_yaml(args.plan, PLAN, "configs/learning/tiny.yaml")
        if args.steps:
            self.plan["optimizer"]["steps"] = args.steps
        self.config = {key: self.plan[key] for key in ("model", "data", "optimizer", "measures")}
        unknown = [r["arm"] for r in self.plan["runs"] if r["arm"] not in self.plan["arms"]]
        if unknown:
            raise ValueError(f"runs of unknown arms: {unknown}")
        arms = sorted({r["arm"] for r in self.plan["runs"]})
        if missing := sorted(set(args.only or []) - set(arms)):
            raise ValueError(f"{args.plan} has no run of {', '.join(missing)}, only of {', '.join(arms)}")
        corpus = Corpus(args.corpus)
        args.out.mkdir(parents=True, exist_ok=True)
        args.work.mkdir(parents=True, exist_ok=True)
        self.results: list[dict[str, Any]] = []
        if args.previous and args.previous.exists():
            self.results = every_run(json.loads(args.previous.read_text()))
        done = {
            (r["arm"], r["seed"])
            for r in self.results
            if (r["complete"] or r.get("diverged")) and not r.get("lacks") and r["config"] == self.config
        }
        self.waiting = [r for r in self.plan["runs"] if (r["arm"], r["seed"]) not in done]
        if args.only:
            self.waiting = [r for r in self.waiting if r["arm"] in args.only]
        self.n_gpus = torch.cuda.device_count()
        self.free = list(range(max(1, self.n_gpus)))
        self.running: list[Started] = []
        self.took: dict[str, float] = {}
        self.slowdown = 1.0
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.devices = visible.split(",") if visible else [str(i) for i in range(self.n_gpus)]
        facts, copied = args.corpus / "corpus.json", args.work / "corpus.json"
        known = copied.exists() and copied.read_bytes() == facts.read_bytes()
        if not known or not (args.work / "corpus.npy").exists():
            corpus.unpack(args.work)
            shutil.copy(facts, copied)
        self.about = {
            "commit": args.commit or head_commit(),
            "plan": str(args.plan),
            "machine_gpus": self.n_gpus,
            "corpus": {k: v for k, v in corpus.facts.items() if k not in DETAILS},
        }

    def go(self) -> None:
        while self.running or self.waiting:
            while self.start_one():
                pass
            if not self.running:
                break
            time.sleep(0.2)
            for started in list(self.running):
                self.watch(started)
        self.write()
        for run in self.waiting:
            print(f"not started: {run['arm']} seed {run['seed']}", flush=True)

    def start_one(self) -> bool:
        """Start the first waiting run that the remaining time and the free GPUs hold."""
        for run in self.waiting:
            name = f"{run['arm']}_s{run['seed']}"
            spec, work, deadline = self.plan["arms"][run["arm"]], str(self.args.work), self.limit - MARGIN_S
            task = Task(name, run["arm"], spec, run["seed"], self.config, work, work, deadline)
            cp = spec.get("cp", 1)
            wanted = min(cp, self.n_gpus) if self.n_gpus else 1
            if self.start_is_under_way(task) or time.time() + self.expected(task) > deadline:
                continue
            if wanted > len(self.free):
                return False  # it waits for GPUs; a later run does not overtake it
            self.waiting.remove(run)
            gpus, self.free = self.free[:wanted], self.free[wanted:]
            path = self.args.work / "tasks" / f"{name}.json"
            write_json(path, asdict(task))
            (self.args.work / "results" / f"{name}.json").unlink(missing_ok=True)
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            started = Started(task, gpus, time.time(), self.expected(task) / self.slowdown, store)
            for rank in range(cp):
                env = os.environ | {
                    "CUDA_VISIBLE_DEVICES": ",".join(self.devices[i] for i in gpus) if self.n_gpus else "",
                    "RANK": str(rank),
                    "WORLD_SIZE": str(cp),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHINDUCTOR_CACHE_DIR": str(self.args.work.resolve() / "inductor"),
                    "TRITON_CACHE_DIR": str(self.args.work.resolve() / "triton"),
                    "TORCHINDUCTOR_COMPILE_THREADS": "8",
                }
                if cp > self.n_gpus > 0:  # NCCL refuses two ranks of one host on one GPU
                    env |= {"NCCL_HOSTID": f"rank {rank}", "NCCL_SOCKET_IFNAME": "lo"}
                if not self.n_gpus:
                    env["OMP_NUM_THREADS"] = "1"  # tensors of a CPU run are too small for more
                command = [sys.executable, "-u", "-m", "examples.learning.train", "--task", str(path)]
                started.processes.append(subprocess.Popen(command, env=env))
            self.running.append(started)
            print(f"{self.time_left()}{name} on {gpus}", flush=True)
            return True
        return False

    def start_is_under_way(self, task: Task) -> bool:
        """Whether a run that is under way trains what this one could begin with: waiting for it is cheaper."""
        path = shared_start(task)
        return path is not None and not path.exists() and any(shared_start(s.task) == path for s in self.running)

    def expected(self, task: Task) -> float:
        """Seconds that a run takes.

        The plan says one number for all; then a run takes as long as the last of its arm, else as the longest of other arms.
        Or it says one per arm, of a run that begins after the short windows, and one for these, `short_windows`; then the
        largest ratio of a run's time to what was expected of it, if above 1, multiplies them all. `SHARED_SLOWDOWN` is for a run
        whose ranks share GPUs.
        """
        if task.spec.get("cp", 1) > self.n_gpus > 0:
            return SHARED_SLOWDOWN * self._expected_alone(task)
        return self._expected_alone(task)

    def _expected_alone(self, task: Task) -> float:
        usual = self.plan["expected_s"]
        if not isinstance(usual, dict):
            return self.took.get(task.arm, max(self.took.values(), default=usual))
        path = shared_start(task)
        short = 0 if path is not None and path.exists() else usual["short_windows"]
        return (usual[task.arm] + short) * self.slowdown

    def left(self) -> float:
        return self.limit - time.time()

    def time_left(self) -> str:
        """What is left of the time limit, to stand before a message; nothing where there is none."""
        return f"{self.left():4.0f} s left: " if self.args.time_limit < NO_LIMIT else ""

    def watch(self, started: Started) -> None:
        """Collect a run that ended; end one that is past the limit, or whose other rank died.

        A run that has trained and only measures lets go of its GPUs: the next one gets ready meanwhile.
        """
        path = self.args.work / "results" / f"{started.task.name}.json"
        if not started.trained and path.exists():  # written when training is over
            started.trained, self.free = True, sorted(self.free + started.gpus)
        codes = [p.poll() for p in started.processes]
        over = self.left() < 3 or any(c not in (None, 0) for c in codes)
        if over:
            for process in started.processes:
                process.kill()
        elif None in codes:
            return
        codes = [p.wait() for p in started.processes]
        self.running.remove(started)
        if not started.trained:
            self.free = sorted(self.free + started.gpus)
        task = started.task
        result = {"arm": task.arm, "seed": task.seed, "spec": task.spec, "config": self.config, "complete": False}
        result |= {key: self.about[key] for key in ("commit", "machine_gpus")}
        if path.exists():
            result |= json.loads(path.read_text())
        if any(codes) and "error" not in result:
            result["error"] = f"ended with {codes}"
        if result["complete"]:
            self.took[task.arm] = time.time() - started.began
            self.slowdown = max(self.slowdown, self.took[task.arm] / started.expected)
        before = [r for r in self.results if (r["arm"], r["seed"]) == (task.arm, task.seed)]
        if result["complete"] or not any(r["complete"] for r in before):  # else what was measured in part is kept
            self.results = [r for r in self.results if r not in before] + [result]
        selections = path.with_suffix(".npz")
        if selections.exists():
            shutil.copy(selections, self.args.out / f"selections_{task.arm}.npz")
        self.write()
        shown = {k: result.get(k) for k in ("complete", "diverged", "eval_loss", "tokens_per_second", "error")}
        print(f"{self.time_left()}{task.name} {shown}", flush=True)

    def write(self) -> None:
        """`runs` came to their end and were measured; `unfinished` are all others."""
        runs = finished({"runs": self.results})
        unfinished = [r for r in self.results if r not in runs]
        write_json(self.args.out / "learning.json", self.about | {"runs": runs, "unfinished": unfinished})


def shared_start(task: Task) -> Path | None:
    """`common_start`; None for an arm that is no valid one, which its run will say."""
    try:
        return common_start(task, phases(task.spec, task.config["model"]["layers"]))
    except ValueError:
        return None


def head_commit() -> str:
    """The commit of the working tree, or "unknown" outside one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main(
    plan: Annotated[Path, typer.Option(help="YAML file of arms and runs", exists=True, dir_okay=False)],
    corpus: Annotated[Path, typer.Option(help="folder of corpus.json and corpus.xz")] = Path(".cache/learning"),
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("runs/learning"),
    work: Annotated[Path, typer.Option(help="caches, checkpoints, logs")] = Path(".cache/learning/work"),
    previous: Annotated[Path | None, typer.Option(help="results to go on from")] = None,
    time_limit: Annotated[float, typer.Option(help="seconds", show_default="none")] = NO_LIMIT,
    steps: Annotated[int | None, typer.Option(help="instead of the plan's", min=1)] = None,
    only: Annotated[list[str] | None, typer.Option(help="arm to run; the others wait for another call")] = None,
    commit: Annotated[str | None, typer.Option(help="recorded in the results where git does not know it")] = None,
) -> None:
    """Take the runs of a plan in order of priority until all are done or the time is up."""
    try:
        runs = Plan(Options(plan, corpus, out, work, previous, time_limit, steps, only, commit))
    except (ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    runs.go()


if __name__ == "__main__":
    typer.run(main)
