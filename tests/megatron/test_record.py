"""MoBA's settings among Megatron's arguments, and a checkpoint that was trained with others."""

from __future__ import annotations

import sys
import warnings
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("megatron.core")

from moba_cp import MoBAConfig
from moba_cp.megatron import MoBASettings, record
from tests.megatron.test_core_attention import MOBA, build


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """Arguments of a program on ``megatron.training``, where that keeps them."""
    module = ModuleType("megatron.training.global_vars")
    module._GLOBAL_ARGS = Namespace(num_layers=2, load=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module._GLOBAL_ARGS  # type: ignore[attr-defined]


def test_layers_record_their_settings(arguments: Namespace) -> None:
    settings = MoBASettings(MOBA, comm="ring", full_attention_last_n_layers=1, packed_partition="zigzag")
    for number in (1, 2):
        build(settings=settings, layer_number=number, softmax_scale=0.25)
    assert {name: value for name, value in vars(arguments).items() if name.startswith("moba_")} == {
        "moba_block_size": 5,
        "moba_topk": 3,
        "moba_softmax_scale": 0.25,
        "moba_comm": "ring",
        "moba_partition": "zigzag",
        "moba_packed_partition": "zigzag",
        "moba_full_attention_comm": "auto",
        "moba_full_attention_backend": "torch",
        "moba_layers": [1, 0],
    }


def test_different_settings_are_all_recorded(arguments: Namespace) -> None:
    for number, block_size in ((1, 8), (2, 16), (2, 8)):
        build(settings=MoBASettings(MoBAConfig(block_size, 3)), layer_number=number)
    assert (arguments.moba_block_size, arguments.moba_topk) == ([8, 16], 3)


def test_the_flags_of_the_script_are_seen_by_the_layers(arguments: Namespace) -> None:
    arguments.context_parallel_size, arguments.reset_attention_mask = 1, True
    with pytest.raises(ValueError, match="--reset-attention-mask"):
        build()
    arguments.reset_attention_mask, arguments.sft = False, True
    assert build().packed_partition == "zigzag"
    assert build(settings=MoBASettings(MOBA, packed_partition="zigzag_pack")).packed_partition == "zigzag_pack"


def checkpoint(folder: Path, name: str, trained_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).mkdir()
    (folder / name / "metadata.json").write_text("{}")
    tracker = name.removeprefix("iter_").lstrip("0")
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker + "\n")
    states = {str(folder / name): {"args": trained_with}}
    monkeypatch.setattr(record, "load_common_state_dict", states.__getitem__)


@pytest.mark.parametrize("name", ["iter_0000120", "release"])
def test_a_checkpoint_with_other_settings_is_warned_of(
    name: str, arguments: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments.load = str(tmp_path)
    trained_with = Namespace(moba_block_size=4, moba_topk=3, moba_softmax_scale=None, moba_layers=[1, 1], moba_comm="x")
    checkpoint(tmp_path, name, trained_with, monkeypatch)
    with pytest.warns(
        UserWarning, match=r"other MoBA settings: moba_block_size 4 -> 5, moba_layers \[1, 1\] -> \[1, 0\]$"
    ):
        build(settings=MoBASettings(MOBA, full_attention_last_n_layers=1))
    with warnings.catch_warnings():  # once, not per layer
        warnings.filterwarnings("error", message="the checkpoint")
        build(settings=MoBASettings(MOBA, full_attention_last_n_layers=1), layer_number=2)


@pytest.mark.parametrize("trained_with", [Namespace(), Namespace(moba_block_size=5, moba_topk=3), None])
def test_the_same_settings_and_dense_checkpoints_are_fine(
    trained_with: Any, arguments: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments.load = str(tmp_path)
    checkpoint(tmp_path, "iter_0000007", trained_with, monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the checkpoint")
        build()


def test_no_checkpoint_is_looked_for_where_there_is_none(arguments: Namespace, tmp_path: Path) -> None:
    arguments.load = str(tmp_path)
    assert record._checkpoint_arguments(arguments) is None
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert record._checkpoint_arguments(arguments) is None
    arguments.ckpt_step = 12
    assert record._checkpoint_folder(arguments) == tmp_path / "iter_0000012"
