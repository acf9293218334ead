"""The layer on one GPU: tables and the plot of `bench_kernels`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .text import Entry, pyplot, thousands

DENSE = "dense cuDNN"


def load(files: list[Path]) -> tuple[dict[str, Any], list[Entry], dict[tuple[Any, ...], Entry]]:
    """What the first file says about the machine; finished MoBA results, and dense ones by (tokens, heads, name), each with its
    commit. Of equal cases the last one counts.

    Raises:
        ValueError: no files, or files of different devices: their times are not comparable.
    """
    if not files:
        raise ValueError("no results: expected kernels*.json, made by scripts/bench_kernels.py")
    contents = [json.loads(f.read_text()) for f in files]
    devices = {c["about"]["device"] for c in contents}
    if len(devices) > 1:
        raise ValueError(f"results of different devices do not go into one table: {sorted(devices)}")
    done, dense = (
        [{"commit": c["about"]["commit"]} | r for c in contents for r in c[name] if "forward_ms" in r]
        for name in ("results", "dense")
    )
    by_case = {(*case(r), *sizes(r)): r for r in done}
    return contents[0]["about"], [by_case[key] for key in sorted(by_case)], {(*case(r), r["name"]): r for r in dense}


def case(result: Entry) -> tuple[int, int, int]:
    return result["q_heads"], result["kv_heads"], result["tokens"]


def sizes(result: Entry) -> tuple[int, int, float]:
    """Block size, top-k, and GiB of workspace; 0 for the default."""
    return result["block_size"], result["topk"], result.get("workspace_gib", 0)


def kernels_table(about: dict[str, Any], results: list[Entry], dense: dict[tuple[Any, ...], Entry]) -> str:
    """Markdown: one row per (heads, tokens, block size, top-k), forward / forward+backward milliseconds."""
    beside = [r for r in dense.values() if any(case(r) == case(x) for x in results)]
    of_rows, of_dense = (sorted({r["commit"][:10] for r in x}) for x in (results, beside))
    several = len({*of_rows, *of_dense}) > 1
    measured = "at the commits in the last column" if several else f"at {of_rows[0]}"
    if several and of_dense:
        measured += f", dense attention at {' and '.join(of_dense)}"
    lines = [
        f"{about['device']}, bf16, D = {about['head_dim']}, N(0, 1) inputs, one document; torch {about['torch']}, "
        f"Triton {about['triton']}; measured {measured}. Medians of "
        "milliseconds, forward / forward+backward. "
        "*Of the floor*: the floor over the time. The floor is the time of scoring, plus the larger of attention's FLOPs at "
        "800 TFLOP/s and the bytes of a block-major design at 3.0 TB/s."
        + " *GiB* beside (B, k): `workspace_bytes`, where it is not the default."
        * any(sizes(r)[2] > 0 for r in results),
        "",
        "| heads | tokens | (B, k) | moba_cp | of the floor | against dense cuDNN | dense cuDNN | dense flash | peak GiB "
        "| output / dq error |" + " commit |" * several,
        "|---|---|---|---|---|---|---|---|---|---|" + "---|" * several,
    ]
    for r in results:
        reference, flash = (dense.get((*case(r), name)) for name in (DENSE, "dense flash"))
        checks = r.get("checks", {})
        cells = [
            f"{r['q_heads']}/{r['kv_heads']}",
            thousands(r["tokens"]),
            f"({r['block_size']}, {r['topk']})" + f", {sizes(r)[2]:g} GiB" * (sizes(r)[2] > 0),
            f"**{both(r)}**",
            of_the_floor(r),
            faster(r, reference),
            both(reference),
            both(flash),
            f"{r['forward_peak_gib']:.1f} / {r['forward_backward_peak_gib']:.1f}",
            f"{checks['out_error']:.1e} / {checks['dq_error']:.1e}" if checks else "-",
            *[r["commit"][:7]] * several,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    checked = [r["checks"] for r in results if "checks" in r]
    if checked:
        rows, wrong = (sum(c[key] for c in checked) for key in ("rows", "wrong_rows"))
        seeds = sorted({c["seeds"] for c in checked})
        drawn = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        drawn += " seed" if drawn == "1" else " seeds"
        lines += [
            "",
            f"Selected blocks were checked against fp32 scores in {rows:,} rows ({drawn}). Wrong rows: {wrong}.",
        ]
    return "\n".join(lines)


def kernels_plot(about: dict[str, Any], results: list[Entry], dense: dict[tuple[Any, ...], Entry], path: Path) -> None:
    """Forward+backward time against tokens, one panel per pair of heads, log-log."""
    plt = pyplot()
    heads = sorted({case(r)[:2] for r in results})
    figure, axes = plt.subplots(1, len(heads), figsize=(5 * len(heads), 4), squeeze=False, sharey=True)
    for axis, pair in zip(axes[0], heads):
        lines: dict[str, list[tuple[int, float]]] = {}
        for r in [*results, *dense.values()]:
            if case(r)[:2] == pair and "forward_backward_ms" in r and "workspace_gib" not in r:
                label = r.get("name") or f"MoBA ({r['block_size']}, {r['topk']})"
                lines.setdefault(label, []).append((r["tokens"], r["forward_backward_ms"]["median"]))
        for label, points in sorted(lines.items()):
            tokens, times = zip(*sorted(points))
            axis.plot(tokens, times, "o--" if label.startswith("dense") else "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{pair[0]} q / {pair[1]} kv heads")
        ticks = sorted({point[0] for points in lines.values() for point in points})
        axis.set_xticks(ticks, [thousands(t) for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[0][-1].legend(fontsize=8)
    figure.suptitle(f"{about['device']}, bf16, D = {about['head_dim']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def both(result: Entry | None) -> str:
    if result is None:
        return "-"
    return " / ".join(milliseconds(result.get(key)) for key in ("forward_ms", "forward_backward_ms"))


def of_the_floor(result: Entry) -> str:
    """Share of the lower bound in the time taken, forward / forward+backward; `floors` of bench_kernels.py."""
    floors = result["floors_ms"]
    forward = floors["scoring"] + max(floors["forward_attention"], floors["forward_traffic"])
    whole = forward + max(floors["backward_attention"], floors["backward_traffic"])
    shares = {"forward_ms": forward, "forward_backward_ms": whole}
    return " / ".join(f"{floor / result[key]['median']:.0%}" for key, floor in shares.items() if key in result)


def faster(result: Entry, reference: Entry | None) -> str:
    """How many times as fast as `reference`, forward / forward+backward."""
    if reference is None:
        return "-"
    cells = []
    for key in ("forward_ms", "forward_backward_ms"):
        known = key in reference and key in result
        cells.append(f"{reference[key]['median'] / result[key]['median']:.1f}x" if known else "-")
    return " / ".join(cells)


def milliseconds(time: Entry | None) -> str:
    if time is None:
        return "-"
    value = time["median"]
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
