"""Training configurations: every file of the repository loads, and mistakes are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.core")

from examples.megatron_gpt.config import load_config
from examples.megatron_gpt.data import PADDED_VOCAB_SIZE
from moba_cp import MoBAConfig
from moba_cp.megatron.flops import step_flops

CONFIGS = Path(__file__).parents[2] / "configs"
TRAINING = sorted(p for p in CONFIGS.glob("*.yaml") if "\nrun:" in p.read_text())
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.stem)
def test_every_training_file_loads(path: Path) -> None:
    load_config(path, [])


def test_quickstart_cuts_blocks_at_rank_boundaries() -> None:
    config = load_config(QUICKSTART, ["parallel.context=2"])
    assert config.data.seq_length // 4 % config.moba.block_size
    assert config.model.num_query_groups < config.model.num_attention_heads


def test_the_300m_model_is_that_large() -> None:
    config = load_config(CONFIGS / "gpt_300m_128k.yaml", [])
    sizes = SimpleNamespace(**vars(config.model), gated_linear_unit=config.model.swiglu)
    moba = MoBAConfig(config.moba.block_size, config.moba.topk)
    tokens = config.data.seq_length
    flops = step_flops(sizes, moba, [tokens], PADDED_VOCAB_SIZE)
    weights = (flops.linear + flops.logits) // (6 * tokens)  # without the embedding and the norms
    assert weights == 327_548_928


def test_an_odd_length_is_for_one_rank() -> None:
    assert load_config(QUICKSTART, ["data.seq_length=1023"]).data.seq_length == 1023


def test_overrides_change_single_keys() -> None:
    config = load_config(QUICKSTART, ["run.steps=7", "data.paths=[a.txt]", "run.name=x", "run.directory=/y"])
    assert (config.run.steps, config.data.paths, str(config.run_directory)) == (7, ["a.txt"], "/y/x")


@pytest.mark.parametrize("name", ["off", "3e-4", "[1", "'a'", "null", "${nope}"])
def test_text_is_taken_as_it_is(name: str) -> None:
    assert load_config(QUICKSTART, [f"run.name={name}", "run.directory=/y"]).run_directory == Path("/y") / name


def test_a_run_directory_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    assert load_config(QUICKSTART, ["run.directory=~/runs", "run.name=x"]).run_directory == Path("/home/a/runs/x")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("run: {steps: 1}\nrun: {steps: 2}", "not YAML: .*duplicate key run"),
        ("model: {num_layers: 2", "not YAML: "),
        ("- a", "expected sections model, moba, .* got a list"),
        ("run: {name: off}", "run.name is text, and YAML reads it as False: put it in quotes"),
        ("run: {directory: 1e3}", "run.directory is text, and YAML reads it as 1000.0"),
        ("run:\n  steps: ???", "no value is given for run.steps"),
        ("model: 3", "model must be a section of keys, got 3"),
        ("run:", "run must be a section of keys, got None"),
        (
            "model: {num_layers: two}",
            r"^Value 'two' of type 'str' could not be converted to Integer \(model.num_layers\)$",
        ),
    ],
)
def test_files_that_are_no_configuration_are_refused(text: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        load_config(path, [])


@pytest.mark.parametrize(
    "override", ["run.stepps=3", "modell.num_layers=2", "run.steps=many", "run.resume=perhaps", "run=3"]
)
def test_unknown_keys_and_wrong_types_are_refused(override: str) -> None:
    with pytest.raises(
        ValueError, match=r" \((run\.stepps|modell|run\.steps|run\.resume)\)$|^run must be a section of keys, got 3"
    ):
        load_config(QUICKSTART, [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.steps"], "section.key=value, got 'run.steps'"),
        (["moba.layer_pattern.0=1"], "incompatible container types|Cannot merge DictConfig with ListConfig"),
        (["run.directory=~nobody_here/x"], "run.directory='~nobody_here/x': Could not determine home directory"),
        (["moba.layer_pattern=[1,0"], "'moba.layer_pattern=\\[1,0' is not YAML behind the equals sign"),
        (["moba.workspace_gib=1e300"], "moba.workspace_gib must be at most 1048576, got 1e\\+300"),
        (["optimizer.eps=0"], "optimizer.eps=0 divides"),
        (["optimizer.lr=1e300"], r"optimizer.lr must be at most 3e\+38, got 1e\+300"),
        (["model.rotary_base=10000000000000000000000"], r"model.rotary_base must be at most 9.22337e\+18"),
        (["run.resume=2"], "run.resume must be true or false, got 2"),
        (["data.paths=x"], r"data.paths must be a list, such as \[x\], got 'x'"),
        (["run.precision=fp16"], "run.precision must be one of.*'fp16'"),
        (["run.routing_interval=-1"], "run.routing_interval must not be negative .0: never., got -1"),
        (["moba.comm=pul"], "moba.comm must be one of.*'auto'.*got 'pul'"),
        (["moba.topk=0"], "moba.topk must be at least 1, got 0"),
        (
            ["data.seq_length=1026", "parallel.context=2"],
            "seq_length=1026 must be a multiple of 2 . parallel.context=4",
        ),
        (["model.num_query_groups=3"], "num_attention_heads=4 must be a multiple of model.num_query_groups=3"),
        (["data.eval_fraction=1"], "eval_fraction must be at least 0 and less than 1, got 1.0"),
        (["data.eval_fraction=-0.1"], "eval_fraction must be at least 0 and less than 1, got -0.1"),
        (["data.eval_fraction=nan"], "eval_fraction must be at least 0 and less than 1, got nan"),
        (
            ["data.eval_fraction=0", "run.routing_interval=0"],
            "no documents to evaluate: set run.eval_interval=.*, run.routing_picture=True to 0 or false",
        ),
        (["parallel.sequence=true"], "needs parallel.tensor > 1"),
        (
            ["parallel.sequence=true", "parallel.tensor=4", "parallel.context=3", "data.seq_length=1026"],
            "data.seq_length=1026 must be a multiple of parallel.context . tensor=12",
        ),
        (["parallel.virtual_pipeline=2"], "parallel.virtual_pipeline=2 needs parallel.pipeline > 1"),
        (
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
            "model.num_layers=2 must be a multiple of parallel.pipeline . virtual_pipeline=4",
        ),
        (["moba.block_size=1" + 24 * "0"], "moba.block_size must be at most 4611686018427387904, got 1" + 24 * "0"),
        (["run.name="], "run.name must be a folder in run.directory, got ''"),
        (["run.name=../x"], "run.name must be a folder in run.directory, got '../x'"),
        (["run.token_parts=0"], "run.token_parts must be at least 1, got 0"),
        (
            ["run.token_parts=5", "data.seq_length=192"],
            r"data.seq_length=192 must be a multiple of 2 \* run.token_parts=10",
        ),
        (["run.token_parts=2", "parallel.context=2"], "token_parts=2 imitates parallel.context"),
        (["run.steps=3"], "warmup_steps=5 must be below run.steps=3"),
        (["optimizer.warmup_steps=-1"], "warmup_steps=-1 must be below .* and not negative"),
        (["data.seq_length=0"], "data.seq_length must be at least 1, got 0"),
        (["data.seq_length=-1024"], "data.seq_length must be at least 1, got -1024"),
        (["run.eval_batches=0"], "run.eval_batches must be at least 1, got 0"),
        (["run.seed=-1"], "run.seed must be from 0 .* got -1"),
        (["run.seed=99999999999999999999"], "run.seed must be .* got 99999999999999999999"),
        (["run.timeout_seconds=inf"], "run.timeout_seconds must be positive and at most .* got inf"),
        (["optimizer.lr=nan"], "optimizer.lr must be positive and finite, got nan"),
        (["optimizer.lr=-1"], "optimizer.lr must be positive and finite, got -1"),
        (["optimizer.min_lr=1"], "optimizer.min_lr must be from 0 to optimizer.lr=0.002, got 1"),
        (["optimizer.beta1=1.5"], "optimizer.beta1 must be at least 0 and below 1, got 1.5"),
        (["optimizer.eps=-1"], "optimizer.eps must be finite and not negative, got -1"),
        (["optimizer.clip_grad=-1"], "optimizer.clip_grad must be finite and not negative, got -1"),
        (["optimizer.decay_style=sine"], "optimizer.decay_style must be one of .*'cosine'.* got 'sine'"),
        (["model.init_std=nan"], "model.init_std must be finite and not negative, got nan"),
        (["model.hidden_size=12"], "hidden_size=12 over model.num_attention_heads=4 gives heads of 3"),
        (
            ["model.ffn_hidden_size=63", "parallel.tensor=2"],
            "ffn_hidden_size=63 must be a multiple of parallel.tensor=2",
        ),
        (["moba.layer_pattern=[1]"], r"layer_pattern must have .* model.num_layers=2, got \[1\]"),
        (["moba.layer_pattern=[1,2]"], r"layer_pattern must have a 1 .MoBA. or a 0 .* got \[1, 2\]"),
        (["moba.layer_pattern=[1,0]", "moba.full_last_layers=1"], "exclude each other"),
        (["moba.full_last_layers=3"], "full_last_layers must be from 0 to model.num_layers=2, got 3"),
        (["moba.full_last_layers=-1"], "full_last_layers must be from 0 to model.num_layers=2, got -1"),
        (["moba.head_parallel=3", "parallel.context=2"], "head_parallel must divide the 2 ranks of the layout, got 3"),
        (["moba.comm=ring", "moba.head_parallel=2", "parallel.context=2"], "comm='ring' does not split heads"),
        (["moba.workspace_gib=-1"], "moba.workspace_gib must not be negative .* got -1"),
        (["moba.workspace_gib=nan"], "moba.workspace_gib must not be negative .* got nan"),
        (["moba.comm=a2a", "moba.head_parallel=1", "parallel.context=2"], "comm='a2a' splits heads over all 2 ranks"),
        (
            ["moba.comm=a2a", "parallel.context=2", "parallel.tensor=4", "model.num_query_groups=4"],
            "q heads that 2 divides, got 1",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(QUICKSTART, overrides)
