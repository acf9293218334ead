"""Argument checks of the public functions. Messages carry the offending values."""

from __future__ import annotations

import operator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .config import MoBAConfig
from .derivatives import refuse_transforms
from .kernels import backend_for
from .parallel import agreement
from .parallel.comm import backends_of, check_group
from .parallel.layout import SequenceLayout
from .parallel.splits import COMMS, HEADS, check_split
from .tracing import TRACED, sends_nothing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Of q, k, v, and of what scores blocks."""
INTEGERS = (torch.int16, torch.int32, torch.int64)
"""Of block numbers that a caller gives."""


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Types, ranks, shapes, dtypes and devices of q `[T, Hq, D]`, k `[T, Hkv, D]`, v `[T, Hkv, Dv]`."""
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        _check_is_tensor(name, x)
    for name, x in named.items():
        check_tensor(name, x)
        if x.dim() != 3:
            raise ValueError(f"{name} must have shape [tokens, heads, head size], got {tuple(x.shape)}")
        check_dtype(name, x)
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must have at least one head and a head size of at least 1, got {tuple(x.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got q {q.device}, k {k.device}, v {v.device}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"q, k and v must be on the CPU or a CUDA device, got {q.device}")
    if wrong := _wrong_shapes(q.shape, k.shape, v.shape):
        raise ValueError(f"{wrong}, got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")


def check_tensor(name: str, x: Tensor) -> None:
    """`x` is an ordinary dense tensor of a class that a call can read."""
    _check_is_tensor(name, x)
    _check_class(name, x)
    if x.layout != torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be an ordinary dense tensor, got {kind}")


def check_dtype(name: str, x: Tensor) -> None:
    """`x` is of a dtype that attention computes with."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp64, fp32, bf16 or fp16, got {x.dtype}")


def _check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def _check_class(name: str, x: Tensor) -> None:
    """`x` is a plain tensor or a parameter, or one that holds no numbers (see `tracing`).

    Other subclasses are refused, even if they only override `__torch_function__`: kernels would ignore what they stand for.
    """
    kind = type(x)
    if kind is Tensor or kind is torch.nn.Parameter or x.is_nested or isinstance(x, TRACED):
        return
    if issubclass(kind, torch.nn.Parameter) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return
    if hasattr(x, "to_local"):
        remedy = f"pass this rank's part, {name}.to_local()"
    elif hasattr(x, "wait"):
        remedy = f"pass {name}.wait()"
    else:
        remedy = f"pass a plain tensor, for example {name}.as_subclass(torch.Tensor) if that means the same"
    raise TypeError(f"{name} must be a plain tensor, got {kind.__name__}: {remedy}")


def _wrong_shapes(q: torch.Size, k: torch.Size, v: torch.Size) -> str:
    """How three shapes `[tokens, heads, head size]` fail to match; empty if they match."""
    if not q[0] == k[0] == v[0]:
        return "q, k and v must have the same number of tokens"
    if k[1] != v[1]:
        return "k and v must have the same number of heads"
    if q[2] != k[2]:
        return "q and k must have the same head size"
    if q[1] % k[1]:
        return f"the q heads ({q[1]}) must be a multiple of the kv heads ({k[1]})"
    return ""


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    layout: SequenceLayout,
    group: dist.ProcessGroup | None,
    *,
    comm: str,
    head_parallel: int | None,
    workspace_bytes: int,
    exchange_bytes: int,
) -> None:
    """All checks that a rank can make alone. Raises TypeError or ValueError."""
    check_config(config)
    check_layout(layout)
    check_comm(comm, COMMS)
    check_integer("workspace_bytes", workspace_bytes, least=1)
    check_integer("exchange_bytes", exchange_bytes, least=0)
    check_tensors(q, k, v)
    refuse_transforms(q=q, k=k, v=v)
    backend_for(q.device, q.dtype).check_sizes(dim=q.shape[2], dim_v=v.shape[2], block_size=config.block_size)
    check_split(comm, head_parallel, q.shape[1], layout.cp_size)
    check_placement(q, layout, group)


def check_can_be_saved(gradients: bool, **tensors: Tensor) -> None:
    """If there will be a backward pass (`gradients`), autograd can keep the tensors for it."""
    for name, x in tensors.items():
        if gradients and x.is_inference():
            raise ValueError(
                f"gradients are wanted, and {name} was made under torch.inference_mode(): backward cannot keep it; pass "
                f"{name}.clone()"
            )


def check_flags(**flags: object) -> None:
    """Each of these arguments is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_capture(capturing: bool, layout: SequenceLayout) -> None:
    """No CUDA graph captures a call over several ranks. `capturing`: whether one captures this call."""
    if capturing and layout.cp_size > 1:
        raise ValueError(
            f"a CUDA graph can capture attention on one rank, got a layout for {layout.cp_size}: ranks agree on the host"
        )


def check_longest(max_seqlen: int, layout: SequenceLayout) -> None:
    """`max_seqlen` is at least the longest document of `layout`."""
    try:
        max_seqlen = operator.index(max_seqlen)
    except TypeError as error:
        raise TypeError(f"max_seqlen must be an int, got {max_seqlen!r}") from error
    longest = int(np.diff(layout.cu_seqlens_array).max(initial=0))
    if max_seqlen < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens has a document of {longest} tokens")


def check_integer(name: str, value: int, least: int) -> None:
    """`value` is an int, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_layout(layout: SequenceLayout) -> None:
    """`layout` is a `SequenceLayout`, which checks its own values."""
    if not isinstance(layout, SequenceLayout):
        raise TypeError(f"layout must be a SequenceLayout, got {type(layout).__name__}")


def check_comm(comm: str, known: tuple[str, ...]) -> None:
    """`comm` is one of the known transports."""
    if not isinstance(comm, str):
        raise TypeError(f"comm must be a string, got {comm!r}")
    if comm not in known:
        flat = ", ".join(name for name in known if not name.startswith(HEADS))
        heads = f"; {HEADS} and {HEADS}+<exchange> split heads" if HEADS in known else ""
        raise ValueError(f"comm must be one of {flat}; got {comm!r}{heads}")


def check_placement(q: Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None) -> None:
    """The group fits the layout and the device of q, and q holds this rank's tokens."""
    rank = _check_group(layout, group)
    if layout.cp_size > 1:
        _check_backend(group, q.device)
    check_tokens(q, layout, rank)


def check_config(config: MoBAConfig) -> None:
    """`config` is a `MoBAConfig`, which checks its own values."""
    if not isinstance(config, MoBAConfig):
        raise TypeError(f"config must be a MoBAConfig, got {type(config).__name__}")


def check_tokens(q: Tensor, layout: SequenceLayout, rank: int) -> None:
    """q holds the tokens that the layout gives the rank."""
    if q.shape[0] != layout.local_tokens(rank):
        raise ValueError(
            f"the layout gives rank {rank} {layout.local_tokens(rank)} tokens, but q has {q.shape[0]} ({layout})"
        )


def _check_group(layout: SequenceLayout, group: dist.ProcessGroup | None) -> int:
    """This rank in a group that fits the layout."""
    if group is None and layout.cp_size == 1:
        return 0
    check_group(group)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"the layout is for {layout.cp_size} ranks, but torch.distributed is not initialized: start with torchrun and call "
            "torch.distributed.init_process_group, or make the layout for cp_size=1"
        )
    size = dist.get_world_size(group)
    if size != layout.cp_size:
        raise ValueError(f"the layout is for {layout.cp_size} ranks, but the group has {size}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this rank does not belong to the group")
    return rank


def _check_backend(group: dist.ProcessGroup | None, device: torch.device) -> None:
    """The group can move tensors on `device`, as far as torch knows what the group was made with."""
    served = backends_of(group)
    if served and device.type not in served:
        raise ValueError(
            f"q, k and v are on {device}, but the group's backend serves {', '.join(map(':'.join, served.items()))}"
        )


def call_facts(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, comm: str, gradients: bool) -> dict[str, str]:
    """What all ranks must have in common in any call of attention, by name; `gradients`: whether there will be a backward."""
    return {
        "layout": f"{layout.digest.hex()} {layout!r}",
        "dtype": f"{q.dtype} on {q.device.type}",
        "heads and head sizes": f"Hq {q.shape[1]}, Hkv {k.shape[1]}, D {q.shape[2]}, Dv {v.shape[2]}",
        "comm": comm,
        "gradients": gradients_fact(gradients),
    }


def gradients_fact(wanted: bool) -> str:
    """Whether there will be a backward pass, for `agreement.check`."""
    return "wanted" if wanted else "not wanted"


class RefusedTogether:
    """Context in which what one rank refuses (TypeError, ValueError, NotImplementedError), all ranks of the call raise: see
    `parallel.agreement`. A class, as a generator costs each call microseconds.

    Args:
        layout, group: of the call.
        tensors: its tensors. Calls that are part of a recording (see `tracing.sends_nothing`) tell the other ranks nothing.
    """

    def __init__(self, layout: object, group: dist.ProcessGroup | None, *tensors: object) -> None:
        self._layout, self._group, self._tensors = layout, group, tensors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (TypeError, ValueError, NotImplementedError)):
            return
        if group_size(self._layout, self._group) > 1 and not sends_nothing(*self._tensors):
            group = self._group if isinstance(self._group, dist.ProcessGroup) else None
            agreement.refuse(group, error, self._tensors[0] if self._tensors else None)


def group_size(layout: object, group: object) -> int:
    """Ranks that a call would involve, as far as its arguments can be trusted: all, where not even the layout can be. What is no
    group stands for all ranks where the layout is for as many, else for 1: nobody knows who the others are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    if isinstance(group, dist.ProcessGroup):
        return group.size() if dist.get_rank(group) >= 0 else 1
    size = dist.get_world_size()
    ranks = layout.cp_size if isinstance(layout, SequenceLayout) else None
    if group is None:
        return 1 if ranks == 1 else size
    return size if ranks == size else 1
