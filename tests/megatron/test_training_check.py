"""scripts/harness/training_check.py: attention of a training step, held against its definition."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")
pytest.importorskip("typer")

from moba_cp import MoBAConfig
from scripts import training_speed
from scripts.harness import limits
from tests.megatron_models import transformer_config
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
TOKENS, CONFIG = 192, MoBAConfig(16, 3)


def checked(rank: int, world_size: int) -> dict[str, Any]:
    """Errors of a MoBA layer and of a full one behind it, right and with things that are wrong."""
    from megatron.core.transformer.enums import AttnMaskType

    from moba_cp.megatron import MoBACoreAttention
    from moba_cp.megatron.layout import sbhd_layout
    from moba_cp.megatron.settings import MoBASettings
    from scripts.harness import training_check

    settings = MoBASettings(CONFIG, full_attention_last_n_layers=1)
    config = transformer_config(context_parallel_size=world_size)
    groups: Any = SimpleNamespace(cp=torch.distributed.group.WORLD)
    layers = torch.nn.ModuleList(
        MoBACoreAttention(config, number, AttnMaskType.causal, "self", settings, pg_collection=groups)
        for number in (1, 2)
    )
    held = sbhd_layout(TOKENS // world_size, 1, world_size).local_indices(rank)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TOKENS, 1, n, 8, generator=generator)[held].requires_grad_() for n in (4, 2, 2))

    def forward() -> torch.Tensor:
        out = layers[0](q, k, v)
        return layers[1](out.unflatten(-1, (4, 8)), k, v)

    def step() -> dict[str, training_check.Watch]:
        with training_check.watching([layers]) as watched:
            forward().square().sum().backward()
        return watched

    def loss() -> float:
        total = forward().detach().square().sum()
        torch.distributed.all_reduce(total)
        return total.item()

    device, found = torch.device("cpu"), dict[str, Any]()
    watched = step()
    found["right"] = training_check.errors(watched, device)
    moba = watched["moba"].seen
    assert moba is not None
    moba.tensors["dq"][0] += 1
    found["dq"] = training_check.errors(watched, device)
    watched = step()
    moba = watched["moba"].seen
    assert moba is not None
    watched["moba"].seen = replace(moba, config=MoBAConfig(16, 2))
    found["one block less"] = training_check.errors(watched, device)
    found["loss"] = training_check.loss_difference(loss, [layers], device)
    layers[0].register_forward_hook(lambda core, arguments, out: out * 1.1)
    found["wrong loss"] = training_check.loss_difference(loss, [layers], device)
    with training_check.watching([layers]) as watched:
        pass
    try:
        training_check.errors(watched, device)
    except RuntimeError as error:
        found["not called"] = str(error)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_wrong_row_shows(ranks: int) -> None:
    for found in run_ranks(ranks, checked):
        for name in ("output_error", "dq_error", "dq_rounding_error", "worst_row_error"):
            assert found["right"][name] < 1e-5, name  # fp32 against fp64
        assert found["right"]["checked_rows"] >= 2 * 4 * ranks * 3  # of two layers, 4 heads; random rows may be equal
        assert found["dq"]["dq_error"] > 0.05
        assert found["dq"]["dq_rounding_error"] > 0.05
        assert found["dq"]["output_error"] < 1e-5
        assert found["one block less"]["output_error"] > 0.05
        assert found["loss"] < 1e-5
        assert found["wrong loss"] > 1e-3
        assert "watched layer of moba attention" in found["not called"]


def run(out: Path, ranks: int, *arguments: str, overrides: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    line += [
        "--nproc-per-node",
        str(ranks),
        "-m",
        "scripts.training_speed",
        "configs/quickstart.yaml",
        "--out",
        str(out),
    ]
    line += ["--warmup", "1", "--steps", "1", *arguments, "--", "data.seq_length=192", "optimizer.warmup_steps=1"]
    line += ["run.global_batch_size=1", f"parallel.context={ranks}", *overrides]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["runs"]


@pytest.mark.heavy
def test_every_timed_run_is_checked_and_compared(tmp_path: Path) -> None:
    both = ("--attention", "moba:48:3", "--attention", "full:1:0")
    alone = run(tmp_path / "one.json", 1, *both)
    runs = run(tmp_path / "two.json", 2, *both, "--against", str(tmp_path / "one.json"))
    for entry in (*alone, *runs):
        assert max(entry["check"][name] for name in ("output_error", "dq_error", "loss_error")) < 1e-5  # fp32
        assert entry["check"]["loss_tokens"] == 192
    for entry in runs:
        assert entry["loss_against"]["other_gpus"] == 1
        assert entry["loss_against"]["steps"] == len(entry["loss"])
        assert entry["loss_against"]["largest_loss_difference"] < 1e-5


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.heavy), "all_but_attention"])
def test_rounding_of_bf16_is_no_mistake(tmp_path: Path, recompute: str) -> None:
    """After a few steps of a model values are nearly alike, so that delta from a rounded output is most of dq's error."""
    line = ("--attention", "moba:48:3", "--attention", "full:1:1", "--warmup", "4")
    overrides = ("run.precision=bf16", "data.seq_length=512", f"run.recompute={recompute}")
    moba, full = run(tmp_path / "one.json", 1, *line, overrides=overrides)
    assert moba["check"]["dq_error"] > limits.GRADIENT
    for entry in (moba, full):
        assert 1e-4 < entry["check"]["dq_rounding_error"] < limits.ROUNDED / 2


def test_more_steps_than_agree_are_not_compared() -> None:
    losses = [1.0] * training_speed.COMPARED_STEPS
    run = {
        "attention": "full",
        "parameters": 7,
        "tokens_per_step": 64,
        "gpus": 2,
        "loss": [*losses, 2.0],
        "overrides": [],
    }
    found = training_speed.loss_against(run, [run | {"loss": [*losses, 1.0], "gpus": 1}])
    assert found is not None
    assert (found["steps"], found["largest_loss_difference"]) == (training_speed.COMPARED_STEPS, 0.0)


def test_losses_are_compared_with_the_same_training_alone() -> None:
    run = {"attention": "moba:512:8:3", "parameters": 7, "tokens_per_step": 64, "gpus": 2, "loss": [4.0, 2.0]}
    run["overrides"] = ["parallel.context=2", "moba.comm=pull", "run.seed=1"]
    alone = run | {
        "attention": "moba:512:8",
        "gpus": 1,
        "loss": [4.0, 1.0, 1.0],
        "overrides": ["run.seed=1", "parallel.context=1"],
    }
    others = [{"error": "no memory"}, run | {"parameters": 8}, run | {"attention": "full:1:0"}, run | {"overrides": []}]
    assert training_speed.loss_against(run, others) is None
    found = training_speed.loss_against(run, [*others, alone])
    assert found == {"other_gpus": 1, "steps": 2, "first_loss_difference": 0.0, "largest_loss_difference": 1.0}


def test_what_is_wrong_with_a_run_is_said() -> None:
    right = {"label": "pull", "attention": "moba:512:8", "gpus": 2, "tokens_per_step": 64, "loss": [1.0]}
    assert (
        training_speed.wrong(
            [right, right | {"check": {"output_error": 0.002, "loss_error": 0.0}, "loss_against": None}]
        )
        == []
    )
    assert training_speed.wrong([right | {"check": {"dq_error": 0.2, "dq_rounding_error": 0.002}}]) == []
    (line,) = training_speed.wrong([right | {"check": {"dq_rounding_error": 0.02}}])
    assert "dq_rounding_error is 0.02, the limit 0.00488" in line
    (line,) = training_speed.wrong([right | {"check": {"output_error": 0.1}}, right])
    assert "output_error is 0.1, the limit 0.00781: label pull, attention moba:512:8, gpus 2" in line
    (line,) = training_speed.wrong([right | {"loss_against": {"first_loss_difference": math.nan, "other_gpus": 1}}])
    assert "first_loss_difference is nan" in line
    (line,) = training_speed.wrong([right | {"check_failed": "OutOfMemoryError: 1 GiB"}])
    assert line == "moba:512:8 was not checked: OutOfMemoryError: 1 GiB"
