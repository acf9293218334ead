"""`moba-cp plan` and `moba-cp doctor`: as users run them, alone and under torchrun."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("yaml")

from typer.testing import CliRunner

from moba_cp.__main__ import main
from moba_cp.commands import app, checks
from moba_cp.commands.plan import read_model, read_tokens
from moba_cp.commands.values import MOBA_KEYS
from moba_cp.planning.measured import read
from tests.programs import run_program

ROOT = Path(__file__).parents[1]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), terminal_width=200)
    return result.exit_code, result.output


def test_plan_recommends_and_shows_its_parts() -> None:
    status, text = invoke("plan", "--model", str(ROOT / "configs" / "gpt_1b_1m.yaml"), "--tokens", "1M", "--gpus", "64")
    assert status == 0, text
    assert "16/4 heads" in text
    assert "block size 4096, topk 12" in text
    for part in (
        "recommended: comm=",
        "recomputation",
        "layout",
        "forward",
        "backward",
        "between nodes",
        "memory of attention",
    ):
        assert part in text
    assert "*(4096, 12)" in text
    assert "least memory of those that fit and are within 3% of the least time" in text  # it need not be the fastest
    assert "Sending queries to blocks" in text


def test_plan_fails_where_nothing_fits() -> None:
    status, text = invoke("plan", "--model", "32/8", "--tokens", "1M", "--gpus", "8", "--memory", "0.001")
    assert status == 1
    assert "No split fits 0.001 GiB. Below is what would take the least time." in text
    assert "recommended:" not in text
    assert text.count("does not fit") >= 4  # the fastest, alternatives, block sizes


@pytest.mark.parametrize(
    ("model", "why"), [("none.yaml", "got 'none.yaml', no such file"), ("configs", "got 'configs' is a folder")]
)
def test_plan_says_what_is_wrong_with_the_models_file(model: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    status, text = invoke("plan", "--model", model, "--tokens", "1M", "--gpus", "8")
    assert status == 2
    assert why in " ".join(text.replace("│", " ").split())


def test_plan_refuses_more_gpus_than_it_can_plan_for() -> None:
    status, text = invoke("plan", "--model", "32/8", "--tokens", "1M", "--gpus", "1000000000")
    assert status == 2
    assert "--gpus must be at most 1048576, got 1000000000" in " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(("tokens", "warns"), [("31K", True), ("32K", False)])
def test_plan_says_where_the_host_is_the_bound(tokens: str, warns: bool) -> None:
    status, text = invoke("plan", "--model", "8/2", "--tokens", tokens, "--gpus", "1")
    assert status == 0, text
    assert ("below 32K tokens times are too short" in text) == warns


def test_plan_calibrates_from_result_files(tmp_path: Path) -> None:
    saved = tmp_path / "calibration.json"
    results = [str(ROOT / "docs" / "results" / name) for name in ("layer.json", "kernels.json")]
    given = ["--model", "32/8", "--tokens", "512K", "--gpus", "2", "--save", str(saved)]
    status, text = invoke("plan", *given, *(x for path in results for x in ("--results", path)))
    assert status == 0, text
    assert json.loads(saved.read_text())["sources"] == ["kernels.json", "layer.json"]
    assert f"calibration written to {saved}" in text


def test_plan_does_not_replace_what_it_reads(tmp_path: Path) -> None:
    copied = tmp_path / "kernels.json"
    shutil.copy(ROOT / "docs" / "results" / "kernels.json", copied)
    given = ["--model", "32/8", "--tokens", "512K", "--gpus", "2", "--results", str(copied), "--save", str(copied)]
    status, text = invoke("plan", *given)
    assert status == 2
    assert "would replace these --results" in " ".join(text.replace("│", " ").split())
    assert copied.read_bytes() == (ROOT / "docs" / "results" / "kernels.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"forward_ms": 0}, r"times must be positive, and forward less than forward_backward, got \[0, "),
        ({"forward_ms": {"median": float("nan")}}, "forward_ms must be a finite number, got nan"),
        ({"forward_ms": "fast"}, "forward_ms must be a finite number, got 'fast'"),
        ({"tokens": 131072.0}, "tokens must be a positive integer, got 131072.0"),
        ({"forward_backward_stages_ms": [1]}, "no result file .*AttributeError"),
        ({"forward_backward_stages_ms": {"gate": -1}}, "gate takes -1 ms"),
    ],
)
def test_damaged_results_are_refused(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    content = json.loads((ROOT / "docs" / "results" / "kernels.json").read_text())
    timed = next(e for e in content["results"] if e.get("tokens") == 131072 and "block_size" in e)
    timed |= change
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=text):
        read([path])


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\x80", b'{"device": 5, "results": []}'])
def test_what_is_no_result_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is no result file"):
        read([tmp_path / "a.json"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--tokens": "many"}, "many"),
        ({"--tokens": "0"}, "'0'"),
        ({"--model": "nowhere.yaml"}, "nowhere.yaml"),
        ({"--model": "32/5"}, "5 and 32"),
        ({"--gpus": "12"}, "12 GPUs"),
        ({"--link": "-1"}, "link must be positive"),
        ({"--link": "1e-300"}, "link is in GB/s and must be 0.001 to 1,000,000, got 1e-300"),
        ({"--fabric": "1e9"}, "fabric is in GB/s and must be 0.001 to 1,000,000, got 1000000000.0"),
        ({"--fabric": "nan"}, "fabric must be positive, got nan"),
        ({"--memory": "inf"}, "memory must be finite, got inf"),
        ({"--tokens": "99999999999999999999M"}, "tokens must be below 4294967296"),
        ({"--model": "0/0"}, "'0/0'"),
        ({"--block-size": "0"}, "'--block-size'"),
        ({"--block-size": "8"}, "blocks of at least 16 tokens, got D = 128, block size 8"),
        ({"--block-size": "9" * 20}, "block_size must be at most 4611686018427387904, got 99999999999999999999"),
        ({"--head-dim": "512"}, "heads of at most 256 and blocks of at least 16 tokens, got D = 512"),
        ({"--memory": "0"}, "memory must be positive, got 0"),
        ({"--layers": "0"}, "'--layers'"),
        ({"--save": str(ROOT / "nowhere" / "x.json")}, "nowhere/x.json"),
        (
            {"--results": str(ROOT / "docs" / "results" / "context_parallel_training.json")},
            "training.json is no result file",
        ),
        ({"--results": str(ROOT / "README.md")}, "README.md is no result file"),
        (
            {"--results": str(ROOT / "README.md"), "--device": "h200"},
            "--device h200 names a calibration, and --results",
        ),
        ({"--tokens": "\u00b2"}, "'\u00b2'"),
        ({"--model": "\u0663/\u0661"}, "'\u0663/\u0661'"),
    ],
)
def test_plan_refuses_by_name(change: dict[str, str], text: str) -> None:
    given = {"--model": "32/8", "--tokens": "1M", "--gpus": "8"} | change
    status, output = invoke("plan", *(x for pair in given.items() for x in pair))
    assert status == 2
    assert text in " ".join(output.replace("│", " ").split())


def test_sizes_are_read() -> None:
    assert [read_tokens(x) for x in ("131072", "128K", "10M")] == [131072, 131072, 10 << 20]
    assert read_model("32/8").kv_heads == 8
    assert read_model(str(ROOT / "configs" / "gpt_1b_1m.yaml")).layers == 24


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            "model: {num_attention_heads: many, hidden_size: 8}",
            "num_attention_heads must be a positive integer, got 'many'",
        ),
        ("model: {num_attention_heads: 4}", "hidden_size must be a positive integer, got None"),
        ("model: {num_attention_heads: 4, hidden_size: 8}\nmoba: {topk: 0}", "topk must be a positive integer, got 0"),
        ("model: {num_attention_heads: 4", "is not YAML"),
        (
            "model: {num_attention_heads: 12, hidden_size: 1000}",
            "hidden_size=1000 must be a multiple of num_attention_heads=12",
        ),
        ("model: {num_attention_heads: 4, hidden_size: 8}\nmoba: {blocksize: 128}", "moba has no key 'blocksize'"),
        (
            "model: {num_attention_heads: 4, hidden_size: 8, num_query_group: 2}",
            "'num_query_group', did you mean 'num_query_groups'",
        ),
        ("model: {num_attention_heads: 4, hidden_size: 8, num_key_value_heads: 2}", "did you mean 'num_query_groups'"),
        ("sweeps: []", "must have a section `model`"),
        (
            "model: {num_attention_heads: 4, hidden_size: 8}\nmoab: {topk: 4}",
            "has a section 'moab', did you mean 'moba'",
        ),
        ("just text", "must have a section `model`"),
        ("model: {num_attention_heads: 8}\nmoba: [1]", "section `moba` must be a mapping, got [1]"),
    ],
)
def test_a_bad_model_file_is_refused_by_name(tmp_path: Path, content: str, text: str) -> None:
    (tmp_path / "model.yaml").write_text(content)
    with pytest.raises(ValueError, match=rf"model\.yaml.*{re.escape(text)}"):
        read_model(str(tmp_path / "model.yaml"))


def test_a_model_file_may_leave_moba_empty(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("model: {num_attention_heads: 4, hidden_size: 256}\nmoba:\n")
    found = read_model(str(tmp_path / "model.yaml"))
    assert (found.kv_heads, found.head_dim, found.block_size, found.topk) == (4, 64, None, None)


def test_plan_shows_the_own_block_size_of_a_short_sequence() -> None:
    status, text = invoke("plan", "--model", "32/8", "--tokens", "600", "--gpus", "1")
    assert status == 0, text
    assert "*(512, 8)" in text


@pytest.mark.parametrize("size", ["--block-size", "--topk"])
def test_plan_takes_sizes_beyond_the_sequence_as_full_attention(size: str) -> None:
    """More than covers the sequence means the same: no time, memory or budget grows with it."""
    given = ["--model", "16/16", "--tokens", "64K", "--gpus", "2", "--topk", "4", "--block-size", "16384"]
    texts = []
    for value in {"--block-size": (65536, 99_999_999_999), "--topk": (4, 99_999_999_999)}[size]:
        status, text = invoke("plan", *given, size, str(value))
        assert status == 0, text
        texts.append(text.split("recommended")[1].split("alternatives")[0])
    assert texts[0] == texts[1]


def test_plan_says_where_half_of_the_gpus_would_be_faster() -> None:
    given = ["--model", "32/8", "--tokens", "1M", "--block-size", "512", "--topk", "8"]
    status, text = invoke("plan", *given, "--gpus", "64")
    assert status == 0, text
    assert re.search(
        r"half of the GPUs would take less: \S+ instead of \S+ ms, by a2a\+ring, U = 8, since each GPU receives", text
    )
    assert "half of the GPUs" not in invoke("plan", *given, "--gpus", "8")[1]


def test_keys_of_moba_are_those_of_the_trainer() -> None:
    pytest.importorskip("omegaconf")
    from examples.megatron_gpt.config import MoBASection

    assert set(MOBA_KEYS) == {field.name for field in fields(MoBASection)}


@pytest.mark.parametrize(("rank", "text"), [("0", "MASTER_ADDR expected, but not set"), ("x", "'x'")])
def test_doctor_names_an_environment_that_is_half_set(monkeypatch: pytest.MonkeyPatch, rank: str, text: str) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    status, output = invoke("doctor", "--megabytes", "1")
    assert status == 1
    (line,) = [line for line in output.splitlines() if line.startswith("[PROBLEM]")]
    assert f"rank {rank}: joining the other ranks: ValueError" in line
    assert text in line
    assert "-> start all ranks by torchrun" in line
    assert output.splitlines()[-1] == "1 problem"


def test_doctor_refuses_bad_sizes() -> None:
    for option, value, text in (
        ("--heads", "16", "'16'"), ("--heads", "32/5", "5 and 32"), ("--tokens-per-gpu", "8k", "128K or 10M, got '8k'"),
    ):  # fmt: skip
        status, output = invoke("doctor", option, value)
        assert status == 2
        assert text in output


def test_doctor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    status, text = invoke("doctor", "--megabytes", "8")
    assert status == 0, text
    for what in ("python", "triton", "nccl", "megatron-core", "transformer-engine", "attention", "torchrun"):
        assert what in text
    assert text.rstrip().endswith("no problems")


def test_a_problem_has_a_cure_and_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    monkeypatch.delenv("RANK", raising=False)
    status, text = invoke("doctor", "--megabytes", "8")
    assert status == 1
    (line,) = [line for line in text.splitlines() if "PROBLEM" in line]
    assert "-> unset CUDA_LAUNCH_BLOCKING" in line
    assert text.rstrip().endswith("1 problem")


def test_wrong_attention_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "moba_attention", lambda q, k, v, config, layout: torch.zeros_like(q))
    assert checks.attention_finding(torch.device("cpu")).status == "problem"

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(checks, "moba_attention", fail)
    found = checks.attention_finding(torch.device("cpu"))
    assert found.status == "problem"
    assert "no kernel image" in found.text
    assert found.cure


def test_doctor_over_ranks() -> None:
    printed = run_program("moba_cp", "doctor", "--megabytes", 4, ranks=2)
    assert printed.count("python:") == 1  # one rank speaks
    for what in ("ranks: 2", "all-to-all", "auto: ", "symmetric memory"):
        assert what in printed


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name == "typer" or name.startswith("moba_cp.commands")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"pip install 'moba_cp\[cli\]'"):
        main(["plan"])
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("moba_cp ")


def test_importing_the_library_imports_no_command_line_and_no_dynamo() -> None:
    """Dynamo would double the time of the import."""
    code = (
        "import sys, moba_cp; "
        "assert not {'typer', 'yaml', 'rich', 'moba_cp.commands', 'moba_cp.planning', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_calls_outside_graphs_import_no_dynamo() -> None:
    """It would keep the default group of that moment for the life of the process."""
    code = (
        "import sys, torch, moba_cp; from moba_cp.dense import causal_attention; "
        "layout = moba_cp.SequenceLayout.contiguous([0, 8], 1); q = torch.randn(8, 1, 8); "
        "moba_cp.block_scores(q, q, torch.zeros(1, 8, 1, dtype=torch.int64), moba_cp.MoBAConfig(4, 2), layout=layout); "
        "causal_attention(q, q, q, None, layout=layout); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_command_describes_itself() -> None:
    for command in ("plan", "doctor"):
        status, text = invoke(command, "--help")
        assert status == 0
        assert "Usage" in text
