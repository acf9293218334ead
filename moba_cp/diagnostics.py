"""Pictures and tables of a `MoBAReport`: which blocks the queries selected, how far back, and what that moved.

    out, report = moba_cp.moba_attention(q, k, v, config, layout=layout, group=group, return_report=True)
    print(diagnostics.format_report(report))
    diagnostics.plot_block_selection(report, "selection.png", layout=layout, group=group)
    diagnostics.plot_distance_histogram(report, "distance.png", layout=layout)
    diagnostics.plot_traffic(report, "traffic.png", group=group)

Nothing here runs unless called. Drawing needs matplotlib (`pip install "moba_cp[plots]"`), which is imported by the first
plot; no global matplotlib state is touched and no display is needed. The suffix of `path` decides the file format; without one
it is PNG, and `.png` is added.

Functions that bring the ranks' figures together say so: every rank of the group calls them, rank 0 writes the file.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from . import drawing
from .drawing import format_bytes
from .parallel import agreement
from .parallel.blocks import block_table
from .parallel.comm import CommGroup, StageTraffic, Traffic, check_group, process_group_of
from .parallel.layout import SequenceLayout
from .report import MoBAReport
from .selection_figures import count_selections, distances, text_table, uniform_histogram
from .validation import RefusedTogether, check_layout


def gather_selection(
    report: MoBAReport, layout: SequenceLayout, group: dist.ProcessGroup | DeviceMesh | None = None
) -> Tensor:
    """Every rank's selected blocks as one tensor; all ranks of the group call it together.

    Args:
        report: this rank's report.
        layout: the layout of the call that made it.
        group: the context-parallel group; None for the default group, or for none at all when `layout.cp_size == 1`.

    Returns:
        int32 `[Hq, T, topk]` over all `T` tokens in order of token number, ascending block numbers, -1 for none; on every
        rank, on the device of `report.selected`. Takes `4 * Hq * T * topk` bytes.

    Raises:
        TypeError, ValueError: the report is not of this layout, or the ranks disagree; on every rank.
    """
    group = process_group_of(group)
    _check_together(report, layout, group)
    with RefusedTogether(layout, group):
        check_layout(layout)
    _begin(report, layout, group, "gather_selection")
    if layout.cp_size == 1:
        return layout.unshard([report.selected], dim=1)
    held = [layout.local_tokens(rank) for rank in range(layout.cp_size)]
    padded = report.selected.new_full((max(held), report.selected.shape[0], report.selected.shape[2]), -1)
    padded[: report.selected.shape[1]] = report.selected.transpose(0, 1)
    gathered = CommGroup(group, layout.cp_size).all_gather(padded, "selected blocks").wait()
    return layout.unshard([part[:tokens] for part, tokens in zip(gathered, held)]).transpose(0, 1).contiguous()


def gather_traffic(report: MoBAReport, group: dist.ProcessGroup | DeviceMesh | None = None) -> list[Traffic]:
    """The traffic of every rank so far, in order of rank; all ranks of the group call it together.

    Args:
        report: this rank's report.
        group: the context-parallel group; None for the default group, or for none at all if the report is of one rank.

    Returns:
        Collectives and bytes of each rank by stage, on every rank.

    Raises:
        TypeError, ValueError: an argument is not as said, or the ranks disagree; on every rank.
    """
    group = process_group_of(group)
    _check_together(report, None, group)
    size = report.attended_keys.size
    if size == 1:
        return [report.traffic]
    agreement.check(group, {"diagnostics": "gather_traffic"}, report.selected.device)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, report.traffic, group=group)
    return every


def format_report(report: MoBAReport) -> str:
    """The report as a plain-text table of about 30 lines, without a newline at its end.

    Raises:
        TypeError: `report` is no `MoBAReport`.
    """
    _check_report(report)
    ranks = report.attended_keys.size
    wanted = ", ".join(f"{block} ({times:,}x)" for block, times in report.most_wanted[:5]) or "none"
    facts = [
        ("transport", f"{report.transport}, {ranks} rank{'s' * (ranks > 1)}"),
        *[("heads", f"split over {report.head_parallel} ranks: {report.reason}")] * (report.head_parallel > 1),
        *_walks(report),
        ("blocks", f"{report.n_blocks:,} of {report.block_size:,} tokens"),
        ("wanted share", f"{report.wanted_share:.1%} of the bytes of remote blocks in sight"),
        ("entropy", f"{report.entropy:.3f} (1: all blocks alike, 0: one block takes all)"),
        ("imbalance", f"{report.imbalance:.3f} (attended keys, busiest rank over mean)"),
        ("most wanted", wanted),
    ]
    lines = [f"{name:<14}{value}" for name, value in facts]

    total = max(1, int(report.distance_histogram.sum()))
    by_distance = [(label, f"{n:,}", f"{n / total:.1%}") for label, n in zip(*distances(report))]
    lines += ["", *text_table(("blocks back", "selections", "share"), by_distance)]

    stages: list[tuple[str, StageTraffic | Traffic]] = [*report.traffic.stages.items()]
    stages.sort(key=lambda stage: -stage[1].received_bytes)
    columns = ["traffic of this rank", "collectives", "sent", "received"]
    apart = report.traffic.between_bytes > 0
    traffic = [
        (
            name,
            f"{t.collectives:,}",
            *(format_bytes(n) for n in (t.sent_bytes, t.received_bytes, t.between_bytes)[: 2 + apart]),
        )
        for name, t in [*stages, ("total", report.traffic)]
    ]
    lines += ["", *text_table((*columns, *["from other nodes"] * apart), traffic)]

    figures = zip(report.lower_bound_bytes.tolist(), report.visible_bytes.tolist(), report.attended_keys.tolist())
    by_rank = [
        (f"rank {rank}", format_bytes(fewest), format_bytes(visible), f"{keys:,}")
        for rank, (fewest, visible, keys) in enumerate(figures)
    ]
    if ranks > 16:
        by_rank = [*by_rank[:8], ("...", "", "", ""), *by_rank[-8:]]
    lines += ["", *text_table(("forward keys, values", "fewest bytes", "all in sight", "keys attended"), by_rank)]
    return "\n".join(lines)


def _walks(report: MoBAReport) -> list[tuple[str, str]]:
    """How often keys and values travel, and what would bring them once; nothing where they do."""
    if max(report.walks) == 1:
        return []
    forward, backward = report.walks
    once = max(report.once_bytes)
    text = f"keys and values travel {forward}x forward, {backward}x backward; once with exchange_bytes={once}"
    return [("walks", f"{text} ({format_bytes(once)})")]


def plot_block_selection(
    report: MoBAReport,
    path: str | os.PathLike[str],
    *,
    layout: SequenceLayout | None = None,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    heads: int | Sequence[int] | None = None,
    title: str | None = None,
) -> Path:
    """Heatmap of query position x block: the share of (query row, q head) pairs that selected the block.

    The own block, which is always selected, is drawn in a colour of its own; the colours are scaled to the earlier
    blocks. Axes longer than 256 (`selection_figures.MAX_CELLS`) are binned; a bin of blocks counts as selected where any of
    its blocks is.

    Args:
        report: this rank's report.
        path: file to write; its folder is made if need be.
        layout: the layout of the call. With it, the rows of all ranks are brought together (all ranks of the group
            call this together, rank 0 writes the file) and documents are outlined. Without it, this rank draws the rows
            it has, and document boundaries are unknown.
        group: the context-parallel group; None for the default group, or for none at all when `layout.cp_size == 1`.
        heads: the q heads to draw; None for all.
        title: None for a standing title.

    Returns:
        The file, on every rank.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: the report is not of this layout, there is no such head, or the ranks disagree.
    """
    group = process_group_of(group)
    if layout is None:
        _check_report(report)
    else:
        _check_together(report, layout, group)
    drawing.matplotlib()
    error: Exception | None = None
    chosen: list[int] = []
    writes = layout is None or _writes(report, group)
    try:
        path, chosen = _file(path, writes), _chosen_heads(heads, report.selected.shape[0])
    except (TypeError, ValueError) as raised:
        error = raised
    if layout is not None:
        _begin(report, layout, group, f"plot_block_selection of heads {heads}", error)
    elif error is not None:
        raise error
    grid = count_selections(report, layout, group, chosen)
    path = Path(path)
    if not writes:
        return path
    documents = layout.cu_seqlens_array if layout is not None else np.zeros(1, dtype=np.int64)
    n_documents = np.count_nonzero(np.diff(documents))
    facts = [
        f"{len(chosen)} head{'s' * (len(chosen) > 1)}",
        f"{grid.tokens:,} tokens" + (f" in {n_documents} documents" if n_documents > 1 else ""),
        f"top {report.selected.shape[2]} of {report.n_blocks:,} blocks",
    ]
    if layout is None and report.attended_keys.size > 1:
        facts.append("rows of one rank")
    frames = block_table(documents, report.block_size)
    subtitle = " · ".join(facts)
    return drawing.draw_selection(
        grid, frames, report.block_size, path, title or "Blocks that queries select", subtitle
    )


def plot_distance_histogram(
    report: MoBAReport,
    path: str | os.PathLike[str],
    *,
    layout: SequenceLayout | None = None,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    title: str | None = None,
) -> Path:
    """Bars: the share of selections by how many blocks they lie before the query's own.

    Args:
        report: the report; its histogram is of the whole group already.
        path: file to write; its folder is made if need be.
        layout: the layout of the call; with it, the picture also shows what uniformly random routing would give.
        group: the context-parallel group: all its ranks call this together, and its rank 0 writes the file. None: this rank
            draws alone, without communication.
        title: None for a standing title.

    Returns:
        The file, on every rank.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: the layout is not the report's, or `group` is no process group of the report's ranks.
    """
    group = process_group_of(group)
    if group is None:
        _check_report(report)
        drawing.matplotlib()
        path = _file(path, True)
    else:
        _check_together(report, layout, group)
        drawing.matplotlib()
        writes = _writes(report, group)
        path = _file_together(path, layout, group, writes)
        _begin(report, layout, group, "plot_distance_histogram")
        if not writes:
            return path
    labels, counts = distances(report)
    uniform = None
    if layout is not None:
        _check_layout(report, layout)
        blocks = block_table(layout.cu_seqlens_array, report.block_size)
        uniform = uniform_histogram(blocks, report.selected.shape[2], len(report.distance_histogram))[: len(labels)]
    subtitle = f"{int(counts.sum()):,} selections · {report.n_blocks:,} blocks · entropy {report.entropy:.2f}"
    share = counts / max(1, counts.sum())
    return drawing.draw_distances(
        labels, share, uniform, report.block_size, path, title or "How far back queries look", subtitle
    )


def plot_traffic(
    report: MoBAReport,
    path: str | os.PathLike[str],
    *,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    title: str | None = None,
) -> Path:
    """Stacked bars: bytes that each rank received by stage, with the fewest its routing allows for keys and values.

    All ranks of the group call it together; rank 0 writes the file. Backward brings keys and values once more, so the bound
    counts twice once backward has run.

    Args:
        report: this rank's report.
        path: file to write; its folder is made if need be.
        group: the context-parallel group; None for the default group, or for none at all if the report is of one rank.
        title: None for a standing title.

    Returns:
        The file, on every rank.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: as `gather_traffic`.
    """
    drawing.matplotlib()
    group = process_group_of(group)
    _check_together(report, None, group)
    writes = _writes(report, group)
    path = _file_together(path, None, group, writes)
    traffic = gather_traffic(report, group)
    if not writes:
        return path
    names = dict.fromkeys(name for t in traffic for name in t.stages)
    received = {n: np.array([t.stages[n].received_bytes if n in t.stages else 0 for t in traffic]) for n in names}
    passes = 2 if any("gradients" in name for name in names) else 1
    subtitle = f"transport: {report.transport}"
    if len(traffic) > 1:
        subtitle += f" · {report.wanted_share:.1%} of the remote keys and values in sight are wanted"
    bounds = report.lower_bound_bytes * passes, report.visible_bytes * passes
    of = "forward and backward" if passes == 2 else "forward"
    return drawing.draw_traffic(received, *bounds, of, path, title or "Bytes each rank received", subtitle)


def _chosen_heads(heads: int | Sequence[int] | None, q_heads: int) -> list[int]:
    if heads is None:
        return list(range(q_heads))
    try:
        listed = [heads] if isinstance(heads, SupportsIndex) else list(heads)
        if any(isinstance(h, bool) for h in listed):
            raise TypeError("bools count nothing")
        chosen = [operator.index(h) for h in listed]
    except TypeError as error:
        raise TypeError(f"heads must be an int or a list of ints, got {heads!r}") from error
    if not chosen or not all(0 <= h < q_heads for h in chosen):
        raise ValueError(f"heads must be in [0, {q_heads}), got {heads!r}")
    return chosen


def _begin(
    report: MoBAReport,
    layout: SequenceLayout | None,
    group: dist.ProcessGroup | None,
    what: str,
    error: Exception | None = None,
) -> None:
    """Check the report against the layout, and that all ranks came for the same; raises on every rank."""
    try:
        if error is not None:
            raise error
        if layout is not None:
            _check_layout(report, layout)
        ranks = report.attended_keys.size
        if ranks > 1:
            _check_ranks(report, group)
    except (TypeError, ValueError) as raised:
        if report.attended_keys.size > 1 and dist.is_initialized():
            agreement.refuse(group, raised, report.selected)
        raise
    if ranks > 1:
        shown = "none" if layout is None else f"{layout.digest.hex()} {layout!r}"
        facts = {"diagnostics": what, "layout": shown, "blocks": str(report.block_size)}
        agreement.check(group, facts, report.selected.device)


def _check_report(report: MoBAReport) -> None:
    if not isinstance(report, MoBAReport):
        raise TypeError(f"report must be a MoBAReport, got {type(report).__name__}")


def _check_together(report: MoBAReport, layout: SequenceLayout | None, group: dist.ProcessGroup | None) -> None:
    """Report and group of a call that all ranks of the group make: what one of them refuses, all raise."""
    with RefusedTogether(layout, group):
        _check_report(report)
        check_group(group)
        if group is not None:
            _check_ranks(report, group)


def _check_ranks(report: MoBAReport, group: dist.ProcessGroup | None) -> None:
    size, ranks = dist.get_world_size(group), report.attended_keys.size
    if size != ranks:
        raise ValueError(f"group has {size} ranks, but the report is of {ranks}")


def _writes(report: MoBAReport, group: dist.ProcessGroup | None) -> bool:
    """Whether this rank writes a picture that all ranks of the report make together."""
    return report.attended_keys.size == 1 or (dist.is_initialized() and dist.get_rank(group) == 0)


def _file(path: str | os.PathLike[str], writes: bool) -> Path:
    """Where a picture goes: `.png` is added to a name without a suffix. If this rank `writes` it, its folder is made.

    Raises:
        TypeError, ValueError: `path` is no path, or of no kind that can be drawn, or this rank cannot write there.
    """
    try:
        file = Path(path)
    except TypeError:
        raise TypeError(f"path must be a str or a path, got {path!r}") from None
    if not file.name:
        raise ValueError(f"path must name a file, got {path!r}")
    file = file if file.suffix else file.with_name(f"{file.name}.png")
    if file.suffix[1:].lower() not in drawing.formats():
        raise ValueError(f"path must end with one of {', '.join(drawing.formats())}, got {str(path)!r}")
    if writes:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"path {str(file)!r} cannot be written: {error}") from error
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"path {str(file)!r} cannot be written")
    return file


def _file_together(
    path: str | os.PathLike[str], layout: SequenceLayout | None, group: dist.ProcessGroup | None, writes: bool
) -> Path:
    """`_file` of a call that all ranks of the group make: what one of them refuses, all raise."""
    with RefusedTogether(layout, group):
        return _file(path, writes)


def _check_layout(report: MoBAReport, layout: SequenceLayout) -> None:
    check_layout(layout)
    ranks = report.attended_keys.size
    if layout.cp_size != ranks:
        raise ValueError(f"layout is for {layout.cp_size} ranks, but the report is of {ranks}")
    if layout.digest != report.layout_digest:
        n_blocks = len(block_table(layout.cu_seqlens_array, report.block_size))
        raise ValueError(
            f"the report is of another layout: it has {report.n_blocks} blocks of {report.block_size} tokens and "
            f"{report.token_numbers.numel()} local tokens, the layout {n_blocks} blocks and {layout!r}"
        )
