"""Draw the picture of the README: python -m scripts.make_picture [docs/moba_cp.png]

One document of 16 blocks over 4 ranks in zigzag, and one query with topk = 4. The same file comes out every time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

RANKS, BLOCKS = 4, 16
BLOCKS_OF_RANK = [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]  # chunks r and 2P - 1 - r of two blocks
RANK_OF_BLOCK = {block: rank for rank, blocks in enumerate(BLOCKS_OF_RANK) for block in blocks}
QUERY_RANK, QUERY_BLOCK = 2, 11
SCORES = [0.22, 0.86, 0.30, 0.12, 0.38, 0.71, 0.17, 0.33, 0.95, 0.27, 0.44]  # of the query's 11 candidates
SELECTED = [1, 5, 8, 11]  # the three best candidates and the own block

FILL = ["#56B4E9", "#E69F00", "#009E73", "#CC79A7"]  # Okabe and Ito: told apart with any colour vision
DARK = ["#0B5C8A", "#8A5F00", "#00573F", "#8A3F68"]
INK, GREY, LINE, CARD, RED = "#222222", "#6B6B6B", "#C9C9C9", "#F7F7F7", "#C44200"

WIDTH, HEIGHT = 124.0, 77.0  # of the canvas, in units of its own
CARD_X, CARD_Y, CARD_WIDTH, CARD_HEIGHT = [4.0, 34.0, 64.0, 94.0], 40.0, 26.0, 21.5
COLUMN_X = [86.0, 95.2, 104.4, 113.6]  # of the selected blocks, on their way to the merge


def main(path: Annotated[Path, typer.Argument(help="a .png or .svg file")] = Path("docs/moba_cp.png")) -> None:
    """Draw how a query of one rank finds its blocks and what comes over."""
    matplotlib.rcParams["svg.hashsalt"] = "moba_cp"  # ids inside the file do not change from run to run
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")

    sequence(axes, y=67.8)
    text(
        axes, 6.5, 64.3, "Tokens stay where they are. Centroids (one mean key per block) go everywhere.", weight="bold"
    )
    number(axes, 4.9, 64.3, 1)
    for rank in range(RANKS):
        rank_card(axes, rank)
    panel(axes, 4, 3, CARD_X[-1] + CARD_WIDTH - 4, 31, DARK[QUERY_RANK], 1.8)
    gate(axes, x=6.5, y=6.0)
    selected_blocks(axes, y=23.0)
    partials(axes, y=14.2)
    merge(axes, y=6.2)

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
    print(path)


def sequence(axes: Axes, y: float) -> None:
    """The document's blocks in order, each in the colour of the rank that holds it."""
    text(axes, 4, y + 6.3, "One sequence of 16 blocks over 4 ranks", size=12.5, weight="bold")
    text(axes, 120, y + 6.3, "zigzag: rank r holds chunks r and 2P − 1 − r of 2P", size=9.5, colour=GREY, align="right")
    width = (CARD_X[-1] + CARD_WIDTH - CARD_X[0]) / BLOCKS
    for block in range(BLOCKS):
        rank = RANK_OF_BLOCK[block]
        x = CARD_X[0] + block * width
        axes.add_patch(Rectangle((x, y), width, 4.0, facecolor=FILL[rank], edgecolor="white", linewidth=1.2))
        text(axes, x + width / 2, y + 1.95, str(block), align="center")


def rank_card(axes: Axes, rank: int) -> None:
    """A rank: the blocks it holds, and the centroids of all blocks."""
    x, y, has_query = CARD_X[rank], CARD_Y, rank == QUERY_RANK
    panel(axes, x, y, CARD_WIDTH, CARD_HEIGHT, DARK[rank] if has_query else LINE, 1.8 if has_query else 1.0)
    text(axes, x + 1.7, y + 19.0, f"rank {rank}", size=11.5, weight="bold", colour=DARK[rank])
    text(axes, x + 1.7, y + 15.8, "centroids of all blocks", size=9, colour=GREY)
    for block in range(BLOCKS):
        colours = {"facecolor": FILL[RANK_OF_BLOCK[block]], "edgecolor": DARK[RANK_OF_BLOCK[block]]}
        centre = (x + 2.6 + block % 8 * 2.97, y + 13.4 - 2.4 * (block // 8))
        axes.add_patch(Circle(centre, 0.8, linewidth=0.7, **colours))
    text(axes, x + 1.7, y + 8.4, "q, k, v of its own blocks", size=9, colour=GREY)
    for block in BLOCKS_OF_RANK[rank]:
        block_box(axes, block_x(block) - 2.5, y + 1.6, block, size=5.0, selected=block in SELECTED)
    if has_query:
        query(axes, block_x(QUERY_BLOCK) + 2.3, y + 6.5)


def gate(axes: Axes, x: float, y: float) -> None:
    """Scores of the query's candidates as bars, the selected ones outlined."""
    number(axes, x + 0.9, y + 24.9, 2)
    text(axes, x + 2.7, y + 24.9, "On rank 2, a query scores all earlier centroids", weight="bold")
    query(axes, x + 3.4, y + 21.9)
    text(axes, x + 4.9, y + 21.9, "in block 11 with topk = 4: the best three and its own block", size=9, colour=GREY)
    step, full = 3.5, 14.5
    axes.plot([x, x + step * (len(SCORES) + 1)], [y + 2.9] * 2, color=GREY, linewidth=0.9)
    for block, score in enumerate([*SCORES, 1.0]):
        rank, selected, own = RANK_OF_BLOCK[block], block in SELECTED, block == QUERY_BLOCK
        left = x + 0.4 + step * block
        style: dict[str, Any] = {"linestyle": (0, (3, 2))} if own else {}  # the own block has no score
        axes.add_patch(
            Rectangle(
                (left, y + 2.9),
                step - 0.8,
                full * score,
                facecolor="none" if own else FILL[rank],
                alpha=1.0 if selected else 0.35,
                edgecolor=INK if selected else "none",
                linewidth=1.8,
                zorder=3,
                **style,
            )
        )
        weight = "bold" if selected else "normal"
        text(
            axes,
            left + step / 2 - 0.4,
            y + 1.5,
            str(block),
            colour=INK if selected else GREY,
            weight=weight,
            align="center",
        )
    own_x = x + step * (len(SCORES) + 0.5)
    axes.text(own_x, y + 2.9 + full / 2, "own block", fontsize=9, color=INK, rotation=90, ha="center", va="center")
    text(axes, x, y - 0.9, "score  <q, centroid>  by block", size=9, colour=GREY)


def selected_blocks(axes: Axes, y: float) -> None:
    """The query's blocks side by side on its rank; those of other ranks come along a line."""
    label(
        axes,
        y + 2.5,
        3,
        "Only selected blocks come over",
        ["1 from rank 0, 8 from rank 3;", "5 and 11 are here already"],
    )
    for x, block in zip(COLUMN_X, SELECTED, strict=True):
        block_box(axes, x - 2.5, y, block, size=5.0, selected=True)
        rank = RANK_OF_BLOCK[block]
        if rank != QUERY_RANK:
            start, bend = block_x(block), 37.0
            path = [(start, CARD_Y + 1.5), (start, bend), (x, bend), (x, y + 5.3)]
            arrow(axes, path, DARK[rank], width=2.2)


def partials(axes: Axes, y: float) -> None:
    """One partial result for each selected block."""
    label(
        axes,
        y + 2.0,
        4,
        "One partial result per block",
        ["output and log-sum-exp; it depends", "on this query and block alone"],
    )
    for x, block in zip(COLUMN_X, SELECTED, strict=True):
        rank = RANK_OF_BLOCK[block]
        arrow(axes, [(x, y + 8.5), (x, y + 4.3)], GREY)
        rounded(axes, x - 4.0, y, 8.0, 4.0, facecolor="white", edgecolor=DARK[rank], linewidth=1.3)
        text(axes, x, y + 1.95, f"$o_{{{block}}},\\ \\ell_{{{block}}}$", size=11.5, align="center")


def merge(axes: Axes, y: float) -> None:
    """The partial results become the output, in block order."""
    label(
        axes,
        y + 2.0,
        5,
        "Partials merge in block order",
        ["so on GPUs the bits are the same for", "every layout, rank count and transport"],
    )
    for x in COLUMN_X:
        arrow(axes, [(x, y + 7.7), (x, y + 4.3)], GREY)
    left, right = COLUMN_X[0] - 4.0, COLUMN_X[-1] + 4.0
    rounded(axes, left, y, right - left, 4.0, facecolor=INK, edgecolor=INK, linewidth=1.0)
    formula = r"output of q $\,=\, \Sigma_j\; e^{\,\ell_j - \ell}\; o_j$"
    text(axes, (left + right) / 2, y + 1.95, formula, size=11, colour="white", align="center")


# Parts of the picture.


def block_x(block: int) -> float:
    """Centre of a block in its rank's card."""
    rank = RANK_OF_BLOCK[block]
    return CARD_X[rank] + 4.2 + BLOCKS_OF_RANK[rank].index(block) * 5.65 + (block >= BLOCKS // 2) * 0.6


def block_box(axes: Axes, x: float, y: float, block: int, size: float, selected: bool) -> None:
    """A block in its rank's colour, outlined if the query selected it."""
    rank = RANK_OF_BLOCK[block]
    edge, width = (INK, 2.2) if selected else (DARK[rank], 0.8)
    rounded(axes, x, y, size, size, facecolor=FILL[rank], edgecolor=edge, linewidth=width, zorder=2 + selected)
    text(axes, x + size / 2, y + size / 2 - 0.1, str(block), weight="bold" if selected else "normal", align="center")


def panel(axes: Axes, x: float, y: float, width: float, height: float, edge: str, linewidth: float) -> None:
    rounded(axes, x, y, width, height, 1.2, 0, facecolor=CARD, edgecolor=edge, linewidth=linewidth)


def rounded(
    axes: Axes, x: float, y: float, width: float, height: float, radius: float = 0.6, zorder: float = 2, **style: Any
) -> None:
    box = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=box, zorder=zorder, **style))


def arrow(axes: Axes, path: list[tuple[float, float]], colour: str, width: float = 1.2) -> None:
    """A line through the points of `path` with a head at its end."""
    axes.plot(
        *zip(*path[:-1], strict=True),
        color=colour,
        linewidth=width,
        solid_joinstyle="round",
        solid_capstyle="round",
        zorder=1.5,
    )
    style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 9 + 3 * width, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(path[-2], path[-1], color=colour, linewidth=width, zorder=1.5, **style))


def query(axes: Axes, x: float, y: float) -> None:
    axes.add_patch(Circle((x, y), 1.0, facecolor=RED, edgecolor="white", linewidth=0.9, zorder=6))
    text(axes, x, y - 0.05, "q", size=8, weight="bold", colour="white", align="center")


def number(axes: Axes, x: float, y: float, n: int) -> None:
    axes.add_patch(Circle((x, y), 1.05, facecolor=INK, edgecolor="none", zorder=3))
    text(axes, x, y - 0.05, str(n), size=8.5, weight="bold", colour="white", align="center")


def label(axes: Axes, y: float, n: int, title: str, lines: list[str]) -> None:
    """A numbered step with two lines of explanation, left of the selected blocks."""
    number(axes, 52.4, y + 1.6, n)
    text(axes, 54.2, y + 1.6, title, weight="bold")
    for i, line in enumerate(lines):
        text(axes, 54.2, y - 0.6 - 1.8 * i, line, size=8.5, colour=GREY)


def text(axes: Axes, x: float, y: float, s: str, size: float = 10.0, colour: str = INK, **style: str) -> None:
    weight, align = style.get("weight", "normal"), style.get("align", "left")
    axes.text(x, y, s, fontsize=size, color=colour, fontweight=weight, ha=align, va="center_baseline", zorder=7)


if __name__ == "__main__":
    typer.run(main)
