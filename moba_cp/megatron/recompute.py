"""Recomputation of a layer that leaves attention out: what stands before it and behind it is computed again, attention is not.

A layer is two segments around attention::

    x --[ norm, projection, rotary embedding ]-- q, k, v --( attention )-- out --[ projection, residual, norm, MLP ]-- y
            Before                                                                  Behind, in chunks of tokens

Between forward and backward a layer keeps its input ``x`` (on the device or on the host), ``out``, and what attention saves
besides its inputs: log-sum-exps and selected blocks. ``q``, ``k`` and ``v`` are not kept. Where attention saves them, a token is
saved in their place; when backward asks for them, `Before` is computed again. `Behind` works on chunks of tokens in both
directions, so no intermediate of the MLP exists for all tokens.

A recomputed value has the bits of the first one: the same functions of the same values, in the same chunks. There are no second
derivatives: backward refuses `create_graph=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moba_cp.derivatives import refuses_create_graph


class Source(Protocol):
    """Where a layer's input is between forward and backward."""

    def get(self) -> Tensor:
        """The input, on the device; without a graph."""

    def release(self) -> None:
        """The layer's backward pass is over."""


class OnDevice:
    """The input itself, kept."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()

    def get(self) -> Tensor:
        """See `Source`."""
        return self._x

    def release(self) -> None:
        """Autograd frees it with the graph."""


@dataclass(frozen=True)
class _Token:
    """Stands where attention saved an output of `Before`, or a view of one."""

    output: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class Before:
    """The segment before attention.

    Attributes:
        compute: from the layer's input to its outputs; the same bits each time.
        source: the layer's input.
    """

    compute: Callable[[Tensor], tuple[Tensor, ...]]
    source: Source
    _leaf: Tensor | None = None
    _outputs: tuple[Tensor, ...] | None = None  # of the recomputation, with its graph
    _storages: dict[int, int] = field(default_factory=dict)  # address of an output's storage -> its number

    def run(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs for the layer's input, differentiable in it and in the segment's parameters."""
        outputs: tuple[Tensor, ...] = _BeforeFunction.apply(self, x, *parameters)
        self._storages = {y.untyped_storage().data_ptr(): n for n, y in reversed(list(enumerate(outputs)))}
        return outputs

    def saving(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which autograd keeps tokens in place of the latest outputs, and everything else as always. Leave the
        outputs alive until its end."""
        outputs = self._storages

        def pack(x: Tensor) -> Any:
            number = outputs.get(x.untyped_storage().data_ptr())
            return x if number is None else _Token(number, x.size(), x.stride(), int(x.storage_offset()))

        def unpack(saved: Any) -> Tensor:
            if not isinstance(saved, _Token):
                return saved
            output = self.recomputed()[saved.output].detach()
            return output.as_strided(saved.size, saved.stride, saved.offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def recomputed(self) -> tuple[Tensor, ...]:
        """The outputs again, with a graph that ends at the layer's input; kept until `backward`."""
        if self._outputs is None:
            self._leaf = self.source.get().detach().requires_grad_()
            with torch.enable_grad(), _nothing_packed():
                self._outputs = self.compute(self._leaf)
        return self._outputs

    def backward(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the layer's input and the parameters."""
        outputs = self.recomputed()
        assert self._leaf is not None
        found = _gradients(outputs, [self._leaf, *parameters], gradients)
        self._leaf = self._outputs = None
        self.source.release()
        return found


class _BeforeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, segment: Before, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.segment, ctx.parameters = segment, parameters
        ctx.save_for_backward(*parameters)  # so that autograd finds that they were changed before backward
        return segment.compute(x)

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return None, *ctx.segment.backward(ctx.parameters, gradients)


@dataclass(frozen=True)
class Behind:
    """The segment behind attention.

    Attributes:
        body: from a chunk of the layer's input and of attention's output to the residual and the input of the last matrix.
        finish: from these two to the layer's output; may overwrite the residual where no graph is recorded.
        finish_backward: gradients of the two and of ``last`` from the output's, without the output; None: through autograd.
        last: the parameters of `finish` that `finish_backward` gives gradients of.
        chunk: rows of a chunk; 0 for all at once.
    """

    body: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    finish: Callable[[Tensor, Tensor], Tensor]
    finish_backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, list[Tensor]]] | None
    last: Sequence[Tensor]
    chunk: int

    def output(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output for its input ``[s, b, h]`` and attention's ``[s, b, h']``; with a graph if one is recorded."""
        chunks = chunks_of(len(x), self.chunk)
        if len(chunks) == 1:
            return self.finish(*self.body(x, out))
        if torch.is_grad_enabled():
            return torch.cat([self.finish(*self.body(x[rows], out[rows])) for rows in chunks])
        y = torch.empty_like(x)
        for rows in chunks:
            y[rows] = self.finish(*self.body(x[rows], out[rows]))
        return y

    def run(self, source: Source, x: Tensor, out: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The same, of which autograd keeps only ``out``; ``parameters`` are those of `body`."""
        return recomputed_behind(self, source, x, out, parameters, self.last)

    def chunk_backward(
        self, x: Tensor, out: Tensor, dy: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a chunk's inputs, of ``parameters`` and of ``last``."""
        x, out = x.detach().requires_grad_(), out.detach().requires_grad_()
        with torch.enable_grad():
            residual, hidden = self.body(x, out)
            if self.finish_backward is None:
                y = self.finish(residual, hidden)
        if self.finish_backward is None:
            return tuple(_gradients([y], [x, out, *parameters, *self.last], [dy]))
        dresidual, dhidden, of_last = self.finish_backward(hidden.detach(), dy)
        found = _gradients([residual, hidden], [x, out, *parameters], [dresidual, dhidden])
        return *found, *of_last


class InRows(Protocol):
    """A segment behind attention that works on chunks of rows; see `Behind`."""

    @property
    def chunk(self) -> int:
        """Rows of a chunk; 0 for all at once."""

    def output(self, x: Tensor, out: Tensor) -> Tensor:
        """The layer's output."""

    def chunk_backward(
        self, x: Tensor, out: Tensor, dy: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a chunk's inputs and of all parameters."""


def recomputed_behind(
    segment: InRows, source: Source, x: Tensor, out: Tensor, parameters: Sequence[Tensor], last: Sequence[Tensor]
) -> Tensor:
    """The segment's output, of which autograd keeps only ``out``; ``parameters`` are those that `chunk_backward` takes."""
    return _BehindFunction.apply(segment, source, len(parameters), x, out, *parameters, *last)


class _BehindFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, segment: InRows, source: Source, count: int, x: Tensor, out: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.segment, ctx.source, ctx.count, ctx.parameters = segment, source, count, parameters
        ctx.save_for_backward(out, *parameters)
        return segment.output(x, out)

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        segment, (out, *_), x = ctx.segment, ctx.saved_tensors, ctx.source.get()
        parameters, chunks = ctx.parameters[: ctx.count], chunks_of(len(dy), segment.chunk)
        if len(chunks) == 1:
            return None, None, None, *segment.chunk_backward(x, out, dy, parameters)
        dx, dout = torch.empty_like(x), torch.empty_like(out)
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for rows in chunks:
            dx_chunk, dout_chunk, *found = segment.chunk_backward(x[rows], out[rows], dy[rows], parameters)
            dx[rows], dout[rows] = dx_chunk, dout_chunk
            del dx_chunk, dout_chunk
            sums = [_add(total, gradient) for total, gradient in zip(sums, found, strict=True)]
        rounded = (None if s is None else s.to(p.dtype) for s, p in zip(sums, ctx.parameters, strict=True))
        return None, None, None, dx, dout, *rounded


class InChunks:
    """A function of tokens, one output row per input row, computed chunk by chunk in forward and again in backward.

    Args:
        compute: from chunks of the inputs to a chunk of the output; rows are dimension 0 of all of them.
        chunk: rows of a chunk; 0 for all at once.
    """

    def __init__(self, compute: Callable[..., Tensor], chunk: int) -> None:
        self.compute, self.chunk = compute, chunk

    def __call__(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """The output for all rows; between forward and backward only the inputs are kept."""
        if not torch.is_grad_enabled():
            return self.output(inputs)
        return _InChunksFunction.apply(self, len(inputs), *inputs, *parameters)

    def output(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, without a graph."""
        return torch.cat([self.compute(*(x[rows] for x in inputs)) for rows in chunks_of(len(inputs[0]), self.chunk)])


class _InChunksFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: InChunks, count: int, *tensors: Tensor) -> Tensor:
        ctx.whole, ctx.parameters = whole, tensors[count:]
        ctx.count = count
        ctx.save_for_backward(*tensors)
        return whole.output(tensors[:count])

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inputs, whole = ctx.saved_tensors[: ctx.count], ctx.whole
        moving = [x for x in inputs if x.is_floating_point()]
        results = [torch.empty_like(x) for x in moving]
        sums: list[Tensor | None] = [None] * len(ctx.parameters)
        for rows in chunks_of(len(dy), whole.chunk):
            leaves = [x[rows].detach().requires_grad_(x.is_floating_point()) for x in inputs]
            with torch.enable_grad():
                y = whole.compute(*leaves)
            of = [x for x in leaves if x.requires_grad]
            found = _gradients([y], [*of, *ctx.parameters], [dy[rows]])
            for result, gradient in zip(results, found, strict=False):
                result[rows] = 0 if gradient is None else gradient
            sums = [_add(total, gradient) for total, gradient in zip(sums, found[len(of) :], strict=True)]
        rounded = (None if s is None else s.to(p.dtype) for s, p in zip(sums, ctx.parameters, strict=True))
        of_inputs = iter(results)
        return None, None, *(next(of_inputs) if x.is_floating_point() else None for x in inputs), *rounded


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """`torch.autograd.grad` for outputs that have a graph and a gradient; None for what needs none."""
    pairs = [(y, dy) for y, dy in zip(outputs, gradients, strict=True) if dy is not None and y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    ys, dys = zip(*pairs, strict=True) if pairs else ((), ())
    found = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True) if pairs else [None] * len(wanted))
    return [next(found) if x.requires_grad else None for x in inputs]


def chunks_of(rows: int, chunk: int) -> list[slice]:
    """Chunks of so many rows each, the last one shorter; one if ``chunk`` is 0."""
    step = chunk or max(rows, 1)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)] or [slice(0, 0)]


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Sum over chunks, in fp32 where the gradient has less."""
    if gradient is None:
        return total
    if gradient.dtype not in (torch.bfloat16, torch.float16):
        return gradient if total is None else total + gradient
    return gradient.float() if total is None else total.add_(gradient)  # the first line made it, so it is no one else's


def _nothing_packed() -> torch.autograd.graph.saved_tensors_hooks:
    """Hooks that save tensors as they are, in place of those that a caller may have set: what is recomputed is used at once."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
