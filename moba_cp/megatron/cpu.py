"""Run Megatron-Core on CPU over gloo: for tests, laptops and the first minutes with this project. Never used on GPUs.

Megatron-Core asks for CUDA by name in a few dozen places (``device="cuda"``, ``torch.cuda.current_device()``, streams,
the CUDA random state, checks of type names like ``torch.cuda.FloatTensor``). :func:`use_cpu_as_cuda` answers all of
them with the CPU. It patches torch and Megatron for the rest of the process, so it belongs at the top of a script, and it
refuses to run where a GPU is visible.

As a program it runs any Megatron-LM script, unmodified and without knowing of MoBA, on CPU::

    PYTHONPATH=/path/to/Megatron-LM torchrun --nproc-per-node 2 -m moba_cp.megatron.cpu \\
        /path/to/Megatron-LM/pretrain_gpt.py --distributed-backend gloo --use-cpu-initialization ...
"""

from __future__ import annotations

import contextlib
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

import torch
import typing_extensions
from torch.overrides import TorchFunctionMode

from .launch import check_script, run_script

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


def use_cpu_as_cuda(training_scripts: bool = False) -> None:
    """Make every request for a CUDA device in this process mean the CPU. Calling it again does nothing.

    Args:
        training_scripts: also do what Megatron-LM's own scripts (``megatron.training``) need and Megatron-Core does not:
            claim that CUDA is available, and leave out the warm-up of compiled functions, which draws random numbers
            by an amount that depends on the parallel sizes (from what is one CPU generator here).

    Raises:
        RuntimeError: a GPU is visible. Hide it with ``CUDA_VISIBLE_DEVICES=""`` to run on CPU on purpose.
    """
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError('a GPU is visible: Megatron runs there unpatched (or hide it with CUDA_VISIBLE_DEVICES="")')
    _patch_device_queries()
    if training_scripts:
        torch.cuda.is_available = _returning(True)
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # demanded where tensors or sequences are sharded
        if not hasattr(typing, "override"):  # the only thing that newer scripts need from Python 3.12
            vars(typing)["override"] = typing_extensions.override
        from megatron.training import initialize

        initialize._warmup_jit_function = _returning(None)
    _patch_streams()
    _patch_random_state()
    # Compiled helpers of Megatron would trace through all of this and gain nothing here.
    torch._dynamo.config.disable = True
    mode = _CudaMeansCpu()
    mode.__enter__()
    _installed.append(mode)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call, and reports CPU tensors under the type names of CUDA tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("cuda", "pin_memory") and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "type" and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.device and args == ("cuda:cpu",):  # f"cuda:{torch.cuda.current_device()}"
            return _CPU
        if name == "to":
            args = tuple(_CPU if _names_cuda(argument) else argument for argument in args)
        if _names_cuda(kwargs.get("device")):
            kwargs = kwargs | {"device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A stream or event that has always finished: CPU work is done when the call returns."""

    cuda_stream = 0
    device = _CPU

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, *_: Any) -> _Stream:
        return self

    def _nothing(self, *_: Any) -> None: ...

    wait_stream = wait_event = synchronize = record = wait = _nothing


def _returning(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _patch_device_queries() -> None:
    properties = type("CpuProperties", (), {"name": "cpu", "major": 9, "minor": 0, "multi_processor_count": 1})
    answers: dict[str, Any] = {
        "current_device": _CPU,
        "device_count": 1,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "reset_peak_memory_stats": None,
        "memory_stats": {},
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _returning(answer))
    torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = _returning(None)


def _patch_streams() -> None:
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, _returning(_Stream()))
    torch.cuda.stream = _returning(contextlib.nullcontext())  # type: ignore[assignment]
    torch.cuda.Stream = torch.cuda.Event = _Stream  # type: ignore[assignment,misc]


def _patch_random_state() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def main(arguments: list[str]) -> None:
    """Run the script ``arguments[0]`` with the other arguments, as if it had been started itself on a machine with GPUs.

    Raises:
        SystemExit: no script, or no ``megatron.training``.
        RuntimeError: a GPU is visible, or another version of Megatron-Core than the script's is in use.
    """
    if not arguments:
        sys.exit("which script? python -m moba_cp.megatron.cpu SCRIPT [ARGUMENT...]")
    check_script(arguments[0], needs_training=True)
    use_cpu_as_cuda(training_scripts=True)
    run_script(arguments[0], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
