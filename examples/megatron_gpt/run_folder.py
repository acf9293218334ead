"""A run's folder belongs to one run at a time: two that write the same checkpoints and metrics would destroy both."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from .distributed import agree

LOCK = "lock"
"""File in the folder, locked by rank 0 as long as its process lives. The lock ends with the process, the file stays."""
OTHER_HOST_SECONDS = 100.0
"""NFS gives up the locks of a dead host after 90 seconds."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system without locks answers."""

_held: set[int] = set()
"""Descriptors of locked files. A lock ends when every process that has its descriptor has closed it."""


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)  # else a child that outlives the run keeps its folder locked


@contextmanager
def held(directory: Path, timeout: float) -> Iterator[None]:
    """Make the folder and keep other runs out of it within the ``with`` block; every rank must enter.

    A file system without locks keeps nobody out; rank 0 says so.

    Args:
        directory: the run's folder.
        timeout: seconds after which a collective of the other ranks, which wait for rank 0, fails.

    Raises:
        TrainingError: the folder cannot be made or written, or another run holds it.
    """
    descriptor: int | None = None
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            descriptor = lock(directory, min(OTHER_HOST_SECONDS, timeout / 2))
        except OSError as error:
            problem = f"run.directory: {error}"
        except FolderInUseError as error:
            problem = str(error)
    try:
        agree(problem)
        yield
    finally:
        if descriptor is not None:
            unlock(descriptor)


class FolderInUseError(RuntimeError):
    """Another run holds the folder."""


def lock(directory: Path, patience: float) -> int:
    """Make the folder and lock it. Returns the descriptor of the lock, for `unlock`.

    A network file system may keep the lock of a host that died for a while, and the run that takes its place starts at once. So
    this waits for a lock of another host.

    Args:
        directory: the run's folder.
        patience: seconds to wait for another host's lock. A lock of this host ends with its process and is not waited for.

    Raises:
        FolderInUseError: another process holds the lock.
        OSError: the folder or the file in it cannot be made or written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _wait(descriptor, directory, patience)
    except (OSError, FolderInUseError):
        unlock(descriptor)
        raise
    return descriptor


def unlock(descriptor: int) -> None:
    """Give back what `lock` returned."""
    _held.discard(descriptor)
    os.close(descriptor)


def _wait(descriptor: int, directory: Path, patience: float) -> None:
    here, deadline, told = f"on {platform.node()}", time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if holder.endswith(here) or time.monotonic() > deadline:
                raise FolderInUseError(
                    f"{directory} is in use by another run ({holder}): wait for it, or choose another run.name"
                ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _say(
                f"{directory} is on a file system without locks ({error.strerror}): a second run there is not kept out"
            )
            break
        if not told and holder:
            _say(f"{directory} is locked by {holder}: waiting up to {patience:.0f} s, in case that host died")
            told = True
        time.sleep(min(1.0, patience))
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} {here}\n".encode(), 0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
