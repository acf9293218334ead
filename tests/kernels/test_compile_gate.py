"""Centroids, gate and routing kernels compile for sm_80 and sm_90 in every shipped shape, and none of them spills."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kernels import interpreter


def kernels(capability: int):
    """(name, kernel, element type of its floating or entry tensors, constants) of every shape to compile."""
    from moba_cp.kernels import centroids, gate, gate_exact, lists

    for dim, block_size in ((64, 64), (128, 128), (128, 4096), (96, 100), (192, 512), (256, 128)):
        padded = 1 << (dim - 1).bit_length()
        chunk = min(centroids.CHUNK_BYTES // (2 * padded), 1 << (block_size - 1).bit_length())
        constants = {"BLOCK_SIZE": block_size, "D": dim, "PADDED_D": padded, "CHUNK": chunk}
        yield f"centroids {constants}", centroids._centroids_kernel, "bf16", constants
    for dim, n_blocks, topk, element in (
        (128, 1024, 8, "bf16"),
        (128, 4096, 8, "bf16"),
        (128, 256, 8, "bf16"),
        (128, 32, 12, "bf16"),
        (64, 1024, 8, "fp16"),
        (96, 64, 3, "bf16"),
        (192, 256, 8, "bf16"),
        (256, 4096, 16, "bf16"),
        (128, 4096, 16, "bf16"),
        (128, 1024, 16, "bf16"),
        (128, 8192, 8, "bf16"),
        (128, 8192, 16, "fp16"),
    ):
        tile, slots, variant = gate.shapes(dim, n_blocks, topk, capability >= 90)
        name = f"D={dim} n_blocks={n_blocks} topk={topk}"
        yield f"gate {name}", gate._gate_kernel, element, {**tile, **slots, **variant}
        yield f"gate exact {name}", gate_exact._gate_exact_kernel, element, {**tile, **slots, "LISTED": True}
    tile, slots, _ = gate.shapes(128, 4096, 64, capability >= 90)
    yield "gate exact topk=64", gate_exact._gate_exact_kernel, "bf16", {**tile, **slots, "LISTED": False}
    yield "scores", gate_exact._scores_kernel, "bf16", tile
    for n_blocks, slots, wide in (
        (1024, 8, False),
        (256, 7, False),
        (32, 11, True),
        (64, 32, False),
        (4096, 8, False),
        (8192, 8, True),
    ):
        shape = lists.counting_shape(n_blocks, slots)
        name = f"n_blocks={n_blocks} slots={slots}"
        bins = shape.pop("BINS")
        count = {"ENTRIES": lists.COUNT_ENTRIES, "BINS": bins, "num_warps": lists.COUNT_WARPS}
        yield f"count {name}", lists._count_kernel, "i32", shape | count
        element = "i64" if wide else "i32"
        if n_blocks <= lists.FEW_BLOCKS:
            few = {"SLOTS": slots, "BINS": n_blocks, "TOKENS": lists.FEW_TOKENS, "num_warps": lists.FEW_WARPS}
            yield f"scatter few {name}", lists._scatter_few_kernel, element, few
        shape["PLACE_BITS"] = shape["ENTRIES"].bit_length() - 1
        yield f"scatter {name}", lists._scatter_kernel, element, shape | {"num_warps": lists.WARPS}
    yield "item", lists._item_kernel, "i32", {"BINS": lists.ITEM_KERNEL_BINS, "ITEMS": lists.ITEM_KERNEL_ITEMS}


def usage(kernel, element: str, constants: dict, capability: int) -> dict[str, int]:
    """Registers, spilled bytes (local memory and stack) and shared memory of a compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants[key] for key in ("num_warps", "maxnreg") if key in constants}
    constants = {key: value for key, value in constants.items() if key not in options}
    elements = dict.fromkeys(("q_ptr", "c_ptr", "k_ptr", "entry_ptr"), element)
    elements["out_ptr"] = {"_centroids_kernel": element, "_scores_kernel": "i64"}.get(kernel.__name__, "i16")
    elements["selected_ptr"] = "i16"
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = f"*{elements.get(name, 'i32')}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, **options})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {**found, "shared": binary.metadata.shared}


@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills(capability):
    lines = interpreter.run_without_interpreter(__file__, str(capability)).splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(results) > 10
    # sm_80 keeps one word of the 64-bit lists' scatter kernel on the stack.
    spilled = [r for r in results if r["STACK"] > (8 if capability == 80 else 0) or r["LOCAL"] > 0]
    assert not spilled, spilled
    limit = 166912 if capability == 80 else 232448
    assert all(r["shared"] <= limit for r in results)


if __name__ == "__main__":
    for name_, kernel_, element_, constants_ in kernels(int(sys.argv[1])):
        result = usage(kernel_, element_, constants_, int(sys.argv[1]))
        print(json.dumps({"kernel": name_, **result}), flush=True)
