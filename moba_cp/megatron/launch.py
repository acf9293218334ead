"""Start a Megatron-LM script inside a process that has prepared something for it first."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

import megatron.core


def check_script(script: str, needs_training: bool) -> None:
    """End the process with a sentence where a script cannot start, before anything is prepared for it.

    Args:
        needs_training: it is prepared through ``megatron.training``, which packages of Megatron-Core leave out.

    Raises:
        SystemExit: there is no such file, or no ``megatron.training``.
    """
    if not Path(script).is_file():
        sys.exit(f"{script} is no file: give the path of Megatron-LM's pretrain_gpt.py, or of a script like it")
    if needs_training and importlib.util.find_spec("megatron.training") is None:
        sys.exit(
            f"megatron.training is not installed, {Path(megatron.core.__path__[0]).resolve()} comes without it: put the "
            "folder of Megatron-LM first on PYTHONPATH"
        )


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
