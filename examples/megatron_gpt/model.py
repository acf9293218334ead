"""A GPT from Megatron-Core whose core attention is MoBA, its optimizer and its learning-rate schedule."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import MoBAConfig
from moba_cp.megatron.heads import full_comm_of
from moba_cp.megatron.layer import LongLayerSettings, with_long_layers
from moba_cp.megatron.loss import ChunkedLossGPT, FusedLossGPT
from moba_cp.megatron.norm import TorchNorm
from moba_cp.megatron.optimizer import use_foreach_kernels
from moba_cp.megatron.settings import MoBASettings
from moba_cp.megatron.spec import with_moba

from .config import TrainConfig, uses_long_layers
from .data import PADDED_VOCAB_SIZE
from .distributed import Ranks
from .graphs import MicroBatchGraph
from .parts import split_tokens

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "all_but_attention": {},  # by the layers themselves
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True)
class Trainer:
    """Everything that a step changes. ``model`` holds this process's model chunks, one without virtual pipeline; ``graph`` is
    there with ``run.cuda_graphs``."""

    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    transformer_config: TransformerConfig
    graph: MicroBatchGraph | None = None


def build(config: TrainConfig, ranks: Ranks) -> Trainer:
    """Build the part of the model that this process holds, wrapped for data parallelism, and its optimizer."""
    transformer_config = transformer(config, ranks.device)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        # gloo has no asynchronous reduce-scatter worth waiting for; with a graph nothing is left to wait beside
        overlap_grad_reduce=ranks.device.type == "cuda" and not config.run.cuda_graphs,
    )
    chunks = [_chunk(config, transformer_config, ranks, number) for number in range(config.parallel.virtual_pipeline)]
    graph = MicroBatchGraph() if config.run.cuda_graphs else None
    with nullcontext() if graph is None else graph.building():
        model = [
            # The gradients of later chunks travel while earlier ones compute, so they need no buckets.
            DistributedDataParallel(transformer_config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
    transformer_config.finalize_model_grads_func = finalize_model_grads
    transformer_config.no_sync_func = [ddp.no_sync for ddp in model] if len(model) > 1 else model[0].no_sync
    use_foreach_kernels()
    optimizer = get_megatron_optimizer(_optimizer_config(config), model)
    transformer_config.grad_scale_func = optimizer.scale_loss
    return Trainer(model, optimizer, _scheduler(config, optimizer), transformer_config, graph)


def _chunk(config: TrainConfig, transformer_config: TransformerConfig, ranks: Ranks, number: int) -> torch.nn.Module:
    """Model chunk ``number`` of this pipeline stage; with virtual pipeline, the stages hold the layers of all chunks 0,
    then those of all chunks 1, and so on."""
    chunks = config.parallel.virtual_pipeline
    kind = FusedLossGPT if uses_long_layers(config) else GPTModel
    if config.run.loss_chunk:
        kind = partial(ChunkedLossGPT, loss_chunk=config.run.loss_chunk)
    model = kind(
        transformer_config,
        block_spec(config, transformer_config),
        vocab_size=PADDED_VOCAB_SIZE,
        max_sequence_length=config.data.seq_length,
        pre_process=ranks.groups.pp.rank() == 0 and number == 0,
        post_process=ranks.is_last_stage and number == chunks - 1,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        vp_stage=number if chunks > 1 else None,
    ).to(ranks.device)
    if config.run.token_parts > 1:
        split_tokens(model, config.run.token_parts)
    return Float16Module(transformer_config, model) if config.run.precision == "bf16" else model


def count_parameters(trainer: Trainer, ranks: Ranks) -> int:
    """Parameters of the whole model, over its tensor-parallel and pipeline ranks; every rank must call this."""
    mine = (p for chunk in trainer.model for p in chunk.parameters() if param_is_not_shared(p))
    count = torch.tensor(sum(p.numel() for p in mine if param_is_not_tensor_parallel_duplicate(p)), device=ranks.device)
    torch.distributed.all_reduce(count, group=ranks.groups.mp)
    return int(count)


def transformer(config: TrainConfig, device: torch.device) -> TransformerConfig:
    """Megatron's own configuration, without anything that needs Transformer Engine or apex."""
    model, parallel = config.model, config.parallel
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization=model.normalization,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        init_method_std=model.init_std,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=config.run.precision == "bf16",
        params_dtype=_DTYPES[config.run.precision],
        pipeline_dtype=_DTYPES[config.run.precision],
        use_cpu_initialization=device.type == "cpu",
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.model_chunks,
        # Between two stages the neighbour before and the one behind are the same process: batched sends would be mixed up.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        variable_seq_lengths=config.data.separate_documents,  # padding depends on the documents
        moe_token_dispatcher_type="alltoall",  # the default refuses varying lengths, though there are no experts
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        calculate_per_token_loss=True,  # sum over tokens / number of tokens, however they are spread over ranks
        # All of these need Transformer Engine, apex or a compiler.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[config.run.recompute],
    )


def block_spec(config: TrainConfig, transformer_config: TransformerConfig) -> TransformerBlockSubmodules:
    """Layers of one model chunk of a pipeline stage: Megatron's local layer with torch norms and MoBA attention."""
    layer = get_gpt_layer_local_spec(normalization=config.model.normalization)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = TorchNorm
    settings = moba_settings(config)
    layer = with_moba(
        layer,
        settings.moba,
        comm=settings.comm,
        full_attention_last_n_layers=settings.full_attention_last_n_layers,
        layer_pattern=settings.layer_pattern,
        full_attention_comm=settings.full_attention_comm,
        head_parallel=settings.head_parallel,
        workspace_bytes=settings.workspace_bytes,
    )
    if uses_long_layers(config):
        run = config.run
        layer = with_long_layers(
            layer, LongLayerSettings(run.recompute == "all_but_attention", run.chunk_tokens, run.offload_inputs)
        )
    layers_here = config.model.num_layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers_here, layer_norm=TorchNorm)


def moba_settings(config: TrainConfig) -> MoBASettings:
    """What the configuration says about attention."""
    section = config.moba
    return MoBASettings(
        MoBAConfig(section.block_size, section.topk),
        comm=section.comm,
        full_attention_last_n_layers=section.full_last_layers,
        layer_pattern=tuple(section.layer_pattern) or None,
        full_attention_comm=full_comm_of(section.comm) or "auto" if section.comm.startswith("a2a") else "auto",
        head_parallel=section.head_parallel or None,
        workspace_bytes=section.workspace_bytes,
    )


def moba_record(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint, the log and TensorBoard say about attention; ``layers`` has 1 for MoBA and 0 for full attention."""
    settings, count = moba_settings(config), config.model.num_layers
    return {
        "block_size": settings.moba.block_size,
        "topk": settings.moba.topk,
        "layers": [int(settings.computes_moba(number, count)) for number in range(1, count + 1)],
        "fraction": config.moba.fraction,
        "comm": settings.comm,
    }


def sizes_record(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about the model, its optimizer and how its text is read, by key of the configuration."""
    model = {f"model.{name}": value for name, value in vars(config.model).items() if name != "init_std"}
    optimizer = {f"optimizer.{name}": value for name, value in vars(config.optimizer).items()}
    optimizer["parallel.distributed_optimizer"] = config.parallel.distributed_optimizer
    run = {"run.seed": config.run.seed, "run.global_batch_size": config.run.global_batch_size}
    return model | optimizer | {"data.seq_length": config.data.seq_length} | run


def _optimizer_config(config: TrainConfig) -> OptimizerConfig:
    section = config.optimizer
    return OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        adam_eps=section.eps,
        clip_grad=section.clip_grad,
        bf16=config.run.precision == "bf16",
        params_dtype=_DTYPES[config.run.precision],
        use_distributed_optimizer=config.parallel.distributed_optimizer,
    )


def resume_schedule(trainer: Trainer, config: TrainConfig, step: int) -> None:
    """Put learning rates where they are after so many steps: the schedule counts samples, and a step may have had others."""
    trainer.scheduler.num_steps = step * config.run.global_batch_size
    trainer.scheduler.step(increment=0)


def _scheduler(config: TrainConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Counts samples, as Megatron does."""
    section, batch = config.optimizer, config.run.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=section.warmup_steps * batch,
        lr_decay_steps=config.run.steps * batch,
        lr_decay_style=section.decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=config.run.steps * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
