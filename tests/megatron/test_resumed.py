"""What a resumed run takes up: the schedule by steps, and checkpoints of its own only; and what long layers cannot rotate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams

from examples.megatron_gpt import checkpoint_files
from examples.megatron_gpt.model import resume_schedule
from moba_cp.megatron.rotation import rotation_of


def schedule_of(batch: int) -> OptimizerParamScheduler:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    return OptimizerParamScheduler(
        optimizer, 0.0, 1e-3, 1e-4, 2 * batch, 8 * batch, "cosine", 0.0, 0.0, 8 * batch, "constant"
    )  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [(8, 4), (4, 8), (4, 4)])
def test_learning_rates_go_on_by_steps(before: int, after: int) -> None:
    def rates(batch: int, steps: int, scheduler: OptimizerParamScheduler) -> list[float]:
        found = []
        for _ in range(steps):
            scheduler.step(increment=batch)
            found.append(scheduler.optimizer.param_groups[0]["lr"])
        return found

    whole = rates(before, 8, schedule_of(before))
    resumed = schedule_of(after)
    resumed.num_steps = 4 * before  # as a checkpoint has it
    config = SimpleNamespace(run=SimpleNamespace(global_batch_size=after))
    resume_schedule(SimpleNamespace(scheduler=resumed), config, 4)  # type: ignore[arg-type]
    assert resumed.optimizer.param_groups[0]["lr"] == whole[3]
    assert rates(after, 4, resumed) == whole[4:]


def test_folders_with_names_of_their_own_are_no_checkpoints(tmp_path: Path) -> None:
    own = tmp_path / "step_00000003_best"
    for step in range(1, 5):
        (checkpoint_files.prepare(tmp_path, f"step_{step:08d}") / "weights").write_bytes(b"x")
        checkpoint_files.publish(tmp_path, f"step_{step:08d}", keep=2)
        if step == 3:
            own.mkdir()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000003", own.name, "step_00000004"]
    assert checkpoint_files.choose(tmp_path) == (tmp_path / "step_00000004", [])


@pytest.mark.parametrize("cut", ["zigzag_pack", "contiguous", "contiguous_pack"])
def test_long_layers_refuse_to_rotate_other_cuts(cut: str) -> None:
    two = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    lengths = torch.tensor([0, 8, 32], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=lengths, cu_seqlens_kv=lengths)
    angles = torch.zeros(32, 1, 1, 8)
    with pytest.raises(ValueError, match=f"each sequence is cut zigzag, got packed_partition='{cut}'"):
        rotation_of(angles, packed, 1, two, torch.float32, cut)  # type: ignore[arg-type]
    assert rotation_of(angles, packed, 1, two, torch.float32, "zigzag") is not None  # type: ignore[arg-type]
    assert rotation_of(None, packed, 1, two, torch.float32, cut) is None  # type: ignore[arg-type]
