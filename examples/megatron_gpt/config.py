"""Configuration of a training run: one dataclass per section of a YAML file, checked before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moba_cp.config import MoBAConfig
from moba_cp.parallel.splits import COMMS, check_split

DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root")
"""Megatron's schedules of the learning rate that need nothing but what `OptimizerSection` has."""
LONGEST_TIMEOUT = 1e9
"""Seconds, 32 years. Beyond, Python's time differences overflow."""
LARGEST_INTEGER, LARGEST_NUMBER = (1 << 63) - 1, 3e38
"""Of 64 bits, and of fp32: beyond, tensors cannot hold a value."""
MOST_WORKSPACE_GIB = 1 << 20
"""A thousand times the memory of any GPU."""


@dataclass
class ModelConfig:
    """Size and shape of the GPT."""

    num_layers: int = 4
    hidden_size: int = 128
    num_attention_heads: int = 4
    num_query_groups: int = 2  # kv heads
    ffn_hidden_size: int = 352
    normalization: str = "RMSNorm"  # or LayerNorm
    swiglu: bool = True
    rotary_base: int = 10000
    init_std: float = 0.02
    tie_embeddings: bool = False


@dataclass
class MoBASection:
    """Attention of the layers, and which of them compute full causal attention instead."""

    block_size: int = 48
    topk: int = 3  # the query's own block counts
    comm: str = "auto"  # as `comm=` of moba_cp.moba_attention
    head_parallel: int = 0  # context-parallel ranks that split heads, with a2a and auto; 0: comm decides
    workspace_gib: float = 0.0  # memory for partial results of a layer; 0: the library's default
    full_last_layers: int = 0  # this many layers at the end: full causal attention
    layer_pattern: list[int] = field(default_factory=list)  # or one entry a layer: 1 MoBA, 0 full
    fraction: float = 1.0  # of the steps with MoBA; the rest of the run computes full attention in every layer

    @property
    def workspace_bytes(self) -> int | None:
        """`workspace_bytes` of the layers; None: the library's default."""
        return math.ceil(self.workspace_gib * 2**30) or None


@dataclass
class DataConfig:
    """Text to train on: every file is read as bytes, whatever is in it."""

    paths: list[str] = field(default_factory=list)  # files, folders or globs; empty: the Python standard library
    seq_length: int = 1024
    separate_documents: bool = False  # no attention from one document into another (packed sequences)
    eval_fraction: float = 0.02  # share of the documents kept for evaluation; 0: none


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups; what is left of the processes is data parallel."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks a stage (interleaved schedule), needs pipeline > 1; 1: off
    sequence: bool = False  # Megatron's sequence parallelism, needs tensor > 1
    distributed_optimizer: bool = True  # optimizer state sharded over data- and context-parallel ranks

    @property
    def model_chunks(self) -> int | None:
        """Model chunks a stage as Megatron takes them: None without virtual pipeline."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None


@dataclass
class OptimizerSection:
    """Adam with Megatron's schedules."""

    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 10
    decay_style: str = "cosine"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class RunConfig:
    """How long, how precisely and where."""

    name: str = "run"
    directory: str = "runs"  # everything the run writes goes to <directory>/<name>
    steps: int = 100
    micro_batch_size: int = 1
    global_batch_size: int = 1
    precision: str = "fp32"  # or bf16
    recompute: str = "none"  # or all_but_attention, selective (attention only), full
    layers: str = "auto"  # long (moba_cp.megatron.layer), megatron, or auto: long where it can be used
    chunk_tokens: int = 0  # long layers: sequence positions that the MLP works on at a time; 0: all at once
    offload_inputs: bool = False  # with recompute=all_but_attention: inputs of layers in host memory until backward
    loss_chunk: int = 0  # sequence positions for which logits exist at a time; 0: all
    cuda_graphs: bool = False  # one process on a GPU: passes over a micro-batch as one CUDA graph (see graphs.py)
    token_parts: int = 1  # more: weight gradients are rounded as with parallel.context of this (see parts.py)
    device: str = "auto"  # auto: GPUs if there are any; or cpu, cuda
    seed: int = 1234
    log_interval: int = 1
    eval_interval: int = 50  # 0: never
    eval_batches: int = 4  # global batches per evaluation
    routing_interval: int = 0  # steps between routing statistics of every layer in TensorBoard; 0: never
    save_interval: int = 0  # 0: only at the end
    save_last: bool = True
    keep_checkpoints: int = 0  # newest ones that are kept; 0: all
    routing_picture: bool = True  # at the end: which blocks the last layer's queries select, as a heatmap
    resume: bool = True  # from the newest checkpoint of this run, if there is one
    allow_moba_change: bool = False  # resume although the checkpoint has other blocks, topk or MoBA layers
    check_memory: bool = True  # refuse a run whose estimated peak is far above the GPU's memory
    timeout_seconds: float = 600.0  # how long a collective waits for the other ranks before the run fails


@dataclass
class TrainConfig:
    """A whole training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moba: MoBASection = field(default_factory=MoBASection)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def run_directory(self) -> Path:
        """Folder that receives checkpoints, metrics and TensorBoard files."""
        return Path(self.run.directory).expanduser() / self.run.name


def load_config(path: str | Path, overrides: list[str]) -> TrainConfig:
    """Read a YAML file, apply ``section.key=value`` overrides, and check the result.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no YAML, or not of sections; an unknown key, a value of the wrong type; text that YAML reads as something
            else; values that cannot work, or do not fit together.
    """
    structure = OmegaConf.structured(TrainConfig)
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"expected sections {', '.join(structure)}, got a list")
    given = [content, *(_override(structure, text) for text in overrides)]
    try:
        for part in given:
            _check_kinds(structure, part)
        config = OmegaConf.to_object(OmegaConf.merge(structure, *given))
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping in place of a list
        what, where = str(error).splitlines()[0], getattr(error, "full_key", None)
        raise ValueError(f"{what} ({where})" if where else what) from None
    assert isinstance(config, TrainConfig)
    _check(config)
    return config


def _override(structure: DictConfig, text: str) -> DictConfig:
    """One ``section.key=value``. Text is taken as it is: YAML would read a run's name ``3e-4`` as a number."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected section.key=value, got {text!r}")
    section, _, name = key.partition(".")
    if _is_text(structure, section, name):
        return OmegaConf.create({section: {name: value.replace("${", r"\${")}})
    try:
        return OmegaConf.from_dotlist([text])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{text!r} is not YAML behind the equals sign: {' '.join(str(error).split())}") from None


def _check_kinds(structure: DictConfig, given: DictConfig) -> None:
    """Refuse what OmegaConf takes for something else, or refuses in words of its own: no section, a missing value, text that YAML
    reads as a number, a number as a switch, a single value as a list."""
    if missing := OmegaConf.missing_keys(given):
        raise ValueError(f"no value is given for {', '.join(sorted(missing))}: ??? stands for a missing one")
    for section, values in given.items():
        if section not in structure:
            continue  # refused when they are merged
        if not isinstance(values, DictConfig):
            raise ValueError(f"{section!s} must be a section of keys, got {values!r}")
        for key, value in values.items():
            default = structure[section].get(key)
            if isinstance(default, str) and not isinstance(value, str):
                raise ValueError(f"{section!s}.{key!s} is text, and YAML reads it as {value!r}: put it in quotes")
            if isinstance(default, bool) and isinstance(value, (int, float)) and not isinstance(value, bool):
                raise ValueError(f"{section!s}.{key!s} must be true or false, got {value!r}")
            if isinstance(default, ListConfig) and isinstance(value, (str, int, float)):
                raise ValueError(f"{section!s}.{key!s} must be a list, such as [{value!s}], got {value!r}")


def _is_text(structure: DictConfig, section: Any, key: Any) -> bool:
    """Whether the configuration has text there; its defaults say so."""
    return section in structure and key in structure[section] and isinstance(structure[section][key], str)


def _check(config: TrainConfig) -> None:
    model, data, parallel, run = config.model, config.data, config.parallel, config.run
    _choose("model.normalization", model.normalization, ("RMSNorm", "LayerNorm"))
    _choose("moba.comm", config.moba.comm, COMMS)
    _choose("run.precision", run.precision, ("fp32", "bf16"))
    _choose("run.recompute", run.recompute, ("none", "all_but_attention", "selective", "full"))
    _choose("run.layers", run.layers, ("auto", "long", "megatron"))
    _choose("run.device", run.device, ("auto", "cpu", "cuda"))
    for section, values in (("model", model), ("moba", config.moba), ("parallel", parallel)):
        for name, value in vars(values).items():
            if (
                name not in ("full_last_layers", "head_parallel")
                and isinstance(value, int)
                and not isinstance(value, bool)
                and value < 1
            ):
                raise ValueError(f"{section}.{name} must be at least 1, got {value}")
    if config.moba.head_parallel < 0:
        raise ValueError(f"moba.head_parallel must not be negative (0: comm decides), got {config.moba.head_parallel}")
    if not 0 <= config.moba.workspace_gib < math.inf:
        raise ValueError(f"moba.workspace_gib must not be negative (0: the default), got {config.moba.workspace_gib}")
    if config.moba.workspace_gib > MOST_WORKSPACE_GIB:
        raise ValueError(f"moba.workspace_gib must be at most {MOST_WORKSPACE_GIB}, got {config.moba.workspace_gib}")
    if not 0 <= config.moba.fraction <= 1:
        raise ValueError(f"moba.fraction must be between 0 and 1, got {config.moba.fraction}")
    folder = Path(run.name)
    if not folder.parts or folder.is_absolute() or ".." in folder.parts:
        raise ValueError(f"run.name must be a folder in run.directory, got {run.name!r}")
    try:
        Path(run.directory).expanduser()
    except RuntimeError as error:
        raise ValueError(f"run.directory={run.directory!r}: {error}") from None
    if data.seq_length < 1:
        raise ValueError(f"data.seq_length must be at least 1, got {data.seq_length}")
    for name in ("steps", "micro_batch_size", "global_batch_size", "log_interval", "eval_batches", "token_parts"):
        if getattr(run, name) < 1:
            raise ValueError(f"run.{name} must be at least 1, got {getattr(run, name)}")
    if not 0 <= run.seed < 1 << 32:
        raise ValueError(f"run.seed must be from 0 to {(1 << 32) - 1}, got {run.seed}")
    for name in ("chunk_tokens", "loss_chunk"):
        if getattr(run, name) < 0:
            raise ValueError(f"run.{name} must not be negative (0: all at once), got {getattr(run, name)}")
    _check_layers(config)
    if run.cuda_graphs and (why := why_no_graph(config)):
        raise ValueError(f"run.cuda_graphs=true does not go with {why}")
    for name in ("eval_interval", "routing_interval", "save_interval"):
        if getattr(run, name) < 0:
            raise ValueError(f"run.{name} must not be negative (0: never), got {getattr(run, name)}")
    if run.keep_checkpoints < 0:
        raise ValueError(f"run.keep_checkpoints must not be negative (0: all), got {run.keep_checkpoints}")
    if not 0 < run.timeout_seconds <= LONGEST_TIMEOUT:
        raise ValueError(
            f"run.timeout_seconds must be positive and at most {LONGEST_TIMEOUT:g}, got {run.timeout_seconds}"
        )
    _divides("model.num_attention_heads", model.num_attention_heads, "model.hidden_size", model.hidden_size)
    _divides("model.num_query_groups", model.num_query_groups, "model.num_attention_heads", model.num_attention_heads)
    if model.hidden_size // model.num_attention_heads % 2:
        raise ValueError(
            f"model.hidden_size={model.hidden_size} over model.num_attention_heads={model.num_attention_heads} gives heads of "
            f"{model.hidden_size // model.num_attention_heads}; rotary embedding needs an even size"
        )
    _divides("parallel.tensor", parallel.tensor, "model.num_attention_heads", model.num_attention_heads)
    _divides("parallel.tensor", parallel.tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    stages = parallel.pipeline * parallel.virtual_pipeline
    _divides("parallel.pipeline * virtual_pipeline", stages, "model.num_layers", model.num_layers)
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise ValueError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs parallel.pipeline > 1")
    chunks = 2 * parallel.context if parallel.context > 1 else 1
    _divides("2 * parallel.context", chunks, "data.seq_length", data.seq_length)
    if parallel.sequence:
        _divides("parallel.context * tensor", parallel.context * parallel.tensor, "data.seq_length", data.seq_length)
    if not 0 <= data.eval_fraction < 1:
        raise ValueError(f"data.eval_fraction must be at least 0 and less than 1, got {data.eval_fraction}")
    if not data.eval_fraction and (reading := reading_evaluation(run)):
        shown = ", ".join(f"run.{name}={getattr(run, name)}" for name in reading)
        raise ValueError(f"data.eval_fraction=0 leaves no documents to evaluate: set {shown} to 0 or false")
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError("parallel.sequence=true needs parallel.tensor > 1")
    if run.token_parts > 1:
        _divides("2 * run.token_parts", 2 * run.token_parts, "data.seq_length", data.seq_length)
    if run.token_parts > 1 and (parallel.context > 1 or parallel.sequence or data.separate_documents):
        raise ValueError(
            f"run.token_parts={run.token_parts} imitates parallel.context on one rank: it goes with parallel.context=1, "
            "without parallel.sequence and data.separate_documents"
        )
    _check_attention(config)
    _check_optimizer(config)
    for section, values in vars(config).items():
        for name, value in vars(values).items():
            most = LARGEST_INTEGER if isinstance(value, int) else LARGEST_NUMBER
            if isinstance(value, (int, float)) and name != "timeout_seconds" and most < value < math.inf:
                raise ValueError(f"{section}.{name} must be at most {most:g}, got {value}")


def _check_attention(config: TrainConfig) -> None:
    """Raise where the choice of layers does not fit the model, or the split of heads does not fit the ranks."""
    moba, layers = config.moba, config.model.num_layers
    try:
        MoBAConfig(moba.block_size, moba.topk)
    except ValueError as error:
        raise ValueError(f"moba.{error}") from None
    if not 0 <= moba.full_last_layers <= layers:
        raise ValueError(
            f"moba.full_last_layers must be from 0 to model.num_layers={layers}, got {moba.full_last_layers}"
        )
    if moba.layer_pattern and moba.full_last_layers:
        raise ValueError(
            f"moba.layer_pattern={moba.layer_pattern} and moba.full_last_layers={moba.full_last_layers} exclude each other"
        )
    if moba.layer_pattern and (len(moba.layer_pattern) != layers or set(moba.layer_pattern) - {0, 1}):
        raise ValueError(
            f"moba.layer_pattern must have a 1 (MoBA) or a 0 (full) for each of model.num_layers={layers}, got "
            f"{moba.layer_pattern}"
        )
    try:
        heads = config.model.num_attention_heads // config.parallel.tensor
        check_split(moba.comm, moba.head_parallel or None, heads, config.parallel.context)
    except ValueError as error:
        raise ValueError(
            f"moba.comm={moba.comm}, moba.head_parallel={moba.head_parallel}, parallel.context={config.parallel.context}, "
            f"parallel.tensor={config.parallel.tensor}: {error}"
        ) from None


def _check_optimizer(config: TrainConfig) -> None:
    """Raise where the optimizer or Megatron's schedule would stop at a value, or run with one that means nothing."""
    section, init_std = config.optimizer, config.model.init_std
    _choose("optimizer.decay_style", section.decay_style, DECAY_STYLES)
    if not 0 < section.lr < math.inf:
        raise ValueError(f"optimizer.lr must be positive and finite, got {section.lr}")
    if not 0 <= section.min_lr <= section.lr:
        raise ValueError(f"optimizer.min_lr must be from 0 to optimizer.lr={section.lr}, got {section.min_lr}")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(section, name) < 1:
            raise ValueError(f"optimizer.{name} must be at least 0 and below 1, got {getattr(section, name)}")
    for name, value in (
        ("model.init_std", init_std),
        ("optimizer.eps", section.eps),
        ("optimizer.weight_decay", section.weight_decay),
        ("optimizer.clip_grad", section.clip_grad),  # 0: no clipping
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")
    if section.eps == 0:
        raise ValueError("optimizer.eps=0 divides 0 by 0 where a gradient is 0")
    if not 0 <= section.warmup_steps < config.run.steps:
        raise ValueError(
            f"optimizer.warmup_steps={section.warmup_steps} must be below run.steps={config.run.steps}, and not negative"
        )


def _check_layers(config: TrainConfig) -> None:
    """Raise where the kind of layers and what is asked of them do not go together."""
    run, why = config.run, why_not_long(config)
    if run.layers == "long" and why:
        raise ValueError(f"run.layers=long does not go with {why}")
    wanted = [
        f"run.{name}={value}"
        for name, value, off in (
            ("recompute", run.recompute, run.recompute != "all_but_attention"),
            ("chunk_tokens", run.chunk_tokens, run.chunk_tokens == 0),
            ("offload_inputs", run.offload_inputs, not run.offload_inputs),
        )
        if not off
    ]
    if wanted and not uses_long_layers(config):
        raise ValueError(
            f"{', '.join(wanted)} needs run.layers=long, which does not go with {why or 'run.layers=megatron'}"
        )
    if run.offload_inputs and run.recompute != "all_but_attention":
        raise ValueError(f"run.offload_inputs=true needs run.recompute=all_but_attention, got {run.recompute!r}")


def reading_evaluation(run: RunConfig) -> list[str]:
    """Settings in use that read the documents kept for evaluation."""
    return [name for name in ("eval_interval", "routing_interval", "routing_picture") if getattr(run, name)]


def uses_long_layers(config: TrainConfig) -> bool:
    """Whether the run's layers are those of `moba_cp.megatron.layer`."""
    return config.run.layers == "long" or (config.run.layers == "auto" and not why_not_long(config))


def why_not_long(config: TrainConfig) -> str:
    """The setting with which long layers do not go; empty if there is none."""
    run, model, tensor = config.run, config.model, config.parallel.tensor
    if run.recompute == "selective":
        return "run.recompute=selective"
    if run.token_parts > 1:
        return f"run.token_parts={run.token_parts}"
    if model.num_query_groups % tensor:
        return f"model.num_query_groups={model.num_query_groups} and parallel.tensor={tensor}"
    return ""


def why_no_graph(config: TrainConfig) -> str:
    """The setting with which passes over micro-batches cannot be replayed; empty if there is none."""
    run, parallel = config.run, config.parallel
    if not uses_long_layers(config):
        return "layers other than run.layers=long"
    for name in ("tensor", "context", "pipeline"):
        if (size := getattr(parallel, name)) > 1:
            return f"parallel.{name}={size}: ranks agree on the host"
    if config.data.separate_documents:
        return "data.separate_documents=true: every micro-batch has lengths of its own"
    if 0 < config.moba.fraction < 1:
        return f"moba.fraction={config.moba.fraction}: attention changes during the run"
    if run.offload_inputs:
        return "run.offload_inputs=true"
    return "run.device=cpu" if run.device == "cpu" else ""


def _choose(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if large % small:
        raise ValueError(f"{large_name}={large} must be a multiple of {small_name}={small}")
