"""What a transformer computes between its matrices, each in one pass over memory on GPUs: without Transformer Engine, apex or a
compiler.

On GPUs these are the Triton kernels of :mod:`.fused_kernels`; elsewhere the same formulas in torch, in the inputs' dtype.
The kernels are differentiable once, and refuse `create_graph=True`. Tensors are made contiguous where a kernel needs it.

`rms_norm`, `add_rms_norm`, `swiglu` and `split_rotate` are for autograd. Functions named ``..._pass`` and ``..._backward`` are
the two directions by themselves, for :mod:`.direct`, which writes the gradients of whole segments out.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_cp.derivatives import refuses_create_graph
from moba_cp.kernels.launch import launch_kernel
from moba_cp.kernels.sizes import next_power_of_2

from . import fused_kernels as kernels

_PROGRAMS = 2048
"""Programs of a norm's backward pass, each with partial sums of the weight's gradient; fixed, so bits are those of any GPU."""
_COLUMNS = 512


def runs_kernels(x: Tensor) -> bool:
    """Whether a tensor goes to the kernels: on GPUs, and on CPU under Triton's interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension.

    Args:
        x: ``[..., h]``.
        weight: ``[h]``.
        eps: added to the mean square.
    """
    if runs_kernels(x):
        return _RmsNorm.apply(x, weight, eps)
    # The view sums the norm's own contributions to the gradient of x, so that x gets one, as from the kernel.
    return F.rms_norm(x.view_as(x), weight.shape, weight, eps)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x + y`` (rounded to the dtype of ``x``), and its norm as in :func:`rms_norm`.

    Args:
        x, y: ``[..., h]`` of one shape and dtype.
        weight: ``[h]``.
        eps: added to the mean square.
    """
    if runs_kernels(x):
        return _AddRmsNorm.apply(x, y, weight, eps)
    total = x + y
    return total, F.rms_norm(total, weight.shape, weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` for ``x = [gate, up]``: ``[..., 2 f]`` to ``[..., f]``."""
    if runs_kernels(x):
        return _SwiGLU.apply(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Megatron's cross entropy of a whole vocabulary, without copies of the logits in fp32.

    Args:
        logits: ``[..., vocabulary]``.
        labels: int64 ``[...]``. One outside the vocabulary has the loss of the largest logit, and no gradient of its own.

    Returns:
        fp32 ``[...]``; in torch for fp64 fp64.
    """
    if runs_kernels(logits):
        return _CrossEntropy.apply(logits, labels)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = (labels >= 0) & (labels < logits.size(-1))
    wanted = wide.gather(-1, labels.where(known, 0).unsqueeze(-1)).squeeze(-1)
    return wide.logsumexp(-1) - wanted.where(known, wide.detach().amax(-1))


def split_rotate(
    mixed: Tensor, groups: int, dim: int, table: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of Megatron's fused projection, with rotary embedding (halves, not interleaved).

    Args:
        mixed: ``[s, b, groups * (r + 2) * dim]``: per kv head its ``r`` q heads, its key, its value.
        groups: kv heads.
        dim: head dimension.
        table: cosine and sine, fp32 (fp64 for fp64) ``[s, m]`` with ``2 m <= dim``: the first ``2 m`` dimensions rotate.
            None: nothing does.

    Returns:
        q ``[s, b, groups * r, dim]``, k ``[s, b, groups, dim]``, and v of the same shape, which is a view of ``mixed``.
    """
    if table is not None and runs_kernels(mixed):
        return _SplitRotate.apply(mixed, *table, groups, dim)
    return _split_rotate(mixed, groups, dim, table)


def rotation_table(freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[s, m]`` of Megatron's rotary angles ``[s, 1, 1, 2 m]``, whose halves are equal; fp32, for fp64 fp64."""
    angles = freqs[:, 0, 0, : freqs.size(-1) // 2]
    angles = angles.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return angles.cos().contiguous(), angles.sin().contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``[s, b, heads, d]`` with its first dimensions rotated by a table of :func:`rotation_table`; in torch."""
    half = cos.size(1)
    first, second, rest = x.split([half, half, x.size(-1) - 2 * half], -1)
    cos, sin = cos[:, None, None].to(x.dtype), sin[:, None, None].to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def norm_pass(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of ``x`` and ``y`` (without ``y``: ``x``), contiguous, and its norm; without a graph. Arguments as of
    `add_rms_norm`; both results are ``[..., h]`` in the dtype of ``x``.

    Raises:
        ValueError: ``y`` is not like ``x``.
    """
    if y is not None and (x.shape != y.shape or x.dtype != y.dtype):
        raise ValueError(f"x and y must be alike, got {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}")
    x = x.contiguous()
    if not runs_kernels(x):
        total = x if y is None else x + y
        return total, F.rms_norm(total, weight.shape, weight, eps)
    rows, width = x.numel() // x.size(-1), x.size(-1)
    normed = torch.empty_like(x)
    total, other = (x, x) if y is None else (torch.empty_like(x), y.contiguous())
    _launch(
        kernels.rms_norm_kernel, (rows,), x, other, weight, total, normed, eps,
        WIDTH=width, ADD=y is not None, **_row_options(width),
    )  # fmt: skip
    return total, normed


def norm_backward(
    total: Tensor, weight: Tensor, dnormed: Tensor, dtotal: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and of the weight.

    Args:
        total: what was normed, contiguous.
        weight, eps: of the norm.
        dnormed: gradient of the norm's result.
        dtotal: another gradient of ``total``, which is added; or None.

    Raises:
        ValueError: ``total`` is not contiguous.
    """
    _check_contiguous(total=total)
    width = total.size(-1)
    if not runs_kernels(total):
        wide = torch.promote_types(total.dtype, torch.float32)
        x, dy = total.to(wide), dnormed.to(wide)
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        weighted = dy * weight.to(wide)
        dx = scale * (weighted - x * scale.square() * (weighted * x).mean(-1, keepdim=True))
        if dtotal is not None:
            dx += dtotal.to(wide)
        return dx.to(total.dtype), (dy * x * scale).flatten(0, -2).sum(0).to(weight.dtype)
    rows = total.numel() // width
    programs = min(_PROGRAMS, rows)
    dx = torch.empty_like(total)
    partial = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    dnormed = dnormed.contiguous()
    added = dnormed if dtotal is None else dtotal.contiguous()
    _launch(
        kernels.rms_norm_backward_kernel, (programs,), total, weight, dnormed, added, dx, partial, rows, eps,
        WIDTH=width, ADD=dtotal is not None, **_row_options(width),
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


def swiglu_pass(x: Tensor) -> Tensor:
    """`swiglu` without a graph: ``[..., 2 f]`` to ``[..., f]``.

    Raises:
        ValueError: ``x`` is not contiguous.
    """
    _check_contiguous(x=x)
    if not runs_kernels(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    width = x.size(-1) // 2
    y = x.new_empty(*x.shape[:-1], width)
    grid = (x.numel() // (2 * width), -(-width // _COLUMNS))
    _launch(kernels.swiglu_kernel, grid, x, y, WIDTH=width, COLUMNS=_COLUMNS, num_warps=2)
    return y


def swiglu_backward(x: Tensor, dy: Tensor) -> Tensor:
    """Gradient ``[..., 2 f]`` of `swiglu`'s input ``x``; ``dy`` is ``[..., f]``.

    Raises:
        ValueError: ``x`` is not contiguous.
    """
    _check_contiguous(x=x)
    if not runs_kernels(x):
        gate, up = x.chunk(2, -1)
        sigmoid = gate.sigmoid()
        return torch.cat([dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid], -1)
    width = x.size(-1) // 2
    dx = torch.empty_like(x)
    grid = (x.numel() // (2 * width), -(-width // _COLUMNS))
    _launch(kernels.swiglu_backward_kernel, grid, x, dy.contiguous(), dx, WIDTH=width, COLUMNS=_COLUMNS, num_warps=2)
    return dx


def split_rotate_pass(
    mixed: Tensor, groups: int, dim: int, table: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_rotate` without a graph: the same shapes.

    Raises:
        ValueError: the table has another number of rows than `mixed` has tokens, or rotates more dimensions than a head has; or
            ``mixed`` or the table is not contiguous.
    """
    _check_contiguous(mixed=mixed, **_named(table))
    if table is None or not runs_kernels(mixed):
        return _split_rotate(mixed, groups, dim, table)
    cos, sin = table
    length, batch, width = mixed.shape
    group = width // (groups * dim) - 2
    if cos.size(0) != length or 2 * cos.size(1) > dim:
        raise ValueError(f"{length} rows with heads of {dim} do not fit a rotation table of {tuple(cos.shape)}")
    q = mixed.new_empty(length, batch, groups * group, dim)
    k = mixed.new_empty(length, batch, groups, dim)
    _launch(
        kernels.split_rotate_kernel, (length * batch,), mixed, cos, sin, q, k, batch,
        **_rotary_sizes(group, groups, dim, cos.size(1)), num_warps=2,
    )  # fmt: skip
    return q, k, mixed.view(length, batch, groups, group + 2, dim)[..., group + 1, :]


def split_rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
    """Gradient of `split_rotate`'s input, from those of its outputs; shapes as there.

    Raises:
        ValueError: the table is not contiguous.
    """
    _check_contiguous(**_named(table))
    length, batch, groups, dim = dk.shape
    group = dq.size(2) // groups
    if table is None or not runs_kernels(dq):
        if table is not None:
            cos, sin = table
            dq, dk = rotate(dq, cos, -sin), rotate(dk, cos, -sin)
        parts = [dq.unflatten(2, (groups, group)), dk.unsqueeze(3), dv.unsqueeze(3)]
        return torch.cat(parts, 3).flatten(2)
    cos, sin = table
    dq, dk, dv = (_rows_of_heads(x) for x in (dq, dk, dv))
    dmixed = dq.new_empty(length, batch, groups * (group + 2) * dim)
    strides = [x.stride(n) for x in (dq, dk, dv) for n in (0, 1)]
    _launch(
        kernels.split_rotate_backward_kernel, (length * batch,), dq, dk, dv, cos, sin, dmixed, batch, *strides,
        **_rotary_sizes(group, groups, dim, cos.size(1)),
        GROUPS_PADDED=next_power_of_2(groups), DIM_PADDED=next_power_of_2(dim), num_warps=2,
    )  # fmt: skip
    return dmixed


def _split_rotate(
    mixed: Tensor, groups: int, dim: int, table: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    by_group = mixed.unflatten(-1, (groups, -1, dim))
    q, k, v = by_group[..., :-2, :].flatten(2, 3), by_group[..., -2, :], by_group[..., -1, :]
    return (q, k, v) if table is None else (rotate(q, *table), rotate(k, *table), v)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, normed = norm_pass(x, None, weight, eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return normed

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dnormed: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *norm_backward(x, weight, dnormed, None, ctx.eps), None


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = norm_pass(x, y, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, normed

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dtotal: Tensor, dnormed: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight = ctx.saved_tensors
        dx, dweight = norm_backward(total, weight, dnormed, dtotal, ctx.eps)
        return dx, dx, dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return swiglu_pass(x)

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return swiglu_backward(x, dy)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != logits.shape[:-1] or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 of shape {tuple(logits.shape[:-1])}, got {labels.dtype} {tuple(labels.shape)}"
            )
        logits, labels = logits.contiguous(), labels.contiguous()
        loss, sums = torch.empty(2, *labels.shape, dtype=torch.float32, device=logits.device)
        sizes = _loss_sizes(logits.size(-1))
        _launch(kernels.cross_entropy_kernel, (labels.numel(),), logits, labels, loss, sums, **sizes)
        ctx.save_for_backward(logits, labels, sums)
        return loss

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        logits, labels, sums = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        sizes = _loss_sizes(logits.size(-1))
        grid = (labels.numel(), -(-sizes["VOCAB"] // sizes["BLOCK"]))
        _launch(kernels.cross_entropy_backward_kernel, grid, logits, labels, sums, dloss.contiguous(), dlogits, **sizes)
        return dlogits, None


class _SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, groups: int, dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return split_rotate_pass(mixed.contiguous(), groups, dim, (cos, sin))

    @staticmethod
    @refuses_create_graph
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None]:
        return split_rotate_backward(dq, dk, dv, ctx.saved_tensors), None, None, None, None


def _named(table: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    return {} if table is None else {"cos": table[0], "sin": table[1]}


def _check_contiguous(**tensors: Tensor) -> None:
    """On the CPU too, where nothing depends on it: the kernels read rows one behind another."""
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got shape {tuple(x.shape)} with strides {x.stride()}")


def _rows_of_heads(x: Tensor) -> Tensor:
    """``[s, b, heads, d]`` as ``[s * b, heads, d]`` with dense heads; a view where there is one."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _rotary_sizes(group: int, groups: int, dim: int, half: int) -> dict[str, int]:
    return {
        "GROUP": group,
        "GROUPS": groups,
        "HEADS_PADDED": next_power_of_2(groups * (group + 1)),
        "DIM": dim,
        "HALF": half,
        "HALF_PADDED": next_power_of_2(half),
        "REST_PADDED": next_power_of_2(dim - 2 * half) if dim > 2 * half else 0,
    }


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`launch_kernel`, but for torch.compile, which knows Triton's own launches."""
    if torch.compiler.is_compiling():
        kernel[grid](*arguments, **constants)
    else:
        launch_kernel(kernel, grid, *arguments, **constants)


def _row_options(width: int) -> dict[str, int]:
    padded = next_power_of_2(width)
    return {"WIDTH_PADDED": padded, "num_warps": min(max(padded // 512, 1), 8)}


def _loss_sizes(vocabulary: int) -> dict[str, int]:
    block = min(next_power_of_2(vocabulary), 4096)
    return {"VOCAB": vocabulary, "BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}
