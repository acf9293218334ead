"""The floor of each kernel beside what it takes: arithmetic of 128K tokens, 16/16 heads, D = 128, bf16, on an H100."""

from __future__ import annotations

from typing import Any

from .text import Entry

PRODUCTS, MEMORY = 800e12, 3.0e12
"""Ceilings of an H100: FLOP/s of bf16 products, bytes/s of memory."""
HEADS, DIM, TOPK = 16, 128, 8
ROW = 2 * DIM
"""Bytes of a row of one head in bf16."""
PRODUCTS_OF_BACKWARD, REPEATED = 5, 2
"""Matrix products of the backward pass, and those that two kernels compute twice."""


def floors_table(kernels: dict[str, Any], long: dict[str, Any]) -> str:
    """Markdown: one row per kernel. Its work is counted from the sizes, its time is a stage of the result files.

    Args:
        kernels, long: `kernels.json` and `kernels_512k.json`.
    """
    of = {r["block_size"]: r for r in kernels["results"]}
    tokens, of_512k = of[128]["tokens"], long["results"][0]
    vectors = tokens * HEADS * ROW
    entries = tokens * HEADS * TOPK
    rows, partials, sums = entries * ROW, entries * (ROW + 4), vectors + 4 * tokens * HEADS
    lists = 2 * 2 * entries + 4 * entries  # the selection, int16, twice; the entries, int32
    five = of[512]["floors_ms"]["backward_attention"]
    seven = five * (PRODUCTS_OF_BACKWARD + REPEATED) / PRODUCTS_OF_BACKWARD
    one_pass = ("forward_stages_ms", "forward_backward_stages_ms")
    scores = _scores(of[128]), _scores(of_512k)
    table = [
        ["centroids", f"reads K once, {_gb(vectors)}", _memory(vectors), _stage(of[128], "centroids", one_pass[:1]), "memory"],
        [
            "gate, B = 128",
            f"{_tflop(of[128], 'scoring', 2)}; {scores[0]} scores",
            f"{of[128]['floors_ms']['scoring']:.2f}",
            _stage(of[128], "gate", one_pass),
            "minima and maxima, see below",
        ],
        [
            "gate, B = 128, 512K",
            f"{_tflop(of_512k, 'scoring', 1)}; {scores[1]} scores",
            f"{of_512k['floors_ms']['scoring']:.1f}",
            _stage(of_512k, "gate", one_pass, 1),
            "the same",
        ],
        [
            "lists, (128, 8)",
            f"reads the selection twice, writes {entries / 1e6:.1f}M entries: {_gb(lists)}",
            _memory(lists),
            _stage(of[128], "lists", one_pass),
            "scattered writes of 4 bytes into L2",
        ],
        [
            "attention, (128, 8)",
            f"{_tflop(of[128], 'forward_attention', 2)}; {_gb(rows)} of rows of q, {_gb(partials)} of partials",
            _memory(rows + partials, 1),
            _stage(of[128], "attend local", one_pass, 1),
            "latency and memory",
        ],
        *(
            [
                f"attention, ({size}, {of[size]['topk']})",
                _tflop(of[size], "forward_attention", 1),
                f"{of[size]['floors_ms']['forward_attention']:.1f}",
                _stage(of[size], "attend local", one_pass[:1], 1),
                bound,
            ]
            for size, bound in (
                (512, "a work item's start and end, exponentials"),
                (4096, "exponentials beside products"),
            )
        ),
        [
            "merge, topk 8",
            f"reads {_gb(partials)} of partials, writes {_gb(sums)}",
            _memory(partials + sums),
            _stage(of[512], "merge", one_pass),
            "memory: at its floor",
        ],
        [
            "merge dq, topk 8",
            f"reads {_gb(rows)}, writes {_gb(vectors)}",
            _memory(rows + vectors),
            _stage(of[512], "merge dq", one_pass[1:]),
            "memory: at its floor",
        ],
        [
            "dkdv and dq, (128, 8)",
            f"{_tflop(of[128], 'backward_attention', 1)}; {_gb(2 * rows)} of rows, {_gb(rows)} of partial dq",
            _memory(3 * rows, 1),
            _stage(of[128], "attend backward local", one_pass[1:], 1),
            "memory and latency",
        ],
        [
            "dkdv, then dq, (512, 8)",
            f"seven products, {seven * PRODUCTS / 1e15:.1f} TFLOP; five would be {five * PRODUCTS / 1e15:.1f}",
            f"{seven:.1f} ({five:.1f})",
            _stage(of[512], "attend backward local", one_pass[1:], 1),
            "products that wait for exponentials",
        ],
    ]  # fmt: skip
    about = kernels["about"]
    lines = ["| kernel | work | floor | measured | bound by |", "|---" * 5 + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table]
    lines += ["", f"Measured: {about['device']}, commit {about['commit'][:10]}."]
    return "\n".join(lines)


def _stage(result: Entry, name: str, passes: tuple[str, ...], digits: int = 2) -> str:
    """Its time in ms, of every pass that has it."""
    found = sorted(float(f"{result[key][name]:.{digits}f}") for key in passes)
    return " - ".join(dict.fromkeys(f"{ms:.{digits}f}" for ms in found))


def _memory(moved: float, digits: int = 2) -> str:
    return f"{1e3 * moved / MEMORY:.{digits}f}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.{1 if count >= 1e9 else 2}f} GB"


def _tflop(result: Entry, floor: str, digits: int) -> str:
    return f"{result['floors_ms'][floor] * PRODUCTS / 1e15:.{digits}f} TFLOP"


def _scores(result: Entry) -> str:
    """Scores of the gate: 2 D FLOP each."""
    mantissa, _, exponent = f"{result['floors_ms']['scoring'] * PRODUCTS / 1e3 / (2 * DIM):.2e}".partition("e+")
    return f"{float(mantissa):g}e{int(exponent)}"
