"""Hosts in miniature: processes in network, pid and uts namespaces of their own, joined by a veth pair.

    with Nodes(hosts=2, processes=2) as nodes:
        nodes.start(attention_loop, "auto")       # fn(rank, size, *args) on every rank, in the background
        nodes.cut()                               # takes the link down
        outcomes = nodes.outcomes(timeout=20.0)   # one `RankOutcome` per rank

Ranks are numbered host by host. Each finds `RANK`, `WORLD_SIZE`, `MASTER_ADDR` (of the first host) and `GLOO_SOCKET_IFNAME` in
its environment, as torchrun sets them, and makes its process group itself.

    test process
      machine            imports what the functions need, once; ends when the test process does
        host             new network and uts namespaces; new pid namespace for its children
          init           process 1 of the pid namespace; says how each rank ended
            rank ...     one request at a time; after an exception the interpreter exits, as that of a script would

Every process dies with its parent, and namespaces and the veth pair with their last process: nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch

from tests.ranks import RankOutcome, _answer, _dumps, _server

INTERFACE = "moba0"
"""Name of each host's end of the veth pair."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWUTS, _CLONE_NEWPID, _CLONE_NEWNET = 0x04000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1
_START_LIMIT = 120.0  # seconds to import what the functions need, on a busy machine


@cache
def why_not() -> str:
    """Why this machine cannot make hosts; empty where it can."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"needs the program {program}"
    tried = [
        "unshare",
        "--net",
        "--pid",
        "--uts",
        "--fork",
        "ip",
        "link",
        "add",
        "moba0",
        "type",
        "veth",
        "peer",
        "moba1",
    ]
    done = subprocess.run(tried, capture_output=True, text=True)
    return f"new namespaces with a veth pair are not permitted: {done.stderr.strip()}" if done.returncode else ""


class Nodes:
    """`hosts` (1 or 2) times `processes` ranks, until the end of the `with` block.

    Args:
        hosts, processes: how many hosts, and ranks on each.
        preload: modules to import once, before the ranks are forked.
    """

    def __init__(self, hosts: int, processes: int, preload: Sequence[str] = ()) -> None:
        self.size = hosts * processes
        self._hosts, self._begin = hosts, 0.0
        pipes = [_server.Pipe() for _ in range(self.size)]
        reports = [_server.Pipe(duplex=False) for _ in range(hosts)]
        self._ranks, self._reports = [ours for ours, _ in pipes], [ours for ours, _ in reports]
        self._life, theirs = _server.Pipe()
        arguments = (theirs, [b for _, b in pipes], [b for _, b in reports], processes, list(preload), sys.path)
        self._machine = _server.Process(target=_machine, args=arguments, daemon=True)
        self._machine.start()
        try:
            if not self._life.poll(_START_LIMIT):
                raise TimeoutError(f"{hosts} hosts did not start within {_START_LIMIT:g} s")
            self._pids: list[int] = self._life.recv()
            self._join_hosts()
        except BaseException:
            self.close()
            raise
        for connection in (theirs, *(b for _, b in pipes + reports)):
            connection.close()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all processes and wait until the namespaces' first ones are gone."""
        self._machine.kill()
        self._machine.join(5.0)
        for connection in (self._life, *self._ranks, *self._reports):
            connection.close()
        deadline = time.monotonic() + 5.0
        while time.monotonic() < deadline and self.left_behind():
            time.sleep(0.02)

    def left_behind(self) -> list[int]:
        """Processes of hosts that are still there."""
        return [pid for pid in getattr(self, "_pids", []) if _alive(pid)]

    def start(self, fn: Callable[..., Any], *args: Any) -> None:
        """Call `fn(rank, size, *args)`, a module-level function, on every rank."""
        request = _dumps((fn, args))
        self._begin = time.monotonic()
        for connection in self._ranks:
            connection.send_bytes(request)

    def outcomes(self, timeout: float) -> list[RankOutcome]:
        """One per rank, in rank order, `timeout` seconds after `start` at the latest: results as they come, and exceptions once
        the process has ended after them. `seconds` runs from `start` to the answer, or to the end where there is none."""
        answers: dict[int, RankOutcome] = {}
        ended: dict[int, RankOutcome] = {}
        deadline = self._begin + timeout
        while len(ended) < self.size:
            waiting = [c for r, c in enumerate(self._ranks) if r not in answers and r not in ended]
            ready = wait([*waiting, *self._reports], max(0.0, deadline - time.monotonic()))
            seconds = time.monotonic() - self._begin
            if not ready:
                break
            for rank, connection in enumerate(self._ranks):
                if connection in ready:
                    with contextlib.suppress(EOFError, ConnectionResetError):
                        kind, value, _ = pickle.loads(connection.recv_bytes())
                        failed = kind == "error"
                        answers[rank] = RankOutcome(rank, *((None, value) if failed else (value,)), seconds=seconds)
                        if not failed:
                            ended[rank] = answers[rank]
            if any(connection in ready for connection in self._ranks):
                continue  # an answer was sent before its rank's end
            for connection in self._reports:
                if connection in ready:
                    rank, exitcode = connection.recv()
                    answer = answers.get(rank, RankOutcome(rank, seconds=seconds))
                    ended[rank] = replace(answer, exitcode=exitcode)
        late = [r for r in range(self.size) if r not in ended]
        for rank in late:
            ended[rank] = replace(answers.get(rank, RankOutcome(rank, seconds=timeout)), timed_out=True)
        return [ended[rank] for rank in range(self.size)]

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """`fn`'s results; the first exception of a rank is raised."""
        self.start(fn, *args)
        outcomes = self.outcomes(timeout)
        for outcome in outcomes:
            if outcome.exception is not None:
                raise outcome.exception
            assert outcome.exitcode is None, outcome
            assert not outcome.timed_out, outcome
        return [outcome.result for outcome in outcomes]

    def cut(self) -> None:
        """Take the link between the hosts down; packets are lost from here on, and nobody is told."""
        self._ip(0, "link", "set", INTERFACE, "down")

    def seconds(self) -> float:
        """Since `start`."""
        return time.monotonic() - self._begin

    def _join_hosts(self) -> None:
        if self._hosts == 1:
            return
        names = [f"moba{self._pids[0]}{end}" for end in "ab"]
        subprocess.run(["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]], check=True)
        try:
            for number, (name, pid) in enumerate(zip(names, self._pids)):
                subprocess.run(["ip", "link", "set", name, "netns", str(pid), "name", INTERFACE], check=True)
                self._ip(number, "addr", "add", f"{_address(number)}/24", "dev", INTERFACE)
                self._ip(number, "link", "set", INTERFACE, "up")
        except BaseException:
            subprocess.run(["ip", "link", "del", names[0]], capture_output=True)
            raise

    def _ip(self, number: int, *arguments: str) -> None:
        subprocess.run(["nsenter", "-t", str(self._pids[number]), "-n", "ip", *arguments], check=True)


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _alive(pid: int) -> bool:
    try:
        return bool(os.readlink(f"/proc/{pid}/ns/net"))  # one that has ended and was not waited for has none
    except OSError:
        return False


# What runs in the processes.


def _machine(
    life: Connection,
    ranks: list[Connection],
    reports: list[Connection],
    processes: int,
    preload: list[str],
    path: list[str],
) -> NoReturn:
    sys.path[:] = path
    torch.set_num_threads(1)
    for name in ("moba_cp", *preload):
        importlib.import_module(name)
    gc.freeze()  # else the collections at a rank's exit copy all that was imported: seconds of CPU time per rank
    pids = []
    for number in range(len(reports)):
        begun, begin = os.pipe()
        pid = os.fork()
        if pid == 0:
            _ended_with_parent()
            _host(number, len(reports), ranks, reports[number], processes, begin)
        os.close(begin)
        os.read(begun, 1)  # until its namespaces are there
        pids.append(pid)
    life.send(pids)
    for connection in (*ranks, *reports):
        connection.close()
    with contextlib.suppress(EOFError, ConnectionResetError):
        life.recv()
    os._exit(0)


def _host(number: int, hosts: int, ranks: list[Connection], report: Connection, processes: int, begin: int) -> NoReturn:
    code = 1
    try:
        flags = _CLONE_NEWNET | _CLONE_NEWUTS | _CLONE_NEWPID
        if _LIBC.unshare(flags):
            raise OSError(ctypes.get_errno(), "unshare")
        socket.sethostname(f"node{number}")
        platform._uname_cache = None  # type: ignore[attr-defined]  # filled before the fork
        if (init := os.fork()) == 0:
            _ended_with_parent()
            _init(number, hosts, ranks, report, processes)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        os.write(begin, b".")
        os.waitpid(init, 0)
        code = 0
    finally:
        os._exit(code)


def _init(number: int, hosts: int, ranks: list[Connection], report: Connection, processes: int) -> NoReturn:
    """Fork the ranks, and say how each ended; with this process, its whole namespace ends."""
    rank_of = {}
    for rank in range(number * processes, (number + 1) * processes):
        if (pid := os.fork()) == 0:
            _ended_with_parent()
            _rank(rank, len(ranks), rank % processes, hosts, ranks[rank])
        rank_of[pid] = rank
    for connection in ranks:
        connection.close()
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            time.sleep(0.1)
            continue
        if pid in rank_of:
            report.send((rank_of[pid], os.waitstatus_to_exitcode(status)))


def _rank(rank: int, size: int, local_rank: int, hosts: int, connection: Connection) -> NoReturn:
    values = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": size // hosts,
        "MASTER_ADDR": _address(0) if hosts > 1 else "127.0.0.1",
        "GLOO_SOCKET_IFNAME": INTERFACE if hosts > 1 else "lo",
    }
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        while True:
            answer = _answer(connection.recv_bytes(), rank, size)
            connection.send_bytes(answer)
            if pickle.loads(answer)[0] == "error":
                ctypes.pythonapi.Py_Exit(1)  # with all that a script's end waits for
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the test process is gone
    finally:
        os._exit(1)


def _ended_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
