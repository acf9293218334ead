"""Training under FSDP2 with context parallelism: one sequence over all GPUs against one GPU.

    torchrun --nproc-per-node 2 -m scripts.bench_fsdp --out docs/results/fsdp.json

A Llama-like model (`harness/llama.py`) trains on one sequence. All ranks together hold its tokens, and shards of the parameters;
then each rank trains the same model alone. Both begin with the same weights, so their losses must agree: the program fails where
they differ by more than `LOSS_DIFFERENCE`. Times are those of the slowest rank.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moba_cp import MoBAConfig, SequenceLayout, set_layout

from .harness import limits, options
from .harness.llama import Model
from .harness.records import Results, about
from .harness.teams import join
from .harness.timing import from_common_start, over_all

LOSS_DIFFERENCE = 2.0**-8
"""Largest relative difference of a loss. Parameters, activations and gradients are rounded to bf16 (2^-9) and summed in another
order. Losses are means over all tokens, where rounding cancels; but AdamW turns the sign of a tiny gradient into a whole step."""


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written by rank 0 after every case", dir_okay=False)],
    tokens: Annotated[int, typer.Option(help="tokens of the sequence")] = 65536,
    layers: Annotated[int, typer.Option(help="layers of the model")] = 8,
    hidden: Annotated[int, typer.Option(help="its hidden size")] = 2048,
    heads: Annotated[str, typer.Option(help="q/kv heads")] = "16/4",
    config: Annotated[str, typer.Option(help="block size:topk")] = "512:8",
    vocabulary: Annotated[int, typer.Option(help="its vocabulary")] = 8192,
    steps: Annotated[int, typer.Option(help="timed steps, after three others", min=1)] = 7,
    device_name: Annotated[str, typer.Option("--device", help="cuda, or cpu to try the program")] = "cuda",
    commit: options.Commit = "",
) -> None:
    """One sequence over all ranks, parameters sharded over them as well; then every rank by itself."""
    sizes, pair = options.single(options.configs, config), options.single(options.heads, heads)
    place = join(options.device(device_name))
    world = dist.get_world_size()
    case = {
        "tokens": tokens, "layers": layers, "hidden": hidden, "q_heads": pair[0], "kv_heads": pair[1],
        "block_size": sizes[0], "topk": sizes[1], "vocabulary": vocabulary,
    }  # fmt: skip
    results = Results(
        out if dist.get_rank() == 0 else None, {"about": about(commit) | {"world_size": world}}, "results"
    )
    meshes = init_device_mesh(place.type, (world, 1), mesh_dim_names=("all", "one"))
    found: list[dict[str, Any]] = []
    for name, ranks in (("all", world), ("one", 1)):
        if found and world == 1:
            break
        torch.manual_seed(0)
        with place:
            model = Model(vocabulary, layers, hidden, pair, MoBAConfig(*sizes), meshes[name])
        found.append(_train(model, meshes[name], tokens, vocabulary, steps, place))
        del model
        entry = case | {"ranks": ranks} | found[-1]
        entry["tokens_per_second"] = round(tokens / entry["step_ms"] * 1e3)
        together = found[0]["losses"]
        entry["largest_relative_loss_difference"] = max(
            abs(a - b) / abs(b) for a, b in zip(entry["losses"], together, strict=True)
        )
        results.add("results", entry)
    dist.destroy_process_group()
    limits.end(limits.broken(results.content["results"], {"largest_relative_loss_difference": LOSS_DIFFERENCE}))


def _train(
    model: Model, mesh: DeviceMesh, tokens: int, vocabulary: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Steps of AdamW under FSDP2: times of the slowest rank, losses over the whole sequence, parameters, peak memory."""
    ranks, rank = mesh.size(), mesh.get_local_rank()
    layout = SequenceLayout.zigzag([0, tokens], ranks)
    set_layout(model, layout)
    parameters = sum(p.numel() for p in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(vocabulary, (tokens // 4 + 1,), generator=generator).repeat(4)[: tokens + 1]  # repeats itself
    ids, labels = (layout.shard(x, rank).to(device) for x in (text[:-1], text[1:]))
    position = layout.local_indices(rank).to(device)
    losses: list[Tensor] = []

    def step() -> None:
        # FSDP averages gradients over its ranks; each holds the sum over its own tokens of the mean over all: times the ranks.
        loss = F.cross_entropy(model(ids, position).float(), labels, reduction="sum") / tokens
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        step()
    times = [from_common_start(step, device) for _ in range(steps)]
    whole = torch.stack(losses)
    if ranks > 1:
        dist.all_reduce(whole, group=mesh.get_group())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "parameters": parameters,
        "step_ms": round(statistics.median(times), 2),
        "step_ms_all": [round(x, 2) for x in times],
        "losses": [round(x, 6) for x in whole.tolist()],
        "peak_gib": round(over_all(peak, device) / 2**30, 2),
    }


if __name__ == "__main__":
    typer.run(main)
