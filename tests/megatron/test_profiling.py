"""Kernels of a profile by category, and the tables made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("matplotlib")
pytest.importorskip("typer")

import typer

from examples.megatron_gpt.profiling import KERNELS, Span, category, shares, stage
from scripts import training_speed
from scripts.tables import headline, speed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gate_kernel", "attention"),
        ("hold_rows_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("nvjet_tst_128x256", "matrices"),
        ("sm90_xmma_gemm_bf16bf16", "matrices"),
        ("ncclDevKernel_AllReduce_Sum_f32", "communication"),
        ("rms_norm_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddOps>", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "elementwise"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("c10d::symmetric_memory::barrier_kernel(unsigned int**, int, int, int, unsigned long)", "communication"),
        ("_heads_kernel", "communication"),
    ],
)
def test_categories(name: str, expected: str) -> None:
    assert category(name) == expected


def test_every_kernel_of_the_package_has_one_stage() -> None:
    kernel = re.compile(r"^@(?:triton|gluon)\.jit.*?^def (\w+)\(", re.DOTALL | re.MULTILINE)
    sources = (path for folder in ("kernels", "parallel") for path in (ROOT / folder).rglob("*.py"))
    names = {name for path in sources for name in kernel.findall(path.read_text()) if name.endswith("_kernel")}
    listed = [f"{name}_kernel" for of_stage in KERNELS.values() for name in of_stage]
    assert set(listed) == names
    assert len(listed) == len(names)
    assert stage("sum_segments_kernel") == stage("cudnn_sdpa_sm90_flash_bprop") == "backward"
    assert stage("arrange_kernel") == "gate"


def test_shares_add_up_where_kernels_overlap() -> None:
    spans = [
        Span("gate_kernel", 0, 1000),
        Span("merge_kernel", 1000, 3000),
        Span("ncclDevKernel_AllGather", 500, 4000),  # 2.5 ms of it beside attention
        Span("nvjet_tst", 6000, 8000),
    ]
    found = shares(spans)
    assert found.step_ms == 8.0
    assert found.by_category == {
        "attention": 3.0,
        "matrices": 2.0,
        "elementwise": 0.0,
        "communication": 1.0,
        "idle": 2.0,
    }
    assert found.busy == 0.75
    assert found.by_stage == {"gate": 1.0, "merge": 2.0}
    assert found.top[0] == ("ncclDevKernel_AllGather", "communication", 3.5, 1)
    with pytest.raises(ValueError, match="no kernels"):
        shares([])


def test_tables_and_plot_of_the_results(tmp_path: Path) -> None:
    path = ROOT / "docs" / "results" / "training_speed.json"
    content = json.loads(path.read_text())
    table = speed.speed_table(content).splitlines()
    assert sum(line.startswith("| ") for line in table) == 1 + len(content["runs"])
    rows = speed.step_rows(content)
    assert rows
    assert all(row.count("|") == 5 for row in rows)
    speed.profile_plot(content, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").stat().st_size > 1000


def test_table_of_one_gpu_and_several() -> None:
    run = {
        "label": "pull", "attention": "moba:512:8:2", "gpus": 1, "parameters": 10**6, "tokens_per_step": 1024,
        "step_seconds": 1.0, "tokens_per_second": 100.0, "mfu": 0.25,
        "peak_memory_gib": 2.0, "peak_memory_by_part": {"estimated_peak": 1.9},
        "loss": [6.0, 5.0],
    }  # fmt: skip
    more = run | {"gpus": 2, "tokens_per_step": 2048, "tokens_per_second": 190.0}
    other = more | {"attention": "moba:128:8", "tokens_per_step": 1 << 20}
    about = {"device": "GPU", "torch": "2", "megatron_core": "0", "commit": "0" * 40}
    table = speed.gpus_table({"about": about, "runs": [run, more, {"error": "no memory"}, other]}).splitlines()[4:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table] == [
        ["1M", "1K", "MoBA (512, 8)", "1", "pull", "1.00 s", "100", "", "25.0%", "2.0 (1.9)", "6.0000, 5.0000"],
        ["1M", "2K", "MoBA (512, 8)", "2", "pull", "1.00 s", "190", "1.90x", "25.0%", "2.0 (1.9)", "6.0000, 5.0000"],
        ["1M", "1M", "MoBA (128, 8)", "2", "pull", "1.00 s", "190", "", "25.0%", "2.0 (1.9)", "6.0000, 5.0000"],
    ]

    # Runs of the program that checks them have a column more.
    check = {"output_error": 0.002, "dq_error": 0.003, "loss_error": 1e-5}
    against = {"largest_loss_difference": 4e-4}
    errors = [run, more | {"check": check, "loss_against": against}, more | {"check": {"loss_error": 1e-5}}]
    table = speed.gpus_table({"about": about, "runs": errors}).splitlines()
    assert [line.split("|")[-2].strip() for line in table[2:]] == [
        "errors", "---", "-", "2.0e-03, 3.0e-03, 1.0e-05; 4.0e-04", "-, -, 1.0e-05",
    ]  # fmt: skip
    assert [line.split("|")[-2].strip() for line in speed.speed_table({"about": about, "runs": errors}).splitlines()[4:]] == [
        "-", "2.0e-03, 3.0e-03, 1.0e-05; 4.0e-04", "-, -, 1.0e-05",
    ]  # fmt: skip
    assert speed.CHECKED in table[0]
    both = more | {"check": check | {"dq_rounding_error": 0.0016}}
    assert "| 2.0e-03, 1.6e-03, 1.0e-05 |" in speed.gpus_table({"about": about, "runs": [both]})

    # Other lengths and ranks compare, other settings do not; the run on one GPU may be in another file.
    alone = run | {"overrides": ["parallel.context=1"]}
    hybrid = alone | {"overrides": ["parallel.context=1", "moba.full_last_layers=2"], "tokens_per_second": 50.0}
    both = more | {"overrides": ["parallel.context=2", "data.seq_length=2048"]}
    (line,) = speed.gpus_table({"about": about, "runs": [both]}, {"runs": [alone, hybrid]}).splitlines()[4:]
    assert "| 1.90x |" in line
    full = both | {"attention": "full:1:0", "step_seconds": 9.0}
    rows = speed.step_rows({"about": about, "runs": [both, full]})
    assert rows == ["| training step, 1M, (512, 8), 2K tokens, pull, 2 GPU | 9.00 s | **1.00 s** | 9.0x |"]
    (line,) = speed.gpus_table(
        {"about": about, "runs": [full]}, {"runs": [alone | {"attention": "full:1"}]}
    ).splitlines()[4:]
    assert "| 9.00 s | 190 |  |" in line  # not against one GPU: its work per token grows

    # The longest step, beside full attention of as many tokens on as many GPUs whatever its label.
    empty = {"device": "NVIDIA GPU", "baselines": [], "results": []}
    for runs, cells in (
        ([both, run], "not measured | **1.0 s** | |"),
        ([run, full | {"gpus": 1}, both, full | {"label": "ring"}], "9.0 s | **1.0 s** | 9.0x |"),
    ):
        row = headline.headline(empty, {"about": about, "runs": runs}).splitlines()[-1]
        assert row == f"| training step, 0.0B, (512, 8), 2,048 tokens, 2 GPU | {cells}"

    # The profiler delays the host: GPU time counts, over the time of a step without it.
    profile = {"busy": 0.5, "step_ms": 1600.0}
    assert "| 80% |" in speed.speed_table({"about": about, "runs": [run | {"profile": profile}]})


def test_what_an_attention_asks_for() -> None:
    plain = training_speed._asked_for("moba:512:8")
    assert plain.changes == ("moba.block_size=512", "moba.topk=8")
    assert (plain.own, plain.steps, plain.warmup, plain.label) == ((), None, None, "")
    full = training_speed._asked_for("full:1:0 model.num_layers=2 label=last_two")
    assert full.own == ("model.num_layers=2",)
    assert (full.steps, full.warmup, full.label) == (1, 0, "last two")
    config = ROOT / "configs" / "quickstart.yaml"
    for plain_too in ([], ["moba.layer_pattern=[1,0]"]):
        settings = training_speed._settings(config, plain_too, full)
        assert (settings.moba.full_last_layers, settings.moba.layer_pattern) == (2, [])
    assert training_speed._settings(config, ["moba.full_last_layers=1"], plain).moba.full_last_layers == 1
    for wrong in (
        "",
        "moba:512",
        "moba:512:8:1:1:1",
        "full:x",
        "half",
        "full:0",
        "full parallel.context=2",
        "full moba.full_last_layers=1",
    ):
        with pytest.raises(typer.BadParameter, match="--attention"):
            training_speed._asked_for(wrong)
