"""The files of checkpoints: which are whole, which is the newest, which may go. Plain files, no collectives.

``step_00000100/`` holds a checkpoint and ``files.json``, which lists the bytes of every other file in it. ``latest`` names
the newest checkpoint. Folders that end in ``.tmp`` are unfinished. Damage is a file that is missing or of another size: bytes
that changed in place are for the file system to find.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

_MANIFEST = "files.json"


def prepare(directory: Path, name: str) -> Path:
    """Remove what unfinished saves left, and make the folder that the next one writes to."""
    directory.mkdir(parents=True, exist_ok=True)
    remove_unfinished(directory)
    unfinished = directory / f"{name}.tmp"
    unfinished.mkdir()
    return unfinished


def check_writable(directory: Path) -> None:
    """Make the folder of a run's checkpoints, and a file in it.

    Raises:
        OSError: that cannot be done; better known before training than after it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / "writable.tmp"
    probe.touch()
    probe.unlink()


def set_aside(directory: Path) -> Path | None:
    """Rename a folder with checkpoints, so that a run that starts from scratch is not mixed with another; its new name, None if
    there is none."""
    if not directory.is_dir() or not (_steps(directory) or (directory / "latest").exists()):
        return None
    number = 1
    while (target := directory.with_name(f"{directory.name}_before_{number}")).exists():
        number += 1
    os.replace(directory, target)
    return target


def publish(directory: Path, name: str, keep: int) -> None:
    """Give a finished folder its name, let ``latest`` name it, and remove all but the ``keep`` newest (0: none)."""
    unfinished, target, replaced = directory / f"{name}.tmp", directory / name, directory / f"{name}.old.tmp"
    sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in _files(unfinished)}
    (unfinished / _MANIFEST).write_text(json.dumps(sizes))
    if target.exists():
        os.replace(target, replaced)
    os.replace(unfinished, target)
    pointer = directory / "latest.tmp"
    pointer.write_text(name + "\n")
    os.replace(pointer, directory / "latest")
    remove_unfinished(directory)
    if keep:
        for old in [path for path in _steps(directory) if path.name <= name][:-keep]:
            shutil.rmtree(old)


def remove_unfinished(directory: Path) -> None:
    """Remove whatever ends in ``.tmp``."""
    for path in directory.glob("*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def choose(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, from the one that ``latest`` names downwards, and what the user should know about it.

    Raises:
        ValueError: there is a ``latest``, or a checkpoint, but no whole one; or ``directory`` is no folder.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is no folder")
    pointer, candidates, notes = directory / "latest", _steps(directory), list[str]()
    if not pointer.exists():
        if not candidates:
            return None, []
        notes.append(f"{pointer} is missing")
    else:
        name = pointer.read_bytes().decode(errors="replace").strip()
        if re.fullmatch(r"step_\d+", name):
            candidates = [path for path in candidates if path.name < name] + [directory / name]
        else:
            notes.append(f"{pointer} names {name!r}, which is no checkpoint" if name else f"{pointer} is empty")
    for path in reversed(candidates):
        damage = _damage(path)
        if damage is None:
            return path, [*notes, f"resuming from {path}"] if notes else []
        notes.append(f"checkpoint {path} is damaged ({damage})")
    raise ValueError(
        "; ".join([*notes, f"no whole checkpoint in {directory}: remove it, or start with run.resume=false"])
    )


def _damage(path: Path) -> str | None:
    if not path.is_dir():
        return "missing"
    manifest = path / _MANIFEST
    if not manifest.exists():  # saved before there were lists of files
        return None if any(path.iterdir()) else "empty"
    try:
        sizes = json.loads(manifest.read_text())
    except ValueError:
        return f"{_MANIFEST} cannot be read"
    if not isinstance(sizes, dict):
        return f"{_MANIFEST} lists no files"
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).exists() else 0
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def _steps(directory: Path) -> list[Path]:
    """Those that `publish` named; others, such as copies with names of their own, are the user's."""
    return sorted(p for p in directory.glob("step_*") if p.is_dir() and re.fullmatch(r"step_\d+", p.name))


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]
