"""What one process finds out for `moba-cp doctor`: versions, GPUs, environment."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from .. import MoBAConfig, SequenceLayout, __version__, moba_attention, reference

OLDEST_CAPABILITY = (8, 0)
MEGATRON, TRANSFORMER_ENGINE = "megatron-core", "transformer-engine"


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        status: "ok", "note" (works, but not as well as it could, or is optional) or "problem".
        what, text: subject, and what is the case.
        cure: what to do; of problems always, of notes where there is something to do.
    """

    status: str
    what: str
    text: str
    cure: str = ""


def version_findings() -> list[Finding]:
    """Python, moba_cp, torch with CUDA, NCCL and Triton, Megatron, Transformer Engine; and whether attention is right."""
    cuda = torch.version.cuda or "none"
    found = [
        Finding(
            "ok",
            "python",
            f"{platform.python_version()}, moba_cp {__version__}, torch {torch.__version__} (CUDA {cuda})",
        )
    ]
    triton = _version("triton")
    if triton:
        found.append(Finding("ok", "triton", triton))
    elif torch.cuda.is_available():
        found.append(
            Finding("problem", "triton", "not installed, and the kernels need it", "pip install 'triton>=3.6'")
        )
    else:
        found.append(Finding("note", "triton", "not installed; needed on GPUs"))
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found.append(Finding("ok", "nccl", f"{nccl}, as torch was built with"))
    else:
        gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
        found.append(
            Finding("note", "nccl", "no GPU, so none; ranks on the CPU use gloo")
            if gloo
            else Finding(
                "problem",
                "gloo",
                "this torch has neither GPUs nor gloo",
                "install torch as https://pytorch.org/get-started says",
            )
        )
    for name, module, user, extra in (
        (MEGATRON, "megatron.core", "moba_cp.megatron", "pip install 'moba_cp[megatron]'"),
        (TRANSFORMER_ENGINE, "transformer_engine", "Megatron's te layers", "pip install 'transformer_engine[pytorch]'"),
    ):
        version = _found(name, module)
        if version:
            found.append(Finding("ok", name, version))
        else:
            found.append(Finding("note", name, f"not installed; needed by {user} only", extra))
    return [*found, attention_finding(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _found(package: str, module: str) -> str:
    """Version of a package, or "found" where it is on the path without being installed; empty where it is not there."""
    try:
        there = find_spec(module) is not None
    except ModuleNotFoundError:
        return ""
    return (_version(package) or "found, not installed by pip") if there else ""


def attention_finding(device: torch.device) -> Finding:
    """A small call against the reference."""
    config, layout = MoBAConfig(64, 3), SequenceLayout.contiguous([0, 300, 512], 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(512, heads, 64, generator=generator).bfloat16().to(device) for heads in (4, 2, 2))
    try:
        out = moba_attention(q, k, v, config, layout=layout).double()
    except Exception as error:  # whatever it is, it is what the user has to know
        text = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Finding(
            "problem", "attention", f"a small call on {device} failed ({text})", "run it alone: python -m pytest tests"
        )
    expected = reference.moba_attention(q.double(), k.double(), v.double(), layout.cu_seqlens, config)
    error_size = ((out - expected).norm() / expected.norm()).item()
    if error_size < 0.02:  # bf16 rounds to 4e-3, and a tie of scores may be decided either way
        return Finding("ok", "attention", f"a small call on {device} agrees with the definition")
    return Finding(
        "problem", "attention", f"a small call on {device} is off by {error_size:.1%}", "report it, with these lines"
    )


def gpu_findings(size: int) -> list[Finding]:
    """GPUs, how they reach each other, and how fast they copy `size` bytes."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return [
                Finding(
                    "note", "GPUs", "none, and this torch is built without CUDA; everything runs on the CPU, slowly"
                )
            ]
        cure = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return [Finding("note", "GPUs", "none is visible; everything runs on the CPU, slowly", cure)]
    found = []
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = properties.major, properties.minor
        free, total = torch.cuda.mem_get_info(index)
        text = f"{properties.name}, sm_{capability[0]}{capability[1]}, {total / 2**30:.0f} GiB"
        if capability < OLDEST_CAPABILITY:
            found.append(Finding("problem", f"GPU {index}", text, "the kernels need sm_80 or newer: use another GPU"))
        elif free < 0.5 * total:
            cure = "other processes hold it: see nvidia-smi"
            found.append(Finding("note", f"GPU {index}", f"{text}, {free / 2**30:.0f} GiB free", cure))
        else:
            found.append(Finding("ok", f"GPU {index}", text))
    if find_spec("triton") and (portable := _without_hopper_kernels(count)):
        of = ", ".join(map(str, portable))
        found.append(Finding("note", "kernels", f"those of Hopper need sm_90; portable ones on GPU {of}"))
    speed = _copy_speed(0, 0, size)
    found.append(Finding("ok", "copy on GPU 0", f"{2 * speed:.0f} GB/s read and written"))
    for other in range(1, count):
        if not torch.cuda.can_device_access_peer(0, other):
            cure = 'comm="pull" and one-sided transfers need peer access: see `nvidia-smi topo -p2p r`'
            found.append(Finding("note", f"GPU 0 and {other}", "cannot read each other's memory", cure))
        else:
            found.append(Finding("ok", f"GPU {other} to 0", f"peer copy {_copy_speed(other, 0, size):.0f} GB/s"))
    return found


def _without_hopper_kernels(count: int) -> list[int]:
    """The first `count` GPUs that Hopper's kernels do not serve."""
    from ..kernels.dispatch import gluon_serves

    return [index for index in range(count) if not gluon_serves(torch.device("cuda", index))]


def _copy_speed(source: int, target: int, size: int) -> float:
    """GB/s of a copy of `size` bytes from GPU `source` to GPU `target`, which may be the same."""
    x = torch.empty(size, dtype=torch.uint8, device=f"cuda:{source}")
    y = torch.empty(size, dtype=torch.uint8, device=f"cuda:{target}")
    return size / seconds(lambda: y.copy_(x), torch.device("cuda", target)) / 1e9


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds that a call takes: the least of `repeats` calls, after one that warms up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def environment_findings() -> list[Finding]:
    """Environment variables that matter, where they are set, or should be."""
    found = []
    if torch.cuda.device_count() > 1 and os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST") != "1":
        cure = "export TORCH_SYMM_MEM_DISABLE_MULTICAST=1 where symmetric memory fails to start"
        found.append(
            Finding(
                "note", "NVLink multicast", "is on; moba_cp does not use it, and some hosts fail to set it up", cure
            )
        )
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1":
        cure = "unset CUDA_LAUNCH_BLOCKING"
        found.append(
            Finding(
                "problem", "CUDA_LAUNCH_BLOCKING", "is 1: nothing overlaps, and several ranks may wait forever", cure
            )
        )
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        cure = "unset it, unless Megatron demands it (tensor or context parallelism on GPUs before Blackwell)"
        found.append(
            Finding("note", "CUDA_DEVICE_MAX_CONNECTIONS", "is 1: communication may wait behind attention", cure)
        )
    if os.environ.get("MOBA_CP_NODE"):
        text = f"{os.environ['MOBA_CP_NODE']!r}: this process counts as of a node of that name"
        found.append(Finding("note", "MOBA_CP_NODE", text, "unset it outside tests and benchmarks"))
    return found
