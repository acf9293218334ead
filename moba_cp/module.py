"""MoBA attention as a module without parameters, for models under FSDP2 and `torch.compile`."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .attention import moba_attention
from .compiled import are_tensors, fits_a_graph
from .config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES, MoBAConfig
from .parallel import agreement
from .parallel.comm import check_group, process_group_of
from .parallel.layout import SequenceLayout
from .parallel.outside_graphs import outside_graphs
from .parallel.partition import Kind, head_of_description
from .parallel.plan_cache import PLANS, Memo
from .parallel.splits import COMMS, check_split
from .tracing import sends_nothing
from .validation import check_comm, check_config, check_integer, check_layout, check_tensor


class MoBAAttention(nn.Module):
    """`moba_attention` over a context-parallel group, with the layout of its inputs.

    Takes q, k, v of this rank's tokens as `[T, H, D]` in the order of `layout`; or as `[B, L, H, D]`, a batch of B sequences of
    which each rank holds L tokens. Without a layout, each sequence is a document whose tokens are dealt as `batch_layout` says:
    as by the head-tail load balancer of torch and torchtitan.

    Args:
        config: block size, top-k and scale.
        group: the context-parallel group, or a `DeviceMesh` of one dimension such as `mesh["cp"]`; None: one rank holds all.
        comm, head_parallel, workspace_bytes, exchange_bytes: as for `moba_attention`.
        layout: which rank holds which tokens, for as many ranks as `group` has; may be set later, or for each call. See
            `set_layout`.

    Raises:
        TypeError, ValueError: an argument is not as said.
    """

    def __init__(
        self,
        config: MoBAConfig,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        comm: str = "auto",
        head_parallel: int | None = None,
        layout: SequenceLayout | None = None,
        workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
        exchange_bytes: int = DEFAULT_EXCHANGE_BYTES,
    ) -> None:
        super().__init__()
        check_config(config)
        check_comm(comm, COMMS)
        check_integer("workspace_bytes", workspace_bytes, least=1)
        check_integer("exchange_bytes", exchange_bytes, least=0)
        self.config, self.comm = config, comm
        self.group = process_group_of(group)
        check_group(self.group)
        self.cp_size = 1 if self.group is None else dist.get_world_size(self.group)
        self.cp_rank = 0 if self.group is None else dist.get_rank(self.group)
        check_split(comm, head_parallel, None, self.cp_size)
        self.head_parallel, self.workspace_bytes, self.exchange_bytes = head_parallel, workspace_bytes, exchange_bytes
        _check_fits(layout, self)
        self.layout = layout

    def __deepcopy__(self, memo: dict[int, Any]) -> MoBAAttention:
        """A copy with the same process group, as for averaged weights: groups cannot be copied."""
        if self.group is not None:
            memo[id(self.group)] = self.group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, layout: SequenceLayout | None = None) -> Tensor:
        """Attention of this rank's tokens.

        Args:
            q: `[T, Hq, D]` or `[B, L, Hq, D]`.
            k, v: `[T, Hkv, D]`, `[T, Hkv, Dv]`, or likewise `[B, L, Hkv, ...]`.
            layout: of this call, instead of the module's.

        Returns:
            `[T, Hq, Dv]` or `[B, L, Hq, Dv]`.

        Raises:
            TypeError, ValueError: as `moba_attention`, on every rank; or there is no layout for `[T, H, D]`; or the samples of a
                batch differ.
        """
        return self._forward(q, k, v, self.config, layout)

    def _forward(self, q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, layout: SequenceLayout | None) -> Tensor:
        if torch.compiler.is_compiling() and not self._can_be_traced(q, k, v, config, layout):
            return _forward_outside_the_graph(self, q, k, v, config, layout)
        try:
            layout = self._checked_layout(q, k, v, self.layout if layout is None else layout)
        except (TypeError, ValueError) as error:
            self._tell(error, q, k, v)
            raise
        if q.dim() != 4:
            return self._attend(q, k, v, config, layout)
        out = self._attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), config, layout)
        return out.unflatten(0, q.shape[:2])

    def _can_be_traced(
        self, q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, layout: SequenceLayout | None
    ) -> bool:
        """Whether `_checked_layout` will accept the inputs, and a graph holds a call with a layout that the module makes. What is
        refused, is refused outside of the graph, where the other ranks learn of it."""
        if not are_tensors(q, k, v):
            return False
        if q.dim() != 4:
            return layout is not None or self.layout is not None
        alike = k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
        return alike and fits_a_graph(config.topk, self.comm)

    def _tell(self, error: Exception, *tensors: Tensor) -> None:
        """Let the other ranks raise too what this one refuses."""
        if self.cp_size > 1 and not torch.compiler.is_compiling() and not sends_nothing(*tensors):
            agreement.refuse(self.group, error, tensors[0])

    def _checked_layout(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout | None) -> SequenceLayout:
        """The layout of the inputs, of which what `moba_attention`, which sees flat tokens, would not find is refused."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, x)
        if q.dim() != 4:
            if layout is None:
                raise ValueError(
                    f"q, k, v [tokens, heads, head size] need a layout, got {tuple(q.shape)} and layout None"
                )
            return layout
        if k.dim() != 4 or v.dim() != 4 or not q.shape[:2] == k.shape[:2] == v.shape[:2]:
            raise ValueError(
                "q, k and v [B, L, heads, head size] must have the same batch and length, got "
                f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
            )
        return self._batch_layout(*q.shape[:2]) if layout is None else layout

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, layout: SequenceLayout) -> Tensor:
        return moba_attention(
            q, k, v, config, layout=layout, group=self.group, comm=self.comm, head_parallel=self.head_parallel,
            workspace_bytes=self.workspace_bytes, exchange_bytes=self.exchange_bytes,
        )  # fmt: skip

    def _batch_layout(self, batch: int, length: int) -> SequenceLayout:
        if not torch.compiler.is_compiling():
            return batch_layout(batch, length * self.cp_size, self.cp_size)
        # A graph takes a layout as numbers, and makes these for any batch and length.
        head = int(head_of_description(Kind.ZIGZAG_PER_DOCUMENT, self.cp_size))
        starts = torch.arange(batch + 1, device="cpu") * (length * self.cp_size)
        description = torch.cat([torch.tensor([head], device="cpu"), starts])
        return _Described(description)  # type: ignore[return-value]

    def shard(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tokens of this rank out of a tensor of all tokens, along `dim`: what the module's inputs are made of.

        Raises:
            ValueError: the module has no layout, or `x` has another number of tokens.
        """
        if self.layout is None:
            raise ValueError("the module has no layout to shard by: set one, see set_layout")
        return self.layout.shard(x, self.cp_rank, dim)

    def extra_repr(self) -> str:
        return f"{self.config}, cp_size={self.cp_size}, comm={self.comm!r}"


_forward_outside_the_graph = outside_graphs(MoBAAttention._forward)


@dataclass(frozen=True)
class _Described:
    """Stands for a layout while a graph is recorded, which reads nothing else of one."""

    described: Tensor


def batch_layout(batch: int, length: int, cp_size: int) -> SequenceLayout:
    """The layout of `batch` sequences of `length` tokens, each cut into `2 * cp_size` chunks of which rank r holds chunks r and
    `2 * cp_size - 1 - r`: torch's head-tail load balancer. Kept in `plan_cache.PLANS`.

    Raises:
        TypeError, ValueError: an argument is no int, or too small; or the chunks are not equally long, as that balancer has them.
    """
    for name, value, least in (("batch", batch, 0), ("length", length, 0), ("cp_size", cp_size, 1)):
        check_integer(name, value, least)
    if length % (2 * cp_size) and cp_size > 1:
        raise ValueError(f"sequences over {cp_size} ranks must be multiples of {2 * cp_size} tokens long, got {length}")
    make = lambda: SequenceLayout.zigzag([row * length for row in range(batch + 1)], cp_size)  # noqa: E731
    return PLANS.get(("layout of a batch", batch, length, cp_size), Memo).get("layout", make)


def _check_fits(layout: SequenceLayout | None, module: MoBAAttention) -> None:
    """`layout` is None, or a layout for as many ranks as the module has."""
    if layout is None:
        return
    check_layout(layout)
    if module.cp_size != layout.cp_size:
        raise ValueError(f"the layout is for {layout.cp_size} ranks, but a module's group has {module.cp_size}")


def set_layout(model: nn.Module, layout: SequenceLayout | None) -> int:
    """Give all `MoBAAttention` modules in `model` the layout of the next step; how many there are.

    Call it after the backward passes of the step before: activation checkpointing computes forward again with the layout that is
    set by then. torch refuses another one with `use_reentrant=False`; the reentrant form cannot tell.

    Raises:
        TypeError: `model` is no module; or `layout` is no `SequenceLayout`, nor None.
        ValueError: there is no such module in it, or the layout is for another number of ranks than one of them has.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    modules = [module for module in model.modules() if isinstance(module, MoBAAttention)]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no MoBAAttention module")
    for module in modules:
        _check_fits(layout, module)
    for module in modules:
        module.layout = layout
    return len(modules)
