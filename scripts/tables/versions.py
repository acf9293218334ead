"""Two commits in turns on one machine: the table of `scripts.compare_versions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .text import Entry, thousands

MODES = {"forward": "forward", "forward_backward": "forward+backward"}


def versions_tables(contents: Sequence[dict[str, Any]]) -> str:
    """Markdown: per file, one row for each case; the last version beside the first."""
    if not contents:
        return "Not measured yet: no docs/results/versions*.json."
    return "\n\n".join(_table(content) for content in contents)


def _table(content: dict[str, Any]) -> str:
    names = list(content["versions"])
    before, after = (content["versions"][name][:16] or name[:16] for name in (names[0], names[-1]))
    ranks, comm = content["ranks"], content["results"][0]["comm"]
    exchange = "" if ranks == 1 else f' with `comm="{comm}"`'
    lines = [
        f"{ranks} x {content['device']}{exchange}, torch {content['torch']}, Triton {content['triton']}. Milliseconds per call "
        f"at commit {before} → at {after}, medians over {content['results'][0]['turns']} turns; in brackets the median ratio "
        "and its quartiles. *Host*: until a forward+backward call on an idle GPU returns.",
        "",
        "| tokens | heads | (B, k) | forward | forward+backward | host | equal bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in content["results"]:
        old, new = (entry["times"][name] for name in (names[0], names[-1]))
        same = [name for name, equal in entry["same_bits"][names[-1]].items() if equal]
        cells = [
            thousands(entry["tokens"]),
            f"{entry['q_heads']}/{entry['kv_heads']}",
            f"({entry['block_size']}, {entry['topk']})",
            *(_cell(old[mode]["ms"], new[mode]["ms"]) for mode in MODES),
            _cell(old["forward_backward"]["host_ms"], new["forward_backward"]["host_ms"]),
            ", ".join(same) or "none",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(old: Entry, new: Entry) -> str:
    ratio = new["ratio"]
    spread = f"{ratio['quartile_1']:.3f} to {ratio['quartile_3']:.3f}"
    return f"{old['median']:.3g} → {new['median']:.3g} ({ratio['median']:.3f}, {spread})"
