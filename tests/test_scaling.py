"""`scripts.scaling` on the CPU: what it measures, what it checks, how it resumes; and its parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("yaml")

import typer
from typer.testing import CliRunner

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.config import DEFAULT_EXCHANGE_BYTES
from scripts import scaling
from scripts.harness import definition, dense_case, layer_case, sweep, teams
from scripts.harness.inputs import draw_global
from scripts.harness.sweep import load_plan
from scripts.tables.layer import layer_tables
from tests.programs import run_program
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ALONE = definition.Ranks(None)
FIELDS = {
    "ranks", "tokens", "q_heads", "kv_heads", "block_size", "topk", "routing", "comm", "forward_ms", "forward_backward_ms",
    "forward_ms_spread", "output_error", "dq_error", "exposed_ms", "received_bytes", "between_bytes", "traffic_rank0", "layout",
    "fingerprint", "bitwise_equal_to_first",
}  # fmt: skip


def run(*options: str, config: str = "configs/scaling/tiny.yaml", ranks: int = 2) -> str:
    """Run the tiny configuration as documented, without PYTHONPATH."""
    return run_program("scripts.scaling", config, "--device", "cpu", *options, ranks=ranks)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scaling") / "scaling.json"
    assert "0 cases skipped" in run("--out", str(out))
    return out


def test_one_start_measures_every_rank_count_and_baseline(measured: Path) -> None:
    content = json.loads(measured.read_text())
    assert {(e["ranks"], e["comm"]) for e in content["results"]} == {
        (1, "auto"), (2, "ring"), (2, "fetch"), (2, "a2a"), (2, "all_gather"),
    }  # fmt: skip
    budgets = {e["sweep"]: e["exchange_bytes"] for e in content["results"]}
    assert budgets == {
        "weak scaling, 128 tokens per rank": DEFAULT_EXCHANGE_BYTES,
        "strong scaling, 256 tokens": DEFAULT_EXCHANGE_BYTES,
        "several walks": 0,
    }
    for entry in content["results"]:
        assert entry.keys() >= FIELDS
        # bf16 results of fp32 sums: half a unit in the last place is 2 ** -9 = 2e-3.
        assert entry["output_error"] < 3e-3
        assert entry["dq_error"] < 6e-3
        assert 0 < entry["dq_rounding_error"] < 2e-3  # of rounding alone: a root mean square
        assert entry["checked_rows"] + entry["unclear_rows"] > 4
        assert entry["forward_ms_spread"][0] <= entry["forward_ms"] <= entry["forward_ms_spread"][1]
        assert (entry["received_bytes"] > 0) == (entry["ranks"] > 1)
    assert {(e["ranks"], e["baseline"]) for e in content["baselines"]} == {
        (1, "dense_heads"), (2, "equal_work"), (2, "dense_heads"),
    }  # fmt: skip
    share = next(e for e in content["baselines"] if e["baseline"] == "equal_work")
    assert (share["tokens"], share["q_heads"], share["kv_heads"]) == (256, 2, 1)
    assert "running" not in content


def test_the_tables_of_the_layer_are_made_of_the_same_file(measured: Path) -> None:
    """Each exchange beside one rank alone, and what is lost between them."""
    content = json.loads(measured.read_text())
    weak = [e for e in content["results"] if e["sweep"].startswith("weak")]
    assert [(e["ranks"], e["comm"], e["transport"]) for e in weak] == [
        (1, "auto", "local"), (2, "ring", "ring"), (2, "fetch", "fetch"), (2, "a2a", "a2a"),
    ]  # fmt: skip
    assert weak[0]["tokens"] == 128
    on_a_gpu = {"stages_ms_rank0": {"gate": 1.0}, "peak_gib_forward": 1.0, "peak_gib_forward_backward": 2.0}
    alone, *together = (e | on_a_gpu for e in weak)
    together[0]["comm"] = "auto"
    text = layer_tables([content | {"results": [alone, *together]}])
    assert text.count("| 4/2 | (32, 3) |") == 2  # in either table
    for e in (alone, *together):
        assert f"{e['forward_ms']:.1f} / {e['forward_backward_ms']:.1f}" in text
    assert f"{alone['forward_ms'] / together[0]['forward_ms']:.0%} / " in text


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        ({"comm": ["ring", "puls"]}, [], "got puls"),
        ({}, ["--time-limit", "-1"], "--time-limit must be a number of seconds, 0 or more, got -1.0"),
        ({}, ["--time-limit", "nan"], "0 or more, got nan"),
        ({}, ["--only", "strong"], "no sweep to measure with --only 'strong': the file has x"),
        ({"ranks": [5]}, [], "the file has none; for more than 1 ranks: x: 5 ranks"),
        ({}, ["--out", "/proc/x.json"], "--out: /proc/x.json cannot be written"),
    ],
)
def test_a_bad_start_is_refused_on_the_command_line(
    change: dict, options: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    app = typer.Typer()
    app.command()(scaling.main)
    line = [str(written(tmp_path, **change)), "--device", "cpu", "--out", str(tmp_path / "out.json"), *options]
    result = CliRunner().invoke(app, line, terminal_width=200)
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out.json").exists()


def test_a_rank_in_no_team_waits(tmp_path: Path) -> None:
    """Of three ranks: two measure, and the third compares nothing."""
    out = tmp_path / "scaling.json"
    assert "0 with errors" in run("--out", str(out), "--only", "strong", ranks=3)
    assert [entry["ranks"] for entry in json.loads(out.read_text())["results"]] == [1, 2]


@pytest.mark.heavy
def test_a_later_run_measures_what_is_missing(measured: Path, tmp_path: Path) -> None:
    content = json.loads(measured.read_text())
    kept, again = content["results"][0], content["results"][1]
    died = {key: content["results"][2][key] for key in sweep.KEY if key in content["results"][2]}
    content |= {"results": [kept], "running": died}
    out = tmp_path / "scaling.json"
    out.write_text(json.dumps(content))
    output = run("--out", str(out), "--previous", str(out), "--only", "weak")
    assert "2 cases to measure" in output
    results = {(e["ranks"], e["comm"]): e for e in json.loads(out.read_text())["results"]}
    assert results[1, "auto"] == kept
    assert results[2, "ring"]["fingerprint"] == again["fingerprint"]  # the same inputs, and the same bits
    assert results[2, "fetch"]["error"] == "the run ended in this case"  # and is not tried again


def test_a_time_limit_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    out = tmp_path / "scaling.json"
    assert "10 cases skipped" in run("--out", str(out), "--time-limit", "0.01")
    assert json.loads(out.read_text())["skipped_for_time"] == 10


def test_a_previous_file_of_another_kind_is_named(tmp_path: Path) -> None:
    head, path = {"device": "CPU", "world_size": 2}, tmp_path / "other.json"
    for text in ("{}", "[]", "no JSON"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"other\.json"):
            scaling.taken_over(path, head)


def _take_over(rank: int, size: int, folder: Path) -> object:
    """Rank 1 names a file that is not there, as if rank 0 had replaced it already."""
    head = {"device": "CPU", "world_size": 2}
    done = scaling.taken_over_by_all(folder / ("previous.json" if rank == 0 else "nowhere.json"), head)
    try:
        scaling.taken_over_by_all(folder / ("broken.json" if rank == 0 else "previous.json"), head)
    except ValueError as error:
        return done, str(error)
    return done, ""


def test_every_rank_takes_over_what_rank_0_read(tmp_path: Path) -> None:
    """Or, where --previous is --out, ranks would measure different cases and wait for each other."""
    content = {"device": "CPU", "world_size": 2, "results": [{"ranks": 1}, {"error": "x"}], "baselines": []}
    (tmp_path / "previous.json").write_text(json.dumps(content))
    (tmp_path / "broken.json").write_text("{")
    for done, error in run_ranks(2, _take_over, tmp_path):
        assert done == [{"ranks": 1}]
        assert "broken.json is no file of scripts.scaling" in error


def test_other_devices_and_sizes_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps({"device": "CPU", "world_size": 2, "results": [], "baselines": []}))
    with pytest.raises(ValueError, match="world_size 2, this run has 4"):
        scaling.taken_over(path, {"device": "CPU", "world_size": 4})


def written(tmp_path: Path, **change: object) -> Path:
    import yaml

    one = {"name": "x", "tokens": [256], "heads": [[4, 2]], "blocks": [[32, 3]], "comm": ["ring"]}
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "sweeps.yaml"
    path.write_text(yaml.safe_dump({"sweeps": [{k: v for k, v in (one | change).items() if v is not None}]}))
    return path


def odd_cases(rank: int, world: int, folder: Path) -> list[tuple[object, ...]]:
    """Three ranks, of which one is in no team of two: a refused case, 5 kv heads over two ranks, 2 kv heads over three."""
    path = written(folder / str(rank), heads=[[5, 5], [10, 5]], ranks=[2], comm=["a2a"], baselines=["dense_heads"])
    three = written(
        folder / f"{rank} three", heads=[[6, 2]], tokens=[255, 256], ranks=[3], comm=["a2a"], baselines=["dense_heads"]
    )
    found: list[tuple[object, ...]] = []
    for plan in (load_plan(path, 3), load_plan(three, 3)):
        groups = teams.make_teams({case.ranks for case in plan.cases})
        for case in plan.cases:
            module = dense_case if case.dense else layer_case
            try:
                module.measure(case, groups[case.ranks], torch.device("cpu"), 1, 0.1)
                found.append((case.q_heads, case.ranks, case.tokens, case.baseline, "measured"))
            except ValueError as error:
                found.append((case.q_heads, case.ranks, case.tokens, case.baseline, str(error)))
    return found


def test_what_two_ranks_refuse_ends_the_case_on_a_third_that_is_in_no_team(tmp_path: Path) -> None:
    found = run_ranks(3, odd_cases, tmp_path)
    members, idle = found[0], found[2]
    assert [case[:4] for case in members] == [case[:4] for case in idle]
    refused = "comm='a2a' on 2 ranks needs q heads that 2 divides, got 5"
    assert [case[4].split(";")[0] for case in members] == [
        refused, "measured", "measured",  # 10/5 over two ranks: each kv head has two copies
        "measured", "measured",  # 6/2 over three, 255 tokens
        "measured", "dense baselines cut 256 tokens into equal parts, not into 3",
    ]  # fmt: skip
    assert idle[0][4] == "another rank failed"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"comm": ["pigeon"]}, "pigeon"),
        ({"routing": ["skewed"]}, "skewed"),
        ({"baselines": ["flash"]}, "flash"),
        ({"layout": "spiral"}, "spiral"),
        ({"color": 1}, "unknown color"),
        ({"heads": [["4/2"]]}, "pairs like"),
        ({"heads": [[5, 2]]}, r"kv heads divide query heads, got \[5, 2\]"),
        ({"heads": [[4, 0]]}, r"heads must be positive, .* got \[4, 0\]"),
        ({"tokens": None}, "tokens_per_rank"),
        ({"tokens_per_rank": [64]}, "not both"),
        ({"comm": None}, "lacks 'comm'"),
        ({"comm": "ring"}, "comm must be a list, got 'ring'"),
        ({"ranks": 4}, "ranks must be a list, got 4"),
        ({"tokens": []}, "tokens must not be empty"),
        ({"heads": []}, "heads must not be empty"),
        ({"tokens": ["256K"]}, "tokens must hold positive integers, got .'256K'."),
        ({"exchange_bytes": "16 GiB"}, "exchange_bytes must be an integer of at least 0, got '16 GiB'"),
        ({"exchange_bytes": -1}, "exchange_bytes must be an integer of at least 0, got -1"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_plan(written(tmp_path, **change), 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sweeps: [", "sweeps.yaml is not YAML"),
        ("sweeps: [fast]", "every sweep must be a mapping, got 'fast'"),
        ("sweeps: []\niterations: many", "iterations must be a positive number, got 'many'"),
        ("model: {}", "must be a mapping with a list `sweeps`"),
    ],
)
def test_a_file_of_another_form_is_named(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "sweeps.yaml").write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_plan(tmp_path / "sweeps.yaml", 2)


def test_equal_work_is_the_share_of_a_rank_also_where_kv_heads_are_copied(tmp_path: Path) -> None:
    """Two ranks with 5 of 10 q heads each need kv heads 0 to 2 and 2 to 4: each works with a regular 5/5, copies among them."""
    plan = load_plan(written(tmp_path, heads=[[10, 5], [8, 4]], ranks=[2], baselines=["equal_work"]), 2)
    assert [(case.q_heads, case.kv_heads) for case in plan.cases if case.baseline] == [(5, 5), (4, 2)]


def test_other_selections_documents_or_passes_are_other_cases(tmp_path: Path) -> None:
    """A later run measures them, and their bits are not compared."""

    def case(name: str, document: int = 64, layer: str = "layer_0", **change: object) -> sweep.Case:
        recorded = np.zeros((2, document, 3), np.int16)
        np.savez(tmp_path / f"{name}.npz", block_size=32, **{layer: recorded})
        selections = {"file": str(tmp_path / f"{name}.npz"), "layer": layer}
        path = written(tmp_path, ranks=[1], routing=["trained"], selections=selections, **change)
        return load_plan(path, 1).cases[0]

    first = case("a")
    others = [case("b"), case("a", layer="layer_1"), case("a", document=128), case("a", passes=["forward"])]
    assert case("a").key == first.key
    assert len({x.key for x in (first, *others)}) == 5
    measured = {"fingerprint": "1", "forward_ms": 1.0, "bitwise_equal_to_first": True}
    done = [x.entry() | measured | ({"forward_backward_ms": 2.0} if x.backward else {}) for x in (first, *others)]
    assert [sweep.key_of(entry) for entry in done] == [x.key for x in (first, *others)]
    for entry in done:
        before = [x for x in done if x is not entry]
        assert scaling.compared(entry | {"fingerprint": "2"}, before) == {"bitwise_equal_to_first": True}
    del done[-1]["passes"]  # as files of old commits have it
    assert sweep.key_of(done[-1]) == others[-1].key


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "scaling").glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_configurations_are_right(path: Path) -> None:
    plan = load_plan(path, 4)
    assert plan.cases
    assert len({case.key for case in plan.cases}) == len(plan.cases)


@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_inputs_depend_on_token_numbers_alone(name: str) -> None:
    whole = draw_global(SequenceLayout.contiguous([0, 5000], 1), 0, 2, 1, CPU)
    layout = getattr(SequenceLayout, name)([0, 5000], 3)
    for index, x in enumerate(whole):
        parts = [draw_global(layout, rank, 2, 1, CPU)[index] for rank in range(3)]
        assert torch.equal(layout.unshard(parts), x)


def test_a_fingerprint_is_of_the_global_tensor() -> None:
    layout, one = SequenceLayout.zigzag([0, 300], 3), SequenceLayout.contiguous([0, 300], 1)
    x = draw_global(one, 0, 2, 1, CPU)[0]
    whole = int(definition.fingerprint([x], one, 0, ALONE), 16)
    parts = [int(definition.fingerprint([layout.shard(x, rank)], layout, rank, ALONE), 16) for rank in range(3)]
    assert sum(parts) % (1 << 64) == whole
    changed = x.clone()
    changed[7, 1, 3] = -changed[7, 1, 3]
    swapped = x.clone()
    swapped[[5, 6]] = x[[6, 5]]
    assert len({definition.fingerprint([y], one, 0, ALONE) for y in (x, changed, swapped)}) == 3


def test_the_check_sees_one_wrong_block_and_a_wrong_gradient() -> None:
    config, layout = MoBAConfig(32, 3), SequenceLayout.contiguous([0, 256], 1)
    q, k, v, dout = draw_global(layout, 0, 2, 1, CPU)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def checked(used: MoBAConfig) -> dict[str, float | int]:
        q.grad = None
        out = moba_attention(*leaves, used, layout=layout)
        out.backward(dout)
        return definition.check_rows(q, k, v, dout, out, q.grad, None, config, layout, 0, ALONE, rows_per_rank=8)

    right, wrong = checked(config), checked(MoBAConfig(32, 2))
    assert right["output_error"] < 3e-3
    assert right["dq_error"] < 6e-3
    assert wrong["output_error"] > 0.05
    assert wrong["dq_error"] > 0.05
    assert wrong["worst_row_error"] > 0.3


def test_rows_of_equal_scores_are_left_out() -> None:
    means = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means[3] = means[2]
    query = means[2:3] * 3
    _, clear = definition.select(query, means, torch.tensor([6]), 2)
    assert not clear.item()  # blocks 2 and 3 score the same, and one of them is selected
    _, clear = definition.select(query, means, torch.tensor([6]), 3)
    assert clear.item()


@pytest.mark.heavy
def test_recorded_selections_are_replayed(tmp_path: Path) -> None:
    """Over ranks of any exchange, and checked against the definition with the recorded blocks, not with scores."""
    import yaml

    own = np.arange(64) // 16
    recorded = np.stack([np.full(64, -1), np.where(own > 1, own - 2, -1), own], 1)  # two blocks back, and the own one
    np.savez(tmp_path / "recorded.npz", block_size=16, layer_0=np.repeat(recorded[None].astype(np.int16), 2, 0))
    one = {
        "name": "trained", "ranks": [2], "tokens": [256], "heads": [[4, 2]], "blocks": [[16, 3]], "routing": ["trained"],
        "selections": {"file": str(tmp_path / "recorded.npz"), "layer": "layer_0"}, "comm": ["ring", "fetch", "a2a"],
    }  # fmt: skip
    config, out = tmp_path / "trained.yaml", tmp_path / "scaling.json"
    config.write_text(yaml.safe_dump({"iterations": 1, "seconds": 1, "sweeps": [one]}))
    run("--out", str(out), config=str(config))
    results = json.loads(out.read_text())["results"]
    assert [(e["comm"], e["document"], e.get("error")) for e in results] == [(x, 64, None) for x in one["comm"]]
    assert all(e["bitwise_equal_to_first"] for e in results)
    assert max(e["output_error"] for e in results) < 3e-3
    assert results[1]["received_bytes"] < results[0]["received_bytes"]  # fetch brings what is selected
    config.write_text(yaml.safe_dump({"sweeps": [one | {"blocks": [[32, 3]]}]}))
    with pytest.raises(ValueError, match="recorded at .16, 3."):
        load_plan(config, 2)
