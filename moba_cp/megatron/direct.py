"""The segments of a layer before and behind attention with their gradients written out: two autograd functions per layer.

Between matrices of 16K tokens a GPU waits for the host, which spends most of its time in autograd and in Megatron's linear
layers: a norm, a linear layer and a rotation are six autograd functions in the general path, and one here. Values are those of
the general path: the same kernels and products in the same order.

They know one tensor-parallel rank, RMSNorm and SwiGLU; :class:`moba_cp.megatron.layer.LongLayer` computes the general path
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_cp.derivatives import refuses_create_graph

from . import fused
from .recompute import Before, Source, chunks_of, recomputed_behind


@dataclass(frozen=True)
class Projection:
    """What stands before attention: norm, projection, split into heads, rotation.

    Attributes:
        norm, eps: weight ``[h]`` of the norm, and what it adds to the mean square.
        weight: ``[groups * (r + 2) * dim, h]`` of the projection.
        groups, dim: kv heads, and the head dimension.
        table: see `fused.split_rotate`.
    """

    norm: Tensor
    eps: float
    weight: Tensor
    groups: int
    dim: int
    table: tuple[Tensor, Tensor] | None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """In the order of their gradients."""
        return self.norm, self.weight

    def forward(self, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """q, k and v of the layer's input ``[s, b, h]``, and the normed input."""
        _, normed = fused.norm_pass(x, None, self.norm, self.eps)
        mixed = F.linear(normed, self.weight)
        return fused.split_rotate_pass(mixed, self.groups, self.dim, self.table), normed

    def backward(self, x: Tensor, normed: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the input and of `parameters`."""
        dmixed = fused.split_rotate_backward(dq, dk, dv, self.table).flatten(0, 1)
        dnormed = torch.mm(dmixed, self.weight).view_as(x)
        dweight = torch.mm(dmixed.t(), normed.flatten(0, 1))
        dx, dnorm = fused.norm_backward(x, self.norm, dnormed, None, self.eps)
        return dx, dnorm, dweight


@dataclass(frozen=True)
class Feed:
    """What stands behind attention: projection, residual, norm, SwiGLU between two matrices, residual.

    Attributes:
        projection: weight ``[h, heads * d]`` behind attention.
        norm, eps: weight ``[h]`` of the norm, and what it adds to the mean square.
        up, down: weights ``[2 f, h]`` and ``[h, f]`` of the MLP.
    """

    projection: Tensor
    norm: Tensor
    eps: float
    up: Tensor
    down: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """In the order of their gradients."""
        return self.projection, self.norm, self.up, self.down

    def body(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the layer's input and attention's output, as rows ``[n, ...]``: residual, normed residual, and the MLP's values in
        front of the activation and behind it."""
        residual, normed = fused.norm_pass(x, F.linear(out, self.projection), self.norm, self.eps)
        wide = F.linear(normed, self.up)
        return residual, normed, wide, fused.swiglu_pass(wide)

    def output(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output, of which nothing is kept."""
        residual, _, _, hidden = self.body(x, out)
        return residual.addmm_(hidden, self.down.t())

    def backward(
        self, out: Tensor, residual: Tensor, normed: Tensor, wide: Tensor, hidden: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of the layer's input, of attention's output and of `parameters`; all as rows."""
        ddown = torch.mm(dy.t(), hidden)
        dwide = fused.swiglu_backward(wide, torch.mm(dy, self.down))
        dup = torch.mm(dwide.t(), normed)
        dx, dnorm = fused.norm_backward(residual, self.norm, torch.mm(dwide, self.up), dy, self.eps)
        return dx, torch.mm(dx, self.projection), [torch.mm(dx.t(), out), dnorm, dup, ddown]


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segment: Projection, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous()
        outputs, normed = segment.forward(x)
        ctx.segment = segment
        ctx.save_for_backward(x, normed, *parameters)  # parameters, so that autograd finds that they were changed
        return outputs

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, normed, *_ = ctx.saved_tensors
        return None, *ctx.segment.backward(x, normed, dq, dk, dv)


class _Feed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segment: Feed, x: Tensor, out: Tensor, *parameters: Tensor) -> Tensor:
        flat = out.flatten(0, 1)
        residual, normed, wide, hidden = segment.body(x.flatten(0, 1), flat)
        ctx.segment, ctx.shapes = segment, (x.shape, out.shape)
        ctx.save_for_backward(flat, residual, normed, wide, hidden, *parameters)
        return torch.addmm(residual, hidden, segment.down.t()).view_as(x)

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_out = ctx.shapes
        dx, dout, found = ctx.segment.backward(*ctx.saved_tensors[:5], dy.flatten(0, 1))
        return None, dx.view(of_x), dout.view(of_out), *found


def project(segment: Projection, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of the layer's input ``[s, b, h]``, as from `fused.split_rotate`; differentiable in it and the parameters."""
    return _Project.apply(segment, x, *segment.parameters)


def feed(segment: Feed, x: Tensor, out: Tensor) -> Tensor:
    """The layer's output of its input ``[s, b, h]`` and attention's output ``[s, b, heads * d]``; differentiable in both and
    the parameters. Without gradients nothing is kept."""
    if not torch.is_grad_enabled():
        return segment.output(x.flatten(0, 1), out.flatten(0, 1)).view_as(x)
    return _Feed.apply(segment, x, out, *segment.parameters)


class DirectBefore(Before):
    """`recompute.Before` of a `Projection`: no graph is recorded, neither in forward nor in the recomputation."""

    def __init__(self, segment: Projection, source: Source) -> None:
        super().__init__(lambda x: segment.forward(x.contiguous())[0], source)
        self.segment = segment
        self._normed: Tensor | None = None

    def recomputed(self) -> tuple[Tensor, ...]:
        """The outputs again, and the normed input; kept until `backward`."""
        if self._outputs is None:
            self._outputs, self._normed = self.segment.forward(self.source.get().contiguous())
        return self._outputs

    def backward(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the layer's input and the parameters."""
        outputs = self.recomputed()
        assert self._normed is not None
        dq, dk, dv = (torch.zeros_like(y) if dy is None else dy for y, dy in zip(outputs, gradients, strict=True))
        found = self.segment.backward(self.source.get().contiguous(), self._normed, dq, dk, dv)
        self._outputs = self._normed = None
        self.source.release()
        return list(found)


class DirectBehind:
    """`recompute.Behind` of a `Feed`: gradients of a chunk without a graph.

    Args:
        segment: what is computed.
        chunk: rows of a chunk; 0 for all at once.
    """

    def __init__(self, segment: Feed, chunk: int) -> None:
        self.segment, self.chunk = segment, chunk

    def output(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output for its input ``[s, b, h]`` and attention's ``[s, b, heads * d]``; without a graph."""
        chunks = chunks_of(len(x), self.chunk)
        if len(chunks) == 1:
            return self.segment.output(x.flatten(0, 1), out.flatten(0, 1)).view_as(x)
        y = torch.empty_like(x)
        for rows in chunks:
            y[rows] = self.segment.output(x[rows].flatten(0, 1), out[rows].flatten(0, 1)).view_as(x[rows])
        return y

    def run(self, source: Source, x: Tensor, out: Tensor) -> Tensor:
        """The same, of which autograd keeps only ``out``."""
        return recomputed_behind(self, source, x, out, self.segment.parameters, ())

    def chunk_backward(
        self, x: Tensor, out: Tensor, dy: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a chunk's inputs and of the parameters."""
        flat = out.flatten(0, 1)
        dx, dout, found = self.segment.backward(flat, *self.segment.body(x.flatten(0, 1), flat), dy.flatten(0, 1))
        return dx.view_as(x), dout.view_as(out), *found
