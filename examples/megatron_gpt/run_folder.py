"""A run's folder belongs to one run at a time: two that write the same checkpoints and metrics would destroy both."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from .distributed import agree

LOCK = "lock"
"""File in the folder, locked by rank 0 as long as its process lives. The lock ends with the process, the file stays."""


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
    """Descriptor of the locked file; closing it unlocks."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise FolderInUseError(
            f"{directory} is in use by another run ({holder}): wait for it, or choose another run.name"
        ) from None
    except OSError:  # no locks on this file system
        return descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
    return descriptor
