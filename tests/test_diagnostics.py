"""Diagnostics: what is gathered and counted is what was selected, and every picture is drawn, also of odd inputs."""

import builtins
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, diagnostics, drawing, selection_figures
from moba_cp.parallel.blocks import block_table
from moba_cp.report import MoBAReport
from moba_cp.selection_figures import count_selections, uniform_histogram
from tests.ranks import run_ranks

CU_SEQLENS = [0, 21, 21, 64, 67]
CONFIG = MoBAConfig(block_size=8, topk=3)
PNG = b"\x89PNG\r\n"


def call(layout: SequenceLayout, rank: int, config: MoBAConfig = CONFIG, backward: bool = False) -> MoBAReport:
    """The report of a small call, on the same global q, k, v whatever the layout."""
    random = torch.Generator().manual_seed(0)
    tokens = layout.total_tokens
    whole = [torch.randn(tokens, heads, 4, generator=random, dtype=torch.float64) for heads in (4, 2, 2)]
    local = [layout.shard(x, rank).requires_grad_(backward) for x in whole]
    out, report = moba_cp.moba_attention(*local, config, layout=layout, comm="fetch", return_report=True)
    if backward:
        out.sum().backward()
    return report


def one_rank(cu_seqlens: list[int] = CU_SEQLENS, config: MoBAConfig = CONFIG) -> tuple[MoBAReport, SequenceLayout]:
    layout = SequenceLayout.contiguous(cu_seqlens, 1)
    return call(layout, 0, config), layout


def reference_grid(selected: torch.Tensor, n_blocks: int) -> np.ndarray:
    """float `[T, n_blocks]`, by a plain loop: share of heads whose row selected the block as an earlier one."""
    share = np.zeros((selected.shape[1], n_blocks))
    for head in selected.tolist():
        for t, row in enumerate(head):
            for block in row:
                if 0 <= block < max(row):
                    share[t, block] += 1 / len(selected)
    return share


def layouts(cp_size: int) -> list[SequenceLayout]:
    everything_on_rank_1 = [[], [(30, 67), (0, 30)]] + [[]] * (cp_size - 2)
    return [
        SequenceLayout.zigzag(CU_SEQLENS, cp_size),
        SequenceLayout.contiguous(CU_SEQLENS, cp_size),
        SequenceLayout.from_runs(everything_on_rank_1, CU_SEQLENS),
    ]


def gathered(rank: int, world_size: int) -> list[torch.Tensor]:
    return [diagnostics.gather_selection(call(layout, rank), layout) for layout in layouts(world_size)]


@pytest.mark.parametrize("cp_size", [2, 3])
def test_gathered_selection_is_that_of_one_rank_bit_for_bit(cp_size):
    report, layout = one_rank()
    expected = diagnostics.gather_selection(report, layout)
    assert expected.dtype == torch.int32
    assert expected.shape == (4, 67, 3)
    assert torch.equal(expected, report.selected)
    for of_rank in run_ranks(cp_size, gathered):
        assert all(torch.equal(selected, expected) for selected in of_rank)


def binned(rank: int, world_size: int, heads: list[int]) -> list[drawing.SelectionGrid]:
    return [count_selections(call(layout, rank), layout, None, heads) for layout in layouts(world_size)]


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [2]])
def test_heatmap_shares_are_those_of_a_plain_count_on_any_layout(heads):
    report, layout = one_rank()
    blocks = block_table(layout.cu_seqlens_array, CONFIG.block_size)
    own = report.selected.amax(2)[0].numpy()
    visible = (blocks.first_of_document[own][:, None] <= np.arange(len(blocks))) & (
        np.arange(len(blocks)) < own[:, None]
    )
    expected = np.where(visible, reference_grid(report.selected[heads], len(blocks)), np.nan)
    alone = count_selections(report, layout, None, heads)
    for grid in [alone, *run_ranks(2, binned, heads)[0]]:
        np.testing.assert_allclose(grid.earlier, expected, rtol=1e-15)
        assert (grid.own.argmax(1) == own).all()
        assert (grid.own.sum(1) == 1).all()
        assert grid.present.all()


def test_bins_count_a_pair_once_however_many_blocks_of_the_bin_it_selected(monkeypatch):
    monkeypatch.setattr(selection_figures, "MAX_CELLS", 2)
    report, layout = one_rank([0, 32])  # four blocks of 8: bins of two blocks and of 16 rows
    grid = count_selections(report, layout, None, [0, 1, 2, 3])
    selected = report.selected.numpy()[:, 16:]
    low = ((selected >= 0) & (selected < 2)).any(2).mean()
    assert np.isnan(grid.earlier[0, 1])  # rows of blocks 0 and 1 see nothing of blocks 2 and 3
    assert grid.earlier[0, 0] == 0.5  # rows of block 1 select block 0, those of block 0 nothing
    assert grid.earlier[1, 0] == pytest.approx(low)
    assert grid.own.tolist() == [[True, False], [False, True]]


def test_rows_without_layout_are_the_ranks_own():
    layout = SequenceLayout.contiguous([0, 40], 1)
    report = call(layout, 0)
    with_layout = count_selections(report, layout, None, [0])
    without = count_selections(report, None, None, [0])
    np.testing.assert_array_equal(with_layout.earlier, without.earlier)


def test_uniform_histogram_against_a_plain_loop():
    blocks = block_table(np.array([0, 21, 64, 67]), 8)
    expected = np.zeros(6)
    for block in range(len(blocks)):
        candidates = block - int(blocks.first_of_document[block])
        expected[0] += blocks.length[block]
        for distance in range(1, candidates + 1):
            expected[distance.bit_length()] += blocks.length[block] * min(2, candidates) / candidates
    np.testing.assert_allclose(uniform_histogram(blocks, 3, 6), expected / expected.sum())
    report, _ = one_rank()
    assert report.distance_histogram.sum() == 4 * expected.sum()


def traffic_of_all(rank: int, world_size: int) -> tuple[list[int], int]:
    report = call(layouts(world_size)[0], rank, backward=True)
    every = diagnostics.gather_traffic(report)
    return [t.received_bytes for t in every], report.traffic.received_bytes


def test_traffic_is_gathered_in_order_of_rank():
    results = run_ranks(3, traffic_of_all)
    own = [received for _, received in results]
    assert all(gathered == own for gathered, _ in results)
    assert all(own)


def draw_on_ranks(rank: int, world_size: int, folder: str) -> str:
    layout = layouts(world_size)[0]
    report = call(layout, rank, backward=True)
    paths = [
        diagnostics.plot_block_selection(report, f"{folder}/selection.png", layout=layout),
        diagnostics.plot_traffic(report, f"{folder}/traffic.png"),
        diagnostics.plot_block_selection(report, f"{folder}/of_rank_{rank}.png"),
        diagnostics.plot_distance_histogram(report, f"{folder}/distance_{rank}.png", layout=layout),
        diagnostics.plot_distance_histogram(report, f"{folder}/group.png", layout=layout, group=dist.group.WORLD),
        diagnostics.plot_distance_histogram(report, f"{folder}/no_layout.png", group=dist.group.WORLD),
    ]
    assert "matplotlib.pyplot" not in sys.modules
    return " ".join(path.name for path in paths)


def test_pictures_of_a_group(tmp_path):
    pytest.importorskip("matplotlib")
    names = run_ranks(2, draw_on_ranks, str(tmp_path))
    for path in {tmp_path / name for line in names for name in line.split()}:
        assert path.read_bytes().startswith(PNG), path


@pytest.mark.parametrize(
    ("cu_seqlens", "config"),
    [
        ([0, 5], CONFIG),  # a single short block
        ([0], CONFIG),  # no tokens
        ([0, 700], MoBAConfig(block_size=2, topk=4)),  # more rows and blocks than cells
        (list(range(0, 601, 3)), MoBAConfig(block_size=8, topk=1)),  # many documents, own blocks only
    ],
)
def test_pictures_and_tables_of_one_rank(tmp_path, cu_seqlens, config):
    pytest.importorskip("matplotlib")
    report, layout = one_rank(cu_seqlens, config)
    folder = tmp_path / "made" / "if need be"
    paths = [
        diagnostics.plot_block_selection(report, folder / "selection.png", layout=layout),
        diagnostics.plot_block_selection(report, str(folder / "head.png"), heads=1, title="Head 1"),
        diagnostics.plot_distance_histogram(report, folder / "uniform.png", layout=layout),
        diagnostics.plot_traffic(report, folder / "traffic.png"),
    ]
    assert diagnostics.plot_traffic(report, folder / "no suffix") == folder / "no suffix.png"
    paths.append(folder / "no suffix.png")
    for path in paths:
        assert isinstance(path, Path)
        assert path.read_bytes().startswith(PNG)
    assert f"{report.n_blocks} of {config.block_size} tokens" in diagnostics.format_report(report)


def formatted(rank: int, world_size: int) -> tuple[str, MoBAReport]:
    report = call(layouts(world_size)[0], rank, backward=True)
    return diagnostics.format_report(report), report


def test_formatted_report_carries_the_figures():
    for text, report in run_ranks(2, formatted):
        assert "fetch, 2 ranks" in text
        for name, stage in report.traffic.stages.items():
            line = next(line for line in text.splitlines() if line.startswith(name))
            assert line.endswith(drawing.format_bytes(stage.received_bytes))
        last = text.splitlines()[-1]
        assert last.startswith("rank 1 ")
        assert last.endswith(f"{report.attended_keys[1]:,}")
        assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"), (5 << 30, "5.0 GiB"), (1 << 40, "1.0 TiB")],
)
def test_format_bytes(n, text):
    assert drawing.format_bytes(n) == text


def test_errors_name_the_values(tmp_path):
    report, layout = one_rank()
    with pytest.raises(ValueError, match=r"heads must be in \[0, 4\), got \[0, 4\]"):
        diagnostics.plot_block_selection(report, tmp_path / "x.png", heads=[0, 4])
    with pytest.raises(TypeError, match="heads must be an int or a list of ints, got True"):
        diagnostics.plot_block_selection(report, tmp_path / "a.png", heads=True)
    with pytest.raises(TypeError, match="heads must be an int or a list of ints, got 'all'"):
        diagnostics.plot_block_selection(report, tmp_path / "x.png", heads="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"heads must be in \[0, 4\), got -1"):
        diagnostics.plot_block_selection(report, tmp_path / "x.png", heads=-1, layout=layout)
    with pytest.raises(ValueError, match="layout is for 2 ranks, but the report is of 1"):
        diagnostics.gather_selection(report, SequenceLayout.contiguous(CU_SEQLENS, 2))
    with pytest.raises(ValueError, match="another layout: it has 10 blocks of 8 tokens and 67 local tokens"):
        diagnostics.plot_distance_histogram(report, tmp_path / "x.png", layout=SequenceLayout.contiguous([0, 67], 1))
    # As many blocks and tokens, of other documents.
    shifted = [0, *(end + 1 for end in CU_SEQLENS[1:-1]), CU_SEQLENS[-1]]
    with pytest.raises(ValueError, match="the report is of another layout"):
        diagnostics.gather_selection(report, SequenceLayout.contiguous(shifted, 1))
    with pytest.raises(TypeError, match="layout must be a SequenceLayout, got list"):
        diagnostics.gather_selection(report, CU_SEQLENS)
    assert not list(tmp_path.iterdir())


def disagree(rank: int, world_size: int) -> list[str]:
    """What each rank is told when rank 1 passes another layout, when ranks draw different heads, and then normally."""
    here, other, _ = layouts(world_size)
    report = call(here, rank)
    messages = []
    for layout, heads in ((other if rank == 1 else here, None), (here, rank)):
        with pytest.raises(ValueError) as raised:
            diagnostics.plot_block_selection(report, "never-written.png", layout=layout, heads=heads)
        messages.append(str(raised.value))
    assert diagnostics.gather_selection(report, here).shape == (4, 67, 3)
    return messages


def no_report_on_rank_1(rank: int, world_size: int) -> list[str]:
    """What each rank is told; after each, the group works."""
    here, _, _ = layouts(world_size)
    report, messages = call(here, rank), []
    for bad in (None, "x"):
        for gather in (diagnostics.gather_traffic, lambda report: diagnostics.gather_selection(report, here)):
            with pytest.raises((TypeError, ValueError)) as raised:
                gather(bad if rank == 1 else report)
            messages.append(f"{type(raised.value).__name__}: {raised.value}")
            assert diagnostics.gather_selection(report, here).shape == (4, 67, 3)
    return messages


def test_no_report_on_one_rank_is_refused_on_all() -> None:
    first, second = run_ranks(2, no_report_on_rank_1)
    for told, kind in zip(second, ("NoneType", "NoneType", "str", "str"), strict=True):
        assert told == f"TypeError: report must be a MoBAReport, got {kind}"
    assert first == [f"ValueError: rank 1 refused its input: {told}" for told in second]


def where_rank_0_cannot_write(rank: int, world_size: int, folder: str) -> list[str]:
    """What the three pictures say of a folder that is a file; only rank 0 writes."""
    layout = layouts(world_size)[0]
    report, path = call(layout, rank), Path(folder) / "file" / "picture.png"
    told = []
    for draw in (
        lambda: diagnostics.plot_block_selection(report, path, layout=layout),
        lambda: diagnostics.plot_distance_histogram(report, path, group=dist.group.WORLD),
        lambda: diagnostics.plot_traffic(report, path),
    ):
        with pytest.raises(ValueError, match="picture.png' cannot be written") as error:
            draw()
        told.append(str(error.value))
    return told


def test_a_place_where_rank_0_cannot_write_is_refused_on_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    first, second = run_ranks(2, where_rank_0_cannot_write, str(tmp_path))
    for own, told in zip(first, second, strict=True):
        assert told.startswith(f"rank 0 refused its input: ValueError: {own}"[: len(told)])


def test_a_group_is_a_process_group() -> None:
    report, layout = one_rank()
    for group in ("cp", 3):
        with pytest.raises(TypeError, match=f"group must be .* got {group!r}"):
            diagnostics.gather_traffic(report, group)
        with pytest.raises(TypeError, match=f"group must be .* got {group!r}"):
            diagnostics.gather_selection(report, layout, group)


def test_what_is_no_report_is_refused(tmp_path):
    layout = SequenceLayout.contiguous([0, 8], 1)
    for show in (
        diagnostics.format_report,
        diagnostics.gather_traffic,
        lambda report: diagnostics.gather_selection(report, layout),
        lambda report: diagnostics.plot_block_selection(report, tmp_path / "a.png"),
        lambda report: diagnostics.plot_distance_histogram(report, tmp_path / "b.png"),
        lambda report: diagnostics.plot_traffic(report, tmp_path / "c.png"),
    ):
        with pytest.raises(TypeError, match="report must be a MoBAReport, got NoneType"):
            show(None)


def test_a_head_may_be_any_integer(tmp_path):
    report, _ = one_rank()
    assert diagnostics.plot_block_selection(report, tmp_path / "head.png", heads=np.int64(1)).exists()


def test_ranks_that_disagree_all_raise_and_the_group_stays_usable():
    first, second = run_ranks(2, disagree)
    assert "rank 1 refused its input" in first[0]
    assert "another layout" in second[0]
    assert all("heads 0" in told[1] and "heads 1" in told[1] for told in (first, second))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch, tmp_path):
    report, _ = one_rank()
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for plot in (diagnostics.plot_block_selection, diagnostics.plot_distance_histogram, diagnostics.plot_traffic):
        with pytest.raises(ImportError, match=r'pip install "moba_cp\[plots\]"'):
            plot(report, tmp_path / "x.png")
    assert diagnostics.format_report(report)


def test_both_bounds_of_the_traffic_show_where_they_are_equal(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    from moba_cp import drawing

    bound = np.full(4, 3 << 20)
    path = drawing.draw_traffic({"ring keys and values": bound // 2}, bound, bound, "", tmp_path / "x.png", "", "")
    image = imread(path)[..., :3]
    ink, orange = (np.abs(image - to_rgb(c)).max(-1) < 0.03 for c in (drawing._INK, drawing._ORANGE))
    plot = slice(None, image.shape[1] // 2)  # the legend, which shows both, is on the right
    rows = np.flatnonzero(orange[:, plot].sum(1) > 20)
    assert len(rows) > 0
    assert ink[rows, plot].sum(1).min() > 20  # in the gaps of the dashes
