"""Launches without a GPU: compiles for Hopper, and records what would be launched. Prints JSON; see `test_launch.py`."""

from __future__ import annotations

import json
from itertools import count
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from moba_cp.kernels import launch
from moba_cp.kernels.launch import BoundLaunch, launch_kernel

LAUNCHED: list[tuple] = []


class Utilities:
    numbers = count()

    def load_binary(self, *_: Any) -> tuple:
        return "module", next(self.numbers), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        values = [getattr(value, "data_ptr", lambda value=value: value)() for value in arguments[4:]]
        LAUNCHED.append((x, y, z, stream, function, *(id(v) if isinstance(v, TensorDescriptor) else v for v in values)))


class Driver:
    utils, launcher_cls = Utilities(), Launcher
    device = 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@triton.jit(do_not_specialize=["n"])
def add_kernel(x, y, n, stride, factor, SIZE: tl.constexpr, TWICE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + index * stride, mask=index < n, other=0).to(tl.float32) * factor
    tl.store(y + index, value * 2 if TWICE else value, mask=index < n)


@triton.jit
def tile_kernel(tiles, y, ROWS: tl.constexpr):
    index = tl.arange(0, ROWS)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(y + index, tiles.load([0, 0]).to(tl.float32))


def main() -> None:
    """The lists `expected` and `launched` of launches by Triton and by `launch_kernel`, and how many each left to Triton."""
    driver.set_active(Driver())
    y = torch.zeros(4096)
    base = {"x": torch.zeros(4096), "n": 100, "stride": 3, "factor": 0.5, "SIZE": 64, "TWICE": False, "num_warps": 1}
    changes = [
        {},
        {"x": torch.zeros(4096, dtype=torch.bfloat16)},
        {"x": torch.zeros(4096)[1:]},
        {"x": torch.zeros(4096)[4:]},
        {"x": torch.nn.Parameter(torch.zeros(4096))},
        {"x": torch.zeros(0)},
        {"n": 1},
        {"n": 1 << 40},
        {"stride": 1},
        {"stride": 16},
        {"stride": 1 << 31},
        {"factor": 1.0},
        {"factor": 1},
        {"SIZE": 128},
        {"TWICE": True},
        {"num_warps": 2},
    ]
    cases: list[tuple] = []
    for change in changes:
        values = base | change
        arguments = values["x"], y, values["n"], values["stride"], values["factor"]
        constants = {name: values[name] for name in ("SIZE", "TWICE", "num_warps")}
        cases += [(add_kernel, grid, arguments, constants) for grid in ((5,), (5, 2), (5, 2, 3))]
    for dtype, rows in ((torch.bfloat16, 32), (torch.bfloat16, 64), (torch.float16, 32)):
        x = torch.zeros(128, 64, dtype=dtype)
        tiles = TensorDescriptor(x, [128, 64], [64, 1], [rows, 64])
        cases.append((tile_kernel, (1,), (tiles, y), {"ROWS": rows, "num_warps": 4}))

    own_run, left = JITFunction.run, 0

    def run(self: JITFunction, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left += 1
        return own_run(self, *arguments, **options)

    JITFunction.run = run
    rounds = []
    for most, device in ((launch.MOST_KEPT, 0), (launch.MOST_KEPT, 1), (4, 2)):
        Driver.device, launch.MOST_KEPT = device, most
        for launcher in (lambda k, g, a, c: k[g](*a, **c), *[lambda k, g, a, c: launch_kernel(k, g, *a, **c)] * 2):
            LAUNCHED.clear()
            left = 0
            for case in cases:
                launcher(*case)
            rounds.append({"launched": list(LAUNCHED), "left": left, "kept": len(launch._kept)})
    launch.MOST_KEPT = 4096
    bound = []
    of_tensors = [case for case in cases if case[0] is add_kernel]
    launches = [BoundLaunch(k, g, a, c) for k, g, a, c in of_tensors]
    for device in (0, 0, 1, 0):  # bound on device 0
        Driver.device = device
        LAUNCHED.clear()
        left = 0
        for again, (_, _, arguments, _) in zip(launches, of_tensors, strict=True):
            again(*arguments[:2])
        bound.append({"launched": list(LAUNCHED), "left": left})
    print(json.dumps({"cases": len(cases), "rounds": rounds, "bound": bound}))


if __name__ == "__main__":
    main()
