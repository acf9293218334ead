"""The programs of scripts/: each starts, and the benchmarks run with small sizes on the CPU."""

from __future__ import annotations

import json
import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import typer
from typer.testing import CliRunner

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.kernels import configs, list_configs
from moba_cp.kernels.gpu import gpu_of_capability
from scripts import (
    bench_compile,
    bench_fsdp,
    bench_huggingface,
    bench_kernels,
    bench_training,
    compare_versions,
    long_run,
    make_picture,
    make_tables,
    parallel_equality,
    pretrain_gpt_stock,
    quickstart,
    sanitize,
    scaling,
    soak,
    training_speed,
    tune,
    tune_decode,
)
from scripts.harness import definition, limits, options, records
from scripts.harness.inputs import draw_inputs
from scripts.harness.timing import Times, time_calls
from tests.programs import run_program

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PROGRAMS = (
    bench_compile, bench_fsdp, bench_huggingface, bench_kernels, bench_training, compare_versions, long_run, make_picture,
    make_tables, parallel_equality, pretrain_gpt_stock, quickstart, sanitize, scaling, soak, training_speed, tune, tune_decode,
)  # fmt: skip


def test_every_program_is_tested() -> None:
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert names == {module.__name__.removeprefix("scripts.") for module in PROGRAMS}


@pytest.mark.parametrize("module", PROGRAMS, ids=lambda module: module.__name__)
def test_a_program_describes_itself_and_its_options(module) -> None:
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, ["--help"], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output
    assert f"-m {module.__name__}" in (module.__doc__ or "")  # its first lines show how it is run


@pytest.mark.parametrize("module", PROGRAMS, ids=lambda module: module.__name__)
def test_a_folder_is_refused_as_the_file_of_results_before_anything_runs(module) -> None:
    hints = typing.get_type_hints(module.main, include_extras=True)
    for name in hints.keys() & {"out", "results"}:
        option = next(x for x in typing.get_args(hints[name])[1:])
        assert not option.dir_okay, name


def run(tmp_path: Path, *words: str, ranks: int = 0) -> dict:
    """Run a benchmark from the root of the repository as documented, without PYTHONPATH, and return what it wrote."""
    out = tmp_path / "out.json"
    run_program(*words, "--out", out, ranks=ranks)
    return json.loads(out.read_text())


def test_bench_kernels_measures_and_checks(tmp_path: Path) -> None:
    found = run(
        tmp_path, "scripts.bench_kernels", "--device", "cpu", "--tokens", "300", "--heads", "4/2",
        "--configs", "64:3", "--iterations", "2", "--seeds", "2",
    )  # fmt: skip
    assert [entry["name"] for entry in found["dense"]] == ["dense flash"]  # cuDNN has no backend on the CPU
    assert {"device", "torch", "commit", "head_dim"} <= found["about"].keys()
    (entry,) = found["results"]
    assert entry["forward_ms"]["quartile_1"] <= entry["forward_ms"]["median"] <= entry["forward_ms"]["quartile_3"]
    assert entry["checks"]["same_bits_again"]
    assert (entry["checks"]["rows"], entry["checks"]["wrong_rows"]) == (2 * 4 * 300, 0)
    # bf16 results of fp32 sums: half a unit in the last place is 2 ** -9 = 2e-3.
    assert entry["checks"]["out_error"] < 3e-3
    assert max(entry["checks"][f"{x}_error"] for x in ("dq", "dk", "dv")) < 6e-3


def test_bench_huggingface_measures_and_checks(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    found = run(
        tmp_path, "scripts.bench_huggingface", "--device", "cpu", "--tokens", "300", "--chunk", "20",
        "--heads", "4/2",
        "--configs", "64:3", "--iterations", "2", "--layers", "2",
    )  # fmt: skip
    results = found["results"]
    assert [(r["what"], r["attention"]) for r in results] == [
        (what, attention) for attention in ("sdpa", "moba") for what in ("prefill", "chunk", "decode")
    ]
    assert [r["queries"] for r in results[3:]] == [300, 20, 1]
    assert max(r["output_error"] for r in results[3:]) < 3e-3  # as above


@pytest.mark.heavy
def test_tune_decode_checks_steps_and_times_sdpa_beside(tmp_path: Path) -> None:
    found = run(
        tmp_path, "scripts.tune_decode", "--device", "cpu", "--tokens", "300", "--heads", "4/2",
        "--configs", "64:3", "--layers", "2",
    )  # fmt: skip
    assert [entry["what"] for entry in found["results"]] == ["sdpa", "step"]
    step = found["results"][1]
    assert step["output_error"] < 3e-3  # bf16 outputs
    assert step["same_bits_again"]
    assert step["us"]["least"] <= step["us"]["median"] <= step["us"]["most"]


def test_soak_compares_refuses_and_samples(tmp_path: Path) -> None:
    found = run(
        tmp_path, "scripts.soak", "--device", "cpu", "--minutes", "0.05", "--tokens", "96", "--samples", "4", "--may-grow",
        ranks=2,
    )  # fmt: skip
    assert found["calls"] >= 2
    assert (found["compared"], found["refused"]) >= (1, 1)
    assert found["largest_error"] < 1e-10  # fp64 sums in another order
    assert len(found["samples"]) == 4
    assert found["samples"][0]["process_bytes"] > 0


def test_soak_sees_what_grows() -> None:
    flat = {"calls": 1, "process_bytes": 1 << 28, "kept_host_bytes": 0, "threads": 3}
    later = flat | {"calls": 90, "process_bytes": (1 << 28) + soak.MAY_GROW, "kept_host_bytes": 1 << 30}
    assert soak.grown([flat, later]) == {}
    assert soak.grown([flat, later | {"threads": 4}]) == {"threads": 1}
    more = later["process_bytes"] + 1
    assert soak.grown([flat, later | {"process_bytes": more}]) == {"process_bytes": soak.MAY_GROW + 1}
    spike = flat | {"process_bytes": 1 << 30, "file_descriptors": 9}
    flat |= {"file_descriptors": 8}
    assert soak.grown([flat, flat, flat, flat, spike, flat]) == {"file_descriptors": 1}
    soak.end({}, may_grow=False)
    soak.end({"threads": 1}, may_grow=True)
    with pytest.raises(SystemExit, match="grew: {'threads': 1}"):
        soak.end({"threads": 1}, may_grow=False)


@pytest.mark.heavy
def test_bench_compile_compares_bits(tmp_path: Path) -> None:
    found = run(
        tmp_path, "scripts.bench_compile", "--device", "cpu", "--tokens", "128", "--heads", "2/1",
        "--configs", "32:2", "--hidden", "0", "--rounds", "1", "--iterations", "2", "--backend", "aot_eager",
    )  # fmt: skip
    (entry,) = found["results"]
    assert entry["bitwise_equal"]
    for what in ("forward", "forward_backward"):
        for name in ("eager", "compiled", "operators"):
            assert entry[f"{what}_{name}_ms"]["count"] == entry[f"{what}_{name}_host_ms"]["count"] == 2


@pytest.mark.heavy
def test_bench_fsdp_has_equal_losses(tmp_path: Path) -> None:
    found = run(
        tmp_path, "scripts.bench_fsdp", "--device", "cpu", "--tokens", "256", "--layers", "2", "--hidden",
        "64", "--heads", "4/2", "--config", "64:3", "--vocabulary", "64", "--steps", "1", ranks=2,
    )  # fmt: skip
    assert [r["ranks"] for r in found["results"]] == [2, 1]
    assert len(found["results"][0]["losses"]) == 4
    # Parameters and gradients are rounded to bf16 (2^-9) in another order; losses are means over 256 tokens.
    assert found["results"][1]["largest_relative_loss_difference"] < 2**-9


def test_a_compiled_call_with_other_results_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention must have equal bits."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *x: function(*x) * (1 + 2**-7))
    app = typer.Typer()
    app.command()(bench_compile.main)
    line = [
        "--device",
        "cpu",
        "--tokens",
        "128",
        "--heads",
        "2/1",
        "--configs",
        "32:2",
        "--hidden",
        "0",
        "--rounds",
        "1",
    ]
    result = CliRunner().invoke(app, [*line, "--iterations", "1", "--out", str(tmp_path / "out.json")])
    assert result.exit_code not in (0, None)
    assert "largest_difference is 0.0" in str(result.exception)
    assert "the limit 0: what attention, tokens 128" in str(result.exception)
    assert (
        json.loads((tmp_path / "out.json").read_text())["results"][0]["largest_difference"] > 2**-9
    )  # and was written


def test_values_beyond_their_limits_are_named() -> None:
    right = {"tokens": 64, "comm": "ring", "output_error": 0.0029, "dq_error": None, "bitwise_equal_to_first": True}
    assert limits.broken([right, {"error": "no memory"}, {"checks": {"wrong_rows": 0, "same_bits_again": True}}]) == []
    wrong = [
        {"output_error": float("nan")},
        {"dk_error": 0.02},
        {"checks": {"wrong_rows": 3}},
        {"same_bits_again": False},
    ]
    assert [line.split(":")[0] for line in limits.broken(right | entry for entry in wrong)] == [
        "output_error is nan, the limit 0.00781",
        "dk_error is 0.02, the limit 0.0156",
        "wrong_rows is 3, must be 0",
        "same_bits_again is False",
    ]
    assert limits.broken([right | wrong[0]])[0].endswith(": tokens 64, comm ring")
    limits.end([])
    with pytest.raises(SystemExit, match="do not use these times:\nout_error is 1"):
        limits.end(limits.broken([{"out_error": 1}]))


def test_losses_that_go_apart_fail() -> None:
    allowed = {"largest_relative_loss_difference": bench_fsdp.LOSS_DIFFERENCE}
    entries = [{"ranks": n, "largest_relative_loss_difference": x} for n, x in ((2, 0.0), (1, 2**-9))]
    assert limits.broken(entries, allowed) == []
    (line,) = limits.broken([*entries, {"ranks": 1, "largest_relative_loss_difference": 0.01}], allowed)
    assert line.startswith("largest_relative_loss_difference is 0.01, the limit 0.00391: ranks 1")
    resumed = {"first_step": 151, "loss": [2.0, 2.0], "difference": [0.0, 0.06]}
    right = {"finite": True, "resumed": resumed}
    assert long_run.wrong(right) == long_run.wrong({"finite": True}) == []
    (line,) = long_run.wrong(right | {"resumed": resumed | {"difference": [0.0, 0.2]}})
    assert line == "relative_difference is 0.1, the limit 0.0312: step 152"
    assert long_run.wrong({"finite": False}) == ["a loss or a gradient norm is not finite"]
    apart = {
        "cp2": {"max": 0.5, "within_noise": False},
        "cp2_ring": {"max": 0.1, "within_noise": True},
        "noise2": {"max": 0.2},
    }
    assert bench_training.too_far(apart) == ["cp2: losses differ from cp1's by up to 0.5, more than 3 times the noise"]


def test_a_wrong_output_row_shows() -> None:
    """The sampled definition, which serves both benchmarks, sees one wrong block of one row."""
    config, layout = MoBAConfig(32, 3), SequenceLayout.contiguous([0, 256], 1)
    q, k, v, dout = draw_inputs(256, 2, 1, seed=0, device=CPU)

    def output_error(out: torch.Tensor) -> float:
        alone = definition.Ranks(None)
        return definition.check_rows(q, k, v, dout, out, None, None, config, layout, 0, alone)["output_error"]

    out = moba_attention(q, k, v, config, layout=layout)
    assert output_error(out) < 3e-3
    fewer = moba_attention(q, k, v, MoBAConfig(32, 2), layout=layout)
    assert output_error(fewer) > 0.05


def test_a_failure_is_noted_and_the_rest_goes_on(tmp_path: Path) -> None:
    def fail() -> dict:
        raise RuntimeError("out of luck")

    results = records.Results(tmp_path / "out.json", {"about": {}}, "results")
    results.attempt("results", {"tokens": 1}, fail)
    results.attempt("results", {"tokens": 2}, lambda: {"ms": 3})
    written = json.loads((tmp_path / "out.json").read_text())["results"]
    assert (written[0]["tokens"], written[0]["error"]) == (1, "RuntimeError: out of luck")
    assert written[1] == {"tokens": 2, "ms": 3}
    assert results.failed == written[:1]


def test_a_file_that_cannot_be_written_or_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(typer.BadParameter, match=r"a_file/out\.json cannot be written"):
        records.Results(tmp_path / "a_file" / "out.json", {}, "results")
    (tmp_path / "soak.json").write_text('{"about"')
    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    for read in (make_tables.content, make_tables.contents):
        with pytest.raises(typer.BadParameter, match=r"soak\.json is damaged"):
            read("soak")


def test_times_have_a_median_and_a_spread() -> None:
    assert Times((3.0, 1.0, 2.0)).record() == {"median": 2.0, "quartile_1": 1.0, "quartile_3": 3.0, "count": 3}
    assert Times((3.0,), (1.0,)).record()["quartile_3"] == 3.0
    assert Times((1.0, 9.0)).quartiles == (1.0, 9.0)  # statistics.quantiles extrapolates: -1 and 11
    assert len(time_calls(lambda: None, CPU, iterations=4).all) == 4


def test_bad_options_are_refused_by_name() -> None:
    with pytest.raises(typer.BadParameter, match="16x16"):
        options.heads("16x16")
    with pytest.raises(typer.BadParameter, match="got 32/7"):
        options.heads("16/16,32/7")
    with pytest.raises(typer.BadParameter, match="got 0:8"):
        options.configs("0:8")
    with pytest.raises(typer.BadParameter, match="one pair, got '16/16,32/8'"):
        options.single(options.heads, "16/16,32/8")
    with pytest.raises(typer.BadParameter, match="at least 1, got '8192,0'"):
        options.integers("8192,0")
    with pytest.raises(typer.BadParameter, match="many"):
        options.integers("8192,many")
    with pytest.raises(typer.BadParameter, match="skewed"):
        options.choices("uniform,skewed", ("uniform", "correlated"))


@pytest.mark.parametrize(
    ("module", "line", "text"),
    [
        (bench_training, ("--device", "cpu", "--comm", "puls"), "got puls"),
        (bench_training, ("--device", "cpu", "--noise", "2,two"), "2,two"),
        (bench_training, ("--device", "cpu", "--", "model.layers=4"), "layers"),
        (long_run, ("--device", "cpu", "--config", "configs/none.yaml"), "configs/none.yaml: [Errno 2]"),
        (long_run, ("--device", "cpu", "--first-ranks", "128"), "first-ranks is 128, and "),
        (long_run, ("--device", "cpu", "--ranks", "128"), "ranks is 128, and "),
        (long_run, ("--device", "cpu", "--", "run.steps=3"), "itself; got run.steps=3"),
        (training_speed, ("configs/none.yaml", "--attention", "full"), "start this with torchrun"),
        (bench_kernels, ("--device", "cpu", "--configs", "64"), "got '64'"),
        (bench_huggingface, ("--device", "cpu", "--heads", "16/16,32/8"), "one pair, got '16/16,32/8'"),
        (bench_huggingface, ("--device", "cpu", "--tokens", "64"), "got 4096 and 64"),
        (tune_decode, ("--device", "cpu", "--configs", "64:0"), "got 64:0"),
        (bench_fsdp, ("--device", "cpu", "--config", "512:8,128:8"), "one pair, got '512:8,128:8'"),
    ],
)
def test_bad_options_of_a_program_are_refused_before_it_starts(
    module, line: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    pytest.importorskip("omegaconf")
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out.json"), *line], terminal_width=200)
    assert result.exit_code == 2, result.output
    assert text in result.output
    assert not (tmp_path / "out.json").exists()


def test_sanitize_asks_for_a_gpu_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    app = typer.Typer()
    app.command()(sanitize.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out.json")], terminal_width=200)
    assert result.exit_code == 2, result.output
    assert "no GPU is visible" in result.output


def test_plain_training_says_how_it_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    train_plain = pytest.importorskip("examples.megatron_gpt.train_plain")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, text in (("quickstart", "start this with torchrun: "), ("none", "configs/none.yaml: [Errno 2]")):
        with pytest.raises(SystemExit, match=re.escape(text)):
            train_plain.main(Path(f"configs/{name}.yaml"))


def test_plain_training_refuses_what_it_would_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    train_plain = pytest.importorskip("examples.megatron_gpt.train_plain")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for ranks, override, text in (
        ("2", "run.steps=20", "on one process, and torchrun started 2"),
        ("1", "moba.fraction=0.5", "moba.fraction=0.5: "),
        ("1", "data.paths=[/none]", "no text found at '/none'"),
    ):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        with pytest.raises(SystemExit, match=re.escape(text)):
            train_plain.main(Path("configs/quickstart.yaml"), [override])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("run.colour=red", "Key 'colour' not in 'RunConfig'"),
        ("run.name=mine", "run.name=mine: the runs differ in run.name"),
        ("parallel.tensor=2", "parallel.tensor=2: a run has as many processes as context-parallel ranks"),
    ],
)
def test_quickstart_refuses_a_key_before_it_removes_earlier_runs(override: str, text: str, tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    (tmp_path / "cp1").mkdir()
    app = typer.Typer()
    app.command()(quickstart.main)
    result = CliRunner().invoke(app, [override, "--output", str(tmp_path)], terminal_width=400)
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.output.replace("│", " ").split())
    assert (tmp_path / "cp1").exists()


def test_soak_refuses_sizes_of_which_it_can_tell_nothing() -> None:
    app = typer.Typer()
    app.command()(soak.main)
    for option, value in (("--minutes", "-1"), ("--tokens", "1")):
        result = CliRunner().invoke(app, [option, value], terminal_width=400)
        assert result.exit_code == 2, result.output
        assert option in result.output


def test_a_model_that_no_run_has_is_refused(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(parallel_equality.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path), "--only", "GQQ"], terminal_width=400)
    assert result.exit_code == 2, result.output
    assert "GQA; MQA; " in result.output
    assert "'GQQ'" in result.output


@pytest.mark.parametrize("block_size", [64, 128, 512, 4096])
def test_tuning_changes_fields_that_exist(block_size: int) -> None:
    """Launch configurations are renamed now and then; the tuner must follow."""
    gpu = gpu_of_capability((9, 0))
    for some in (tune.attend_configs(block_size, gpu), tune.own_configs(gpu), tune.merge_configs()):
        assert len(some) == len(set(some)) > 8
    assert tune.attend_configs(block_size, gpu)[0] in (
        configs.stream_rows(128, 128, block_size, gpu), configs.hold_rows(128, 128, block_size, gpu)
    )  # fmt: skip
    known = {field.name for field in fields(list_configs.ListConfig)}
    assert all(change.keys() <= known for change in tune.list_changes(131072 // block_size))
    known = {field.name for field in fields(configs.GluonConfig)}
    assert all(change.keys() <= known for _, change in tune.backward_changes(block_size))
