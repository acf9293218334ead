"""MoBA's flags, and starting a Megatron script with them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.extensions.transformer_engine import HAVE_TE

import moba_cp.megatron.cpu as cpu
import moba_cp.megatron.pretrain as pretrain
from moba_cp import MoBAConfig
from moba_cp.megatron import MoBACoreAttention, MoBASettings, TorchNorm
from moba_cp.megatron.arguments import add_moba_arguments, layer_spec_from_arguments, settings_from_arguments
from moba_cp.megatron.launch import run_script
from moba_cp.megatron.spec import SpecBuilder


def parse(*flags: str, **megatron: Any) -> argparse.Namespace:
    arguments = add_moba_arguments(argparse.ArgumentParser()).parse_args(flags)
    vars(arguments).update(megatron)
    return arguments


def test_flags_become_settings() -> None:
    flags = "--moba-block-size 64 --moba-topk 3 --moba-comm fetch --moba-full-attention-last-n-layers 2"
    flags += " --moba-full-attention-comm ring"
    assert settings_from_arguments(parse(*flags.split())) == {
        "moba_config": MoBAConfig(64, 3),
        "comm": "fetch",
        "partition": "zigzag",
        "full_attention_last_n_layers": 2,
        "layer_pattern": None,
        "full_attention_comm": "ring",
        "full_attention_backend": "torch",
    }
    assert settings_from_arguments(parse("--moba-workspace-gib", "0.5"))["workspace_bytes"] == 1 << 29
    assert settings_from_arguments(parse("--moba-exchange-gib", "0"))["exchange_bytes"] == 0
    with_te = settings_from_arguments(parse("--moba-full-attention-backend", "te"))
    assert (with_te["full_attention_comm"], with_te["full_attention_backend"]) == ("auto", "te")


@pytest.mark.parametrize("size", ["0", "-1", "inf", "nan"])
def test_a_workspace_that_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"--moba-workspace-gib must be above 0, got {float(size)}"):
        settings_from_arguments(parse("--moba-workspace-gib", size))


@pytest.mark.parametrize("size", ["-1", "inf", "nan"])
def test_an_exchange_that_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match=f"--moba-exchange-gib must not be negative, got {float(size)}"):
        settings_from_arguments(parse("--moba-exchange-gib", size))


@pytest.mark.parametrize(
    ("frequency", "pattern"), [("1", (1, 1, 1, 1)), ("2", (0, 1, 0, 1)), ("([1]*1+[0])*2", (1, 0, 1, 0))]
)
def test_layers_by_number_or_list(frequency: str, pattern: tuple[int, ...]) -> None:
    arguments = parse("--moba-layer-freq", frequency, num_layers=4)
    assert settings_from_arguments(arguments)["layer_pattern"] == pattern


def test_a_frequency_that_leaves_no_moba_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="--moba-layer-freq 5 leaves none of the 4 layers to MoBA"):
        settings_from_arguments(parse("--moba-layer-freq", "5", num_layers=4))


@pytest.mark.parametrize("frequency", ["0", "[2]", "[1]*", "[1][5]", "exit()", "(1)", ""])
def test_other_layer_frequencies_are_refused(frequency: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--moba-layer-freq", frequency)
    assert f"got {frequency!r}" in capsys.readouterr().err


def test_the_spec_follows_megatrons_flags() -> None:
    layer = layer_spec_from_arguments(parse("--moba-block-size", "64", normalization="RMSNorm", qk_layernorm=True))
    attention = layer.submodules.self_attention.submodules
    assert attention.core_attention.module is MoBACoreAttention
    assert attention.core_attention.params["settings"] == MoBASettings(MoBAConfig(64, 8))
    assert layer.submodules.input_layernorm is TorchNorm
    assert "Norm" in attention.q_layernorm.__name__


def test_parts_it_cannot_build_are_refused() -> None:
    with pytest.raises(ValueError, match="--num-experts 8.*with_moba"):
        layer_spec_from_arguments(parse(num_experts=8))
    with pytest.raises(ValueError, match="--transformer-impl inference_optimized"):
        layer_spec_from_arguments(parse(transformer_impl="inference_optimized"))


def test_a_script_runs_as_if_started_itself_and_finds_the_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour.py").write_text("FOUND = True\n")
    script = tmp_path / "pretrain_any.py"
    script.write_text(
        "import sys, neighbour\n"
        "assert __name__ == '__main__'\n"
        "place = sys.argv.index('--spec')\n"
        "module, name = sys.argv[place + 1 : place + 3]\n"
        "sys.seen = sys.argv, vars(sys.modules[module])[name]\n"
    )
    monkeypatch.setattr(sys, "argv", ["unused"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    pretrain.main([str(script), "--transformer-impl", "local", "--moba-topk", "5", "--num-layers", "2", "--bf16"])
    argv, spec = sys.seen  # type: ignore[attr-defined]
    expected = [str(script), "--transformer-impl", "local", "--num-layers", "2", "--bf16"]
    assert argv == [*expected, "--spec", "moba_cp.megatron.pretrain", "layer_spec"]
    if isinstance(spec, SpecBuilder):  # what scripts of newer versions take
        assert spec.settings.moba.topk == 5
    else:
        assert spec.submodules.self_attention.submodules.core_attention.params["settings"].moba.topk == 5


class Stock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.core_attention = torch.nn.Identity()


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), Stock()], ids=["no attention", "stock attention"])
def test_a_script_that_ignores_the_spec_is_stopped(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pretrain_t5.py`` and ``--use-legacy-models`` do: they would train with stock attention."""
    training = types.ModuleType("megatron.training.training")
    training.get_model = lambda: [torch.nn.Sequential(model)]  # type: ignore[attr-defined]
    package = types.ModuleType("megatron.training")
    package.training = training  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training", package)
    monkeypatch.setitem(sys.modules, "megatron.training.training", training)
    monkeypatch.setattr(sys, "argv", ["unused"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = tmp_path / "pretrain_other.py"
    script.write_text("from megatron.training.training import get_model\nget_model()\n")
    with pytest.raises(ValueError, match=r"pretrain_other.py built a model without MoBA: it ignores --spec"):
        pretrain.main([str(script), "--transformer-impl", "local", "--num-layers", "2"])


def test_a_script_with_another_megatron_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "megatron" / "core").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=rf"is in use: put {tmp_path} first on PYTHONPATH"):
        run_script(str(tmp_path / "pretrain_any.py"), [])


def test_what_a_script_lacks_is_said_before_anything_is_prepared(tmp_path: Path) -> None:
    script = tmp_path / "pretrain_any.py"
    for main in (pretrain.main, cpu.main):
        with pytest.raises(SystemExit, match=rf"{script} is no file: give the path of Megatron-LM's pretrain_gpt.py"):
            main([str(script)])


@pytest.mark.skipif(importlib.util.find_spec("megatron.training") is not None, reason="Megatron-LM is here")
def test_megatron_core_alone_is_named(tmp_path: Path) -> None:
    script = tmp_path / "pretrain_any.py"
    script.touch()
    for main, flags in ((pretrain.main, ["--moba-cpu"]), (cpu.main, [])):
        with pytest.raises(SystemExit, match="put the folder of Megatron-LM first on PYTHONPATH"):
            main([str(script), *flags])


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is here")
def test_a_missing_transformer_engine_is_named() -> None:
    with pytest.raises(
        ImportError, match=r"pip install 'transformer_engine\[pytorch\]', or set --transformer-impl local"
    ):
        layer_spec_from_arguments(parse(transformer_impl="transformer_engine"))


def test_a_second_spec_is_refused() -> None:
    with pytest.raises(ValueError, match="--spec is what this script sets"):
        pretrain.split(["x.py", "--spec", "a", "b"])
    with pytest.raises(ValueError, match="leave --spec out"):
        pretrain.split(["x.py", "--spec=a"])
