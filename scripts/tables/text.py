"""What the tables share: filling marked blocks and figures of a page, short numbers, matplotlib without a screen."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
"""One entry of a list of results, as its JSON holds it."""
FIGURE = re.compile(r"<!--=([\w.]+)-->(.*?)<!--/-->")
"""A figure in a sentence: its name, and its text."""


def short_device(name: str) -> str:
    """A GPU's name without its maker's."""
    return name.removeprefix("NVIDIA ")


def fill(blocks: dict[str, str], files: list[Path]) -> None:
    """Write every block into all files that are marked for it.

    Raises:
        ValueError: a block's markers are in none of the files.
    """
    for name, text in blocks.items():
        marked = [file for file in files if f"<!-- {name} -->" in file.read_text()]
        if not marked:
            raise ValueError(
                f"none of {', '.join(file.name for file in files)} has lines <!-- {name} --> and <!-- /{name} -->"
            )
        for file in marked:
            replace_between(file, name, text)


def fill_figures(figures: dict[str, str], files: list[Path]) -> None:
    """Write every figure into the sentences that name it: `<!--=file.name-->1.7 s<!--/-->`.

    Raises:
        ValueError: a page names a figure that there is none of, or no page names one.
    """
    named: set[str] = set()
    for file in files:
        content = file.read_text()
        names = {name for name, _ in FIGURE.findall(content)}
        if unknown := sorted(names - figures.keys()):
            raise ValueError(f"{file} names figures that there are none of: {', '.join(unknown)}")
        named |= names
        filled = FIGURE.sub(lambda found: f"<!--={found[1]}-->{figures[found[1]]}<!--/-->", content)
        if filled != content:
            file.write_text(filled)
    if unnamed := sorted(figures.keys() - named):
        raise ValueError(f"no page names the figures {', '.join(unnamed)}")


def replace_between(path: Path, name: str, text: str) -> None:
    """Put `text` between the comments `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the file lacks them.
    """
    content = path.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(content):
        raise ValueError(f"{path} has no lines <!-- {name} --> and <!-- /{name} -->")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", content))


def thousands(tokens: int) -> str:
    """131072 -> "128K"."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
