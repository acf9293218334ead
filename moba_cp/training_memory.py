"""Peak memory of a training step of a GPT with MoBA attention, by part, before it runs: arithmetic on sizes, no GPU, no Megatron.

What is counted is what torch allocates on the fullest rank. The peak is reached in the backward pass of the first layers that it
visits: weights, gradients and optimizer state are there, every layer's kept activations, and what the current layer works with.
The CUDA context and NCCL's buffers come on top (`OUTSIDE_TORCH`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .chunks import estimated_workspace, slots_per_row
from .config import DEFAULT_WORKSPACE_BYTES
from .kernels.sizes import SUM_TILE_BYTES, cdiv, sums_dq

GIB = 1 << 30
OUTSIDE_TORCH = int(1.5 * GIB)
"""Bytes of the CUDA context, of kernels and of NCCL's buffers on a GPU: torch does not count them."""
RECOMPUTE = ("none", "all_but_attention", "selective", "full")


@dataclass(frozen=True)
class TrainingShape:
    """Sizes that decide the memory of a training step.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim, ffn, vocab: of the whole model; ``ffn`` is the width behind the activation.
        tokens: tokens of a micro-batch on one context-parallel rank.
        topk: of MoBA; 0 for full attention.
        gated: the MLP has a gate (SwiGLU).
        tied: the output layer shares the embedding's weights.
        tensor, pipeline, context, data: sizes of the parallel groups.
        sequence_parallel: Megatron's sequence parallelism.
        distributed_optimizer: optimizer state is spread over data- and context-parallel ranks.
        bf16: parameters and activations in bf16 with fp32 gradients and master weights; else all fp32.
        recompute: one of `RECOMPUTE`; "all_but_attention" is `moba_cp.megatron.layer`'s.
        long_layers: layers are those of `moba_cp.megatron.layer`, and the loss that of `moba_cp.megatron.loss`; Megatron's keep
            what their unfused functions save.
        chunk_tokens, loss_chunk: tokens that the MLP works on, and that have logits, at a time; 0: all.
        offload: layer inputs are in host memory.
        head_parallel: ranks that split heads; above 1 attention keeps its head-sharded inputs.
        in_flight: micro-batches whose forward pass is done and whose backward is not (at most ``pipeline`` under 1F1B).
        workspace_bytes: see `moba_attention`.
        block_size: of MoBA, for what backward keeps: gradients of scores where they fit the workspace, or sums of dq in fp32; 0:
            neither.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tokens: int
    topk: int = 8
    gated: bool = True
    tied: bool = False
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    bf16: bool = True
    recompute: str = "none"
    long_layers: bool = True
    chunk_tokens: int = 0
    loss_chunk: int = 0
    offload: bool = False
    head_parallel: int = 1
    in_flight: int = 1
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES
    block_size: int = 0

    def __post_init__(self) -> None:
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute must be one of {RECOMPUTE}, got {self.recompute!r}")
        if self.recompute == "all_but_attention" and not self.long_layers:
            raise ValueError("recompute='all_but_attention' needs long_layers=True")
        for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "tokens", "tensor", "pipeline",
                     "context", "data", "in_flight", "head_parallel", "workspace_bytes"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("topk", "block_size", "chunk_tokens", "loss_chunk"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter and of an activation."""
        return 2 if self.bf16 else 4

    @property
    def sequence_shards(self) -> int:
        """Ranks among which the tokens between layers are divided besides context parallelism."""
        return self.tensor if self.sequence_parallel else 1


@dataclass(frozen=True)
class PeakMemory:
    """Bytes on one GPU at the peak.

    Attributes:
        weights: parameters.
        gradients: main gradients.
        optimizer: master weights and moments.
        kept: activations that layers keep between forward and backward.
        working: what one layer, or the loss, works with.
        working_in: which of them that is: a key of `workings`.
        host: pinned host memory of offloaded inputs.
        workings: what "MLP", "attention" and "loss" work with; `working` is the largest.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    working: int
    working_in: str
    host: int = 0
    workings: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def torch(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` should show."""
        return self.weights + self.gradients + self.optimizer + self.kept + self.working

    @property
    def device(self) -> int:
        """With what torch does not count."""
        return self.torch + OUTSIDE_TORCH

    def table(self) -> str:
        """The parts in GiB, one per line."""
        rows = [(name, getattr(self, name)) for name in ("weights", "gradients", "optimizer", "kept")]
        rows += [(f"working ({self.working_in})", self.working), ("outside torch", OUTSIDE_TORCH), ("sum", self.device)]
        return "\n".join(f"  {name:<28}{value / GIB:8.2f} GiB" for name, value in rows)


def training_peak(shape: TrainingShape) -> PeakMemory:
    """Peak of the fullest rank."""
    s = shape
    parameters = parameters_of_rank(s)
    shards = s.data * s.context if s.distributed_optimizer else 1
    size = s.itemsize
    kept_per_layer = s.tokens * kept_bytes_per_token(s)
    stage_layers = -(-s.layers // s.pipeline)
    workings = {"MLP": _mlp(s), "attention": _attention(s), "loss": _loss(s)}
    if s.recompute == "full":  # a whole layer's activations exist while it is computed again
        whole = s.tokens * _everything_per_token(s)
        workings |= {"MLP": workings["MLP"] + whole, "attention": workings["attention"] + whole}
    where = max(workings, key=lambda name: workings[name])
    return PeakMemory(
        weights=parameters * size,
        gradients=parameters * 4,
        optimizer=parameters * (12 if s.bf16 else 8) // shards,
        kept=kept_per_layer * stage_layers * min(s.in_flight, max(s.pipeline, 1)),
        working=workings[where],
        working_in=where,
        host=s.tokens * s.hidden * size * stage_layers if s.offload else 0,
        workings=workings,
    )


def parameters_of_rank(shape: TrainingShape) -> int:
    """Parameters of the fullest rank: its layers, and the embedding or output layer of an end of the pipeline."""
    s = shape
    attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
    mlp = s.hidden * s.ffn * (3 if s.gated else 2)
    ends = s.vocab * s.hidden * (2 if s.pipeline == 1 and not s.tied else 1)
    return -(-s.layers // s.pipeline) * ((attention + mlp) // s.tensor + 2 * s.hidden) + ends // s.tensor + s.hidden


def kept_bytes_per_token(shape: TrainingShape) -> int:
    """Bytes that one layer keeps per token between forward and backward."""
    s = shape
    size, shard = s.itemsize, s.sequence_shards
    if s.recompute == "full":
        return size * s.hidden // shard
    if s.recompute == "all_but_attention":
        inputs = 0 if s.offload else s.hidden // shard
        projected = s.hidden // shard if s.sequence_parallel else 0
        sharded = (s.heads + 2 * s.kv_heads) * s.head_dim // s.tensor if s.head_parallel > 1 else 0
        return size * (inputs + projected + sharded + s.heads * s.head_dim // s.tensor) + _attention_figures(s)
    return _everything_per_token(s)


def _everything_per_token(s: TrainingShape) -> int:
    """Bytes per token of a layer that computes nothing again: what norms, matrices, attention and activation save."""
    size, shard = s.itemsize, s.sequence_shards
    q, kv, ffn = (n // s.tensor for n in (s.heads * s.head_dim, s.kv_heads * s.head_dim, s.ffn))
    up = 2 if s.gated else 1
    values = 4 * s.hidden // shard + (q + 2 * kv) + (q + kv) + q + (up + 1) * ffn
    if not s.long_layers:  # rotation of halves and the activation of the gate
        values += q + kv + (up - 1) * ffn
    figures = 0 if s.recompute == "selective" else _attention_figures(s)
    return size * values + figures


def _attention_figures(s: TrainingShape) -> int:
    """Log-sum-exps in fp32 and selected blocks in int16, per token."""
    return (4 + 2 * s.topk) * s.heads // s.tensor


def _mlp(s: TrainingShape) -> int:
    """Backward of what stands behind attention: for a chunk the MLP's values and their gradients; for all tokens the gradients of
    the layer's output, of its input and of attention's output."""
    size, shard = s.itemsize, s.sequence_shards
    chunk = min(s.chunk_tokens or s.tokens, s.tokens) if s.long_layers else s.tokens
    ffn, up = s.ffn // s.tensor, 2 if s.gated else 1
    recomputed = s.hidden * 2 + (up + 1) * ffn if s.recompute == "all_but_attention" else 0
    gradients = (up + 1) * ffn + 2 * s.hidden
    whole = 2 * s.hidden // shard + s.heads * s.head_dim // s.tensor
    weights = 4 * s.hidden * ffn * (up + 1) if chunk < s.tokens else 0
    fetched = 2 * s.hidden if s.offload else 0
    return size * (chunk * (recomputed + gradients) + s.tokens * (whole + fetched)) + weights


def _attention(s: TrainingShape) -> int:
    """Backward of attention: partial results, routing lists, the inputs where they are computed again, and their gradients."""
    size = s.itemsize
    q, kv = s.heads * s.head_dim // s.tensor, s.kv_heads * s.head_dim // s.tensor
    again = s.hidden + (q + 2 * kv) + (q + kv) if s.recompute == "all_but_attention" else 0
    values = again + (q + 2 * kv) + q + 2 * s.hidden + (2 * s.hidden if s.offload else 0)
    sums = 0 if s.context == 1 else 2 * 4 * kv  # fp32 sums of dk and dv
    remote = 0 if s.context == 1 or not s.topk else 2 * size * kv + 2 * 4 * kv  # parts of one range at least
    slots = _slots(s) * _slot_bytes(s) * s.heads // s.tensor
    tiles = _blocks(s) * _block_bytes(s)
    together = s.tokens * slots + max(1, s.kv_heads // s.tensor) * tiles
    partials = max(tiles, min(s.workspace_bytes, together)) if s.topk else 0
    lists = 4 * _slots(s) * s.heads // s.tensor * s.tokens * min(1.0, partials / max(1, together)) * 2
    workspace = _workspace(s) if s.topk and s.context == 1 else partials
    return s.tokens * (size * values + sums + remote) + workspace + int(lists)


def _slot_bytes(s: TrainingShape) -> int:
    """Of a partial result, in fp32 where dq is summed, with its log-sum-exp, and 4 bytes beside it."""
    return (4 if _block_bytes(s) else s.itemsize) * s.head_dim + 8


def _block_bytes(s: TrainingShape) -> int:
    """Of each (kv head, block) where dq is summed."""
    return SUM_TILE_BYTES if s.bf16 and sums_dq(s.block_size, s.head_dim, _blocks(s)) else 0


def _blocks(s: TrainingShape) -> int:
    return cdiv(s.tokens * s.context, s.block_size) if s.block_size else 0


def _slots(s: TrainingShape) -> int:
    """Partial results per row, as the pipeline keeps them; `topk` where blocks are not known."""
    return slots_per_row(s.topk, _blocks(s)) if s.block_size else s.topk


def _workspace(s: TrainingShape) -> int:
    """Partial results and what backward keeps beside them, on one context-parallel rank.

    With several, only those that split all heads keep anything: not counted.
    """
    return estimated_workspace(
        rows=s.tokens, slots=_slots(s), q_heads=max(1, s.heads // s.tensor), kv_heads=max(1, s.kv_heads // s.tensor),
        dim=s.head_dim, block_size=s.block_size, blocks=_blocks(s), slot_bytes=_slot_bytes(s), block_bytes=_block_bytes(s),
        workspace_bytes=s.workspace_bytes, keeps_ds=s.bf16,
    )  # fmt: skip


def _loss(s: TrainingShape) -> int:
    """Logits and gradients of a chunk; with Megatron's cross entropy their fp32 copy and the softmax too."""
    size = s.itemsize
    chunk = min(s.loss_chunk or s.tokens, s.tokens)
    copies = 0 if s.long_layers and s.tensor == 1 else 8
    return chunk * s.vocab // s.tensor * (2 * size + copies) + s.tokens * s.hidden * size * 3
