"""NVIDIA's compute-sanitizer over every kernel: reads and writes outside (memcheck), races in shared memory (racecheck).

    PYTHONPATH=. python3 scripts/sanitize.py --out docs/results/sanitizer.json

Runs itself under each tool: small calls of `moba_attention`, forward and backward, that take every kernel. Memory is not
cached, so that what lies beside a tensor is not another's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--seconds", type=int, default=300, help="limit of each tool")
    parser.add_argument("--commit", default="", help="git commit to note, where the checkout has no .git")
    options = parser.parse_args()
    subprocess.run([sys.executable, __file__, "cases"], check=True)  # compiles, so that the tools watch kernels alone
    tools = {}
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "cases"]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
                timeout=options.seconds,
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
    from bench_about import about

    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about(options.commit), "tools": tools}, indent=1) + "\n")
    sys.exit(any(found["exit_status"] for found in tools.values()))


def run_cases() -> None:
    import torch

    from moba_cp import MoBAConfig, SequenceLayout, moba_attention

    for name, (cu_seqlens, block_size, topk, q_heads, kv_heads, dim, value_dim, workspace) in CASES.items():
        torch.manual_seed(0)
        shapes = [(q_heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
        inputs = [
            torch.randn(cu_seqlens[-1], *s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes
        ]
        layout = SequenceLayout.contiguous(cu_seqlens, 1)
        out = moba_attention(*inputs, MoBAConfig(block_size, topk), layout=layout, workspace_bytes=workspace)
        out.backward(torch.randn_like(out))
        torch.cuda.synchronize()
        assert all(x.grad.isfinite().all() for x in inputs)
        print(f"done: {name}", flush=True)


if __name__ == "__main__":
    run_cases() if sys.argv[1:] == ["cases"] else main()
