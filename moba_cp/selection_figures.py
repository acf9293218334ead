"""Figures behind the pictures and tables of `diagnostics`: selections by bin and by distance, and plain-text tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from .drawing import SelectionGrid
from .parallel.blocks import BlockTable, block_table
from .parallel.layout import SequenceLayout
from .report import MoBAReport

MAX_CELLS = 256
"""Most rows, and most columns, of a heatmap; longer axes are drawn in bins."""


def count_selections(
    report: MoBAReport, layout: SequenceLayout | None, group: dist.ProcessGroup | None, heads: list[int]
) -> SelectionGrid:
    """Bin this rank's selections and, given a layout, add up the ranks'."""
    numbers = report.token_numbers
    tokens = layout.total_tokens if layout else int(numbers.max()) + 1 if numbers.numel() else 0
    n_blocks, device = report.n_blocks, report.selected.device
    rows, columns = max(1, min(tokens, MAX_CELLS)), max(1, min(n_blocks, MAX_CELLS))
    row = (numbers * rows // max(1, tokens)).to(device)
    counts = torch.zeros(2, rows * columns, dtype=torch.int64, device=device)  # earlier blocks, own blocks
    for head in heads:  # one at a time: the int64 temporaries are several times the selection
        selected = report.selected[head].long()  # [T, topk]
        own = selected.amax(1, keepdim=True)
        column = selected * columns // max(1, n_blocks)
        first = torch.ones_like(column, dtype=torch.bool)
        first[:, 1:] = column[:, 1:] != column[:, :-1]  # ascending, so blocks of one bin lie side by side
        cell = row[:, None] * columns + column
        counts[0] += torch.bincount(cell[(selected >= 0) & (selected < own) & first], minlength=rows * columns)
        counts[1] += torch.bincount(cell[selected == own], minlength=rows * columns)
    if layout is not None and layout.cp_size > 1:
        dist.all_reduce(counts, group=group)
    earlier, own_count = counts.cpu().numpy().reshape(2, rows, columns)
    pairs = own_count.sum(1)  # each (row, head) has one own block

    visible = np.zeros((rows, columns + 1), dtype=np.int64)  # differences along the columns
    for top, bottom, begin, end in _sights(report, layout, tokens, rows, columns):
        visible[top : bottom + 1, begin] += 1
        visible[top : bottom + 1, end + 1] -= 1
    mask = (visible.cumsum(1)[:, :-1] > 0) & (pairs[:, None] > 0)
    share = np.where(mask, earlier / np.maximum(pairs[:, None], 1), np.nan)
    return SelectionGrid(tokens, n_blocks, share, own_count > 0, pairs > 0)


def _sights(report: MoBAReport, layout: SequenceLayout | None, tokens: int, rows: int, columns: int) -> np.ndarray:
    """int64 `[n, 4]`: first and last bin of query rows, first and last bin of the earlier blocks that they can select.

    Args:
        report: the report.
        layout: its layout; None takes this rank's own rows, and everything before them for one document.
        tokens, rows, columns: tokens on the vertical axis, and bins of tokens and of blocks.
    """
    if layout is not None:
        blocks = block_table(layout.cu_seqlens_array, report.block_size)
        own, first = np.arange(len(blocks)), blocks.first_of_document
        token, last_token = blocks.start, blocks.start + blocks.length - 1
    else:
        own = report.selected[0].amax(1).cpu().numpy().astype(np.int64)
        first, token = np.zeros_like(own), report.token_numbers.numpy()
        last_token = token
    row = np.stack([token, last_token], axis=1) * rows // max(1, tokens)
    column = np.stack([first, own - 1], axis=1) * columns // max(1, report.n_blocks)
    return np.unique(np.concatenate([row, column], axis=1)[own > first], axis=0)


def distances(report: MoBAReport) -> tuple[list[str], np.ndarray]:
    """Labels and counts of the distance histogram, up to the last bucket in use (at least "own" and "1")."""
    histogram = report.distance_histogram
    used = max(2, int(np.flatnonzero(histogram).max(initial=0)) + 1)
    labels = ["own", "1"] + [f"{2 ** (i - 1)}–{2**i - 1}" for i in range(2, used)]
    return labels[:used], histogram[:used]


def uniform_histogram(blocks: BlockTable, topk: int, buckets: int) -> np.ndarray:
    """float64 `[buckets]`, shares by distance if each query chose among its earlier blocks uniformly."""
    candidates = np.arange(len(blocks)) - blocks.first_of_document
    weight = blocks.length * np.minimum(topk - 1, candidates) / np.maximum(candidates, 1)  # for each 1..candidates
    rows_at_least = np.zeros(int(candidates.max(initial=0)) + 2)
    np.add.at(rows_at_least, candidates, weight)
    by_distance = np.cumsum(rows_at_least[::-1])[::-1][1:-1]  # [d - 1]: rows that have a block d back
    bucket = np.floor(np.log2(np.arange(1, by_distance.size + 1))).astype(int) + 1
    histogram = np.bincount(bucket, weights=by_distance, minlength=buckets)
    histogram[0] = blocks.length.sum()
    return histogram / max(1.0, histogram.sum())


def text_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    width = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
    width[0] = max(width[0], 22)
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, width)))
        for r in (head, *rows)
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
