"""What a rank held over minutes of changing calls: the table of `soak`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MIB = 1 << 20


def soak_table(contents: Sequence[dict[str, Any]]) -> str:
    """Markdown: one row per run of `scripts.soak`."""
    lines = [
        "The process that holds most: its memory without plans that are kept, at the middle of the run and at its end; file "
        "descriptors, threads and keys of the store likewise. *Kept*: plans and shared buffers at the end.",
        "",
        "| ranks | minutes | calls | compared with the definition, largest error | refused | MiB | GPU MiB | descriptors "
        "| threads | keys | kept MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for content in contents:
        about, samples = content["about"], content["samples"]
        middle, last = samples[len(samples) // 2], samples[-1]

        def both(name: str, unit: int = 1, middle: dict[str, int] = middle, last: dict[str, int] = last) -> str:
            return f"{middle[name] // unit:,} → {last[name] // unit:,}"

        distinct = f", {about['distinct']} different" if about.get("distinct") else ""
        kept = sum(last[f"kept_{where}_bytes"] for where in ("host", "device", "shared"))
        cells = [
            f"{about['world_size']} x {about['device']}",
            f"{about['minutes']:g}",
            f"{content['calls']:,}{distinct}",
            f"{content['compared']:,}, {content['largest_error']:.0e}",
            f"{content['refused']}",
            both("process_bytes", MIB),
            both("device_bytes", MIB) if last["device_bytes"] else "–",
            both("file_descriptors"),
            both("system_threads"),
            both("store_keys"),
            f"{kept / MIB:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
