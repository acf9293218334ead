"""Findings of compute-sanitizer: the table of `sanitize`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def sanitizer_table(content: dict[str, Any], cases: Iterable[str]) -> str:
    """Markdown: what each tool found, in which calls, and which of `cases` the file lacks."""
    about, tools = content["about"], content["tools"]
    lines = [
        f"{about['device']}, torch {about['torch']}, Triton {about['triton']}, commit {about['commit'][:10]}.",
        "",
        "| tool | calls | found | seconds |",
        "|---|---|---|---|",
    ]
    for name, found in tools.items():
        summary = found["summary"].split(": ", 1)[-1]
        lines.append(f"| {name} | {len(found['cases'])} | {summary} | {found['seconds']:.0f} |")
    run = set.intersection(*(set(found["cases"]) for found in tools.values()))
    lines += ["", f"Calls: {'; '.join(name for name in tools['memcheck']['cases'] if name in run)}."]
    if missing := [name for name in cases if name not in run]:
        lines.append(f"Not run yet: {'; '.join(missing)}.")
    return "\n".join(lines)
