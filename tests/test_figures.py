"""Measured figures in sentences come from committed files: none is typed by hand."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from moba_cp import config
from moba_cp.kernels import sizes
from moba_cp.parallel import agreement, cost, home, plan_cache

pytest.importorskip("typer")
from scripts.make_tables import RESULTS, pages
from scripts.tables.figures import figures
from scripts.tables.text import FIGURE, fill_figures
from scripts.tables.trials import trial_tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
GENERATED = ROOT / "docs" / "learning.md"
"""Written by `examples.learning.report` as a whole, but for its reading, which is a page of its own."""

TIME, RATE, MEMORY = (
    r"n?s|us|µs|ms|h|min|(?:nano|micro|milli)?seconds?|minutes?|hours?",
    r"[kKMGT]i?B/s|[GTP]FLOPs?(?:/s)?|tokens/s|tokens per second",
    r"[kKMGT]i?B|nats",
)
MEASURED = re.compile(
    rf"(?<![\w.,])\d[\d,]*(?:\.\d+)?(?:[ -]?(?:{TIME}|{RATE}|{MEMORY}|%|percent)(?!\w)|x(?!\w)"
    r"| times (?:as|the|faster|slower|less|more|fewer)\b)"
)

ALLOWED: dict[str, dict[str, tuple[str, ...]]] = {
    "ceilings of a GPU": {
        "docs/kernels.md": ("at 800 TFLOP/s (bf16) and its bytes at 3.0 TB/s",),
        "docs/kernel_trials.md": ("5.5 TB/s",),
    },
    "computed from sizes and ceilings, as the sentence says": {
        "docs/kernels.md": (
            "2.1 ms at 512K with 8 heads",
            "33 MB at most",
            "4 to 17 MB",
            "4 KB, which takes as long as the product",
        ),
        "docs/kernel_trials.md": (
            "68.7 GB of centroids from L2 at 512K, 16 heads: 12.5 ms",
            "67 MB, which do not fit in L2",
            "take 256 KiB",
            "4 KB in 32 clocks",
        ),
        "docs/huggingface.md": (
            "SDPA's 537 MB",
            "SDPA reads 537 MB",
            "58 MB | 15 MB | 443 MB",
            "0.5 MB | 2.1 MB | 0.1 MB",
        ),
    },
    "computed by a list scheduler, as the sentence says": {
        "docs/kernels.md": (
            "| dkdv, (512, 8), 8K | 88 % | 99 % | 97 % | 99.7 % |",
            "| dkdv_dq, (128, 8), 8K | 83 % | 99 % | 96 % | 99.7 % |",
            "| attention, (128, 8), 8K | 78 % | 96 % | 96 % | |",
            "a tile for each of those: 7 % of its time",
        ),
    },
    "a setting of a run": {
        "examples/learning/learning.md.in": ("for 90 % of the steps",),
    },
    "a target, or what a test holds": {
        "CONTRIBUTING.md": ("more than 2 % slower", "300 s"),
        "docs/scaling.md": ("within 30 %", "within 15 %"),
    },
    "a default or bound of the code: `test_constants_are_those_of_the_code`, or what torch sets": {
        "docs/architecture.md": (
            "`workspace_bytes`** (1.25 GiB by default)",
            "`exchange_bytes`** (4 GiB by default)",
            "96 MiB on the host, 96 MiB on devices",
            "all-gather of 1 KiB per rank",
            "`_STARTS_BYTES` (8 MiB)",
            "`PATIENCE_S` (0.3 s)",
            "`GRACE_S` (2 s)",
        ),
        "docs/exchanges.md": (
            "`SPLIT_BYTES` (256 MiB)",
            "`PULL_BYTES` (256 MiB)",
            "`GATHER_BYTES` (32 MiB)",
        ),
        "docs/kernels.md": ("`ROWS_AT_ONCE` (32 MiB)", "`GROUPS_AT_ONCE` (64 MiB)"),
        "docs/scaling.md": ("`exchange_bytes` of 4 GiB",),
        "docs/launching.md": ("10 minutes by default over NCCL", "waits up to 100 seconds"),
    },
}


def read(page: Path) -> str:
    """A page, without the example of a figure in code."""
    return re.sub(r"`<!--=[^`]*`", "", page.read_text())


NO_MEASUREMENT = (
    r"```.*?```",
    r"<!-- (results:\w+) -->.*?<!-- /\1 -->",
    r"\*Prediction\*.*?(?=\n\n|\*Outcome\*|\Z)",
    r"^###[^\n]*\((?:not measured yet|not tried|dropped on paper)\)\n.*?(?=^##|\Z)",
)
"""Code, generated tables, what was written down before a measurement, and sections whose heading says that there was none."""


def prose(page: Path) -> str:
    """A page without generated figures, and without parts that hold none that was measured."""
    text = read(page)
    for pattern in NO_MEASUREMENT:
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    return FIGURE.sub("", text)


def allowed(page: Path) -> list[str]:
    name = str(page.relative_to(ROOT))
    return [text for by_page in ALLOWED.values() for text in by_page.get(name, ())]


@cache
def made() -> dict[str, str]:
    return figures(RESULTS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_in_sentences_are_generated(page: Path) -> None:
    """A measured figure stands as `<!--=file.name-->1.7 s<!--/-->`: add it to `scripts/tables/figures.py`, or a trial without a
    file to `docs/results/trials.json`, and run `python -m scripts.make_tables`."""
    for name, text in FIGURE.findall(read(page)):
        assert text == made()[name], name
    if page == GENERATED:
        return
    text = prose(page)
    for known in allowed(page):
        assert known in text, f"{known!r} is allowed and no longer there"
        text = text.replace(known, "")
    assert not [found[0] for found in MEASURED.finditer(text)]


@pytest.mark.parametrize(
    "text",
    [
        "a step of 440 ms",
        "3.4 TB/s",
        "takes 1.7 s.",
        "23 GiB less",
        "4.0x",
        "4.0 times as fast",
        "86 %",
        "95%",
        "11 µs per layer",
        "a 440-ms step",
        "3 ms/step",
        "12 GiB/rank",
        "900 MB/s",
        "5 milliseconds",
        "1.2 PFLOP/s",
        "twenty, or 20 percent",
        "3 times faster",
    ],
)
def test_measured_figures_are_found(text: str) -> None:
    assert MEASURED.search(text)


@pytest.mark.parametrize(
    "text", ["128K tokens", "64 x 64 x 16", "two GPUs", "commit 1c91dde", "2 * cp chunks", "8 heads", "sm_90"]
)
def test_other_numbers_are_not(text: str) -> None:
    assert not MEASURED.search(text)


def test_constants_are_those_of_the_code() -> None:
    page = "".join((ROOT / "docs" / name).read_text() for name in ("architecture.md", "exchanges.md"))
    for text, value in (
        ("`SPLIT_BYTES` (256 MiB)", cost.SPLIT_BYTES == 256 << 20),
        ("`PULL_BYTES` (256 MiB)", cost.PULL_BYTES == 256 << 20),
        ("`PULL_ROWS` (2^20)", cost.PULL_ROWS == 1 << 20),
        ("`FETCH_SHARE` (0.75)", cost.FETCH_SHARE == 0.75),
        ("`GATHER_BYTES` (32 MiB)", cost.GATHER_BYTES == 32 << 20),
        ("`workspace_bytes`** (1.25 GiB by default)", config.DEFAULT_WORKSPACE_BYTES == 5 << 28),
        ("`exchange_bytes`** (4 GiB by default)", config.DEFAULT_EXCHANGE_BYTES == 4 << 30),
        ("96 MiB on the host", plan_cache.MOST_HOST_BYTES == 96 << 20),
        ("96 MiB on devices", plan_cache.MOST_DEVICE_BYTES == 96 << 20),
        ("`_STARTS_BYTES` (8 MiB)", home._STARTS_BYTES == 8 << 20),
        ("`PATIENCE_S` (0.3 s)", agreement.PATIENCE_S == 0.3),
        ("`GRACE_S` (2 s)", agreement.GRACE_S == 2),
    ):
        assert text in page
        assert value, text
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert "`ROWS_AT_ONCE` (32 MiB)" in page
    assert "`GROUPS_AT_ONCE` (64 MiB)" in page
    assert (sizes.ROWS_AT_ONCE, sizes.GROUPS_AT_ONCE) == (32 << 20, 64 << 20)


def test_figures_are_filled_or_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("It takes <!--=a.ms-->old<!--/--> or <!--=b.ms--><!--/-->.\n")
    fill_figures({"a.ms": "3 ms", "b.ms": "4 ms"}, [page])
    assert page.read_text() == "It takes <!--=a.ms-->3 ms<!--/--> or <!--=b.ms-->4 ms<!--/-->.\n"
    with pytest.raises(ValueError, match=r"none of: b\.ms"):
        fill_figures({"a.ms": "3 ms"}, [page])
    with pytest.raises(ValueError, match=r"no page names the figures c\.ms"):
        fill_figures({"a.ms": "3 ms", "b.ms": "4 ms", "c.ms": "5 ms"}, [page])


def test_a_trial_says_that_it_was_recorded_by_hand() -> None:
    with pytest.raises(ValueError, match="'x' is not marked"):
        trial_tables({"trials": [{"name": "x", "rows": [["1"]], "columns": ["a"]}]})
