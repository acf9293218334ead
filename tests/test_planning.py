"""The planner: counted work and bytes equal what was counted in runs; times are near those of the committed results."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from moba_cp import MoBAConfig, SequenceLayout, moba_attention, wide
from moba_cp.commands.plan import report
from moba_cp.config import DEFAULT_EXCHANGE_BYTES
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.parallel.heads import PeerHeadTransfer, wide_layout
from moba_cp.parallel.peer_memory import kept_bytes, release
from moba_cp.planning import advice, sizes
from moba_cp.planning.calibration import Calibration, known
from moba_cp.planning.measured import Measured, calibrate, compare, judged, read
from moba_cp.planning.memory import memory
from moba_cp.planning.prediction import features, predict, received, walks
from moba_cp.planning.sizes import Cluster, Layer, Split, busiest, moves_keys
from moba_cp.training_memory import TrainingShape, training_peak
from scripts.make_tables import kernel_files
from tests.ranks import run_ranks

RESULTS = Path(__file__).parents[1] / "docs" / "results"
DEFAULT = Calibration.default()
LAYER = Layer(1 << 20, 32, 8, 512, 8)


def test_predictions_are_near_the_committed_measurements() -> None:
    """All rows of the sources of every calibration, and of every scaling file: also of GPUs that nothing was fitted to."""
    rows = 0
    for calibration, paths in judged(RESULTS):
        errors = np.abs([one.errors for one in compare(read(paths)[1], calibration)])
        assert np.median(errors) < 0.15
        assert errors.max() < 0.30
        rows += len(errors)
    assert rows > 50


def test_stages_of_heads_of_64_are_near_those_of_training() -> None:
    """Kernels of one layer, one H200, 16/4 heads. Of (4096, 12) the gate is a hundredth."""
    calibration, seen = Calibration.of("h200"), set()
    stages = {"forward": ["attend"], "backward": ["attend backward"], "merge": ["merge", "merge dq"], "gate": ["gate"]}
    for path in (RESULTS / "training_scaling.json", RESULTS / "training_speed.json"):
        for run in json.loads(path.read_text())["runs"]:
            one = run.get("label") == "long layers" and run["gpus"] == 1 and run["attention"].startswith("moba")
            if one and run["tokens_per_step"] == 131072:
                block_size, topk = map(int, run["attention"].split(":")[1:3])
                layer = Layer(131072, 16, 4, block_size, topk, head_dim=64)
                work = busiest(layer, Split.of_comm("local", 1, 1, "contiguous"))
                found = {name: calibration.stage_ms(name, x) for name, x in features(work, 64).items()}
                for name, names in stages.items():
                    if name != "gate" or block_size < 4096:
                        measured = run["profile"]["by_stage"][name] / 24  # layers
                        assert sum(map(found.get, names)) == pytest.approx(measured, rel=0.15), (block_size, name)
                seen.add(block_size)
    assert seen == {128, 512, 4096}


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_split_heads_are_kept_in_place_of_those_of_the_tokens(kv_heads: int) -> None:
    """q, k, v of half of the heads and of all tokens are as many numbers as of all heads and half of the tokens."""
    layer = Layer(8192, 8, kv_heads, 64, 4, head_dim=64)
    assert memory(layer, Split(2, 2)).saved == pytest.approx(memory(layer, Split(2, 1, "ring")).saved)


def test_walks_are_those_that_reports_counted() -> None:
    counted = set()
    for path in RESULTS.glob("scaling*.json"):
        for entry in json.loads(path.read_text())["results"]:
            if entry["routing"] != "trained":
                split = Split.of_comm(
                    *(entry[name] for name in ("transport", "ranks", "head_ranks", "layout")),
                    entry.get("exchange_bytes", DEFAULT_EXCHANGE_BYTES),
                )
                sizes = (entry[name] for name in ("tokens", "q_heads", "kv_heads", "block_size", "topk"))
                layer = Layer(*sizes)
                assert [walks(layer, split, backward) for backward in (False, True)] == entry["walks"]
                counted |= set(entry["walks"])
    assert counted == {1, 33}


def test_every_scaling_file_is_judged() -> None:
    seen = {path.name for _, paths in judged(RESULTS) for path in paths}
    assert {path.name for path in RESULTS.glob("scaling*.json")} <= seen


@pytest.mark.parametrize("name", known())
def test_the_committed_calibration_is_the_fit_to_its_sources(name: str) -> None:
    """Or `moba-cp plan --results ... --save` was forgotten."""
    calibration = Calibration.of(name)
    again = calibrate(*read([RESULTS / source for source in calibration.sources]))
    assert again.assumed == calibration.assumed
    for stage, coefficients in calibration.stages.items():
        assert again.stages[stage] == pytest.approx(coefficients, rel=1e-2, abs=1e-3)


def test_counted_keys_are_those_of_the_runs() -> None:
    """The busiest rank attends to as many keys as the report counted with uniform routing."""
    for entry in json.loads((RESULTS / "layer.json").read_text())["results"]:
        layer = Layer(*(entry[x] for x in ("tokens", "q_heads", "kv_heads", "block_size", "topk")))
        exchange = entry["transport"] if entry["ranks"] > 1 else "local"
        assert busiest(layer, Split(entry["ranks"], 1, exchange)).keys == max(entry["attended_keys"])


@pytest.mark.parametrize(
    ("length", "ranks", "block_size", "topk", "keys", "pairs", "scored"),
    [
        (1 << 20, 4096, 512, 8, 1015936, 2048, 249344),
        (10 << 20, 512, 512, 8, 71313408, 149504, 260988920),
        (1000003, 64, 128, 8, 15007818, 125000, 60980957),
        (1 << 18, 2, 4096, 12, 5620203520, 1437640, 5783328),
    ],
)
def test_work_of_balanced_layouts_is_counted(
    length: int, ranks: int, block_size: int, topk: int, keys: int, pairs: int, scored: int
) -> None:
    """As it was counted from the runs of `SequenceLayout.balanced`, rank by rank."""
    work = busiest(Layer(length, 1, 1, block_size, topk), Split(ranks, 1, "ring", "balanced"))
    assert (work.keys, work.pairs, work.scored) == (keys, pairs, scored)


@pytest.mark.parametrize(("gpus", "seconds"), [(4096, 2), (65536, 10)])
def test_large_clusters_are_planned_in_seconds(gpus: int, seconds: float) -> None:
    """CPU time of everything that `moba-cp plan` shows. Seven heads are not split, which leaves most ranks to balance."""
    sizes._busiest.cache_clear()
    begin = time.process_time()
    lines, _ = report(Layer(10 << 20, 7, 7, 512, 8), Cluster(gpus), DEFAULT, 1)
    assert time.process_time() - begin < seconds
    assert any("layout: " in line for line in lines)


def test_bytes_are_those_of_the_runs() -> None:
    """Of 16/16 heads: with 32/8 this file's commit still sent keys and values once per chunk of rows."""
    of_ring = [e for e in json.loads((RESULTS / "layer.json").read_text())["results"] if e["comm"] == "ring"]
    of_ring = [entry for entry in of_ring if entry["q_heads"] == 16]
    assert of_ring
    for entry in of_ring:
        layer = Layer(*(entry[x] for x in ("tokens", "q_heads", "kv_heads", "block_size", "topk")))
        found = received(layer, Split(2, 1, "ring"), Cluster(2), backward=False)
        assert found.inside == entry["traffic_forward_rank0"]["ring keys and values"]["received_bytes"]
        assert found.between == 0


def test_splitting_heads_leaves_a_share_between_nodes() -> None:
    cluster = Cluster(64, 8)
    flat, split = (received(LAYER, Split(64, u, "ring"), cluster, backward=True) for u in (1, 8))
    assert flat.between == flat.sequence  # as slow as the link between nodes, all of it
    assert split.sequence == pytest.approx(
        flat.sequence * 7 / 63
    )  # one kv head of eight, of 7 of 8 other sequence ranks
    assert split.between == split.sequence
    assert split.inside == split.heads


def test_memory_of_one_gpu_is_what_was_measured() -> None:
    for one in [*read(kernel_files())[1], *read(kernel_files(h200=True))[1]]:
        assert memory(one.layer, one.split).peak == pytest.approx(one.peak_gib, rel=0.15)


def test_memory_of_two_gpus_is_what_was_measured() -> None:
    """With every exchange, and with a balanced layout, whose ranks copy keys to have whole blocks."""
    seen = set()
    for one in read([RESULTS / "scaling.json"])[1]:
        if one.split.ranks > 1:
            assert memory(one.layer, one.split).peak == pytest.approx(one.peak_gib, rel=0.11), one
            seen.add((one.split.exchange, one.split.head_parallel))
    assert seen == {("pull", 1), ("ring", 1), ("fetch", 1), ("all_gather", 1), ("local", 2)}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize(("ranks", "head_parallel"), [(2, 1), (4, 1), (4, 2), (8, 2), (8, 4)])
def test_copied_keys_are_known(layout: str, documents: int, ranks: int, head_parallel: int) -> None:
    """As the plans of the ranks say: rows that are no home keys, or blocks that are cut."""
    seen = set()
    for length in (4096, 4000, 2048 * 3, 96, 16, 7):
        cu_seqlens = [length * i for i in range(documents + 1)]
        if layout == "balanced":
            made = SequenceLayout.balanced(cu_seqlens, ranks, 64, 3)
        else:
            made = (SequenceLayout.zigzag if layout == "zigzag" else SequenceLayout.contiguous)(cu_seqlens, ranks)
        plan = home_plan(wide_layout(made, head_parallel), 64)
        moved = [rank_plan(plan, rank).home_from is not None for rank in range(ranks // head_parallel)]
        layer = Layer(length * documents, 8, 8, 64, 3, document=length)
        split = Split(ranks, head_parallel, "ring", layout)
        assert moves_keys(layer, split) == (any(moved) or plan.has_fragments), length
        assert ("home blocks" in memory(layer, split).parts) == moves_keys(layer, split)
        seen.add(moves_keys(layer, split))
    assert True in seen


def shared_bytes(rank: int, size: int, layer: Layer) -> int:
    """What the buffers of heads in and out take after a step that goes through memory, in slabs."""
    layout = SequenceLayout.zigzag([0, layer.tokens], size)
    q, k, v = (
        torch.randn(layer.tokens // size, heads, layer.head_dim, requires_grad=True)
        for heads in (layer.q_heads, layer.kv_heads, layer.kv_heads)
    )
    release()
    with (
        mock.patch.object(wide, "SLAB_BYTES", 1),
        mock.patch.object(wide, "head_transfer", lambda comm, tokens, device: PeerHeadTransfer(comm, tokens)),
    ):
        config = MoBAConfig(layer.block_size, layer.topk)
        moba_attention(q, k, v, config, layout=layout, comm="a2a").sum().backward()
    return kept_bytes()


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_memory_for_heads_is_what_is_set_up(kv_heads: int) -> None:
    layer = Layer(2048, 8, kv_heads, 64, 2, head_dim=16, itemsize=4)
    with mock.patch.object(wide, "SLAB_BYTES", 1):
        expected = memory(layer, Split(2, 2)).parts["memory for heads in and out"] * 2**30
    assert run_ranks(2, shared_bytes, layer) == [expected] * 2


@pytest.mark.parametrize("ranks", [1, 4])
def test_sums_of_dq_take_four_bytes_a_number_and_a_tile_per_block(ranks: int) -> None:
    """Of blocks above 512 keys with heads of 128 in 16 bits."""
    rows, blocks = (1 << 18) // ranks, (1 << 18) // 1024
    split = Split(ranks, 1, "pull" if ranks > 1 else "local", workspace_bytes=1 << 50)
    for layer, slot, block in (
        (Layer(1 << 18, 4, 2, 1024, 8), 4 * 128 + 4, 64 * 128 * 4),
        (Layer(1 << 18, 4, 2, 1024, 8, itemsize=4), 4 * 128 + 4, 0),
        (Layer(1 << 18, 4, 2, 1024, 8, head_dim=64), 2 * 64 + 4, 0),
        (Layer(1 << 18, 4, 2, 512, 8), 2 * 128 + 4, 0),
    ):
        found = memory(layer, split).parts["workspace"] * 2**30
        least = 4 * rows * 8 * slot + 2 * blocks * block
        assert found == least if layer.block_size > 512 or ranks > 1 else found >= least


def test_a_workspace_holds_no_more_than_the_heads_that_are_computed_together() -> None:
    """Split heads come in slabs: a quarter, a half and a quarter of a rank's."""
    layer, unbounded = Layer(1 << 20, 32, 8, 512, 8), 1 << 50
    alone, split = (Split(4, u, "pull", workspace_bytes=unbounded) for u in (1, 2))
    slot = 2 * 128 + 4
    assert memory(layer, alone).parts["workspace"] * 2**30 == (1 << 18) * 32 * 8 * slot
    assert memory(layer, split).parts["workspace"] * 2**30 == (1 << 19) * 8 * 8 * slot
    assert memory(layer, split).parts["exchange"] < memory(layer, alone).parts["exchange"]


def test_tiles_of_sums_of_one_kv_head_are_taken_whatever_the_workspace() -> None:
    """Of the blocks of all documents; and a training step counts them as a plan does."""
    for layer, split in (
        (Layer(100_000, 1, 1, 640, 8, document=100), Split(1, workspace_bytes=1)),
        (Layer(1 << 20, 32, 8, 1024, 8), Split(64, 1, "ring", workspace_bytes=1)),
    ):
        assert memory(layer, split).parts["workspace"] * 2**30 >= layer.blocks * 2**15
    shape = TrainingShape(
        1, 2048, 16, 16, 128, 8192, 32000, tokens=8192, context=64, block_size=1024, workspace_bytes=1 << 40
    )
    small = replace(shape, workspace_bytes=1)
    planned = memory(Layer(8192 * 64, 16, 16, 1024, 8), Split(64, 1, "ring", workspace_bytes=1 << 40))
    # Of the routing lists, which a training step counts with their chunk, at most the whole.
    added = training_peak(shape).workings["attention"] - training_peak(small).workings["attention"]
    assert added == pytest.approx(planned.parts["workspace"] * 2**30 - 512 * 2**15, rel=0.05)


def test_balanced_takes_less_time_where_zigzag_is_uneven() -> None:
    layer = Layer(1 << 18, 16, 16, 4096, 12)
    zigzag, balanced = (predict(layer, Split(2, 1, "pull", x), Cluster(2), DEFAULT) for x in ("zigzag", "balanced"))
    assert balanced.forward_backward_ms < 0.95 * zigzag.forward_backward_ms


def test_what_fits_comes_first_and_the_fastest_of_it() -> None:
    found = advice.options(LAYER, Cluster(64), DEFAULT)
    assert found[0].split.head_parallel == 8
    assert found[0].split.comm.startswith("a2a+")
    assert all("pull" not in option.split.exchange for option in found)  # several nodes
    others = [option.milliseconds for option in found[1:] if option.fits]
    assert others == sorted(others)
    assert found[0].milliseconds < (1 + advice.ALIKE) * others[0]  # the fastest, or one as fast that takes less memory
    none = advice.options(replace(LAYER, tokens=100 << 20), Cluster(8), DEFAULT)
    assert not any(option.fits for option in none)


def test_budgets_are_chosen_from_the_memory_that_is_left() -> None:
    """10M tokens on 8 GPUs: what brings keys and values once fits, and is recommended; with less memory it is not."""
    layer = replace(LAYER, tokens=10 << 20)
    (best, *_) = advice.options(layer, Cluster(8), DEFAULT)
    assert best.fits
    assert "exchange_bytes" in advice.changed_budgets(best.split)
    assert [walks(layer, best.split, backward) for backward in (False, True)] == [1, 1]
    default = advice.with_default_budgets(best.split)
    assert walks(layer, default, True) > 1
    assert predict(layer, default, Cluster(8), DEFAULT).forward_backward_ms > 2 * best.milliseconds
    (less, *_) = advice.options(layer, Cluster(8, memory=best.memory.peak - 1), DEFAULT)
    assert less.split != best.split


@pytest.mark.parametrize(
    ("blocks", "heads"), [((512, 8), (32, 8)), ((128, 8), (16, 16)), ((4096, 12), (64, 8)), ((512, 8), (8, 1))]
)
def test_twice_the_gpus_take_longer_only_for_a_stated_reason(blocks: tuple[int, int], heads: tuple[int, int]) -> None:
    """Inside a node never."""
    for tokens in (1 << 20, 10 << 20):
        best = advice.fastest(Layer(tokens, *heads, *blocks), Cluster(8), DEFAULT, [1 << i for i in range(9)])
        assert best
        for found in advice.slower(best):
            assert found.many.split.ranks > 8
            assert "GiB from other nodes" in found.reason


def test_kv_heads_that_ranks_share_count_as_the_copies_that_a_call_makes() -> None:
    layer = Layer(1 << 20, 10, 5, 512, 8)
    assert [layer.kv_heads_of(size) for size in (1, 2, 5, 10)] == [5, 5, 1, 1]
    split = Split(2, 2)
    assert busiest(layer, split).kv_rows == 5 * layer.tokens


def test_heads_that_do_not_divide_are_not_split() -> None:
    assert {s.head_parallel for s in advice.splits(Layer(1 << 20, 6, 2, 512, 8), Cluster(8), ("zigzag",))} == {1, 2}


def test_recomputation_depends_on_what_layers_keep() -> None:
    (option, *_) = advice.options(LAYER, Cluster(8), DEFAULT)
    assert advice.recomputation(option, 1, Cluster(8)).startswith("none")
    assert advice.recomputation(option, 80, Cluster(8)).startswith("every layer")


def test_visiting_pays_from_the_number_of_bytes() -> None:
    """Fetching moves 2 D numbers per kv head of each token of the other ranks; visiting, 4 D per q head and earlier block."""
    assert advice.visiting_pays_from(LAYER) == 2 * (32 / 8) * 7


def test_a_calibration_survives_json(tmp_path: Path) -> None:
    assert Calibration.from_json(DEFAULT.to_json()) == DEFAULT
    with pytest.raises(ValueError, match="h100.*'abacus'"):
        Calibration.of("abacus")
    with pytest.raises(ValueError, match="not a calibration"):
        Calibration.from_json('{"device": "x"}')


def test_exchanges_without_measurements_are_named() -> None:
    _, measured = read([RESULTS / "layer.json"])
    alone = [one for one in measured if one.split.ranks == 1]
    found = calibrate("x", alone)
    assert set(found.assumed) >= {"a2a", "ring", "pull"}
    assert predict(LAYER, Split(8, 8), Cluster(8), found).assumed == ("a2a",)
    with pytest.raises(ValueError, match="no measurement of one rank"):
        calibrate("x", [replace(one, stages={}) for one in alone])


def test_entries_of_splits_are_read_as_such() -> None:
    assert Split.of_comm("a2a", 4, 4).comm == "a2a"
    assert Split.of_comm("a2a+ring", 8, 4) == Split(8, 4, "ring")
    assert Split.of_comm("pull", 2, 2) == Split(2, 1, "pull")
    assert isinstance(read([RESULTS / "layer.json"])[1][0], Measured)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Layer(0, 1, 1, 1, 1), "tokens must be at least 1, got 0"),
        (lambda: Layer(8, 6, 4, 1, 1), "got 4 and 6"),
        (lambda: Layer(8, 4, 4, 1, 1, wanted_share=1.5), "got 1.5"),
        (lambda: Layer(8, 4, 4, 1, 1, document=3), "documents of 3"),
        (lambda: Cluster(12, 8), "12 GPUs"),
        (lambda: Cluster(8, fabric=0), "fabric must be positive, got 0"),
        (lambda: Split(8, 3, "ring"), "divide 8 ranks, got 3"),
        (lambda: Split(8, 8, "ring"), "'ring' for 1"),
        (lambda: Split(8, 1, "local"), "'local' for 8"),
        (lambda: Split(8, 1, "ring", "spiral"), "'spiral'"),
        (lambda: predict(LAYER, Split(4, 4), Cluster(8), DEFAULT), "4 ranks does not fit a cluster of 8"),
    ],
)
def test_bad_input_is_named(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()
