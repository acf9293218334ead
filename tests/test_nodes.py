"""Two hosts with two processes each: namespaces joined by a veth pair (`tests.nodes`), gloo between them.

Skipped with the reason where such namespaces are not permitted; root in a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN. To
run this file alone: `python -m pytest tests/test_nodes.py`.

A cut link drops packets and closes no socket, so gloo finds out by its timeout alone. The training run is `heavy`.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import fields
from datetime import timedelta
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.parallel.exchanges import EXCHANGES
from moba_cp.parallel.splits import COMMS, HYBRIDS
from tests.nodes import Nodes, why_not
from tests.ranks import RankOutcome

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

ROOT = Path(__file__).resolve().parents[1]
BETWEEN_HOSTS = [comm for comm in COMMS if comm in ("auto", "a2a") or not EXCHANGES[HYBRIDS.get(comm, comm)].same_host]
GROUP_TIMEOUT = 6.0
MARGIN = 5.0  # seconds after the group's timeout
EXIT = (
    15.0  # seconds for the end of an interpreter that was forked with all its imports; on a busy machine this is slow
)
PORT = 29400  # in the first host's own network


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[Nodes]:
    with Nodes(hosts=2, processes=2) as nodes:
        yield nodes


def readme_example() -> str:
    """The README's example, with fewer tokens, and `comm` in the call."""
    found = re.search(r"```python\n(# torchrun.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    code = found[1]
    for old, new in (
        ("[0, 3000, 8192]", "[0, 300, 820]"),
        ("block_size=512", "block_size=64"),
        ("layout=layout)", "layout=layout, comm=comm)"),
        ("return_report=True)", "return_report=True, comm=comm)"),
    ):
        assert old in code
        code = code.replace(old, new)
    return code


def examples(rank: int, size: int, code: str, comms: list[str]) -> dict[str, tuple[list[torch.Tensor], str, str]]:
    """By comm: out and gradients, transport, and what the example printed."""
    found = {}
    alike = {"MOBA_CP_NODE": str(rank // 2)}  # so that heads are split alike on one host
    for number, comm in enumerate(comms):
        # Another port each time: a rank may be late to leave the store before.
        os.environ["MASTER_PORT"] = str(PORT + number)
        torch.manual_seed(rank)
        names: dict[str, Any] = {"comm": comm}
        with redirect_stdout(StringIO()) as printed, mock.patch.dict(os.environ, alike):
            exec(code, names)
        tensors = [names["out"], *(names[name].grad for name in "qkv")]
        found[comm] = ([x.detach() for x in tensors], names["report"].transport, printed.getvalue())
    return found


def test_the_readme_example_gives_the_same_numbers_on_two_hosts_as_on_one(two_hosts: Nodes) -> None:
    """Bitwise: the ranks and what they do are the same. `auto` takes what needs no shared memory, and says so."""
    apart = two_hosts.run(examples, readme_example(), BETWEEN_HOSTS)
    with Nodes(hosts=1, processes=4) as one_host:
        together = one_host.run(examples, readme_example(), BETWEEN_HOSTS)
    for comm in BETWEEN_HOSTS:
        for rank in range(4):
            tensors, transport, printed = apart[rank][comm]
            assert transport in (("fetch", "ring", "all_gather") if comm == "auto" else (comm,))
            assert transport == together[rank][comm][1]
            assert (f"{transport}, 4 ranks" in printed) == (rank == 0)
            for x, y in zip(tensors, together[rank][comm][0], strict=True):
                assert torch.equal(x, y), (comm, rank)


def join(limit: float, port: int) -> None:
    os.environ["MASTER_PORT"] = str(port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=limit))


def attend(rank: int, size: int, comm: str) -> moba_cp.report.MoBAReport:
    layout = SequenceLayout.zigzag([0, 100, 256], size)
    qkv = [torch.randn(layout.local_tokens(rank), h, 8, requires_grad=True) for h in (4, 2, 2)]
    out, report = moba_cp.moba_attention(*qkv, MoBAConfig(16, 3), layout=layout, comm=comm, return_report=True)
    out.sum().backward()
    return report


def refused_pull(rank: int, size: int) -> tuple[str, str, str]:
    """The error of `pull`, and what `auto` takes in the same group afterwards, with its reason."""
    join(20.0, PORT + 50)
    try:
        attend(rank, size, "pull")
        error = "none"
    except ValueError as refused:
        error = str(refused)
    report = attend(rank, size, "auto")
    dist.destroy_process_group()
    return error, report.transport, report.reason


def test_pull_is_refused_with_both_hosts_names_on_all_ranks(two_hosts: Nodes) -> None:
    for error, transport, reason in two_hosts.run(refused_pull):
        hosts = r"host \(pull is for ranks of one\): rank 0 has node0 \(\S+\), rank 2 has node1 \(\S+\)"
        assert re.search(hosts, error), error
        assert transport != "pull"
        assert "no shared memory" in reason


def progress(folder: str, rank: int) -> Path:
    return Path(folder) / f"progress{rank}"


def attend_for_ever(rank: int, size: int, comm: str, folder: str) -> None:
    join(GROUP_TIMEOUT, PORT)
    while True:
        attend(rank, size, comm)
        progress(folder, rank).touch()


def wait_until(ready: Callable[[], bool], nodes: Nodes, limit: float) -> None:
    while not ready():
        assert nodes.seconds() < limit, "the ranks did not get going"
        time.sleep(0.05)


def cut(nodes: Nodes) -> float:
    """Cut the link; when, in seconds since `start`."""
    nodes.cut()
    return nodes.seconds()


def ended(nodes: Nodes, cut_at: float) -> list[RankOutcome]:
    """How the ranks ended after the cut: all of them by an exception, and in time."""
    outcomes = nodes.outcomes(cut_at + GROUP_TIMEOUT + MARGIN + EXIT)
    for outcome in outcomes:
        assert not outcome.timed_out, outcome
        assert outcome.exitcode == 1, outcome
        # At least half of the timeout: a collective may have begun before the cut, or before this process read the clock.
        assert GROUP_TIMEOUT / 2 < outcome.seconds - cut_at < GROUP_TIMEOUT + MARGIN, outcome
    return outcomes


def test_a_cut_link_ends_attention_on_every_rank(tmp_path: Path) -> None:
    """Two pairs of hosts, one per exchange, side by side: most of the time is the group's timeout."""
    with contextlib.ExitStack() as stack:
        pairs = {comm: stack.enter_context(Nodes(hosts=2, processes=2)) for comm in ("fetch", "ring")}
        for comm, nodes in pairs.items():
            (tmp_path / comm).mkdir()
            nodes.start(attend_for_ever, comm, str(tmp_path / comm))
        for comm, nodes in pairs.items():
            files = [progress(str(tmp_path / comm), rank) for rank in range(4)]
            wait_until(lambda: all(file.exists() for file in files), nodes, limit=120.0)  # noqa: B023
        with ThreadPoolExecutor() as pool:
            outcomes = [x for some in pool.map(ended, pairs.values(), map(cut, pairs.values())) for x in some]
    assert not any(nodes.left_behind() for nodes in pairs.values())
    for outcome in outcomes:
        assert isinstance(outcome.exception, RuntimeError)
        assert re.search(rf"rank {outcome.rank} of 4 waited for the .*it did not come", str(outcome.exception))


def train(rank: int, size: int, folder: str, overrides: list[str]) -> None:
    """The example trainer, with a group timeout: by its own setting, if it has one."""
    from examples.megatron_gpt import train
    from examples.megatron_gpt.config import RunConfig

    os.environ["MASTER_PORT"] = str(PORT)
    os.chdir(folder)
    if "timeout_seconds" in {field.name for field in fields(RunConfig)}:
        overrides = [*overrides, f"run.timeout_seconds={GROUP_TIMEOUT}"]
    else:

        def limited(make: Callable[..., Any]) -> Callable[..., Any]:
            return wraps(make)(lambda *a, **k: make(*a, **k | {"timeout": timedelta(seconds=GROUP_TIMEOUT)}))

        dist.init_process_group, dist.new_group = limited(dist.init_process_group), limited(dist.new_group)
        torch.distributed.new_group = dist.new_group
    train.main(ROOT / "configs" / "quickstart.yaml", overrides)


@pytest.mark.heavy
def test_a_cut_link_ends_training_on_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text("A link is cut while these words are learned. " * 400)
    overrides = [
        f"data.paths=[{tmp_path}/text]",
        f"run.directory={tmp_path}/runs",
        "run.steps=100000",
        "run.eval_interval=0",
        "run.global_batch_size=1",
        "model.hidden_size=32",
        "model.ffn_hidden_size=64",
        "data.seq_length=256",
        "moba.block_size=24",
        "parallel.context=4",
        "run.device=cpu",
    ]
    metrics = tmp_path / "runs" / "quickstart" / "metrics.jsonl"

    def ready() -> bool:
        return metrics.exists() and len(metrics.read_text().splitlines()) > 2

    with Nodes(hosts=2, processes=2, preload=["examples.megatron_gpt.train"]) as nodes:
        nodes.start(train, str(tmp_path), overrides)
        wait_until(ready, nodes, limit=120.0)
        outcomes = ended(nodes, cut(nodes))
    assert not nodes.left_behind()
    # Megatron's own collectives give gloo's words; those of attention are named.
    waited = r"waited for the .*it did not come|Timed out waiting \d+ms for (send|recv) operation"
    for outcome in outcomes:
        assert isinstance(outcome.exception, RuntimeError)
        assert re.search(waited, str(outcome.exception)), outcome
