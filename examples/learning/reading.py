"""Files that a command line names: read, and refused by name where they are of another kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

PLAN = ("model", "data", "optimizer", "measures", "arms", "runs")
PACKAGES = ("sources", "vocabulary", "document_bytes", "min_tokens", "eval_share", "train_tokens")
RESULTS = ("plan", "corpus", "runs")


def read_yaml(path: Path, names: Collection[str], example: str) -> dict[str, Any]:
    """The entries of a YAML file.

    Args:
        names: entries that it must have.
        example: a file that has them, for the error.

    Raises:
        ValueError: it is no YAML, or lacks entries.
    """
    return _read(path, names, example, yaml.safe_load, "YAML")


def read_json(path: Path, names: Collection[str], example: str) -> dict[str, Any]:
    """The entries of a JSON file; arguments and errors as of `read_yaml`."""
    return _read(path, names, example, json.loads, "JSON")


def _read(path: Path, names: Collection[str], example: str, parse: Callable[[str], Any], kind: str) -> dict[str, Any]:
    try:
        found = parse(path.read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not found.keys() >= set(names):
        lacking = [name for name in names if not isinstance(found, dict) or name not in found]
        raise ValueError(f"{path} lacks {', '.join(lacking)}, which {example} has")
    return found
