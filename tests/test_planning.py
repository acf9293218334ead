"""The planner: counted work and bytes equal what was counted in runs; times are near those of the committed results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moba_cp.planning import advice
from moba_cp.planning.calibration import Calibration
from moba_cp.planning.measured import Measured, calibrate, compare, read
from moba_cp.planning.memory import memory
from moba_cp.planning.prediction import predict, received
from moba_cp.planning.sizes import Cluster, Layer, Split, busiest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
DEFAULT = Calibration.default()
LAYER = Layer(1 << 20, 32, 8, 512, 8)


def of_the_default_device() -> list[Path]:
    """Every result file that the default calibration should explain."""
    paths = [RESULTS / name for name in DEFAULT.sources]
    for path in sorted(RESULTS.glob("scaling*.json")):
        if json.loads(path.read_text())["device"] == DEFAULT.device and path not in paths:
            paths.append(path)
    return paths


def test_predictions_are_near_the_committed_measurements() -> None:
    device, measured = read(of_the_default_device())
    assert device == DEFAULT.device
    errors = np.abs([one.errors for one in compare(measured, DEFAULT)])
    assert len(errors) > 50
    assert np.median(errors) < 0.15
    assert errors.max() < 0.30


def test_the_committed_calibration_is_the_fit_to_its_sources() -> None:
    """Or `moba-cp plan --results ... --save` was forgotten."""
    again = calibrate(*read([RESULTS / name for name in DEFAULT.sources]))
    assert again.assumed == DEFAULT.assumed
    for name, coefficients in DEFAULT.stages.items():
        assert again.stages[name] == pytest.approx(coefficients, rel=1e-2, abs=1e-3)


def test_counted_keys_are_those_of_the_runs() -> None:
    """The busiest rank attends to as many keys as the report counted with uniform routing."""
    for entry in json.loads((RESULTS / "layer.json").read_text())["results"]:
        layer = Layer(*(entry[x] for x in ("tokens", "q_heads", "kv_heads", "block_size", "topk")))
        exchange = entry["transport"] if entry["ranks"] > 1 else "local"
        assert busiest(layer, Split(entry["ranks"], 1, exchange)).keys == max(entry["attended_keys"])


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
    for one in read(sorted(RESULTS.glob("kernels*.json")))[1]:
        assert memory(one.layer, one.split).peak == pytest.approx(one.peak_gib, rel=0.15)


def test_balanced_takes_less_time_where_zigzag_is_uneven() -> None:
    layer = Layer(1 << 18, 16, 16, 4096, 12)
    zigzag, balanced = (predict(layer, Split(2, 1, "pull", x), Cluster(2), DEFAULT) for x in ("zigzag", "balanced"))
    assert balanced.forward_backward_ms < 0.95 * zigzag.forward_backward_ms


def test_what_fits_comes_first_and_the_fastest_of_it() -> None:
    found = advice.options(LAYER, Cluster(64), DEFAULT)
    assert found[0].split.head_parallel == 8
    assert found[0].split.comm.startswith("a2a+")
    assert all("pull" not in option.split.exchange for option in found)  # several nodes
    fitting = [option.milliseconds for option in found if option.fits]
    assert fitting == sorted(fitting)
    none = advice.options(replace(LAYER, tokens=100 << 20), Cluster(8), DEFAULT)
    assert not any(option.fits for option in none)


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
