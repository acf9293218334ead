"""Run a function on every rank of a gloo process group, from inside one test.

    def all_reduced(rank, world_size, start):          # a module-level function: it is sent by its name
        x = torch.tensor(float(start + rank))
        dist.all_reduce(x)
        return x

    def test_sum():
        assert [x.item() for x in run_ranks(2, all_reduced, 10)] == [21.0, 21.0]

`run_ranks` keeps one warm pool of processes per world size, so a call costs a millisecond, not an import of torch.
`run_fresh_ranks` starts processes of its own with a short group timeout, for tests in which ranks die or stall.

Workers are forked from one clean server process that has imported torch and nothing has used yet (multiprocessing's
"forkserver"), so a new pool costs tenths of a second. Tensors travel by value, both ways, as detached CPU tensors.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

_START_LIMIT = 120.0  # seconds until new ranks are connected, however busy the machine
_POOL_GROUP_TIMEOUT = 120.0  # seconds; run_ranks' own limit is meant to strike first
_ERROR_GRACE = 5.0  # seconds the other ranks get to answer once one rank has raised

_server = multiprocessing.get_context("forkserver")
# The first backward pass imports torch's symbolic shapes; compiling, and torch's optimizers, import dynamo.
_preloaded = ["torch.distributed", "torch.fx.experimental.symbolic_shapes", "torch._dynamo"]
_preloaded += ["numpy", "pytest", "hypothesis", "moba_cp"]
_server.set_forkserver_preload(_preloaded)


def preload(*modules: str) -> None:
    """Let the server import these too, if they are installed, before it starts with the first ranks. Also for other processes of
    the start method "forkserver"."""
    _preloaded.extend(module for module in modules if module not in _preloaded)
    _server.set_forkserver_preload(_preloaded)


class RankDiedError(RuntimeError):
    """A rank's process ended without an answer."""


class RankHungError(RuntimeError):
    """A rank gave no answer within the time limit of the call."""


class RemoteTraceback(Exception):
    """The traceback of an exception on a rank, as text: the `__cause__` of the exception raised here."""


@dataclass(frozen=True)
class RankOutcome:
    """How one rank of `run_fresh_ranks` ended: a result, an exception, an exit code, or out of time.

    `result`: what the function returned, if it did. `exception`: what it raised, if it did (with its own type).
    `exitcode`: the process's exit code if it ended by itself (negative: minus the signal), else None.
    `timed_out`: no answer within the limit of the call. `seconds`: from the call, which comes when all ranks are connected, to
    this rank's answer or end.
    """

    rank: int
    result: Any = None
    exception: BaseException | None = None
    exitcode: int | None = None
    timed_out: bool = False
    seconds: float = 0.0


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    expect_errors: bool = False,
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on each rank of a warm gloo group and return the results in rank order.

    The default process group is initialised; torch runs on one thread and is seeded with 0 before every call.
    Sub-groups: `dist.new_group` inside `fn`; keep them in a module global of the test if they are used often.

    If ranks raise, the exception is raised here with its own type, and the remote traceback as its cause: the lowest
    rank's if all failed with the same type, else the one that came first. With `expect_errors=True` nothing is raised
    for that: the list holds each rank's exception (or result) instead.
    A rank that dies raises `RankDiedError`, one that gives no answer within `timeout` seconds `RankHungError`.
    After any failure the pool is thrown away, and the next call gets a new one.
    """
    pool = _pools.get(world_size)
    if pool is None:
        pool = _pools[world_size] = _Ranks(world_size, _POOL_GROUP_TIMEOUT)
    try:
        grace = None if expect_errors else _ERROR_GRACE
        outcomes = pool.call(fn, args, timeout, grace)
    except BaseException:
        close_pool(world_size)
        raise
    if any(o.exception is not None or o.timed_out or o.exitcode is not None for o in outcomes):
        close_pool(world_size)
    if expect_errors and all(o.exitcode is None and not o.timed_out for o in outcomes):
        return [o.result if o.exception is None else o.exception for o in outcomes]
    _raise_failure(outcomes, fn, timeout)
    return [o.result for o in outcomes]


def run_fresh_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    group_timeout: float = 5.0,
    timeout: float = 60.0,
) -> list[RankOutcome]:
    """Call `fn(rank, world_size, *args)` on new processes and say how each rank ended; nothing is raised for it.

    `group_timeout` is the process group's own timeout in seconds. A rank that has answered stays alive (its sockets
    open) until all have answered, died, or run out of `timeout` seconds; then all of them are killed.
    """
    ranks = _Ranks(world_size, group_timeout)
    try:
        return ranks.call(fn, args, timeout, grace=None)
    finally:
        ranks.kill()


def close_pool(world_size: int) -> None:
    """Kill the warm pool of this world size, if there is one."""
    pool = _pools.pop(world_size, None)
    if pool is not None:
        pool.kill()


def close_pools() -> None:
    """Kill every warm pool (conftest.py does this when the tests end)."""
    for world_size in list(_pools):
        close_pool(world_size)


class _Ranks:
    """The processes of one group and a pipe to each, connected."""

    def __init__(self, world_size: int, group_timeout: float) -> None:
        # One group at a time: ranks have the group's own timeout to connect, of two seconds in some tests. A machine that is
        # too busy even for that gets more attempts: starting ranks is not what is tested.
        with _starting:
            for left in (2, 1, 0):
                self._start(world_size, group_timeout)
                if not (ends := self._not_connected()):
                    return
                self.kill()
                if not left:
                    raise RankDiedError(f"of {world_size} ranks these did not connect (exit code by rank): {ends}")

    def _start(self, world_size: int, group_timeout: float) -> None:
        self.folder = tempfile.mkdtemp(prefix="ranks-")
        self.connections: list[Connection] = []
        self.processes: list[BaseProcess] = []
        store_path = os.path.join(self.folder, "store")
        for rank in range(world_size):
            ours, theirs = _server.Pipe()
            process = _server.Process(
                target=_serve,
                args=(theirs, rank, world_size, store_path, group_timeout, sys.path),
                name=f"rank{rank}of{world_size}",
                daemon=True,
            )
            with _polling:
                process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def _not_connected(self) -> dict[int, int | None]:
        """Wait until every rank has said that it is connected. Those that died before, or were not after `_START_LIMIT`."""
        deadline = time.monotonic() + _START_LIMIT
        waiting = dict(enumerate(self.connections))
        while waiting:
            died = {r: code for r in waiting if (code := _exit_code(self.processes[r])) is not None}
            if died or time.monotonic() > deadline:
                return died or dict.fromkeys(waiting)
            for connection in wait(list(waiting.values()), 1.0):
                with contextlib.suppress(EOFError, ConnectionResetError):
                    connection.recv_bytes()
                    del waiting[self.connections.index(connection)]
        return {}

    def call(self, fn: Callable[..., Any], args: tuple, timeout: float, grace: float | None) -> list[RankOutcome]:
        """One outcome per rank. Once a rank has failed, the others get `grace` more seconds (None: `timeout`)."""
        request = _dumps((fn, args))
        begin = time.monotonic()
        deadline = begin + timeout
        outcomes: dict[int, RankOutcome] = {}
        for connection in self.connections:
            with contextlib.suppress(BrokenPipeError):  # a dead rank is reported by the loop below
                connection.send_bytes(request)
        while waiting := [r for r in range(len(self.processes)) if r not in outcomes]:
            ends: dict[Any, int] = {}
            for rank in waiting:
                ends[self.connections[rank]] = rank
                ends[self.processes[rank].sentinel] = rank
            ready = {ends[end] for end in wait(list(ends), max(0.0, deadline - time.monotonic()))}
            seconds = time.monotonic() - begin
            if not ready:
                outcomes |= {rank: RankOutcome(rank, timed_out=True, seconds=seconds) for rank in waiting}
            for rank in sorted(ready):
                outcomes[rank] = self._outcome(rank, seconds)
                if grace is not None and self._failed(outcomes[rank]):
                    deadline = min(deadline, time.monotonic() + grace)
        return [outcomes[rank] for rank in range(len(self.processes))]

    @staticmethod
    def _failed(outcome: RankOutcome) -> bool:
        return outcome.exception is not None or outcome.exitcode is not None

    def _outcome(self, rank: int, seconds: float) -> RankOutcome:
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self.connections[rank].poll():
                kind, value, text = pickle.loads(self.connections[rank].recv_bytes())
                if kind == "result":
                    return RankOutcome(rank, result=value, seconds=seconds)
                value.__cause__ = RemoteTraceback(f"\non rank {rank} of {len(self.processes)}:\n{text}")
                return RankOutcome(rank, exception=value, seconds=seconds)
        return RankOutcome(rank, exitcode=_exit_code(self.processes[rank], 5.0), seconds=seconds)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process, connection in zip(self.processes, self.connections):
            _exit_code(process, 5.0)
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _exit_code(process: BaseProcess, timeout: float = 0.0) -> int | None:
    """The exit code of a process that has ended, or ends within `timeout` seconds; else None."""
    wait([process.sentinel], timeout)
    with _polling:
        return process.exitcode


_pools: dict[int, _Ranks] = {}
_starting = threading.Lock()
_polling = threading.Lock()
"""Held where processes are asked whether they have ended; a start asks all of them. The server tells each code once: of two
threads that ask at the same time one gets it, and the other one 255."""


def _raise_failure(outcomes: list[RankOutcome], fn: Callable[..., Any], timeout: float) -> None:
    size = len(outcomes)
    name = getattr(fn, "__qualname__", repr(fn))
    raised = [o for o in outcomes if o.exception is not None]
    died = [o for o in outcomes if o.exitcode is not None]
    hung = [o for o in outcomes if o.timed_out]
    if died and not (raised and min(o.seconds for o in raised) < min(o.seconds for o in died)):
        ends = ", ".join(f"rank {o.rank} (exit code {o.exitcode})" for o in died)
        raise RankDiedError(f"{name}: of {size} ranks these died: {ends}")
    if raised:
        same_type = len(raised) == size and len({type(o.exception) for o in raised}) == 1
        first = raised[0] if same_type else min(raised, key=lambda o: o.seconds)
        assert first.exception is not None
        raise first.exception
    if hung:
        ranks = ", ".join(str(o.rank) for o in hung)
        raise RankHungError(f"{name}: no answer within {timeout:g} s from rank {ranks} of {size}")


# What runs in the worker processes.


def _serve(
    connection: Connection, rank: int, world_size: int, store_path: str, group_timeout: float, path: list[str]
) -> None:
    """Join the group, then answer requests until the pipe closes. Leaves by `os._exit`: nothing to wait for."""
    try:
        sys.path[:] = path
        torch.set_num_threads(1)
        if any(name == "lo" for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = dist.FileStore(store_path, world_size)
        _wait_for_all("there", store, world_size)
        limit = timedelta(seconds=group_timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
        _wait_for_all("connected", store, world_size)
        connection.send_bytes(b"connected")
        while True:
            connection.send_bytes(_answer(connection.recv_bytes(), rank, world_size))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the test process is gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _wait_for_all(name: str, store: dist.Store, world_size: int) -> None:
    """Until every rank is there, or connected: one that has its request at once, and dies of it, would break another's
    connecting."""
    end = time.monotonic() + _START_LIMIT
    found = store.add(name, 1)
    while found < world_size:
        if time.monotonic() > end:
            raise TimeoutError(f"{found} of {world_size} ranks were {name} after {_START_LIMIT:g} s")
        time.sleep(0.002)
        found = store.add(name, 0)


def _answer(request: bytes, rank: int, world_size: int) -> bytes:
    try:
        fn, args = pickle.loads(request)
        torch.manual_seed(0)
        return _dumps(("result", fn(rank, world_size, *args), ""))
    except Exception as error:
        text = traceback.format_exc()
        error.__traceback__ = error.__cause__ = error.__context__ = None
        try:
            answer = _dumps(("error", error, text))
            pickle.loads(answer)  # some exceptions pickle, but do not come back
        except Exception:
            answer = _dumps(("error", RuntimeError(f"{type(error).__qualname__}: {error}"), text))
        return answer


class _ByValuePickler(pickle.Pickler):
    """Plain pickle, but a tensor is its bytes: no shared memory, no storage larger than the tensor, no autograd."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) in (torch.Tensor, torch.nn.Parameter):
            flat = obj.detach().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            return _tensor, (data, obj.dtype, tuple(obj.shape))
        return NotImplemented


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _dumps(obj: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValuePickler(buffer, pickle.HIGHEST_PROTOCOL).dump(obj)
    return buffer.getvalue()
