"""Time two or more commits of this package in turns, on one GPU or several, and compare the bits of what they compute.

    git worktree add /tmp/before 1c91dde
    python -m scripts.compare_versions before=/tmp/before after=. --out docs/results/versions.json
    python -m scripts.compare_versions before=/tmp/before after=. --ranks 2 --out docs/results/versions_2.json

A version is a checkout's folder. Each runs in processes of its own, one per rank, which stay for the whole run. In every turn
each case is timed in all versions, in a new random order: a machine that grows slower does so for all. Ratios are those of one
turn's times to the first version's. Where the host is the bound, as in calls of 8K tokens, a version that was named first was
faster than an equal one named second: run such cases in both orders. `scripts.bench_kernels` and `scripts.scaling` measure one
commit more closely.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .harness import options
from .harness.records import Results, about, git
from .harness.version_rank import MODES

RANK = Path(__file__).parent / "harness" / "version_rank.py"
TABLES = (
    "8192:16/16:128:8,8192:16/16:512:8,32768:16/16:128:8,32768:16/16:512:8,131072:16/16:128:8,131072:16/16:512:8,"
    + ("131072:16/16:4096:12,131072:32/8:128:8,131072:32/8:512:8,131072:32/8:4096:12")
)
"""Rows of the table of kernels, those of 512K tokens left out."""


@dataclass(frozen=True)
class Case:
    """One layer: `tokens` in all ranks together."""

    tokens: int
    q_heads: int
    kv_heads: int
    block_size: int
    topk: int
    comm: str


def main(
    versions: Annotated[list[str], typer.Argument(help="NAME=FOLDER of each; the others are compared with the first")],
    out: Annotated[Path, typer.Option(help="JSON file, written after every turn", dir_okay=False)],
    cases: Annotated[str, typer.Option(help="tokens:q/kv heads:block size:topk, comma-separated")] = TABLES,
    comm: Annotated[str, typer.Option(help="exchange, where there are several ranks")] = "auto",
    ranks: Annotated[int, typer.Option(help="processes, one per GPU", min=1)] = 1,
    turns: Annotated[int, typer.Option(help="times of each case and version", min=1)] = 9,
    seconds: Annotated[float, typer.Option(help="of one case's forward or forward+backward in one turn")] = 0.4,
    limit: Annotated[float, typer.Option(help="seconds after which no further turn begins")] = 600.0,
    device: Annotated[str, typer.Option(help="cuda; cpu tries the program")] = "cuda",
    commit: options.Commit = "",
) -> None:
    """Compare `versions`."""
    place = options.device(device)
    folders = {name: checkout(folder) for name, folder in (named(version) for version in versions)}
    if len(folders) < max(2, len(versions)):
        raise typer.BadParameter(f"expected at least two versions of different names, got {', '.join(versions)}")
    if place.type == "cuda" and torch.cuda.device_count() < ranks:
        raise typer.BadParameter(f"--ranks {ranks} needs as many GPUs, {torch.cuda.device_count()} are visible")
    wanted = [case_of(text, comm) for text in cases.split(",")]
    head = about(commit, "" if device == "cuda" else "CPU") | {
        "ranks": ranks,
        "versions": {name: commit_of(folder) for name, folder in folders.items()},
    }
    results = Results(out, head, "results")
    with tempfile.TemporaryDirectory() as scratch:
        running = [Version(name, folder, device, ranks, Path(scratch)) for name, folder in folders.items()]
        try:
            measure(running, wanted, results, turns, seconds, limit)
        finally:
            for version in running:
                version.close()


def measure(
    running: list[Version], wanted: list[Case], results: Results, turns: int, seconds: float, limit: float
) -> None:
    """Bits of every case, then its times in turns; the file is written after every turn."""
    began = time.perf_counter()
    for version in running:  # all at once: their kernels are compiled beside each other
        for case in wanted:
            version.send({"what": "bits", "case": asdict(case)})
    hashes = {version.name: [version.receive() for _ in wanted] for version in running}
    names = [version.name for version in running]
    times: list[dict[str, list[ModeTimes]]] = [{name: [] for name in names} for _ in wanted]
    for number, case in enumerate(wanted):
        first = hashes[names[0]][number]
        same = {
            name: {
                what: all(x[what] == y[what] for x, y in zip(first, hashes[name][number], strict=True))
                for what in first[0]
            }
            for name in names
        }
        results.content["results"].append(asdict(case) | {"same_bits": same})
    shuffle = random.Random(0)
    for turn in range(turns):
        if turn and time.perf_counter() - began > limit:
            break
        for number, case in enumerate(wanted):
            for version in shuffle.sample(running, len(running)):
                version.send({"what": "times", "case": asdict(case), "seconds": seconds})
                times[number][version.name].append(slowest(version.receive()))
            results.content["results"][number] |= summary(times[number], names[0])
        results.write()
        print(f"turn {turn + 1} of {turns}, {time.perf_counter() - began:.0f} s", flush=True)
    for entry in results.content["results"]:
        print(json.dumps(entry))


ModeTimes = dict[str, dict[str, float]]
"""What `harness.version_rank.time_modes` returns."""


def slowest(ranks: list[ModeTimes]) -> ModeTimes:
    """Of each time the largest of any rank."""
    return {mode: {name: max(rank[mode][name] for rank in ranks) for name in ranks[0][mode]} for mode in MODES}


def summary(times: dict[str, list[ModeTimes]], first: str) -> dict[str, Any]:
    """Per version, mode and kind of time: quartiles of the milliseconds, and of their ratios to the first version's."""
    found: dict[str, Any] = {}
    for name, turns in times.items():
        found[name] = {
            mode: {
                kind: quartiles([turn[mode][kind] for turn in turns])
                | {
                    "ratio": quartiles(
                        [x[mode][kind] / y[mode][kind] for x, y in zip(turns, times[first], strict=True)]
                    )
                }
                for kind in ("ms", "host_ms")
            }
            for mode in MODES
        }
    return {"turns": len(times[first]), "times": found}


def quartiles(values: list[float]) -> dict[str, float]:
    """All three; one value is each of them."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: round(x, 4) for name, x in zip(("quartile_1", "median", "quartile_3"), found, strict=True)}


class Version:
    """The processes of one version, one per rank, which wait for requests."""

    def __init__(self, name: str, folder: Path, device: str, ranks: int, scratch: Path) -> None:
        self.name = name
        # A cache of its own: versions whose kernels have the same source but other launches would share compiled ones.
        environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(scratch / f"triton-{name}")}
        # run_path, so that the folder of the file stays off the path
        start = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        store = scratch / f"store-{name}"
        self.logs = [scratch / f"{name}-{rank}.log" for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            command = [sys.executable, "-c", start, str(RANK), device, str(rank), str(ranks), str(store)]
            with log.open("w") as errors:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        cwd=scratch,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                    )
                )
        for answer in self.receive():
            if not Path(answer["package"]).resolve().is_relative_to(folder):
                raise SystemExit(f"{name} imports moba_cp from {answer['package']}, not from {folder}")

    def send(self, request: dict[str, Any]) -> None:
        """To every rank; `receive` gets the answers, or says which process has ended."""
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()

    def receive(self) -> list[dict[str, Any]]:
        """One answer of each rank.

        Raises:
            SystemExit: a process has ended; with the end of what each that has ended printed.
        """
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait()  # others may have ended before, and why is in their logs
                ended = [(p.poll(), log.read_text()[-2000:]) for p, log in zip(self.processes, self.logs, strict=True)]
                raise SystemExit(
                    "\n".join(
                        f"{self.name} ended with {status}:\n{text}" for status, text in ended if status is not None
                    )
                )
            answers.append(json.loads(line))
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def named(version: str) -> tuple[str, str]:
    """ "before=/tmp/before" -> ("before", "/tmp/before")."""
    name, separator, folder = version.partition("=")
    if not (name and separator and folder):
        raise typer.BadParameter(f"expected NAME=FOLDER, got {version!r}")
    return name, folder


def checkout(folder: str) -> Path:
    """The folder of a version, which holds the package."""
    path = Path(folder).resolve()
    if not (path / "moba_cp" / "__init__.py").is_file():
        raise typer.BadParameter(f"{folder} holds no moba_cp")
    return path


def commit_of(folder: Path) -> str:
    """The commit that a checkout holds, with "-dirty" if files differ from it; "" where the folder is no checkout of its own."""
    if git(folder, "rev-parse", "--show-toplevel") != str(folder):
        return ""
    return git(folder, "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*") or ""


def case_of(text: str, comm: str) -> Case:
    """ "8192:16/16:128:8" -> that case."""
    try:
        tokens, heads, block_size, topk = text.split(":")
        (q_heads, kv_heads) = map(int, heads.split("/"))
        return Case(int(tokens), q_heads, kv_heads, int(block_size), int(topk), comm)
    except ValueError:
        raise typer.BadParameter(f"expected tokens:q/kv heads:block size:topk, got {text!r}") from None


if __name__ == "__main__":
    typer.run(main)
