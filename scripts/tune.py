"""Launch configurations of the kernels on one GPU: times, and whether results stay what they are.

    python -m scripts.tune forward --out forward.json     # block attention, own blocks, merge
    python -m scripts.tune lists --out lists.json         # routing lists
    python -m scripts.tune backward --out backward.json   # Hopper backward kernels, beside the portable ones

One chunk of heads is timed, as the pipeline would cut it, and scaled to all heads. Every configuration is compared with the
first one of its kernel (the shipped one; in `backward`, the portable kernel): `difference` is the norm of the difference
over the norm, 0 for equal bits. Times are medians of CUDA events, launch overhead hidden. A configuration that fails is noted
and the rest goes on.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import Tensor

from moba_cp.kernels import RoutingLists, backend_for
from moba_cp.kernels import configs as shipped
from moba_cp.kernels.backward.call import Call
from moba_cp.kernels.configs import RowConfig, TileConfig
from moba_cp.kernels.gpu import Gpu, gpu_of
from moba_cp.kernels.list_configs import LISTS

from .harness import options
from .harness.chunk import SCALE, Chunk, make_chunk
from .harness.inputs import HEAD_DIM
from .harness.records import Results, about
from .harness.timing import time_calls

C = TypeVar("C", bound=TileConfig | RowConfig)


@dataclass(frozen=True)
class Variant:
    """One launch of one kernel: its name in the results, what it changes, and the launch."""

    kernel: str
    fields: dict[str, Any]
    launch: Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """What is tuned on one chunk.

    Attributes:
        variants: launches; of each kernel the first one is what the others are compared with.
        references: kernels that are compared with another one's first launch instead.
        outputs: what a kernel writes, by name.
        flops: of a kernel, over all heads; None where FLOPs mean nothing.
    """

    variants: Iterator[Variant]
    outputs: Callable[[str], dict[str, Tensor]]
    flops: Callable[[str], float] | None = None
    references: Mapping[str, str] = field(default_factory=dict)


def main(
    kernels: Annotated[str, typer.Argument(help="forward, lists or backward")],
    out: Annotated[Path, typer.Option(help="JSON file, written after every configuration", dir_okay=False)],
    configs: Annotated[str, typer.Option(help="block size:topk, comma-separated")] = "128:8,512:8,4096:12",
    tokens: Annotated[int, typer.Option(help="rows of the chunk")] = 131072,
    heads: Annotated[int, typer.Option(help="kv heads that times are scaled to")] = 16,
    at_once: Annotated[int, typer.Option(help="kv heads of the timed chunk")] = 3,
    group: Annotated[int, typer.Option(help="q heads per kv head")] = 1,
    budget: Annotated[
        float, typer.Option(help="seconds per (block size, topk); what does not fit is left out")
    ] = 300.0,
    commit: options.Commit = "",
) -> None:
    """Time launch configurations of some kernels. `backward` first compiles in processes of its own on few tokens, so that a
    configuration that crashes stops nobody."""
    (name,) = options.choices(kernels, SUBJECTS)
    sizes = options.configs(configs)
    if name == "backward":
        compile_backward(sizes, heads, at_once, group)  # before this process has a CUDA context
    options.gpu()
    results = Results(out, {"about": about(commit)}, "results")
    for block_size, topk in sizes:
        chunk = make_chunk(tokens, heads, at_once, group, block_size, topk)
        measure(results, {"block_size": block_size, "topk": topk}, SUBJECTS[name](chunk), chunk.factor, budget)
    print()
    for entry in sorted(results.content["results"], key=lambda e: (e["block_size"], e["kernel"], e.get("ms", 1e9))):
        print({key: value for key, value in entry.items() if key != "trace"})
    if not any("ms" in entry for entry in results.content["results"]):
        sys.exit("no configuration could be timed")


def measure(results: Results, case: dict[str, int], subject: Subject, factor: float, budget: float) -> None:
    """Time variants, and compare what each writes with what the first one of its kernel, or of its reference, wrote."""
    end, device = time.perf_counter() + budget, torch.device("cuda")
    expected: dict[str, dict[str, Tensor]] = {}

    def one(variant: Variant) -> dict[str, Any]:
        kernel = variant.kernel
        if time.perf_counter() > end:
            raise TimeoutError("no time left")
        for x in subject.outputs(kernel).values():
            x.zero_()
        variant.launch()
        written = subject.outputs(kernel)
        reference = subject.references.get(kernel, kernel)
        if kernel == reference and kernel not in expected:
            expected[kernel] = {name: x.clone() for name, x in written.items()}
        worst = max(difference(x, expected[reference][name]) for name, x in written.items())
        milliseconds = time_calls(variant.launch, device, iterations=7, warmup=0, ahead=True).median * factor
        found = {"difference": worst, "ms": round(milliseconds, 4)}
        if subject.flops is not None:
            found["tflops"] = round(subject.flops(kernel) / milliseconds / 1e9, 1)
        return found

    for variant in subject.variants:
        results.attempt("results", case | {"kernel": variant.kernel} | variant.fields, partial(one, variant))


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, 0 for equal bits."""
    if torch.equal(found, expected):
        return 0.0
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def combined(config: C, choices: dict[str, list[Any]]) -> list[C]:
    """`config`, then every other combination of `choices`."""
    made: list[C] = [replace(config, **dict(zip(choices, values))) for values in itertools.product(*choices.values())]
    return [config, *(other for other in made if other != config)]


# ---- forward


def attend_configs(block_size: int, gpu: Gpu) -> list[TileConfig]:
    """Of the portable kernel for listed entries, the shipped one first."""
    stream = shipped.stream_rows(HEAD_DIM, HEAD_DIM, block_size, gpu)
    choices: dict[str, list[Any]] = {"rows": [64, 128], "keys": [stream.keys] if stream else [32, 64, 128]}
    choices |= {"num_warps": [4, 8], "num_stages": [2, 3, 4], "store": ["", ".cs"]}
    return combined(stream or shipped.hold_rows(HEAD_DIM, HEAD_DIM, block_size, gpu), choices)


def own_configs(gpu: Gpu) -> list[TileConfig]:
    """Of the portable kernel for own blocks, the shipped one first."""
    choices: dict[str, list[Any]] = {"rows": [64, 128], "keys": [32, 64], "num_warps": [4, 8], "num_stages": [2, 3]}
    return combined(shipped.own_blocks(HEAD_DIM, HEAD_DIM, gpu), choices)


def merge_configs() -> list[RowConfig]:
    """Of the merge, the shipped one first."""
    choices: dict[str, list[Any]] = {"rows": [8, 16, 32], "num_warps": [1, 2, 4, 8], "num_stages": [1, 2, 3, 4, 5]}
    return combined(shipped.merge(HEAD_DIM), choices)


def forward(chunk: Chunk) -> Subject:
    """Portable block attention, own blocks and merge."""
    merged, lse = torch.empty_like(chunk.dout), backend_for(chunk.q.device, chunk.q.dtype).new_lse(chunk.q)
    outputs = {"merge": merged}
    return Subject(
        forward_variants(chunk, merged, lse), lambda kernel: {"out": outputs.get(kernel, chunk.partials.out)}
    )


def forward_variants(chunk: Chunk, merged: Tensor, lse: Tensor) -> Iterator[Variant]:
    """Launches of the forward kernels; "by pointers": without TMA."""
    from moba_cp.kernels import merge
    from moba_cp.kernels.forward import portable

    gpu, block_size, arguments = gpu_of(chunk.q.device), chunk.lists.shape.block_size, chunk.attend_arguments
    stream = shipped.stream_rows(HEAD_DIM, HEAD_DIM, block_size, gpu) is not None
    for tma in [True] if stream else [True, False]:
        name = "attend" if tma else "attend by pointers"
        for tile in attend_configs(block_size, gpu):
            run = partial(portable.attend_listed, *arguments, tile, stream=stream, tma=tma)
            yield Variant(name, asdict(tile), run)
    for tma in [] if stream else [True, False]:
        name = "own" if tma else "own by pointers"
        for tile in own_configs(gpu):
            yield Variant(name, asdict(tile), partial(portable.attend_own, *arguments, tile, tma=tma))
    backend_for(chunk.q.device, chunk.q.dtype).attend(*arguments)
    for config in merge_configs():
        run = partial(merge.merge, chunk.partials, selected=chunk.selected, out=merged, lse=lse, config=config)
        yield Variant("merge", asdict(config), run)


# ---- routing lists


def list_changes(n_blocks: int) -> list[dict[str, Any]]:
    """Fields of `ListConfig` that differ from the shipped ones; the first one changes nothing, the others sort in registers."""
    counted = [(1024, 8, 1024), (2048, 4, 1024), (2048, 8, 1024), (4096, 4, 1024), (4096, 8, 1024), (1024, 4, 0)]
    few = [(32, 1, 1024), (32, 2, 1024), (32, 4, 1024), (32, 8, 1024), (64, 4, 1024), (64, 8, 1024), (128, 4, 1024)]
    few += [(128, 8, 1024), (32, 4, 2048), (32, 2, 2048), (32, 1, 4096), (32, 4, 4096)]
    entries = [(1024, 4), (512, 1), (1024, 2), (1024, 8), (512, 2), (1024, 1), (2048, 8), (512, 4)]
    changes: list[dict[str, Any]] = [
        {},
        *({"count_entries": n, "count_warps": warps, "register_bins": bins} for n, warps, bins in counted),
        *(
            {"few_blocks": 256, "few_tokens": n, "few_warps": warps, "programs": programs, "most_programs": programs}
            for n, warps, programs in few
            if n_blocks * n <= 8192  # larger tables would not fit the registers
        ),
        *(
            {"entries": n, "warps": warps, "programs": programs, "most_programs": programs, "few_blocks": 0}
            for (n, warps), programs in itertools.product(entries, [1024, 2048])
        ),
    ]
    return [{}, *(change | {"shared_memory": False} for change in changes)]


def lists(chunk: Chunk) -> Subject:
    """Routing lists: all passes of `route` together."""
    from moba_cp.kernels import lists as kernels

    shape = chunk.lists.shape
    route = partial(
        kernels.route,
        chunk.selected,
        n_blocks=shape.n_blocks,
        kv_heads=chunk.part.k.shape[1],
        block_size=shape.block_size,
    )
    made: list[RoutingLists] = []

    def launch(change: dict[str, Any]) -> None:
        made[:] = [route(config=replace(LISTS, **change))]

    variants = (Variant("lists", change, partial(launch, change)) for change in list_changes(shape.n_blocks))
    return Subject(variants, lambda _: list_contents(made[0]) if made else {})


def list_contents(lists: RoutingLists) -> dict[str, Tensor]:
    """What lists say, without what is never read."""
    used = lists.item_bin >= 0
    return {
        "pointer": lists.pointer,
        "entry": lists.entry[: int(lists.pointer[-1])],
        "item_bin": lists.item_bin,
        "item_start": lists.item_start[used],
        "item_end": lists.item_end[used],
    }


# ---- backward

COMPILERS = 3
"""Processes that compile for one block size."""
WRITTEN = {"dkdv": ("dk", "dv"), "dq": ("dq",), "dkdv_dq": ("dk", "dv", "dq"), "dkdv_dq_tiles": ("dk", "dv")}
"""By kernel, what is compared; sums of dq are in an order of their own."""
REFERENCES = {"dkdv_dq_tiles": "dkdv"}
"""The portable kernels never sum dq over tiles."""


def backward_changes(block_size: int) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, fields of its Hopper configuration that differ from the shipped ones)."""
    if block_size <= 128:
        return [("dkdv_dq", {"ahead": ahead}) for ahead in (1, 2)]
    return [("dkdv", {"last": x, "ahead": ahead}) for x, ahead in ((False, 2), (True, 2), (False, 1))] + [("dq", {})]


def backward(chunk: Chunk) -> Subject:
    """Hopper backward kernels, beside the portable ones. FLOPs count 8 D (dK and dV), 6 D (dq) or 10 D (both) per visible key."""
    call, shape = backward_call(chunk), chunk.lists.shape
    written = {"dk": call.dk, "dv": call.dv, "dq": call.dq}
    keys = sum(
        shape.block_size * (min(block, shape.topk - 1) * shape.block_size + (shape.block_size + 1) / 2)
        for block in range(shape.n_blocks)
    )
    pairs = keys * chunk.q.shape[1] * chunk.factor
    return Subject(
        backward_variants(call),
        lambda kernel: {name: written[name] for name in WRITTEN[kernel]},
        lambda kernel: {"dkdv": 8, "dq": 6, "dkdv_dq": 10, "dkdv_dq_tiles": 10}[kernel] * HEAD_DIM * pairs,
        REFERENCES,
    )


def backward_call(chunk: Chunk) -> Call:
    """What the backward kernels are launched with, after a forward pass."""
    from moba_cp.kernels import triton_backend
    from moba_cp.kernels.backward import segments

    shape = chunk.lists.shape
    out, lse = torch.empty_like(chunk.dout), triton_backend.new_lse(chunk.q)
    triton_backend.attend(*chunk.attend_arguments)
    triton_backend.merge(chunk.partials, selected=chunk.selected, out=out, lse=lse)
    tokens, pointer = len(chunk.rows), chunk.lists.pointer
    n_segments = segments.segment_count(tokens, shape)
    segment_bin = segments.find_segments(pointer, n_segments, shape.block_size) if n_segments else pointer
    return Call(
        part=chunk.part, lists=chunk.lists, rows=chunk.rows, q=chunk.q, dout=chunk.dout, lse=lse,
        delta=triton_backend.delta(out=out, dout=chunk.dout), scale=SCALE, dk=torch.zeros_like(chunk.part.k),
        dv=torch.zeros_like(chunk.part.v), dq=torch.zeros_like(chunk.partials.out), accumulate=False,
        n_segments=n_segments, segment_bin=segment_bin,
    )  # fmt: skip


def backward_variants(call: Call) -> Iterator[Variant]:
    from moba_cp.kernels import triton_backend
    from moba_cp.kernels.backward import portable, sm90

    block_size = call.lists.shape.block_size
    tiles = shipped.backward(HEAD_DIM, HEAD_DIM, block_size, gpu_of(call.q.device))
    fused = "dkdv_dq" if tiles.dq is None else "dkdv"
    yield Variant(fused, {"name": "portable"}, partial(portable.launch_dkdv, call, tiles.dkdv, fused=tiles.dq is None))
    if tiles.dq is not None:
        yield Variant("dq", {"name": "portable"}, partial(portable.launch_dq, call, tiles.dq))
    for kernel, change in backward_changes(block_size):
        config = replace(shipped.SM90_DQ if kernel == "dq" else shipped.sm90_dkdv(HEAD_DIM, block_size), **change)
        launch = sm90.launch_dq if kernel == "dq" else sm90.launch_dkdv
        yield Variant(kernel, {"name": "sm90"} | change, partial(launch, call, config))
    partials = triton_backend.new_dq_partials(call.dq[..., 0], call.lists, call.q, call.dout)
    if partials.sums:
        summing = replace(call, dq=partials.dq, place=partials.place, sums_dq=True)
        launch_summing = partial(sm90.launch_dkdv_dq_tiles, summing, shipped.SM90_DKDV_DQ_TILES)
        yield Variant("dkdv_dq_tiles", {"name": "sm90"}, launch_summing)


def compile_backward(sizes: list[tuple[int, int]], heads: int, at_once: int, group: int) -> None:
    """Run every variant once in `COMPILERS` processes per block size, which leaves it in Triton's cache."""
    context = multiprocessing.get_context("spawn")
    shares = [(share, heads, at_once, group, *size) for size in sizes for share in range(COMPILERS)]
    workers = [context.Process(target=compile_share, args=share) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def compile_share(share: int, heads: int, at_once: int, group: int, block_size: int, topk: int) -> None:
    """Every `COMPILERS`-th variant, on few tokens."""
    tokens = max(16384, 2 * topk * block_size)
    call = backward_call(make_chunk(tokens, heads, at_once, group, block_size, topk))
    for variant in list(backward_variants(call))[share::COMPILERS]:
        try:
            variant.launch()
        except Exception as error:
            print("compile", block_size, variant.kernel, variant.fields, f"{error}"[:200], flush=True)
    torch.cuda.synchronize()


SUBJECTS: dict[str, Callable[[Chunk], Subject]] = {"forward": forward, "lists": lists, "backward": backward}


if __name__ == "__main__":
    typer.run(main)
