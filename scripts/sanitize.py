"""NVIDIA's compute-sanitizer over every kernel: reads and writes outside (memcheck), races in shared memory (racecheck).

    python -m scripts.sanitize --out docs/results/sanitizer.json

Runs itself under each tool: small calls of `moba_attention`, forward and backward, that take every kernel. The caching
allocator is off, so that an access past the end of a tensor does not fall into another one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from moba_cp import MoBAConfig, SequenceLayout, moba_attention

from .harness.records import REPOSITORY, about, write_json

# name: cu_seqlens, block size, topk, q heads, kv heads, D, Dv, workspace bytes
CASES = {
    "blocks of 128, fused backward": ([0, 1000], 128, 3, 2, 1, 128, 128, 1 << 30),
    "blocks of 512": ([0, 1700], 512, 3, 2, 2, 128, 128, 1 << 30),
    "blocks of 64, D 64, packed, in chunks": ([0, 300, 301, 700], 64, 4, 4, 2, 64, 64, 1 << 18),
    "blocks of 100, D 96, portable": ([0, 650], 100, 3, 2, 1, 96, 96, 1 << 30),
    "blocks of 256, Dv unlike D": ([0, 900], 256, 2, 2, 1, 128, 64, 1 << 30),
    "many slots": ([0, 700], 16, 24, 1, 1, 64, 64, 1 << 30),
}  # fmt: skip
TOOLS = ("memcheck", "racecheck")


def main(
    out: Annotated[Path, typer.Option(help="JSON file")] = Path("runs/sanitizer.json"),
    seconds: Annotated[int, typer.Option(help="limit of each tool")] = 300,
    commit: Annotated[str, typer.Option(help="git commit to note, where the checkout has no .git")] = "",
    only_cases: Annotated[
        bool, typer.Option("--only-cases", help="make the calls without a tool, write nothing")
    ] = False,
) -> None:
    """Run small calls that take every kernel under compute-sanitizer. Exits with an error if a tool finds something."""
    if only_cases:
        run_cases()
        return
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
    """Forward and backward of every case, on the GPU."""
    for name, (cu_seqlens, block_size, topk, q_heads, kv_heads, dim, value_dim, workspace) in CASES.items():
        torch.manual_seed(0)
        shapes = [(q_heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
        inputs = [
            torch.randn(cu_seqlens[-1], *s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes
        ]
        layout = SequenceLayout.contiguous(cu_seqlens, 1)
        q, k, v = inputs
        out = moba_attention(q, k, v, MoBAConfig(block_size, topk), layout=layout, workspace_bytes=workspace)
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)
        print(f"done: {name}", flush=True)


if __name__ == "__main__":
    typer.run(main)
