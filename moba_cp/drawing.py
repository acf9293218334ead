"""Draws the pictures of `moba_cp.diagnostics` from plain arrays. Only this file imports matplotlib, on first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .parallel.blocks import BlockTable

# Okabe and Ito's palette, which is safe for colour-blind readers.
_BLUE, _SKY, _GREEN, _YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
_ORANGE, _RED, _PINK = "#E69F00", "#D55E00", "#CC79A7"
_INK, _GREY, _PALE = "#222222", "#777777", "#EBEBEB"

_MAX_FRAMES = 128
"""Above this many documents, frames would cover the picture and are not drawn."""


@dataclass(frozen=True)
class SelectionGrid:
    """Selections in bins of tokens (rows) and blocks (columns).

    Attributes:
        tokens: tokens on the vertical axis.
        n_blocks: blocks on the horizontal axis.
        earlier: float `[rows, columns]`, share of (query, q head) pairs that selected an earlier block of the column; NaN
            where none of the rows can.
        own: bool `[rows, columns]`, where the own blocks of the rows are.
        present: bool `[rows]`, whether any of the row's tokens was counted.
    """

    tokens: int
    n_blocks: int
    earlier: np.ndarray
    own: np.ndarray
    present: np.ndarray


def matplotlib() -> Any:
    """The package, with the modules in use imported.

    Raises:
        ImportError: it is not installed; the message says which extra brings it.
    """
    try:
        import matplotlib
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.patches
        import matplotlib.ticker
    except ImportError as error:
        raise ImportError('moba_cp.diagnostics draws with matplotlib: pip install "moba_cp[plots]"') from error
    return matplotlib


def draw_selection(
    grid: SelectionGrid, blocks: BlockTable, block_size: int, path: Path, title: str, subtitle: str
) -> Path:
    """Heatmap of query position x block, with a frame around each document of `blocks` if there are several."""
    mpl = matplotlib()
    figure, axes = _figure(7.2, 6.6)
    top = max(float(np.nan_to_num(grid.earlier).max(initial=0)), 1e-3)
    extent = (0, max(1, grid.n_blocks), max(1, grid.tokens), 0)
    picture = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    axes.imshow(_flat(np.broadcast_to(grid.present[:, None], grid.own.shape), _PALE), **picture)
    image = axes.imshow(
        np.ma.masked_invalid(grid.earlier),
        cmap="YlGnBu",
        norm=mpl.colors.PowerNorm(0.5, 0, top),  # on a linear scale, a few blocks that all select would hide the rest
        **picture,
    )
    axes.imshow(_flat(grid.own, _RED), **picture)
    for x, y in _document_frames(blocks):
        axes.plot(x, y, color=_INK, linewidth=0.7, clip_on=False, solid_joinstyle="miter")

    axes.set_xlabel(f"block ({block_size:,} tokens each)")
    axes.set_ylabel("query position (tokens)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(mpl.ticker.MaxNLocator(8, integer=True))
        axis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.045)
    bin_size = -(-grid.n_blocks // grid.own.shape[1])
    what = "the block" if bin_size <= 1 else f"any of about {bin_size} blocks"
    bar.set_label(f"share of (query, head) pairs that selected {what}", color=_INK)
    bar.ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(6))
    bar.ax.yaxis.set_major_formatter(mpl.ticker.PercentFormatter(1, decimals=0 if top > 0.05 else 1))
    bar.ax.tick_params(colors=_INK, labelsize=9)
    bar.outline.set_visible(False)
    marks = [
        mpl.patches.Patch(color=_RED, label="own block, always selected"),
        mpl.patches.Patch(facecolor=_PALE, edgecolor=_GREY, linewidth=0.5, label="out of the query's sight"),
    ]
    _legend(axes, handles=marks, loc="upper left", bbox_to_anchor=(-0.01, -0.085), ncols=2)
    _title(axes, title, subtitle)
    return _save(figure, path)


def draw_distances(
    labels: Sequence[str],
    share: np.ndarray,
    uniform: np.ndarray | None,
    block_size: int,
    path: Path,
    title: str,
    subtitle: str,
) -> Path:
    """Bars of the share of selections by distance, and diamonds at the share that uniformly random routing would give."""
    figure, axes = _figure(7.2, 4.2)
    x = np.arange(len(labels))
    axes.bar(x, share, width=0.72, color=[_RED] + [_BLUE] * (len(x) - 1))
    top = share.max(initial=0)
    diamond = np.full(len(x), -1.0)  # none
    if uniform is not None:
        diamond[1:] = uniform[1:]  # the own block is always selected
        top = max(top, diamond.max())
        axes.plot(
            x[1:], uniform[1:], "D", color="white", markeredgecolor=_INK, markersize=5, label="if routing were uniform"
        )
        _legend(axes, loc="upper right")
    for i, value in enumerate(share):
        near = -0.02 * top < diamond[i] - value < 0.09 * top
        axes.annotate(
            f"{value:.0%}" if value >= 0.0995 or value == 0 else f"{value:.1%}",
            (i, max(diamond[i], value) if near else value),
            (0, 8 if near else 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_INK,
        )
    axes.set_xticks(x, labels)
    axes.set_ylim(0, max(top * 1.2, 1e-9))
    axes.yaxis.set_major_formatter(matplotlib().ticker.PercentFormatter(1, decimals=0))
    axes.set_xlabel(f"blocks before the query's own ({block_size:,} tokens each)")
    axes.set_ylabel("share of selections")
    _title(axes, title, subtitle)
    return _save(figure, path)


def draw_traffic(
    received: dict[str, np.ndarray],
    fewest: np.ndarray,
    visible: np.ndarray,
    passes: str,
    path: Path,
    title: str,
    subtitle: str,
) -> Path:
    """Stacked bars of bytes received by stage, each `[P]`, and lines at the fewest and the most that routing can make."""
    ranks = len(fewest)
    figure, axes = _figure(max(7.6, min(16.0, 5.0 + 0.4 * ranks)), 4.4)
    received = {name: r for name, r in received.items() if r.any()}
    # Keys and values at the foot, where the bounds are drawn; gradients last.
    names = sorted(received, key=lambda n: ("gradients" in n, "keys and values" not in n, -received[n].sum()))
    colours = [_BLUE, _SKY, _GREEN, _YELLOW, _PINK, _ORANGE]
    top = max(sum(received.values(), np.zeros(ranks)).max(), visible.max())
    unit, unit_name = _unit(top)
    x, foot = np.arange(ranks), np.zeros(ranks)
    stages = []
    for i, name in enumerate(names):
        colour = colours[i] if i < len(colours) else _GREY
        stages.append(axes.bar(x, received[name] / unit, 0.62, foot / unit, color=colour, label=name))
        foot += received[name]
    if ranks > 1:
        ends = {"xmin": x - 0.4, "xmax": x + 0.4}
        lines = [
            axes.hlines(
                fewest / unit, **ends, color=_INK, linewidth=3.5, zorder=3, label=f"fewest possible,\n{passes}"
            ),
            # On top and in another colour: where everything in sight is wanted, both are at the same height.
            axes.hlines(
                visible / unit, **ends, color=_ORANGE, linestyle=(0, (2, 1)), linewidth=1.6, zorder=4,
                label="all keys, values in sight",
            ),
        ]  # fmt: skip
        _legend(axes, handles=[*stages[::-1], *lines], loc="upper left", bbox_to_anchor=(1.0, 1.02))
    else:
        axes.text(0.5, 0.5, "one rank: nothing moves", transform=axes.transAxes, ha="center", color=_GREY)
    axes.set_xticks(x[:: -(-ranks // 32)])
    axes.set_xlim(-0.7, ranks - 0.3)
    axes.set_ylim(0, max(top / unit * 1.08, 1e-9))
    axes.yaxis.set_major_formatter(matplotlib().ticker.StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("rank")
    axes.set_ylabel(f"received ({unit_name})")
    _title(axes, title, subtitle)
    return _save(figure, path)


def format_bytes(n: float) -> str:
    """`n` bytes in the largest binary unit they fill."""
    unit, name = _unit(n)
    return f"{n / unit:,.1f} {name}" if unit > 1 else f"{int(n)} B"


def _unit(n: float) -> tuple[int, str]:
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if n >= 1 << 10 * power:
            return 1 << 10 * power, name
    return 1, "B"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure outside pyplot, in inches, and its axes with the frame reduced to two quiet sides."""
    figure = matplotlib().figure.Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    axes.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=24)
    axes.annotate(
        subtitle, (0, 1), (0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=9.5, color=_GREY
    )


def _legend(axes: Any, **options: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, **options)


def formats() -> list[str]:
    """Suffixes of the files that can be written, without the dot."""
    return sorted(matplotlib().figure.Figure().canvas.get_supported_filetypes())


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path)
    return path


def _flat(mask: np.ndarray, colour: str) -> np.ndarray:
    """float `[rows, columns, 4]`: `colour` where `mask`, else transparent."""
    return mask[..., None] * np.array(matplotlib().colors.to_rgba(colour))


def _document_frames(blocks: BlockTable) -> list[tuple[list[int], list[int]]]:
    """Corners (blocks, tokens) of each document's square, if there are a few documents."""
    first = np.unique(blocks.first_of_document)
    if not 1 < first.size <= _MAX_FRAMES:
        return []
    last = np.append(first[1:], len(blocks)) - 1
    frames = []
    for a, b in zip(first.tolist(), last.tolist()):
        top, bottom = int(blocks.start[a]), int(blocks.start[b] + blocks.length[b])
        frames.append(([a, b + 1, b + 1, a, a], [top, top, bottom, bottom, top]))
    return frames
