"""The GPT example under faults: NaN, damaged and partial checkpoints, a full disk, signals, other settings."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from examples.megatron_gpt import checkpoint, checkpoint_files, distributed, run_folder
from examples.megatron_gpt.config import load_config
from examples.megatron_gpt.distributed import TrainingError
from examples.megatron_gpt.model import sizes_record
from examples.megatron_gpt.progress import Reporter
from scripts.harness.training import hosted_store, metrics, torchrun
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.seq_length=192",
    "model.num_layers=1",
    "run.eval_interval=0",
    "run.routing_picture=false",
    "run.global_batch_size=2",
    "run.save_interval=1",
    "run.steps=2",
    "optimizer.warmup_steps=1",
    "run.name=a",
]
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}


def program(folder: Path, *overrides: str) -> list[str]:
    script = [str(ROOT / "examples" / "megatron_gpt" / "train.py"), str(ROOT / "configs" / "quickstart.yaml")]
    return [*script, *SMALL, f"run.directory={folder}", *overrides]


def command(folder: Path, processes: int, *overrides: str) -> list[str]:
    return [*torchrun(processes), *program(folder, *overrides)]


def run(folder: Path, processes: int, *overrides: str, file_bytes: int | None = None) -> tuple[int, str]:
    """Exit status and output of a run; ``file_bytes``: no file may become larger, as on a full disk."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    done = subprocess.run(
        command(folder, processes, *overrides),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=limit,
    )
    return done.returncode, done.stdout + done.stderr


def make(directory: Path, name: str, keep: int = 0) -> None:
    (checkpoint_files.prepare(directory, name) / "weights").write_bytes(b"12345678")
    checkpoint_files.publish(directory, name, keep)


def test_files_fall_back_past_damage_and_name_it(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, f"step_{step}")
    assert checkpoint_files.choose(tmp_path) == (tmp_path / "step_3", [])
    (tmp_path / "step_3" / "weights").write_bytes(b"123")
    path, notes = checkpoint_files.choose(tmp_path)
    assert path == tmp_path / "step_2"
    assert f"{tmp_path / 'step_3'} is damaged (weights has 3 of 8 bytes)" in notes[0]
    assert notes[1] == f"resuming from {path}"

    (tmp_path / "latest").write_text("")
    path, notes = checkpoint_files.choose(tmp_path)
    assert path == tmp_path / "step_2"
    assert notes[0] == f"{tmp_path / 'latest'} is empty"
    for content, what in ((b"\0" * 14, "which is no checkpoint"), (b"\xff\n", "no checkpoint"), (b"..", "names '..'")):
        (tmp_path / "latest").write_bytes(content)
        path, notes = checkpoint_files.choose(tmp_path)
        assert path == tmp_path / "step_2"
        assert what in notes[0]
    (tmp_path / "step_2" / "files.json").write_text("null")
    assert checkpoint_files.choose(tmp_path)[0] == tmp_path / "step_1"
    (tmp_path / "latest").unlink()
    path, notes = checkpoint_files.choose(tmp_path)
    assert path == tmp_path / "step_1"
    assert notes[0] == f"{tmp_path / 'latest'} is missing"
    (tmp_path / "step_1" / "weights").unlink()
    with pytest.raises(ValueError, match=r"is missing.*no whole checkpoint"):
        checkpoint_files.choose(tmp_path)
    (tmp_path / "latest").write_text("")
    with pytest.raises(ValueError, match=r"is empty.*no whole checkpoint"):
        checkpoint_files.choose(tmp_path)
    assert checkpoint_files.choose(tmp_path / "nothing") == (None, [])


def test_files_keep_the_newest_and_remove_unfinished_ones(tmp_path: Path) -> None:
    (tmp_path / "step_9.tmp").mkdir()
    for step in (1, 2, 3, 3):
        make(tmp_path, f"step_{step}", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_2", "step_3"]
    assert checkpoint_files.choose(tmp_path) == (tmp_path / "step_3", [])


def test_checkpoints_of_another_run_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert checkpoint_files.set_aside(folder) is None
    checkpoint_files.check_writable(folder)
    assert checkpoint_files.set_aside(folder) is None  # nothing is in it
    for number in (1, 2):
        make(folder, "step_3")
        assert checkpoint_files.set_aside(folder) == tmp_path / f"checkpoints_before_{number}"
        assert checkpoint_files.choose(folder) == (None, [])
        folder.mkdir()


def test_what_is_no_folder_takes_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match="checkpoints is no folder"):
        checkpoint_files.choose(tmp_path / "checkpoints")
    with pytest.raises(OSError, match="File exists"):
        checkpoint_files.check_writable(tmp_path / "checkpoints")


@pytest.mark.heavy
def test_a_run_from_scratch_is_not_mixed_with_the_one_before(tmp_path: Path) -> None:
    """Nor does it train where it could not save."""
    short = ("run.routing_picture=false",)
    for steps, more in ((3, ()), (2, ("run.resume=false", "model.init_std=0.05"))):
        status, output = run(tmp_path, 2, "parallel.context=2", f"run.steps={steps}", *short, *more)
        assert status == 0, output
    aside = tmp_path / "a" / "checkpoints_before_1"
    assert f"run.resume=false:earliercheckpointsarenowin{aside}" in "".join(output.split())  # lines are cut anywhere
    saved = [len(list((tmp_path / "a" / f).glob("step_*"))) for f in ("checkpoints", aside.name)]
    assert saved == [2, 3]
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] in ("model", "train")] == [0, 1, 2]
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    (tmp_path / "a" / "checkpoints").touch()
    status, output = run(tmp_path, 2, "parallel.context=2", *short)
    assert status
    assert "error: checkpoints cannot be written: [Errno 17] File exists" in output
    assert "step 1" not in output


@pytest.mark.parametrize("override", ["run.keep_checkpoints=-1", "run.timeout_seconds=0"])
def test_settings_that_cannot_work_are_refused(override: str) -> None:
    with pytest.raises(ValueError, match=override.split("=")[0]):
        load_config(ROOT / "configs" / "quickstart.yaml", [override])


@pytest.mark.heavy
def test_text_for_evaluation_fills_a_sequence_only_where_something_reads_it(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):  # one is kept for evaluation
        (texts / f"{number}.txt").write_text("a" * 100)
    paths = f"data.paths=[{texts}]"
    status, output = run(tmp_path, 1, paths, "run.eval_interval=1")
    assert status
    assert "101 tokens of text do not fill a sequence of 192 + 1" in output
    status, output = run(tmp_path, 1, paths)
    assert status == 0, output


@pytest.mark.heavy
def test_a_run_stops_at_nan_on_all_ranks_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    status, output = run(tmp_path, 2, "optimizer.lr=1e30", "optimizer.min_lr=1e30", "run.steps=6")
    assert status
    assert "parallel.context=1: no sequence is sharded, 2 model replicas train data-parallel" in output
    assert "is NaN; training stops, nothing is saved" in output or "parameters are not finite" in output
    assert "Traceback (most recent call last):\n  File" not in output.split("error: ")[0]
    checkpoints = tmp_path / "a" / "checkpoints"
    saved = sorted(p.name for p in checkpoints.glob("*"))
    assert not [name for name in saved if name.endswith(".tmp")]
    steps = [entry["step"] for entry in metrics(tmp_path / "a")]
    assert len(steps) < 6


@pytest.mark.heavy
def test_a_resumed_run_has_the_optimizer_of_its_configuration(tmp_path: Path) -> None:
    constant = "optimizer.decay_style=constant"
    assert run(tmp_path, 1, constant)[0] == 0
    status, output = run(tmp_path, 1, constant, "run.steps=3", "optimizer.lr=5e-3", "optimizer.min_lr=5e-3")
    assert status == 0, output
    assert metrics(tmp_path / "a")[-1]["learning_rate"] == 0.005
    assert "optimizer.lr0.002,now0.005" in "".join(output.split())
    status, output = run(tmp_path, 1, constant, "run.steps=4", "parallel.distributed_optimizer=false")
    assert status
    assert "state of another form: parallel.distributed_optimizer True -> False; choose" in " ".join(output.split())


@pytest.mark.heavy
def test_resuming_with_other_moba_settings_and_from_a_truncated_checkpoint(tmp_path: Path) -> None:
    assert run(tmp_path, 1)[0] == 0
    checkpoints = tmp_path / "a" / "checkpoints"
    (entry,) = metrics(tmp_path / "a", "moba")
    assert (entry["block_size"], entry["topk"], entry["layers"]) == (48, 4, [1])

    status, output = run(tmp_path, 1, "moba.topk=2", "run.steps=3")
    assert status
    assert "moba.topk 4 -> 2; run.allow_moba_change=true resumes all the same" in output

    status, output = run(tmp_path, 1, "model.tie_embeddings=true", "run.steps=3")
    assert status
    assert "holds another model: model.tie_embeddings False -> True; choose another run.name" in output

    largest = max((checkpoints / "step_00000002").iterdir(), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    status, output = run(tmp_path, 1, "moba.topk=2", "run.allow_moba_change=true", "run.steps=3")
    assert status == 0, output
    text = "".join(output.split())  # the console wraps long lines
    assert f"checkpoint{checkpoints / 'step_00000002'}isdamaged({largest.name}has" in text
    assert f"resumingfrom{checkpoints / 'step_00000001'}" in text
    assert "moba.topk4->2" in text
    assert (checkpoints / "latest").read_text() == "step_00000003\n"

    status, output = run(tmp_path, 1, "moba.topk=2", "run.steps=2")
    assert status == 0, output
    assert "run.steps=2 are done: a larger run.steps trains on" in output


def disagreeing_rank(rank: int, size: int) -> str:
    distributed.agree_on({"weather": "sun"})
    with pytest.raises(TrainingError) as error:  # the text is looked at below
        distributed.agree_on({"weather": "sun", "training text": f"{rank} documents"})
    return str(error.value)


def test_ranks_with_other_text_refuse_it_together() -> None:
    text = "ranks have different training text: rank 0 has 0 documents, rank 1 has 1 documents"
    assert run_ranks(2, disagreeing_rank) == [text, text]


def test_ranks_with_other_settings_refuse_them_together(tmp_path: Path) -> None:
    """Hosts that were started with unlike commands. Folders may differ."""
    _store, variables = hosted_store(2, 60)
    began = [
        subprocess.Popen(
            [sys.executable, *program(tmp_path / str(rank), f"run.seed={rank}")],
            env=ENVIRONMENT | variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in began:
        output = process.communicate(timeout=120)[1]
        assert process.returncode == 1, output
        assert "quickstart.yaml: ranks have different run.seed: rank 0 has 0, rank 1 has 1" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.heavy
def test_damaged_bytes_are_called_so(tmp_path: Path) -> None:
    """Files of the right size."""
    assert run(tmp_path, 1)[0] == 0
    saved = tmp_path / "a" / "checkpoints" / "step_00000002"
    for name in ("common.pt", ".metadata"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(b"\xc2" * len(content))
        status, output = run(tmp_path, 1, "run.steps=3")
        assert status
        assert f"checkpoint{saved}isdamaged" in "".join(output.split()), output
        if name == "common.pt":  # of .metadata torch logs a traceback itself
            assert "Traceback (most recent call last):\n  File" not in output.split("error: ")[0]
        (saved / name).write_bytes(content)


@pytest.mark.heavy
def test_a_full_disk_ends_the_run_in_one_line_and_leaves_nothing_partial(tmp_path: Path) -> None:
    status, output = run(tmp_path, 2, "parallel.context=2", file_bytes=200_000)
    assert status
    target = tmp_path / "a" / "checkpoints" / "step_00000001"
    assert f"error: checkpoint {target} could not be written: " in output
    assert not list((tmp_path / "a" / "checkpoints").iterdir())


def test_another_model_is_refused_and_other_lengths_are_noted() -> None:
    saved = sizes_record(load_config(ROOT / "configs" / "quickstart.yaml", []))
    change = ["model.num_layers=3", "data.seq_length=2048", "model.init_std=0.1"]
    wanted = sizes_record(load_config(ROOT / "configs" / "quickstart.yaml", change))
    notes: list[str] = []
    with pytest.raises(TrainingError, match=r"step_2 holds another model: model.num_layers 2 -> 3; choose another"):
        checkpoint._compare_sizes(Path("step_2"), saved, wanted, notes)
    assert not notes
    checkpoint._compare_sizes(Path("step_2"), saved, wanted | {"model.num_layers": 2}, notes)
    assert notes == [
        "step_2 was trained with data.seq_length 1024, now 2048: the text is cut and drawn anew from here on"
    ]
    checkpoint._compare_sizes(Path("step_2"), None, wanted, notes)  # saved before sizes were recorded
    saved.pop("optimizer.lr")  # saved before the optimizer was recorded
    checkpoint._compare_sizes(Path("step_2"), saved, saved | {"optimizer.lr": 1.0}, notes)
    assert len(notes) == 1


def test_metrics_survive_a_line_that_a_killed_run_did_not_finish(tmp_path: Path) -> None:
    whole = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in whole) + '{"kind": "train", "st'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode() + b"\xff\x00")  # of a block that was never written
    with Reporter(tmp_path, True, total_steps=4, first_step=2, tokens_per_step=10) as reporter:
        reporter.step(3, loss=0.5)
    assert [(line["step"], line["loss"]) for line in metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    held = run_folder.lock(tmp_path / "a", 60)
    with pytest.raises(run_folder.FolderInUseError, match=rf"a is in use by another run \(process {os.getpid()} on "):
        run_folder.lock(tmp_path / "a", 60)
    run_folder.unlock(held)
    run_folder.unlock(run_folder.lock(tmp_path / "a", 60))


def test_a_lock_of_another_host_is_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    held = run_folder.lock(tmp_path, 0)
    os.pwrite(held, b"process 7 on elsewhere\n".ljust(200), 0)
    with pytest.raises(run_folder.FolderInUseError, match=r"in use by another run \(process 7 on elsewhere\)"):
        run_folder.lock(tmp_path, 0)
    capfd.readouterr()
    threading.Timer(0.2, run_folder.unlock, [held]).start()
    run_folder.unlock(run_folder.lock(tmp_path, 60))
    assert "is locked by process 7 on elsewhere: waiting up to 60 s" in capfd.readouterr().err
    assert (tmp_path / run_folder.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    page = (ROOT / "docs" / "launching.md").read_text()
    assert f"waits up to {run_folder.OTHER_HOST_SECONDS:.0f} seconds, or half of `run.timeout_seconds`" in page


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # the child only reads and writes pipes
def test_a_lock_ends_with_its_process_though_a_child_outlives_it(tmp_path: Path) -> None:
    (hear, tell), (end, keep) = os.pipe(), os.pipe()
    held = run_folder.lock(tmp_path, 60)
    child = os.fork()
    if not child:
        os.close(keep)
        os.write(tell, b".")
        os.read(end, 1)
        os._exit(0)
    assert os.read(hear, 1) == b"."
    with pytest.raises(run_folder.FolderInUseError):
        run_folder.lock(tmp_path, 60)
    os.close(held)  # as the kernel does where the process is killed
    run_folder._held.discard(held)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child lives"
    run_folder.unlock(run_folder.lock(tmp_path, 60))
    os.close(keep)
    os.waitpid(child, 0)
    for descriptor in (hear, tell, end):
        os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_named_and_other_errors_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_folder.fcntl, "flock", fail)
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(number)):
            run_folder.lock(tmp_path, 60)
        assert not run_folder._held
        return
    run_folder.unlock(run_folder.lock(tmp_path, 60))
    assert "is on a file system without locks" in capfd.readouterr().err


@pytest.mark.heavy
def test_a_folder_that_another_run_holds_or_that_cannot_be_made_ends_all_ranks_in_one_line(tmp_path: Path) -> None:
    held = run_folder.lock(tmp_path / "a", 60)
    status, output = run(tmp_path, 2, "parallel.context=2")
    run_folder.unlock(held)
    assert status
    assert output.count(f"error: {tmp_path / 'a'} is in use by another run (process {os.getpid()} on ") == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["lock"]

    (tmp_path / "file").write_text("")
    status, output = run(tmp_path / "file", 2, "parallel.context=2")
    assert status
    assert output.count("error: run.directory: ") == 1
    assert "Traceback (most recent call last):\n  File" not in output.split("error: ")[0]


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_and_ends_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    line = command(tmp_path, 2, "run.steps=100000", "run.save_interval=0")
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(line, env=ENVIRONMENT, stdout=out, stderr=out) as process:
        deadline = time.monotonic() + 120
        while "step 2 " not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(number)
        process.wait(60)
    output = log.read_text()
    assert "stopped by " in output, output
    latest = (tmp_path / "a" / "checkpoints" / "latest").read_text().strip()
    assert checkpoint_files.choose(tmp_path / "a" / "checkpoints") == (tmp_path / "a" / "checkpoints" / latest, [])


@pytest.mark.heavy
def test_missing_text_and_a_start_without_torchrun_take_one_line(tmp_path: Path) -> None:
    status, output = run(tmp_path, 1, "data.paths=[/nowhere]")
    assert status
    assert "error: data.paths=['/nowhere']: no text found at '/nowhere'\n" in output
    script = command(tmp_path, 1)[command(tmp_path, 1).index("1") + 1 :]
    done = subprocess.run([sys.executable, *script], env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode
    assert "start this with torchrun: torchrun --nproc-per-node" in done.stderr
    assert "Traceback" not in done.stderr
