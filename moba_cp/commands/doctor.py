"""`moba-cp doctor`: what is installed, what connects the GPUs and how fast, and what `auto` will choose here.

moba-cp doctor                                               # one process, all GPUs it sees; works without GPUs
torchrun --nproc-per-node 4 -m moba_cp doctor                # also collectives, shared memory and `auto`, over the ranks
"""

from __future__ import annotations

import os
from typing import Annotated, NoReturn

import torch.distributed as dist
import typer

from .checks import Finding, environment_findings, gpu_findings, version_findings
from .group_checks import group_findings, join, leave
from .values import read_heads, read_tokens

STATUS = {"ok": "  ok  ", "note": " note ", "problem": "PROBLEM"}


def doctor(
    tokens_per_gpu: Annotated[
        str, typer.Option(help="of the call that `auto` is asked about, such as 128K; at most 256 on a CPU")
    ] = "128K",
    heads: Annotated[str, typer.Option(help="query/kv heads of that call")] = "16/16",
    megabytes: Annotated[
        int, typer.Option(help="size of the transfers that are timed; at most 8 on a CPU", min=1)
    ] = 256,
) -> None:
    """Look at this machine: one line per finding, and the cure of each problem. Ends with status 1 if there is a problem."""
    try:
        pair, tokens = read_heads(heads), read_tokens(tokens_per_gpu)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    findings = [*version_findings(), *gpu_findings(megabytes << 20), *environment_findings()]
    if not started:
        for finding in findings:
            show(finding)
        print(
            "\nFor collectives and what `auto` chooses, which --heads and --tokens-per-gpu are for: torchrun --nproc-per-node "
            "<GPUs> -m moba_cp doctor"
        )
        end(findings)
    try:
        device = join()
    except (ValueError, RuntimeError, OSError) as error:
        cure = "start all ranks by torchrun --nproc-per-node <GPUs> -m moba_cp doctor, or unset RANK and WORLD_SIZE"
        fail(findings, "joining the other ranks", error, cure)
    try:
        findings += group_findings(device, tokens, pair, megabytes << 20)
        everyone: list[list[Finding]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, findings)
    except (ValueError, RuntimeError) as error:
        # Does not leave the group: over NCCL that may wait for ranks that wait for this one.
        fail(findings, "working together", error, "see the first rank that failed, and NCCL_DEBUG=WARN")
    leave()
    shown: list[Finding] = []
    for rank, of_rank in enumerate(everyone):
        for finding in of_rank:
            if finding in shown:
                continue  # the same on several ranks
            shown.append(finding)
            if int(os.environ["RANK"]) == 0 and (rank == 0 or finding.status == "problem"):
                show(finding, f"rank {rank}: " if rank else "")
    end([finding for of_rank in everyone for finding in of_rank], quiet=int(os.environ["RANK"]) != 0)


def fail(findings: list[Finding], what: str, error: Exception, cure: str) -> NoReturn:
    """Show what this rank has found, and as a problem what ended it; every rank that failed shows its own.

    Raises:
        typer.Exit: always, with status 1.
    """
    problem = Finding("problem", what, f"{type(error).__name__}: {' '.join(str(error).split())}", cure)
    for finding in [*findings, problem]:
        show(finding, f"rank {os.environ['RANK']}: ")
    end([*findings, problem])


def show(finding: Finding, where: str = "") -> None:
    """One line, and the cure below it."""
    print(
        f"[{STATUS[finding.status]}] {where}{finding.what}: {finding.text}"
        + (f" -> {finding.cure}" if finding.cure else "")
    )


def end(findings: list[Finding], quiet: bool = False) -> NoReturn:
    """The verdict as the last line and the exit status.

    Raises:
        typer.Exit: always.
    """
    problems = sum(finding.status == "problem" for finding in findings)
    if not quiet:
        print(f"\n{problems or 'no'} problem{'' if problems == 1 else 's'}")
    raise typer.Exit(1 if problems else 0)
