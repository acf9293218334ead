"""Compile kernels for a GPU that need not exist here, and read the resources that their machine code uses.

For programs that run in a separate process: without a GPU, the tests' process may have Triton's interpreter on.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ALIGNED = [["tt.divisibility", 16]]
"""Attribute of a pointer or stride that is a multiple of 16."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def source_of(
    kernel, constants: dict[str, Any], type_of: Callable[[Any], str], is_aligned: Callable[[Any, str], bool]
) -> ASTSource:
    """A call of `kernel`, to build.

    Args:
        kernel: what `triton.jit` made.
        constants: by name; its other parameters are arguments.
        type_of: Triton's type of an argument, by its parameter.
        is_aligned: whether an argument is a multiple of 16, by its parameter and type.
    """
    types = {p.name: "constexpr" if p.name in constants else type_of(p) for p in kernel.params}
    attributes = {
        (p.num,): ALIGNED for p in kernel.params if types[p.name] != "constexpr" and is_aligned(p, types[p.name])
    }
    values = {(p.num,): constants[p.name] for p in kernel.params if p.name in constants}
    return ASTSource(kernel, types, values, attributes)


def build(source, capability: tuple[int, int], *, products: bool = False, **options: Any) -> dict[str, Any]:
    """Registers, bytes of stack and local memory and their sum ("spill"), and bytes of shared memory of a compiled kernel.

    With `products`, for kernels with asynchronous ones, also whether ptxas "serialised" them: runs them one after another.
    """
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [TOOLS / "cuobjdump", "-res-usage", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}
        used = {"registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"]}
        used |= {"spill": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}
        if products:
            ptx = Path(folder) / "kernel.ptx"
            ptx.write_text(compiled.asm["ptx"])
            command = [TOOLS / "ptxas", "-arch=sm_90a", "-v", ptx, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            used["serialised"] = "serialized" in done.stderr + done.stdout
    return used


def main(builders: dict[str, Callable[..., dict[str, dict]]]) -> None:
    """Build the cases of the first argument, a JSON list of `[builder, its arguments ..., capability]`; print JSON."""
    results = []
    for name, *arguments, capability in json.loads(sys.argv[1]):
        try:
            built = builders[name](*arguments, tuple(capability))
        except Exception as error:  # one failure must not hide the others
            built = {"error": {"text": f"{type(error).__name__}: {error}"[:2000]}}
        results.append(built)
    print(json.dumps(results))
