"""Scaling: tables and plots of `scripts.scaling`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moba_cp.config import DEFAULT_EXCHANGE_BYTES

from ..harness.sweep import PROBLEM
from .text import pyplot

LONGEST_TOKENS = 4 << 20
"""From so many tokens on, a result is one of the longest contexts."""
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10
"""Of dense attention, per (query, key) pair and D."""
LEGEND = """\
Times are milliseconds of the slowest rank, forward / forward+backward.

- *Equal work*: one GPU with all tokens and its share of the heads. *Efficiency*: that time over the time of the best exchange.
- *Exposed*: ms that the best exchange waits for other ranks, summed over stages. *GiB received* and *peak GiB* are of it, too.
- *Dense*: the faster of torch's ring and heads by all-to-all; in brackets, how many times as long as the best exchange.
- *Error*: output of sampled rows against the definition in fp64, norm over norm. bf16 rounds to 2e-03 at most."""


def scaling_tables(contents: Sequence[dict[str, Any]]) -> str:
    """Markdown: of each machine, times by exchange beside equal work on one GPU and dense attention."""
    measured = [scaling_table(content) for content in contents if _measured(content)]
    return "\n\n".join([LEGEND, *measured]) if measured else ""


def scaling_table(content: dict[str, Any]) -> str:
    """Markdown: the part of `scaling_tables` of one machine."""
    results, baselines = _measured(content), [b for b in content["baselines"] if "forward_ms" in b]
    comms = list(dict.fromkeys(r["comm"] for r in results if r["ranks"] > 1))
    lines = [
        f"{content['world_size']} x {content['device']}, NCCL {content['nccl']}, bf16, D = 128, one document; torch "
        f"{content['torch']}, commit {commits(results)}.",
        "",
        "| GPUs | tokens | heads | (B, k) | routing, layout | "
        + " | ".join(comms or ["alone"])
        + " | equal work | efficiency | exposed | GiB received | peak GiB | dense | error |",
        "|" + "---|" * (12 + len(comms or ["alone"])),
    ]
    for key, of_comm in _cases(results):
        ranks = key[0]
        best = min(of_comm.values(), key=lambda r: r.get("forward_backward_ms", r["forward_ms"]))
        share = _baseline(baselines, best, "equal_work")
        dense = [b for b in baselines if b["baseline"].startswith("dense") and _same(b, best)]
        fastest = min(dense, key=lambda b: b["forward_backward_ms"], default=None)
        cells = [
            str(ranks), tokens_text(best["tokens"]), f"{best['q_heads']}/{best['kv_heads']}",
            f"({best['block_size']}, {best['topk']})",
            f"{routing_text(best)}, {best['layout']}{budget(best)}",
            *([times(of_comm.get(comm)) for comm in comms] if ranks > 1 or comms == [] else _alone(best, comms)),
            times(share), efficiency(share, best), f"{best['exposed_ms']:.1f}" if ranks > 1 else "-",
            f"{best['received_bytes'] / 2**30:.2f}" if ranks > 1 else "-", peak(best),
            dense_cell(fastest, best), f"{max(r['output_error'] for r in of_comm.values()):.0e}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    of_exchanges = [r["bitwise_equal_to_first"] for same in _of_same_inputs(results) for r in same[1:]]
    of_counts = [r[key] for key in ("bitwise_equal_to_other_rank_counts",) for r in results if key in r]
    compared = ((of_exchanges, "with another exchange, layout or budget"), (of_counts, "with other numbers of GPUs"))
    text = ", ".join(f"{sum(same)} of {len(same)} compared {how}" for same, how in compared if same)
    lines += [
        "",
        f"Equal bits of output and dq, as timed: {text or 'nothing to compare'}.",
    ]
    if stronger := strong_scaling(results):
        lines += ["", "The same problem on more GPUs, forward / forward+backward:", "", *stronger]
    return "\n".join(lines)


def strong_scaling(results: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each problem that several numbers of GPUs solved: how much faster the best exchange is than with the fewest."""
    found: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for _, of_comm in _cases(results):
        timed = [r for r in of_comm.values() if "forward_backward_ms" in r]
        for r in timed:
            of_count = found.setdefault(tuple(map(r.get, PROBLEM)), {})
            before = of_count.get(r["ranks"])
            if before is None or r["forward_backward_ms"] < before["forward_backward_ms"]:
                of_count[r["ranks"]] = r
    lines = []
    for of_count in found.values():
        few, *others = (of_count[count] for count in sorted(of_count))
        for many in others:
            ratios = " / ".join(f"{few[x] / many[x]:.2f}x" for x in ("forward_ms", "forward_backward_ms"))
            what = f"{few['q_heads']}/{few['kv_heads']}, ({few['block_size']}, {few['topk']}), {routing_text(few)}"
            gpus = f"{few['ranks']} to {many['ranks']} GPUs"
            lines.append(f"- {tokens_text(few['tokens'])} tokens, {what}: {gpus} {ratios} ({many['comm']})")
    return lines


def commits(results: Sequence[dict[str, Any]]) -> str:
    """Of all results, the earliest first."""
    return " and ".join(dict.fromkeys(r["commit"][:10] for r in results))


def routing_text(result: dict[str, Any]) -> str:
    """What selects blocks, and of how long documents where there are several."""
    selections = f" ({result['selections']})" if "selections" in result else ""
    documents = f", documents of {result['document']:,}" if "document" in result else ""
    return f"{result['routing']}{selections}{documents}"


def budget(result: dict[str, Any]) -> str:
    """`exchange_bytes`, where it is not the default."""
    given = result.get("exchange_bytes", DEFAULT_EXCHANGE_BYTES)
    return "" if given == DEFAULT_EXCHANGE_BYTES else f", exchange_bytes {given / 2**30:g} GiB"


def _alone(best: dict[str, Any], comms: list[str]) -> list[str]:
    """Cells of one rank, where nothing moves: its time stands in the first column."""
    return [f"{times(best)} (alone)", *["-"] * (len(comms) - 1)]


def longest_table(contents: Sequence[dict[str, Any]], fastest: bool = False) -> str:
    """Markdown: the longest contexts, beside what dense attention would take by FLOPs at the rate it was measured at.

    Args:
        contents: of result files.
        fastest: only the fastest result for each number of GPUs, tokens and heads.
    """
    lines = [
        "| tokens | GPUs | heads | (B, k) | exchange | forward / forward+backward | dense, by FLOPs | peak GiB per GPU | error |",
        "|" + "---|" * 9,
    ]
    shown: set[tuple[Any, ...]] = set()
    for content in contents:
        rates = [r for one in _of_device(contents, content["device"]) for r in map(dense_rate, one["baselines"]) if r]
        order = ("tokens", "ranks", *["block_size"] * (not fastest), "forward_backward_ms")
        for r in sorted(_measured(content), key=lambda r: [r.get(name, 0) for name in order]):
            problem = content["device"], r["ranks"], r["tokens"], r["q_heads"], r["kv_heads"]
            if r["tokens"] < LONGEST_TOKENS or (fastest and problem in shown):
                continue
            shown.add(problem)
            dense = "-"
            if rates:
                flops = (FORWARD_FLOPS + BACKWARD_FLOPS) * r["tokens"] ** 2 / 2 * r["q_heads"] * 128
                seconds = flops / (max(rates) * r["ranks"])
                dense = (
                    f"{seconds:,.0f} s ({seconds * 1e3 / r['forward_backward_ms']:.0f}x)"
                    if "forward_backward_ms" in r
                    else "-"
                )
            lines.append(
                f"| {r['tokens']:,} | {r['ranks']} x {content['device']} | {r['q_heads']}/{r['kv_heads']} | ({r['block_size']}, "
                f"{r['topk']}) | {r['comm']}{budget(r)} | {times(r, 's')} | {dense} | {peak(r)} | {r['output_error']:.0e} |"
            )
    if not shown:
        return ""
    lines += [
        "",
        "*Dense, by FLOPs*: what forward+backward would take at the best rate that dense attention reached on the same "
        f"GPUs{_rate_text(contents)}.",
    ]
    return "\n".join(lines)


def _of_device(contents: Sequence[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    return [content for content in contents if content["device"] == device]


def _rate_text(contents: Sequence[dict[str, Any]]) -> str:
    rates: dict[str, float] = {}
    for content in contents:
        for rate in filter(None, map(dense_rate, content["baselines"])):
            rates[content["device"]] = max(rate, rates.get(content["device"], 0.0))
    shown = [f"{rate / 1e12:.0f} TFLOP/s per {device if len(rates) > 1 else 'GPU'}" for device, rate in rates.items()]
    return "".join(f", {text}" for text in shown)


def dense_rate(baseline: dict[str, Any]) -> float:
    """FLOP/s per GPU of a dense baseline, forward with backward; 0 for others."""
    if not baseline["baseline"].startswith("dense") or "forward_backward_ms" not in baseline:
        return 0.0
    flops = (FORWARD_FLOPS + BACKWARD_FLOPS) * baseline["tokens"] ** 2 / 2 * baseline["q_heads"] * 128
    return float(flops / baseline["ranks"] / baseline["forward_backward_ms"] * 1e3)


def scaling_plot(contents: Sequence[dict[str, Any]], path: Path) -> None:
    """Left: time of one layer against tokens, uniform routing, the fastest of each case; colours are attention, markers heads,
    lines numbers of GPUs. Right: share of the time that equal work on one GPU takes."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=130, layout="constrained", width_ratios=(1.2, 1))
    curves: dict[tuple[str, str, int], dict[int, float]] = {}
    bars: dict[str, float] = {}

    def add(what: str, entry: dict[str, Any]) -> None:
        points = curves.setdefault((what, f"{entry['q_heads']}/{entry['kv_heads']}", entry["ranks"]), {})
        ms = entry["forward_backward_ms"]
        points[entry["tokens"]] = min(ms, points.get(entry["tokens"], ms))

    for content in contents:
        results = [r for r in _measured(content) if "forward_backward_ms" in r and r["routing"] == "uniform"]
        for _, of_comm in _cases(results):
            best = min(of_comm.values(), key=lambda r: r["forward_backward_ms"])
            add(f"({best['block_size']}, {best['topk']})", best)
            share = _baseline(content["baselines"], best, "equal_work")
            if share is not None and best["layout"] == "zigzag":
                where = f"{best['ranks']} GPUs, {tokens_text(best['tokens'])}, {best['q_heads']}/{best['kv_heads']}"
                name = f"{where}\n({best['block_size']}, {best['topk']}): {best['comm']}"
                bars[name] = share["forward_backward_ms"] / best["forward_backward_ms"]
        for b in content["baselines"]:
            if b["baseline"].startswith("dense") and "forward_backward_ms" in b:
                add("dense", b)
    colours, markers = ({name: i for i, name in enumerate(sorted({key[at] for key in curves}))} for at in (0, 1))
    for what, heads, gpus in sorted(curves):
        tokens, ms = zip(*sorted(curves[what, heads, gpus].items()), strict=True)
        left.plot(
            tokens, ms, color=f"C{colours[what] % 10}", marker="os^Dv"[markers[heads] % 5], markersize=4,
            linestyle={1: "--", 2: "-"}.get(gpus, "-."), markerfacecolor="white" if gpus == 1 else None,
            label=f"{what}, {heads}, {gpus} GPU" + "s" * (gpus > 1),
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="tokens, all GPUs", ylabel="forward + backward, ms")
    ticks = sorted({tokens for points in curves.values() for tokens in points})
    left.set_xticks(ticks, [tokens_text(t) for t in ticks])
    left.minorticks_off()
    left.grid(alpha=0.3)
    left.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    right.barh(range(len(bars)), list(bars.values()), color="C0")
    right.set_yticks(range(len(bars)), list(bars), fontsize=6)
    right.axvline(1.0, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.set_xlabel("efficiency: equal work on one GPU over this time")
    figure.suptitle("; ".join(sorted({content["device"] for content in contents})), fontsize=10)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _measured(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in content["results"] if "forward_ms" in r]


def _of_same_inputs(results: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Results of equal tensors on as many GPUs."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for r in results:
        found.setdefault((r["ranks"], *map(r.get, PROBLEM), "forward_backward_ms" in r), []).append(r)
    return list(found.values())


def _cases(results: Sequence[dict[str, Any]]) -> list[tuple[tuple[Any, ...], dict[str, dict[str, Any]]]]:
    """By case: results by exchange; of equal ones with other head groups, the fastest. A case is a number of GPUs, the values of
    `PROBLEM`, a layout and `exchange_bytes`.
    """
    found: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in results:
        key = r["ranks"], *map(r.get, PROBLEM), r["layout"], r.get("exchange_bytes", DEFAULT_EXCHANGE_BYTES)
        of_comm = found.setdefault(key, {})
        before = of_comm.get(r["comm"])
        if before is None or r.get("forward_backward_ms", 0) < before.get("forward_backward_ms", 0):
            of_comm[r["comm"]] = r
    return sorted(found.items(), key=lambda item: _order(next(iter(item[1].values()))))


def _order(r: dict[str, Any]) -> tuple[Any, ...]:
    """By heads and blocks, then by routing and layout; the shortest sequences, on the fewest GPUs, first."""
    of_blocks = (r[x] for x in ("q_heads", "kv_heads", "block_size", "topk", "routing", "layout"))
    of_routing = r.get("document", 0), r.get("selections", "")
    return *of_blocks, *of_routing, r["tokens"], r["ranks"], r.get("exchange_bytes", DEFAULT_EXCHANGE_BYTES)


def _same(baseline: dict[str, Any], result: dict[str, Any]) -> bool:
    return all(
        baseline.get(name) == result.get(name) for name in ("ranks", "tokens", "q_heads", "kv_heads", "document")
    )


def _baseline(baselines: Sequence[dict[str, Any]], result: dict[str, Any], name: str) -> dict[str, Any] | None:
    """One GPU with the same tokens and its share of the heads."""
    wanted = {x: result.get(x) for x in ("ranks", *PROBLEM) if x not in ("q_heads", "kv_heads")} | {"baseline": name}
    for b in baselines:
        share = b["q_heads"] * result["ranks"] == result["q_heads"]
        if share and "forward_backward_ms" in b and all(b.get(x) == value for x, value in wanted.items()):
            return b
    return None


def efficiency(share: dict[str, Any] | None, best: dict[str, Any]) -> str:
    """Forward / forward+backward, in per cent."""
    if share is None:
        return "-"
    return " / ".join(f"{share[key] / best[key]:.0%}" for key in ("forward_ms", "forward_backward_ms"))


def dense_cell(dense: dict[str, Any] | None, best: dict[str, Any]) -> str:
    """Its time, and how many times as long that is."""
    if dense is None:
        return "-"
    return f"{times(dense)} ({dense['forward_backward_ms'] / best['forward_backward_ms']:.1f}x)"


def times(result: dict[str, Any] | None, unit: str = "ms") -> str:
    """Forward / forward+backward."""
    if result is None:
        return "-"
    factor = 1e-3 if unit == "s" else 1.0
    values = [result[key] * factor for key in ("forward_ms", "forward_backward_ms") if key in result]
    text = " / ".join(f"{x:.2f}" if unit == "s" else f"{x:.1f}" for x in values)
    return f"{text} s" if unit == "s" else text


def peak(result: dict[str, Any]) -> str:
    """GiB of the busiest GPU; nothing on the CPU."""
    value = result.get("peak_gib_forward_backward") or result.get("peak_gib_forward")
    return f"{value:.1f}" if value else "-"


def tokens_text(tokens: int) -> str:
    """131072 -> "128K", 10485760 -> "10M"."""
    if tokens % (1 << 20) == 0:
        return f"{tokens >> 20}M"
    return f"{tokens >> 10}K" if tokens % 1024 == 0 else str(tokens)
