"""A run's folder belongs to one run at a time: two that write the same checkpoints and metrics would destroy both."""

from __future__ import annotations

import fcntl
import os
import platform
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


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it within the ``with`` block; every rank must enter.

    File systems without locks keep nobody out.

    Raises:
        TrainingError: the folder cannot be made or written, or another run holds it.
    """
    descriptor: int | None = None
    problem: str | None = None
    if dist.get_rank() == 0:
        try:
            descriptor = _lock(directory)
        except OSError as error:
            problem = f"run.directory: {error}"
        except FolderInUseError as error:
            problem = str(error)
    try:
        agree(problem)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


class FolderInUseError(RuntimeError):
    """Another run holds the folder."""


def _lock(directory: Path) -> int:
    """Descriptor of the locked file; closing it unlocks.

    A network file system may keep the lock of a host that died for a while, and the run that takes its place starts at once. So
    this waits for another host's lock, up to `OTHER_HOST_SECONDS`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    here, deadline = f"on {platform.node()}", time.monotonic() + OTHER_HOST_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            if holder.endswith(here) or time.monotonic() > deadline:
                os.close(descriptor)
                raise FolderInUseError(
                    f"{directory} is in use by another run ({holder}): wait for it, or choose another run.name"
                ) from None
            time.sleep(min(1.0, OTHER_HOST_SECONDS))
        except OSError:  # no locks on this file system
            return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} {here}\n".encode())
    return descriptor
