"""Launch constants of the Hopper backward kernels, timed on one chunk of heads (3 of 16, 128K tokens, D = 128, bf16).

    PYTHONPATH=. python3 scripts/bench_backward.py --out backward.json

Every variant is compared with the portable kernels on the data that is timed (norm of the difference over the norm) and
timed by CUDA events (median of --iterations, scaled to 16 heads). Variants are compiled first by processes of their own on
a small case, so that one that crashes stops nobody. TFLOP/s count 8 D (dK and dV), 6 D (dq) or 10 D a visible key.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

TOKENS, ALL_HEADS, HEADS, DIM = 131072, 16, 3, 128
CASES = {"128": (128, 8), "512": (512, 8), "4096": (4096, 12)}


def variants(block_size: int) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(kernel, name, fields of the configuration that differ from the shipped ones)."""
    if block_size == 128:
        for ahead in (1, 2):
            yield "dkdv_dq", f"AHEAD={ahead}", {"ahead": ahead}
        return
    yield "dkdv", "LATE=0 AHEAD=2", {"late": False, "ahead": 2}
    yield "dkdv", "LATE=1 AHEAD=2", {"late": True, "ahead": 2}
    yield "dkdv", "LATE=1 AHEAD=1", {"late": True, "ahead": 1}
    for ahead in (1, 2):
        yield "dq", f"AHEAD={ahead}", {"ahead": ahead}


def make_call(block_size: int, topk: int, tokens: int):
    """One chunk as the pipeline cuts it: views of HEADS of ALL_HEADS heads, random rows; what `attend_backward` takes."""
    import torch

    from moba_cp.kernels import triton_backend
    from moba_cp.kernels.backward import segments
    from moba_cp.kernels.backward.call import Call
    from moba_cp.kernels.types import KVPart, query_rows

    torch.manual_seed(0)
    draw = lambda: torch.randn(tokens, ALL_HEADS, DIM, device="cuda", dtype=torch.bfloat16)[:, :HEADS]  # noqa: E731
    q, k, v, dout = draw(), draw(), draw(), draw()
    at = torch.arange(tokens, device="cpu").numpy()
    rows = query_rows(at // block_size, at * 0, at % block_size, q.device)
    n_blocks = tokens // block_size
    start = torch.arange(0, tokens, block_size, dtype=torch.int32, device="cuda")
    length = torch.full_like(start, block_size)
    part = KVPart(k, v, start.expand(HEADS, n_blocks), length)
    selected = triton_backend.select_blocks(
        q, centroids=triton_backend.centroids(k, start=start, block_size=block_size), rows=rows, topk=topk
    )
    partials = triton_backend.new_partials(selected, DIM, q.dtype)
    lists = triton_backend.route(selected, n_blocks=n_blocks, kv_heads=HEADS, block_size=block_size)
    triton_backend.attend(q, part, lists, rows, DIM**-0.5, partials)
    out, lse = torch.empty_like(dout), triton_backend.new_lse(q)
    triton_backend.merge(partials, selected=selected, out=out, lse=lse)
    n_segments = segments.segment_count(tokens, lists.shape)
    segment_bin = segments.find_segments(lists.pointer, n_segments, block_size) if n_segments else lists.pointer
    whole = lambda: torch.zeros(tokens, ALL_HEADS, DIM, device="cuda", dtype=q.dtype)[:, :HEADS]  # noqa: E731
    dq = torch.zeros(HEADS, tokens, topk, DIM, device="cuda", dtype=q.dtype)
    return Call(
        part=part, lists=lists, rows=rows, q=q, dout=dout, lse=lse, delta=triton_backend.delta(out=out, dout=dout),
        scale=DIM**-0.5, dk=whole(), dv=whole(), dq=dq, accumulate=False, n_segments=n_segments, segment_bin=segment_bin,
    )  # fmt: skip


def runner(call, kernel: str, change: dict[str, int]) -> Callable[[], None]:
    from moba_cp.kernels import configs
    from moba_cp.kernels.backward import sm90

    if kernel == "dq":
        return lambda: sm90.launch_dq(call, replace(configs.SM90_DQ, **change))
    config = replace(configs.sm90_dkdv(DIM, call.lists.shape.block_size), **change)
    return lambda: sm90.launch_dkdv(call, config)


def compile_some(jobs: list[tuple[str, str, dict[str, int]]], case: str) -> None:
    """In a process of its own: run variants on few tokens, which leaves them in Triton's cache."""
    block_size, topk = CASES[case]
    call = make_call(block_size, topk, max(16384, 2 * topk * block_size))
    for kernel, name, change in jobs:
        try:
            runner(call, kernel, change)()
        except Exception as error:
            print("compile", case, kernel, name, type(error).__name__, str(error)[:200], flush=True)


def compile_all(cases: list[str], share: int) -> None:
    context = multiprocessing.get_context("fork")  # before this process touches the GPU
    workers = []
    for case in cases:
        jobs = list(variants(CASES[case][0]))
        shares = (jobs[i : i + share] for i in range(0, len(jobs), share))
        workers.extend(context.Process(target=compile_some, args=(some, case)) for some in shares)
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def timed(run: Callable[[], None], iterations: int) -> float:
    """Median milliseconds, scaled from HEADS to ALL_HEADS."""
    import torch

    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(iterations)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * ALL_HEADS / HEADS


def flops(kernel: str, block_size: int, topk: int) -> float:
    at = range(0, TOKENS, block_size)
    keys = sum(block_size * (min(i, topk - 1) * block_size + (block_size + 1) / 2) for i, _ in enumerate(at))
    return {"dkdv": 8, "dq": 6, "dkdv_dq": 10}[kernel] * DIM * keys * ALL_HEADS


def measure(case: str, options: argparse.Namespace) -> list[dict]:
    import torch

    from moba_cp.kernels import configs
    from moba_cp.kernels.backward import portable
    from moba_cp.kernels.gpu import gpu_of

    block_size, topk = CASES[case]
    call = make_call(block_size, topk, TOKENS)
    found: list[dict] = []
    outputs = {"dk": call.dk, "dv": call.dv, "dq": call.dq}
    reference: dict = {}

    def note(kernel: str, name: str, run: Callable[[], None]) -> None:
        entry = {"case": f"({block_size}, {topk})", "kernel": kernel, "name": name}
        try:
            checked = {"dkdv": ("dk", "dv"), "dq": ("dq",), "dkdv_dq": ("dk", "dv", "dq")}[kernel]
            for x in checked:
                outputs[x].fill_(0)
            run()
            torch.cuda.synchronize()
            for x in checked if reference else ():
                a, b = outputs[x].float(), reference[x].float()
                entry[f"error_{x}"] = float(f"{((a - b).norm() / b.norm()).item():.2e}")
            entry["ms"] = round(timed(run, options.iterations), 3)
            entry["tflops"] = round(flops(kernel, block_size, topk) / entry["ms"] / 1e9, 1)
        except Exception as error:
            entry |= {"error": f"{type(error).__name__}: {str(error)[:200]}", "trace": traceback.format_exc()}
        found.append(entry)

    config = configs.backward(DIM, DIM, block_size, gpu_of(call.q.device))
    dkdv, dq = config.dkdv, config.dq
    fused = dq is None
    note("dkdv_dq" if fused else "dkdv", "portable", lambda: portable.launch_dkdv(call, dkdv, fused=fused))
    if dq is not None:
        note("dq", "portable", lambda: portable.launch_dq(call, dq))
    reference = {name: x.clone() for name, x in outputs.items()}
    for kernel, name, change in variants(block_size):
        note(kernel, name, runner(call, kernel, change))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file, written after every case")
    parser.add_argument("--cases", default="512,4096,128", help=f"of {', '.join(CASES)}")
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--share", type=int, default=2, help="variants that one compiling process takes")
    parser.add_argument("--commit", default="", help="git commit to note, where the checkout has no .git")
    options = parser.parse_args()
    cases = options.cases.split(",")
    began = time.perf_counter()
    compile_all(cases, options.share)
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    from bench_about import about  # after the compiling processes, which must not share a CUDA context

    results: list[dict] = []
    for case in cases:
        try:
            results += measure(case, options)
        except Exception:
            traceback.print_exc()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"about": about(options.commit), "results": results}, indent=1))
    for r in sorted(results, key=lambda r: (r["case"], r["kernel"], r.get("ms", float("inf")))):
        errors = " ".join(f"{key[6:]} {value:.1e}" for key, value in r.items() if key.startswith("error_"))
        shown = r.get("error") or f"{r['ms']:8.2f} ms {r['tflops']:6.0f} TFLOP/s  {errors}"
        print(f"{r['case']:>10} {r['kernel']:>8}  {r['name']:<24} {shown}")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
