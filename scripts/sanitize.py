"""NVIDIA's compute-sanitizer over the kernels: reads and writes outside (memcheck), races in shared memory (racecheck).

    python -m scripts.sanitize --out docs/results/sanitizer.json

Runs itself under each tool: small calls of attention forward and backward, of selections that are given, of decoding, of the
kernels that exchanges use on their own GPU, and of the layer parts of `moba_cp.megatron.fused` where megatron-core is installed.
The caching allocator is off, so that an access past the end of a tensor does not fall into another one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from torch import Tensor

from moba_cp import CachedTokens, CentroidCache, MoBAConfig, SequenceLayout, moba_attention, moba_attention_cached
from moba_cp.kernels import list_configs, triton_backend
from moba_cp.parallel.head_rows import put_heads, take_heads
from moba_cp.parallel.rows import Pairs, add_pairs, add_wanted, copy_wanted, pack, pack_pairs

from .harness import options
from .harness.records import REPOSITORY, about, write_json

TOOLS = ("memcheck", "racecheck")


def main(
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)] = Path("runs/sanitizer.json"),
    seconds: Annotated[int, typer.Option(help="limit of each tool")] = 300,
    commit: options.Commit = "",
    only_cases: Annotated[
        bool, typer.Option("--only-cases", help="make the calls without a tool, write nothing")
    ] = False,
) -> None:
    """Run small calls under compute-sanitizer. Exits with an error if a tool finds something."""
    options.device("cuda")
    if only_cases:
        run_cases()
        return
    if shutil.which("compute-sanitizer") is None:
        raise typer.BadParameter("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    cases = [sys.executable, "-m", "scripts.sanitize", "--only-cases"]
    subprocess.run(cases, check=True, cwd=REPOSITORY)  # compiles, so that the tools watch kernels alone
    tools = {}
    for tool in TOOLS:
        began = time.perf_counter()
        try:
            done = subprocess.run(
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *cases], cwd=REPOSITORY,
                env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True, timeout=seconds,
            )  # fmt: skip
            text, status = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            text, status = (error.stdout or b"").decode(errors="replace"), -1
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
        tools[tool] = {
            "exit_status": status,
            "summary": summary[-1] if summary else "none",
            "cases": [name for name in CASES if f"done: {name}" in text],
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(tool, json.dumps(tools[tool]), flush=True)
        if status:
            print(text[-6000:], flush=True)
    write_json(out, {"about": about(commit), "tools": tools})
    sys.exit(any(found["exit_status"] for found in tools.values()))


def run_cases() -> None:
    """Every case, on the GPU; layer parts where megatron-core is installed."""
    for name, case in CASES.items():
        if case is layer_parts and (find_spec("megatron") is None or find_spec("megatron.core") is None):
            continue
        torch.manual_seed(0)
        results = case()
        torch.cuda.synchronize()
        assert all(x.isfinite().all() for x in results)
        print(f"done: {name}", flush=True)


def attention(
    cu_seqlens: list[int],
    block_size: int,
    topk: int,
    q_heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    *,
    workspace_bytes: int = 1 << 30,
    given: bool = False,
) -> list[Tensor]:
    """Output and gradients; with `given`, of the selection that a first call returns."""
    q, k, v = (draw(cu_seqlens[-1], *s) for s in ((q_heads, dim), (kv_heads, dim), (kv_heads, value_dim)))
    layout, config = SequenceLayout.contiguous(cu_seqlens, 1), MoBAConfig(block_size, topk)
    selection = None
    if given:
        _, found = moba_attention(q, k, v, config, layout=layout, return_selection=True)
        selection = found.blocks
    out = moba_attention(q, k, v, config, layout=layout, workspace_bytes=workspace_bytes, selection=selection)
    return [out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out))]


def keeping_ds() -> list[Tensor]:
    """Backward that keeps gradients of scores, as it would with far more rows: of whole kv heads, and of some of their rows.

    All partial results take 12.5 MB, those of one kv head with its gradients of scores 6.8.
    """
    new_partials = mock.patch.object(triton_backend, "new_dq_partials", wraps=triton_backend.new_dq_partials)
    enough = mock.patch("moba_cp.chunks.LONG_ROWS", 1), mock.patch("moba_cp.call.least_chunk_of_ds", return_value=0)
    results = []
    for workspace, calls in ((12_000_000, 4), (3_000_000, 12)):
        with enough[0], enough[1], new_partials as made:
            results += attention([0, 700, 2000], 256, 3, 8, 4, 128, 128, workspace_bytes=workspace)
        kept = [call.kwargs["keeps_ds"] for call in made.call_args_list]
        assert kept == [True] * calls, kept
    return results


def lists_in_registers() -> list[Tensor]:
    """Routing lists as GPUs other than Hopper make them, of few blocks and of more."""
    with mock.patch.object(list_configs, "LISTS", replace(list_configs.LISTS, shared_memory=False)):
        return attention([0, 1000], 128, 3, 2, 1, 128, 128) + attention([0, 1200], 16, 3, 2, 1, 64, 64)


def decoding() -> list[Tensor]:
    """A prompt, a chunk and single tokens against a cache of two samples, one padded on the left."""
    slots, config, centroids = 700, MoBAConfig(64, 3), CentroidCache()
    q, k, v = (draw(2, slots, heads, 128).detach() for heads in (4, 2, 2))
    padding = torch.ones(2, slots, dtype=torch.bool, device="cuda")
    padding[1, :77] = False
    found, used = [], 0
    for queries in (600, 50, 1, 1):
        new = slice(used, used + queries)
        tokens = CachedTokens.of(
            padding[:, : used + queries], samples=2, queries=queries, slots=slots, offset=used, device=q.device
        )
        found.append(moba_attention_cached(q[:, new], k, v, config, tokens=tokens, centroids=centroids))
        used += queries
    return found


def heads() -> list[Tensor]:
    """Heads of two members, packed and put back."""
    x = draw(333, 8, 128).detach()
    packed = take_heads(x, 2, 1, 2, 4)
    back = torch.zeros_like(x)
    put_heads(packed, back, 1, 4)
    return [packed, back]


def rows() -> list[Tensor]:
    """Rows as exchanges pack, copy and add them: 800 tokens in blocks of 128, every other one wanted, the short last one too."""
    k, v = draw(800, 2, 128).detach(), draw(800, 2, 96).detach()
    packed = pack(k, v)
    blocks = torch.arange(7, dtype=torch.int32, device=k.device)
    start, length = blocks * 128, torch.full_like(blocks, 128, dtype=torch.int64)
    length[-1] = 32
    selected = blocks[::2].view(1, -1, 1).repeat(4, 1, 1)
    wanted = triton_backend.wanted_pairs(selected, n_blocks=7, kv_heads=2).view(torch.uint8)
    of_blocks = wanted, start, length, 128
    copied, sums = torch.zeros_like(packed), torch.empty_like(packed, dtype=torch.float32)
    copy_wanted(packed, copied, *of_blocks)
    add_wanted(packed.float(), sums, *of_blocks, first=True)
    add_wanted(packed.float(), sums, *of_blocks, first=False)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    triton_backend.add_gradients(own_dk=k.float(), own_dv=v.float(), arrived=[sums, packed.float()], dk=dk, dv=dv)
    return [packed, copied, sums, dk, dv]


def pairs() -> list[Tensor]:
    """Messages of `fetch` packed and added: blocks of 128 for three ranks, of which the last one wants none; the last block is
    short."""
    k, v = draw(800, 2, 128).detach(), draw(800, 2, 96).detach()
    begin = torch.arange(0, 800, 128, device=k.device)
    length = torch.full_like(begin, 128)
    length[-1] = 32
    keys = length.repeat(3, 2, 1)
    keys[2] = 0
    keys[0, :, ::2] = 0
    ends = keys.flatten().cumsum(0).view_as(keys)
    message = Pairs(torch.where(keys > 0, ends - keys, -1), begin, length, 128)
    packed = pack_pairs(k, v, message, int(keys.sum()))
    dk, dv = k.float(), v.float()
    add_pairs(packed.float(), message, dk, dv)
    return [packed, dk, dv]


def layer_parts() -> list[Tensor]:
    """Norms, SwiGLU, rotary embedding and cross entropy with their gradients."""
    from moba_cp.megatron import fused

    x, y, weight = draw(300, 1, 1000), draw(300, 1, 1000), draw(1000)
    mixed, wide = draw(300, 1, 2 * 4 * 64), draw(300, 1, 2 * 520)
    table = fused.rotation_table(torch.rand(300, 1, 1, 64, device="cuda"), torch.bfloat16)
    outputs = [
        fused.rms_norm(x, weight, 1e-5),
        *fused.add_rms_norm(x, y, weight, 1e-5),
        fused.swiglu(wide),
        *fused.split_rotate(mixed, 2, 64, table),
        fused.cross_entropy(x, torch.randint(1000, (300, 1), device="cuda")),
    ]
    total = torch.stack([o.float().square().sum() for o in outputs]).sum()
    return [*outputs, *torch.autograd.grad(total, (x, y, weight, mixed, wide))]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "blocks of 128, fused backward": lambda: attention([0, 1000], 128, 3, 2, 1, 128, 128),
    "blocks of 512": lambda: attention([0, 1700], 512, 3, 2, 2, 128, 128),
    "blocks of 1024, dq summed": lambda: attention([0, 1500, 4100], 1024, 3, 4, 2, 128, 128),
    "blocks of 1024, dq summed, in chunks": lambda: attention(
        [0, 3000], 1024, 3, 4, 1, 128, 128, workspace_bytes=3 << 20
    ),
    "blocks of 64, D 64, packed, in chunks": lambda: attention(
        [0, 300, 301, 700], 64, 4, 4, 2, 64, 64, workspace_bytes=1 << 18
    ),
    "blocks of 100, D 96, portable": lambda: attention([0, 650], 100, 3, 2, 1, 96, 96),
    "blocks of 256, gradients of scores kept": keeping_ds,
    "blocks of 256, Dv unlike D": lambda: attention([0, 900], 256, 2, 2, 1, 128, 64),
    "many slots": lambda: attention([0, 700], 16, 24, 1, 1, 64, 64),
    "routing lists in registers": lists_in_registers,
    "a selection that is given": lambda: attention([0, 1000], 128, 3, 2, 1, 128, 128, given=True),
    "decoding": decoding,
    "heads in and out": heads,
    "rows for other ranks": rows,
    "messages to other ranks": pairs,
    "layer parts": layer_parts,
}

if __name__ == "__main__":
    typer.run(main)
