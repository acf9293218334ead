"""What small models lose by MoBA, for the README; `docs/learning.md` has the study, made by `examples.learning.report`."""

from __future__ import annotations

from typing import Any

from examples.learning.summary import arms, finished, gaps, shown, table
from examples.learning.tables import percent_answered

NAMES = {
    "full": "full attention",
    "moba_512_3": "(512, 3)",
    "moba_128_8": "(128, 8)",
    "window_1536": "window of 1,536",
    "moba_512_3_last2_full": "(512, 3), last 2 of 8 layers full",
    "hybrid_90_full": "(512, 3), last 10 % of steps full",
}
"""Arms that the README shows, in this order, and what they are called there."""


def learning_headline(results: dict[str, Any]) -> str:
    """Markdown: a column per arm, rows for seeds, loss and retrieval."""
    runs = finished(results)
    found = arms(runs)
    known = {arm: found[arm] for arm in NAMES if arm in found}
    length = runs[0]["config"]["data"]["length"]
    nats, answered = [], []
    for arm, seeds in known.items():
        values = gaps(seeds, found["full"])
        nats.append("0" if arm == "full" else shown(values, 3, sign=True))
        answered.append(shown([p for run in seeds.values() if (p := percent_answered(run)) is not None], 0))
    rows = [["seeds", *(str(len(seeds)) for seeds in known.values())]]
    rows += [["loss above full attention's, nats", *nats], [f"% answered at {length:,} tokens", *answered]]
    tokens, size = runs[0]["tokens"] / 1e6, runs[0]["parameters"] / 1e6
    text = (
        f"Models of {size:.0f}M parameters after {tokens:.0f}M tokens of code and prose, windows of {length:,} tokens; ± is the "
        "standard error over seeds. *Answered*: prompts whose answer stands somewhere before. [Method, curves and "
        "limits](docs/learning.md)."
    )
    return f"{text}\n\n{table(['', *(NAMES[arm] for arm in known)], rows).replace(' (one seed)', '')}"
