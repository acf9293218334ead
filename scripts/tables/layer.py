"""The layer over several ranks: times by exchange and what is lost from one rank to several, of `scripts.scaling` with
`configs/scaling/layer.yaml`."""

from __future__ import annotations

from typing import Any

from .text import Entry, thousands

WAITS_FORWARD = ("wait for keys and values",)
WAITS_BACKWARD = ("wait for keys and values, send gradients", "return gradients")


def layer_tables(contents: list[dict[str, Any]]) -> str:
    """Markdown of result files of one machine and commit: times by exchange, then weak scaling.

    Raises:
        ValueError: no files, or files of different machines or commits, which do not go into one table.
    """
    keys = ("device", "world_size", "nccl", "torch", "commit")
    heads = {tuple(content[key] for key in keys) for content in contents}
    if len(heads) != 1:
        raise ValueError(f"results of one machine and commit are needed, got {sorted(heads, key=str)}")
    device, ranks, nccl, torch, commit = heads.pop()
    done = [r for content in contents for r in content["results"] if "forward_ms" in r]
    equal = all(r["bitwise_equal_to_first"] for r in done)
    return "\n".join(
        [
            f"{ranks} x {device}, NCCL {nccl}, bf16, D = 128, {done[0]['layout']} layout; torch {torch}, commit "
            f"{commit[:10]}. Milliseconds of the slowest rank, forward / forward+backward; *alone*: one GPU with the tokens "
            "that each of the ranks holds.",
            "",
            *exchanges_table(done),
            "",
            f"Output and dq of all exchanges {'are' if equal else 'are NOT'} the same bits, as timed.",
            "",
            "What all ranks lose against *alone*, with `auto`:",
            "",
            "- *Scoring*: of one GPU alone and of all ranks. It grows with the sequence.",
            "- *Not hidden*: time that rank 0 waits, forward for keys and values / backward for these and for gradients. It "
            "includes sums of gradients, and waiting for a rank that has more to do.",
            "- *Work*: keys that the busiest rank attends to, over those of *alone*. It grows with the sequence, and where the "
            "layout does not balance keys.",
            "- *Peak*: GiB per GPU, forward / forward+backward: torch's allocations and shared memory.",
            "",
            *scaling_table(done),
        ]
    )


def exchanges_table(done: list[Entry]) -> list[str]:
    """One row per (ranks, heads, block size, top-k, tokens, routing), one column per exchange."""
    comms = list(dict.fromkeys(r["comm"] for r in done if r["ranks"] > 1))
    lines = [
        f"| heads | (B, k) | tokens | routing | wanted | {' | '.join(comms)} | alone | output error |",
        "|" + "---|" * (7 + len(comms)),
    ]
    for of_comm, alone in cases(done):
        any_of = next(iter(of_comm.values()))
        cells = [
            *about(any_of),
            f"{any_of['wanted_share']:.0%}",
            *(times(of_comm.get(comm)) for comm in comms),
            times(alone),
            f"{max(r['output_error'] for r in of_comm.values()):.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def scaling_table(done: list[Entry]) -> list[str]:
    """One row per case that was also run alone: weak-scaling efficiency, scoring, waits, work and memory."""
    lines = [
        "| heads | (B, k) | tokens | routing | efficiency | scoring, ms | not hidden, ms | work | peak |",
        "|" + "---|" * 9,
    ]
    for of_comm, alone in cases(done):
        if alone is None or "auto" not in of_comm:
            continue
        together = of_comm["auto"]
        stages = together["stages_ms_rank0"]
        forward, backward = (sum(stages.get(name, 0.0) for name in names) for names in (WAITS_FORWARD, WAITS_BACKWARD))
        efficiency = [alone[key] / together[key] for key in ("forward_ms", "forward_backward_ms")]
        cells = [
            *about(together),
            f"{efficiency[0]:.0%} / {efficiency[1]:.0%}",
            f"{alone['stages_ms_rank0']['gate']:.1f} to {stages['gate']:.1f}",
            f"{forward:.1f} / {backward:.1f}",
            f"{max(together['attended_keys']) / max(alone['attended_keys']):.2f}",
            f"{together['peak_gib_forward']:.1f} / {together['peak_gib_forward_backward']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cases(done: list[Entry]) -> list[tuple[dict[str, Entry], Entry | None]]:
    """By case, sorted: the results of several ranks by exchange, and the one alone with each rank's tokens."""
    rows: dict[tuple[Any, ...], dict[str, Entry]] = {}
    for r in done:
        key = (r["ranks"], r["q_heads"], r["kv_heads"], r["tokens"], r["block_size"], r["topk"], r["routing"])
        rows.setdefault(key, {})[r["comm"]] = r
    return [
        (of_comm, rows.get((1, *key[1:3], key[3] // key[0], *key[4:]), {}).get("auto"))
        for key, of_comm in sorted(rows.items())
        if key[0] > 1
    ]


def about(result: Entry) -> list[str]:
    return [
        f"{result['q_heads']}/{result['kv_heads']}",
        f"({result['block_size']}, {result['topk']})",
        thousands(result["tokens"]),
        result["routing"],
    ]


def times(result: Entry | None) -> str:
    if result is None:
        return "-"
    text = f"{result['forward_ms']:.1f} / {result['forward_backward_ms']:.1f}"
    return f"{text} ({result['transport']})" if result["comm"] == "auto" and result["ranks"] > 1 else text
