"""Result files: what was measured on what, written as JSON after every case."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
import typer

REPOSITORY = Path(__file__).resolve().parents[2]


def about(commit: str = "", device: str = "") -> dict[str, Any]:
    """What a benchmark runs on: device, versions, commit.

    Args:
        commit: where the checkout has no .git.
        device: its description; the GPU's name, or "CPU" where there is none.
    """
    cuda = torch.cuda.is_available()
    return {
        "device": device or (torch.cuda.get_device_name() if cuda else "CPU"),
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "commit": commit or git(REPOSITORY, "rev-parse", "HEAD") or "unknown",
    }


def git(folder: Path, *arguments: str) -> str | None:
    """What git prints in `folder`; None if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def megatron_core_version(folder: Path | None = None) -> str:
    """Version of the megatron.core that would be imported, or of the one in `folder`, without importing it."""
    if folder is None:
        found = find_spec("megatron.core")
        if found is None or found.origin is None:
            return "none"
        folder = Path(found.origin).parent
    version: str = run_path(str(folder / "package_info.py"))["__version__"]
    return version.split("+")[0]  # behind the plus: the commit of the checkout around it


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a whole file or none: a reader, or an end in the middle, never meets half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def check_writable(path: Path) -> None:
    """Make the folder of a result file, before what is measured takes minutes.

    Raises:
        typer.BadParameter: it cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be written: {error.strerror}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written")


class Results:
    """A result file: facts about the run, and lists of entries.

    Example:
        >>> results = Results(Path("layer.json"), about() | {"world_size": 2}, "results")
        >>> results.attempt("results", {"tokens": 8192}, lambda: {"forward_ms": 1.5})
    """

    def __init__(self, path: Path | None, head: dict[str, Any], *lists: str, quiet: tuple[str, ...] = ()) -> None:
        """Write the file with empty lists.

        Args:
            path: the file; None (all ranks but one) writes and prints nothing.
            head: what comes before the lists.
            lists: names of the lists.
            quiet: fields of an entry that are written and not printed.

        Raises:
            typer.BadParameter: the file cannot be written.
        """
        self.path, self.lists, self.quiet = path, lists, {"trace", *quiet}
        self.content = head | {name: [] for name in lists}
        if path is not None:
            check_writable(path)
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)

    def add(self, name: str, entry: dict[str, Any], took: float | None = None) -> None:
        """Append an entry to a list, write the file and print the entry."""
        self.content[name].append(entry)
        self.write()
        if self.path is not None:
            shown = {key: value for key, value in entry.items() if key not in self.quiet}
            print(*([] if took is None else [f"[{took:.1f} s]"]), json.dumps(shown), flush=True)

    def attempt(self, name: str, case: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Add `case` with what `measure` returns. A failure becomes the entry's `error` and `trace`, and the rest goes on."""
        began = time.perf_counter()
        try:
            found = measure()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}", "trace": traceback.format_exc()}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.add(name, case | found, time.perf_counter() - began)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Entries with an error."""
        return [entry for name in self.lists for entry in self.content[name] if "error" in entry]


def _triton_version() -> str | None:
    """None where Triton is not installed, as on systems other than Linux."""
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
