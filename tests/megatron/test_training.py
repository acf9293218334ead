"""The GPT example from the command line: losses do not depend on the context-parallel size, and resuming is exact."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("megatron.core")

from examples.megatron_gpt import progress
from examples.megatron_gpt.progress import Reporter
from scripts.harness.training import hosted_store, metrics

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SMALL = ["data.seq_length=192", "run.steps=4", "run.eval_interval=4", "run.eval_batches=1", "optimizer.warmup_steps=1"]
SMALL += [f"data.paths=[{ROOT}/examples]"]  # the default, the standard library, takes seconds to list


def main_on_rank(rank: int, variables: dict[str, str], directory: str, overrides: list[str]) -> None:
    """The script in a process that has it imported, started as torchrun would."""
    from examples.megatron_gpt import train

    os.chdir(directory)
    torch.set_num_threads(1)
    os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    with open(Path(directory) / f"printed{rank}", "w") as printed, redirect_stdout(printed):
        train.main(QUICKSTART, [*SMALL, f"run.directory={directory}", *overrides])


def by_ranks(directory: Path, processes: int, *overrides: str) -> str:
    """Run the script over ``processes`` processes on CPU, as torchrun would; what it printed."""
    store, variables = hosted_store(processes, 240.0)  # noqa: RUF059 # lives while its name does
    arguments = (variables, str(directory), list(overrides))
    torch.multiprocessing.start_processes(main_on_rank, arguments, nprocs=processes, start_method="forkserver")
    return "".join((directory / f"printed{rank}").read_text() for rank in range(processes))


def by_a_program(directory: Path, *overrides: str) -> None:
    """The same as a program of its own, to its very end, on one process."""
    store, variables = hosted_store(1, 240.0)  # noqa: RUF059 # lives while its name does
    environment = (
        os.environ | variables | {"RANK": "0", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    )
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples" / "megatron_gpt" / "train.py"), str(QUICKSTART), *SMALL]
    command += [f"run.directory={directory}", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_losses_do_not_depend_on_context_parallelism_and_resuming_is_exact(tmp_path: Path) -> None:
    by_ranks(tmp_path, 2, "run.name=a", "parallel.context=2", "run.save_interval=2", "run.routing_interval=2")
    run = tmp_path / "a"
    through = metrics(run)
    assert [entry["step"] for entry in through] == [1, 2, 3, 4]
    assert all(entry["tflops_per_device"] > 0 for entry in through)
    assert [(entry["step"], entry["layer"]) for entry in metrics(run, "routing")] == [
        (2, 1),
        (2, 2),
        (4, 1),
        (4, 2),
    ]
    assert (run / "routing.png").stat().st_size > 10_000
    assert list((run / "tensorboard").iterdir())

    # The same sizes: the same bits.
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    assert "resumed after step 2" in by_ranks(tmp_path, 2, "run.name=a", "parallel.context=2")
    resumed = metrics(run)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [entry[name] for entry in resumed] == [entry[name] for entry in through]

    # One process instead of two, from the same checkpoint: equal to rounding.
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    by_a_program(tmp_path, "run.name=a", "parallel.context=1", "run.routing_picture=false", "run.save_last=false")
    unsharded = metrics(run)
    assert len(unsharded) == 4
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(unsharded, through, strict=True)) < 1e-5
    assert max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(unsharded, through, strict=True)) < 1e-4


def test_mistakes_end_the_run_with_their_names() -> None:
    main = runpy.run_path(str(ROOT / "examples" / "megatron_gpt" / "train.py"))["main"]
    with pytest.raises(SystemExit, match=r"quickstart.yaml: Key 'colour' not in 'RunConfig'"):
        main(ROOT / "configs" / "quickstart.yaml", ["run.colour=red"])
    with pytest.raises(SystemExit, match=r"No such file.*nowhere.yaml"):
        main(ROOT / "configs" / "nowhere.yaml")


def test_mfu_is_the_share_of_the_peak_and_leaves_pauses_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now))
    with Reporter(tmp_path, True, total_steps=2, first_step=0, tokens_per_step=10, devices=4, peak=1e12) as reporter:
        now += 3.0
        reporter.step(1, loss=1.0)
        with reporter.pause():
            now += 1.0
        now += 0.5
        reporter.step(2, flops=4e9, peak_memory=3 << 29, loss=1.0)
    without, with_flops = metrics(tmp_path)
    assert "tflops_per_device" not in without
    assert "peak_memory_gib" not in without
    assert with_flops["peak_memory_gib"] == 1.5
    assert with_flops["mfu"] == pytest.approx(with_flops["tflops_per_device"])
    seconds = 10 / with_flops["tokens_per_second"]
    assert seconds == pytest.approx(0.5)
    assert with_flops["tflops_per_device"] == pytest.approx(1e-3 / seconds)
