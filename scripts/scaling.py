"""Scaling of the layer over 1, 2, 4, ... GPUs, from a YAML file: weak and strong, every exchange, beside dense attention.

    bash scripts/scaling.sh configs/scaling/node.yaml --out docs/results/scaling.json      # all GPUs of this machine
    torchrun --nproc-per-node 4 -m scripts.scaling configs/scaling/node.yaml --out docs/results/scaling.json
    torchrun --nproc-per-node 2 -m scripts.scaling configs/scaling/tiny.yaml --device cpu --out /tmp/scaling.json

One start measures all rank counts: smaller groups work side by side. Each timed configuration is checked on the tensors that
were timed: output and dq of sampled rows against the definition in fp64 (`harness.definition`), and their bits against those
of the first exchange; beyond `harness.limits` the program ends with exit status 1. The file is written after every case. A run
that ended early keeps what it has; `--previous` takes that over and goes on. `--time-limit` ends between cases. The file's
format: `harness.sweep`, `harness.layer_case`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

if not __package__:  # started by its path, as torchrun scripts/scaling.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "scripts"
    import scripts  # noqa: F401

from .harness import dense_case, layer_case, limits, options
from .harness.records import Results, about
from .harness.sweep import PROBLEM, Case, Plan, key_of, load_plan
from .harness.teams import first_rank_says, join, make_teams
from .harness.timing import over_all

LISTS = ("results", "baselines")
QUIET = (
    *(
        "forward_ms_all",
        "forward_backward_ms_all",
        "stages_ms_rank0",
        "traffic_rank0",
        "attended_keys",
        "reason",
        "walks",
    ),
    *("lower_bound_bytes", "visible_bytes", "forward_ms_spread", "forward_backward_ms_spread", "fingerprint"),
)
FIRST_FLOPS, FIRST_OVERHEAD_S = 2e14, 4.0
"""First guesses: forward FLOPs per second and rank, and seconds of a case beside its calls (inputs, compiling, checks)."""


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of sweeps, as in configs/scaling/", exists=True)],
    out: Annotated[Path, typer.Option(help="JSON file, written by rank 0 after every case", dir_okay=False)],
    previous: Annotated[
        Path | None, typer.Option(help="take finished cases over from this file, if it is there (it may be --out)")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="seconds from the start; 0: no limit")] = 0.0,
    only: Annotated[str, typer.Option(help="measure only sweeps whose name contains this")] = "",
    device: Annotated[str, typer.Option(help="cuda; cpu tries the program over gloo")] = "cuda",
    commit: options.Commit = "",
) -> None:
    """Measure every case of the file on the ranks that torchrun started."""
    if not (time_limit >= 0 and math.isfinite(time_limit)):
        raise typer.BadParameter(f"--time-limit must be a number of seconds, 0 or more, got {time_limit}")
    clock = Clock(time_limit)
    place = join(options.device(device))
    world = dist.get_world_size()
    try:
        plan = load_plan(config, world)
        head = about(commit) | {"world_size": world, "config": config.name, "command": shown_command()}
        done = taken_over_by_all(previous, head)
    except (ValueError, OSError) as error:
        dist.destroy_process_group()
        raise typer.BadParameter(str(error)) from None
    if previous is not None and not done:
        say(f"nothing to take over from {previous}")
    cases = [case for case in plan.cases if only in case.sweep]
    writable = first_rank_says(can_write(out))
    problem = "" if writable else f"--out: {out} cannot be written"
    if not cases:
        names = "; ".join(dict.fromkeys(case.sweep for case in plan.cases)) or "none"
        more = f"; for more than {world} ranks: {', '.join(plan.left_out)}" if plan.left_out else ""
        problem = f"no sweep to measure with --only {only!r}: the file has {names}{more}"
    if problem:
        dist.destroy_process_group()
        raise typer.BadParameter(problem)
    results = Results(out if dist.get_rank() == 0 else None, head, *LISTS, quiet=QUIET)
    for name in LISTS:
        results.content[name] = [entry for entry in done if ("baseline" in entry) == (name == "baselines")]
    run(plan, cases, done, results, place, clock)
    is_first = dist.get_rank() == 0
    dist.destroy_process_group()
    if is_first:
        limits.end(limits.broken(entry for name in LISTS for entry in results.content[name]))


def can_write(path: Path) -> bool:
    """Whether a file can be made or replaced there; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return not path.is_dir()
    except OSError:
        return False


def shown_command() -> str:
    """What ran, without the folders that it ran in."""
    arguments = [Path(x).name if "/" in x and not x.startswith("configs") else x for x in sys.argv[1:]]
    return " ".join(["-m scripts.scaling", *arguments])


@dataclass
class Clock:
    """How long cases take, learned on the way.

    Attributes:
        limit: seconds from the start, 0 for none.
        slowness: of finished cases, seconds of a forward pass over seconds by FIRST_FLOPS.
        overheads: of finished cases, seconds beside their calls.
    """

    limit: float
    began: float = field(default_factory=time.monotonic)
    slowness: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)

    def expected(self, case: Case, plan: Plan) -> float:
        """Seconds that a case will take."""
        forward = case.flops() / FIRST_FLOPS * (statistics.median(self.slowness[-9:]) if self.slowness else 1.0)
        overhead = statistics.median(self.overheads[-9:]) if self.overheads else FIRST_OVERHEAD_S
        return overhead + calls_s(forward, case, plan)

    def learn(self, case: Case, plan: Plan, entry: dict[str, Any], took: float) -> None:
        """Take a finished case into account."""
        if "forward_ms" in entry:
            forward = entry["forward_ms"] / 1e3
            self.slowness.append(forward / (case.flops() / FIRST_FLOPS))
            self.overheads.append(max(0.0, took - calls_s(forward, case, plan)))

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def allows(self, seconds: float) -> bool:
        """Whether a case of so many seconds still fits."""
        return not self.limit or self.elapsed + seconds <= self.limit


def calls_s(forward: float, case: Case, plan: Plan) -> float:
    """Seconds of all calls of a case by those of a forward pass: the first one, the timed ones, and one by stage."""
    both = 4.0 * forward if case.backward else 0.0
    timed = sum(min(plan.iterations * x, max(x, plan.seconds)) for x in (forward, both))
    return timed + 2 * max(forward, both)


def run(
    plan: Plan, cases: list[Case], done: list[dict[str, Any]], results: Results, place: torch.device, clock: Clock
) -> None:
    """Measure what is not done yet, in order, as far as time allows."""
    have = {key_of(entry) for entry in done}
    todo = [case for case in cases if case.key not in have]
    say(
        f"{len(todo)} cases to measure, {len(cases) - len(todo)} taken over; left out: {', '.join(plan.left_out) or 'none'}"
    )
    teams = make_teams(case.ranks for case in todo)
    skipped = 0
    for number, case in enumerate(todo):
        expected = clock.expected(case, plan)
        if not first_rank_says(clock.allows(expected)):
            skipped += 1  # a shorter one may still fit
            continue
        began = time.monotonic()
        results.content["running"] = case.entry()
        results.write()
        entry = case.entry()
        try:
            measure = dense_case.measure if case.dense else layer_case.measure
            entry |= measure(case, teams[case.ranks], place, plan.iterations, plan.seconds)
            problem = ""
        except (
            torch.OutOfMemoryError,
            ValueError,
        ) as error:  # equal on every rank, as a rule; if not, the timeout strikes
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        if over_all(bool(problem), place):
            entry["error"] = problem or "another rank failed"
        del results.content["running"]
        if place.type == "cuda":
            torch.cuda.empty_cache()
        if "fingerprint" in entry and not case.baseline:  # a rank in no team has none
            entry |= compared(entry, results.content["results"])
        entry["commit"] = results.content["commit"]
        took = time.monotonic() - began
        entry["measured_in_s"] = round(took, 2)
        clock.learn(case, plan, entry, took)
        results.add("baselines" if case.baseline else "results", entry, took)
        left = sum(clock.expected(later, plan) for later in todo[number + 1 :])
        say(f"  {number + 1} of {len(todo)} after {clock.elapsed:.0f} s; about {left:.0f} s left")
    results.content["skipped_for_time"] = skipped
    results.write()
    say(f"done in {clock.elapsed:.0f} s; {skipped} cases skipped for want of time, {len(results.failed)} with errors")


def compared(entry: dict[str, Any], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether output and dq have the bits of the first exchange, and of one rank alone where that was measured."""
    found: dict[str, Any] = {}
    of_inputs = [r for r in earlier if "fingerprint" in r and all(r.get(x) == entry.get(x) for x in PROBLEM)]
    with_gradient = "forward_backward_ms" in entry
    of_inputs = [r for r in of_inputs if ("forward_backward_ms" in r) == with_gradient]
    first = next((r for r in of_inputs if r["ranks"] == entry["ranks"]), entry)
    found["bitwise_equal_to_first"] = first["fingerprint"] == entry["fingerprint"]
    if any(r["ranks"] != entry["ranks"] for r in of_inputs):
        others = {r["fingerprint"] for r in of_inputs if r["ranks"] != entry["ranks"]}
        found["bitwise_equal_to_other_rank_counts"] = others == {entry["fingerprint"]}
    return found


def taken_over(previous: Path | None, head: dict[str, Any]) -> list[dict[str, Any]]:
    """Finished entries of an earlier run; the case in which it ended, if it did, counts as failed.

    Raises:
        ValueError: it is of another kind, or was made on another device or another world size.
    """
    if previous is None or not previous.exists():
        return []
    try:
        content = json.loads(previous.read_text())
        made = {key: content[key] for key in ("device", "world_size", *LISTS)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{previous} is no file of scripts.scaling ({type(error).__name__}: {error})") from None
    for key in ("device", "world_size"):
        if made[key] != head[key]:
            raise ValueError(f"{previous} was made with {key} {made[key]!r}, this run has {head[key]!r}")
    done = [entry for name in LISTS for entry in content[name] if "error" not in entry]
    if "running" in content:
        done.append(content["running"] | {"error": "the run ended in this case"})
    return done


def taken_over_by_all(previous: Path | None, head: dict[str, Any]) -> list[dict[str, Any]]:
    """`taken_over` as rank 0 reads it, on every rank: rank 0 may write to that file next, before the others would read it.

    Raises:
        ValueError, OSError: as rank 0 found it, on every rank.
    """
    said: list[dict[str, Any]] | Exception = []
    if dist.get_rank() == 0:
        try:
            said = taken_over(previous, head)
        except (ValueError, OSError) as error:
            said = error
    said = first_rank_says(said)
    if isinstance(said, Exception):
        raise said
    return said


def say(text: str) -> None:
    """Rank 0 prints."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    typer.run(main)
