"""Start a Megatron-LM script inside a process that has prepared something for it first."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import megatron.core


def run_script(script: str, arguments: list[str]) -> None:
    """Run a script with command-line arguments, as if Python had been started with it.

    Raises:
        RuntimeError: the script's own ``megatron`` package is not the one in use here, which would mix two versions.
    """
    folder = Path(script).resolve().parent
    own, imported = folder / "megatron" / "core", Path(megatron.core.__path__[0]).resolve()
    if own.is_dir() and own != imported:
        raise RuntimeError(f"{script} comes with {own}, but {imported} is in use: put {folder} first on PYTHONPATH")
    sys.path.insert(0, os.fspath(folder))  # as Python does for a script
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
