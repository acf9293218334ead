"""The attention layer over 1..N GPUs: time by stage, bytes, peak memory, for every transport, uniform and correlated routing.

    torchrun --nproc-per-node 2 scripts/bench_layer.py --out docs/results/layer.json
    torchrun --nproc-per-node 8 scripts/bench_layer.py --tokens-per-gpu 131072 --total-tokens 1048576 --out layer.json

Every timed configuration is checked: sampled output rows against an fp32 evaluation of the definition for these rows, and
output and dq bit for bit against the first transport. One result of the JSON is one (ranks, heads, block size, top-k,
tokens, routing, transport); times are medians over iterations of the slowest rank. The same ranks also run the layer
alone (`ranks: 1`), so that one file holds the scaling curve.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from bench_about import about
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout, moba_attention
from moba_cp.parallel.peer_memory import kept_bytes
from moba_cp.stages import time_stages

HEAD_DIM = 128
SAMPLED_ROWS = 8


def main(
    out: Annotated[Path, typer.Option(help="JSON file, written by rank 0")],
    tokens_per_gpu: Annotated[int, typer.Option(help="weak scaling: tokens on each GPU; 0 leaves it out")] = 131072,
    total_tokens: Annotated[int, typer.Option(help="strong scaling: tokens in all; 0 leaves it out")] = 0,
    heads: Annotated[str, typer.Option(help="q/kv heads, comma-separated")] = "16/16,32/8",
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "128:8,512:8,4096:12",
    transports: Annotated[str, typer.Option(help="comma-separated")] = "all_gather,ring,fetch,pull,auto",
    routing: Annotated[str, typer.Option(help="uniform, correlated, or both comma-separated")] = "uniform,correlated",
    layout_name: Annotated[str, typer.Option("--layout", help="contiguous or zigzag")] = "zigzag",
    iterations: Annotated[int, typer.Option(help="timed iterations of each configuration")] = 5,
    alone: Annotated[bool, typer.Option(help="also one rank by itself, for the scaling curve")] = True,
    commit: Annotated[str, typer.Option(help="git commit to note, where the checkout has no .git")] = "",
) -> None:
    """Run the sweep on all ranks that torchrun started."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank)
    dist.init_process_group("nccl", device_id=device)
    world = dist.get_world_size()
    results: list[dict[str, Any]] = []
    for head_pair, block, kind in itertools.product(heads.split(","), configs.split(","), routing.split(",")):
        q_heads, kv_heads = (int(x) for x in head_pair.split("/"))
        config = MoBAConfig(*(int(x) for x in block.split(":")))
        sizes = {tokens_per_gpu * world, total_tokens} - {0}
        for tokens in sorted(sizes):
            results += measure(
                tokens, q_heads, kv_heads, config, kind, transports, layout_name, iterations, world, device
            )
            write(out, results, commit)
        if alone and world > 1 and tokens_per_gpu:
            results += measure(
                tokens_per_gpu, q_heads, kv_heads, config, kind, "local", layout_name, iterations, 1, device
            )
            write(out, results, commit)
    dist.destroy_process_group()


def measure(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    config: MoBAConfig,
    kind: str,
    transports: str,
    layout_name: str,
    iterations: int,
    ranks: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """One set of inputs through every transport; the same on every rank (with `ranks == 1` each works alone)."""
    rank = dist.get_rank() if ranks > 1 else 0
    make = SequenceLayout.contiguous if layout_name == "contiguous" else SequenceLayout.zigzag
    layout = make([0, tokens], ranks)
    q, k, v, dout = make_inputs(layout, rank, q_heads, kv_heads, config, kind, device)
    first: tuple[Tensor, Tensor] | None = None
    results = []
    for transport in transports.split(",") if ranks > 1 else ["auto"]:
        result: dict[str, Any] = {
            "ranks": ranks,
            "tokens": tokens,
            "q_heads": q_heads,
            "kv_heads": kv_heads,
            "head_dim": HEAD_DIM,
            "block_size": config.block_size,
            "topk": config.topk,
            "routing": kind,
            "layout": layout_name,
            "comm": transport,
        }
        try:
            timed, outputs = run(q, k, v, dout, config, layout, transport, iterations)
            result |= timed
            result["output_error"] = sampled_error(q, k, v, outputs[0], config, layout, rank)
            if first is None:
                first = outputs
            result["bitwise_equal_to_first"] = all_ranks(
                all(torch.equal(a, b) for a, b in zip(outputs, first, strict=True)), ranks
            )
            del outputs
        except torch.OutOfMemoryError as error:
            result["error"] = str(error).split(".")[0]
        torch.cuda.empty_cache()
        results.append(result)
        if dist.get_rank() == 0:
            shown = {n: result.get(n) for n in ("forward_ms", "forward_backward_ms", "output_error", "error")}
            where = f"{ranks} ranks {tokens} tokens {q_heads}/{kv_heads} ({config.block_size}, {config.topk})"
            print(where, kind, transport, result.get("transport"), shown, flush=True)
    return results


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    config: MoBAConfig,
    layout: SequenceLayout,
    comm: str,
    iterations: int,
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Median times in ms over ranks' maxima, stages, bytes, peak memory; and (output, dq) of the last timed iteration."""
    ranks = layout.cp_size
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def step() -> Tensor:
        for x in inputs:
            x.grad = None
        return moba_attention(*inputs, config, layout=layout, comm=comm)

    def grad_free() -> Tensor:
        with torch.no_grad():
            return moba_attention(q, k, v, config, layout=layout, comm=comm)

    with torch.no_grad():
        _, report = moba_attention(q, k, v, config, layout=layout, comm=comm, return_report=True)
    torch.cuda.reset_peak_memory_stats()
    grad_free()
    forward_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step().backward(dout)
    peak = torch.cuda.max_memory_allocated()
    forward = [timed(grad_free, ranks) for _ in range(iterations)]
    both = [timed(lambda: step().backward(dout), ranks) for _ in range(iterations)]
    with time_stages() as timer:
        out = step()
        out.backward(dout)
    dq = inputs[0].grad
    assert dq is not None
    traffic = {name: vars(stage) for name, stage in report.traffic.stages.items()}
    shared = kept_bytes() if report.transport == "pull" else 0
    result = {
        "transport": report.transport,
        "forward_ms": median(forward),
        "forward_ms_all": forward,
        "forward_backward_ms": median(both),
        "forward_backward_ms_all": both,
        "stages_ms_rank0": timer.milliseconds(),
        "traffic_forward_rank0": traffic,
        "lower_bound_bytes": report.lower_bound_bytes.tolist(),
        "visible_bytes": report.visible_bytes.tolist(),
        "wanted_share": report.wanted_share,
        "imbalance": report.imbalance,
        "attended_keys": report.attended_keys.tolist(),
        "peak_gib_forward": (forward_peak + shared) / 2**30,
        "peak_gib_forward_backward": (peak + shared) / 2**30,
        "shared_gib": shared / 2**30,
    }
    return result, (out.detach(), dq)


def timed(work: Any, ranks: int) -> float:
    """Milliseconds of the slowest rank, from a common start."""
    if ranks > 1:
        dist.barrier()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    elapsed = torch.tensor(start.elapsed_time(end), device="cuda")
    if ranks > 1:
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    return elapsed.item()


def make_inputs(
    layout: SequenceLayout, rank: int, q_heads: int, kv_heads: int, config: MoBAConfig, kind: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the output's gradient of the local tokens, bf16 N(0, 1); the global input is the same for any layout
    only in distribution.

    "correlated": every block's keys share a direction, and the queries of a block share the directions of block 0, the
    block before them and `topk` earlier ones out of a sixteenth of all blocks that everybody likes, as trained models do.
    """
    noise = torch.Generator(device).manual_seed(1 + rank)
    tokens = layout.local_tokens(rank)
    normal = lambda heads: torch.randn(  # noqa: E731
        tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16, generator=noise
    )
    q, k, v, dout = normal(q_heads), normal(kv_heads), normal(kv_heads), normal(q_heads)
    if kind == "correlated":
        shared = torch.Generator(device).manual_seed(0)
        n_blocks = -(-layout.total_tokens // config.block_size)
        direction = torch.randn(n_blocks, HEAD_DIM, device=device, generator=shared) * 0.5
        picked = torch.rand(n_blocks, config.topk, device=device, generator=shared)
        block = torch.arange(n_blocks, device=device)
        liked = (picked * block[:, None]).long() // 16 * 16  # earlier blocks, the same for every head
        liked = torch.cat([liked, (block - 1).clamp(min=0)[:, None], torch.zeros_like(liked[:, :1])], 1)
        own = layout.local_indices(rank).to(device) // config.block_size
        k += direction[own][:, None].to(torch.bfloat16)
        q += direction[liked].sum(1)[own][:, None].to(torch.bfloat16)
    elif kind != "uniform":
        raise typer.BadParameter(f"routing must be uniform or correlated, got {kind!r}")
    return q, k, v, dout


@torch.no_grad()
def sampled_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: MoBAConfig, layout: SequenceLayout, rank: int
) -> float:
    """Largest relative error over ranks of sampled output rows, against the definition in fp32 for these rows."""
    ranks, group = layout.cp_size, q.shape[1] // k.shape[1]
    generator = torch.Generator().manual_seed(rank)
    rows = torch.randint(0, q.shape[0], (SAMPLED_ROWS,), generator=generator).to(q.device)
    position = layout.local_indices(rank).to(q.device)[rows]
    wanted = []
    for kv_head in range(k.shape[1]):
        keys, values = (gather_tokens(x[:, kv_head], layout) for x in (k, v))
        block_size = config.block_size
        whole = len(keys) // block_size
        centroid = keys[: whole * block_size].float().unflatten(0, (whole, block_size)).mean(1).to(keys.dtype)
        own = position // block_size
        for head in range(kv_head * group, (kv_head + 1) * group):
            query = q[rows, head].float()
            score = query @ centroid.float().T
            score.masked_fill_(torch.arange(whole, device=q.device) >= own[:, None], float("-inf"))
            chosen = torch.zeros_like(score, dtype=torch.bool)
            best = score.topk(min(config.topk - 1, whole), dim=1)
            chosen.scatter_(1, best.indices, best.values > float("-inf"))
            index = torch.arange(len(keys), device=q.device)
            block = index // block_size
            allowed = torch.cat([chosen, chosen.new_zeros(len(chosen), 1)], 1)[:, block.clamp(max=whole)]
            allowed |= block == own[:, None]
            allowed &= index <= position[:, None]
            attention = (query @ keys.float().T * HEAD_DIM**-0.5).masked_fill(~allowed, float("-inf")).softmax(1)
            wanted.append(attention @ values.float())
    expected = torch.stack(wanted, 1)
    error = ((out[rows].float() - expected).norm() / expected.norm()).reshape(1)
    if ranks > 1:
        dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


def gather_tokens(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The global tensor of equal shards `x`, for checking only."""
    if layout.cp_size == 1:
        return x
    parts = [x.new_empty(layout.local_tokens(r), *x.shape[1:]) for r in range(layout.cp_size)]
    dist.all_gather(parts, x.contiguous())
    return layout.unshard(parts)


def all_ranks(fact: bool, ranks: int) -> bool:
    """Whether it holds on every rank."""
    flag = torch.tensor(int(fact), device="cuda")
    if ranks > 1:
        dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def median(values: list[float]) -> float:
    return torch.tensor(values).median().item()


def write(out: Path, results: list[dict[str, Any]], commit: str) -> None:
    """The JSON so far, by rank 0, with what it ran on."""
    if dist.get_rank():
        return
    head = about(commit) | {"world_size": dist.get_world_size()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
