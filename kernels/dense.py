"""Dense attention of some queries to some keys by torch's own fused kernels, merged with what the queries have seen so far.

A softmax over several sets of keys is exact if each set yields its log-sum-exp. The gradient with respect to one set is exact if
the backward kernel gets the output and the log-sum-exp over *all* keys. torch's fused operators return and take both.

========  =============================================================================================================
kernel    taken for
========  =============================================================================================================
cudnn     bf16 and fp16 on sm_90 and sm_100, head sizes up to 128 in multiples of 8, if lengths repeat from call to
          call (``steady``): about twice as fast as flash, but it compiles for each new length
flash     bf16 and fp16 on GPUs from sm_80, head sizes up to 256
cpu       every dtype on the CPU
math      the rest (fp32 and fp64 on GPUs, larger heads; scales of 0 and below, with which the others give NaN): plain
          matrix products in fp32 or fp64, some rows at a time
========  =============================================================================================================

Head sizes that flash and cpu refuse (``Dv != D``; on GPUs, not a multiple of 8) are padded with zeros, which add nothing to a
score; the extra output columns are dropped. Grouped kv heads are expanded for a few heads at a time, and the gradients of a
group are summed in fp32.

The operators round partial outputs and gradients to the inputs' dtype; their sums are fp32 (fp64 for fp64). The same call gives
the same bits, except for dq of cudnn and flash: they add in no fixed order unless
``torch.use_deterministic_algorithms(True)`` is on, in which case cudnn is not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from .gpu import gpu_of
from .torch_backend import accumulate_dtype

WORKSPACE_BYTES = 1 << 30
"""Heads are processed in groups whose expanded keys, values and partial results take about this much; at least one head."""

_MATH_SCORES = 1 << 26
"""Scores that `math` computes at once: 256 MiB in fp32."""

_CUDNN_FIXED = 91501
"""First version of cuDNN with correct results for lengths that are not multiples of 128."""

_ops = torch.ops.aten


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, out: Tensor, lse: Tensor, steady: bool = False
) -> None:
    """Merge the attention of `q` to `k`, `v` into `out` and `lse`.

    Args:
        q: `[n, Hq, D]`, n at least 1.
        k, v: `[m, Hkv, D]`, `[m, Hkv, Dv]`, m at least 1.
        scale: factor on the scores.
        causal: row i of `q` sees rows 0 to i of `k` (n = m). Otherwise it sees all rows.
        out: fp32 (fp64 for fp64) `[n, Hq, Dv]`, updated: the output over the keys seen so far, initially zeros.
        lse: `[Hq, n]` of the same dtype, updated: natural log-sum-exp over these keys, initially -inf.
        steady: calls with the same lengths will be repeated.
    """
    for heads, kv_heads in _head_groups(q, k, v):
        keys, values = _expand(k, v, heads, kv_heads)
        part, part_lse = _forward(q[:, heads], keys, values, scale, causal, steady)
        old = lse[heads]
        new = torch.logaddexp(old, part_lse)
        mine = out[:, heads]
        mine.mul_((old - new).exp_().T[..., None]).addcmul_(part, (part_lse - new).exp_().T[..., None])
        old.copy_(new)


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    causal: bool,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    steady: bool = False,
) -> None:
    """Add the gradients with respect to these keys to `dq`, `dk` and `dv`.

    Args:
        q, k, v, scale, causal, steady: as in `attend`.
        out: `[n, Hq, Dv]` in the dtype of `q`: the output over all keys, these and others.
        lse: `[Hq, n]`: its log-sum-exp, from `attend`.
        dout: `[n, Hq, Dv]` in the dtype of `q`, with the strides of `out`.
        dq, dk, dv: fp32 (fp64 for fp64), of the shapes of `q`, `k`, `v`; updated.
    """
    for heads, kv_heads in _head_groups(q, k, v):
        keys, values = _expand(k, v, heads, kv_heads)
        dq_part, dk_part, dv_part = _backward(
            q[:, heads], keys, values, out[:, heads], lse[heads].contiguous(), dout[:, heads], scale, causal, steady
        )
        dq[:, heads] += dq_part
        groups = (kv_heads.stop - kv_heads.start, -1)
        dk[:, kv_heads] += dk_part.unflatten(1, groups).sum(2, dtype=dk.dtype)
        dv[:, kv_heads] += dv_part.unflatten(1, groups).sum(2, dtype=dv.dtype)


def _head_groups(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, slice]]:
    """Query heads to process together, and the kv heads that they read: complete groups, or part of one."""
    kv_heads, repeats = k.shape[1], q.shape[1] // k.shape[1]
    head_bytes = (q.shape[0] + k.shape[0]) * (k.shape[2] + v.shape[2]) * 4
    budget = max(1, WORKSPACE_BYTES // head_bytes)
    if budget < repeats:
        for head in range(kv_heads):
            for first in range(head * repeats, (head + 1) * repeats, budget):
                yield slice(first, min(first + budget, (head + 1) * repeats)), slice(head, head + 1)
        return
    step = budget // repeats
    for head in range(0, kv_heads, step):
        end = min(head + step, kv_heads)
        yield slice(head * repeats, end * repeats), slice(head, end)


def _expand(k: Tensor, v: Tensor, heads: slice, kv_heads: slice) -> tuple[Tensor, Tensor]:
    """One head of keys and values per query head; views where heads are not grouped."""
    repeats = (heads.stop - heads.start) // (kv_heads.stop - kv_heads.start)
    k, v = k[:, kv_heads], v[:, kv_heads]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, steady: bool) -> tuple[Tensor, Tensor]:
    """Output `[n, H, Dv]` in the dtype of `q` (`math`: fp32 or fp64), and log-sum-exp `[H, n]`."""
    kernel = choose_kernel(q, k, v, scale, causal, steady)
    if kernel == "math":
        return _math_forward(q, k, v, scale, causal)
    heads_first = _prepared(kernel, q, k, v)
    if kernel == "cudnn":
        out, lse, *_ = _ops._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, causal, scale=scale)
    elif kernel == "flash":
        out, lse, *_ = _ops._scaled_dot_product_flash_attention(*heads_first, 0.0, causal, scale=scale)
    else:
        out, lse = _ops._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, causal, scale=scale)
    return out[0].transpose(0, 1)[..., : v.shape[2]], lse.reshape(q.shape[1], q.shape[0])


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    scale: float,
    causal: bool,
    steady: bool,
) -> tuple[Tensor, ...]:
    """dq, dk, dv of the shapes of `q`, `k`, `v`."""
    kernel = choose_kernel(q, k, v, scale, causal, steady)
    if kernel == "math":
        return _math_backward(q, k, v, out, lse, dout, scale, causal)
    q_, k_, v_, out_, dout_ = _prepared(kernel, q, k, v, out, dout)
    stats, options = lse[None], (0.0, causal)
    if kernel == "cpu":
        gradients = _ops._scaled_dot_product_flash_attention_for_cpu_backward(
            dout_, q_, k_, v_, out_, stats, *options, scale=scale
        )
    else:
        lengths = (None, None, q.shape[0], k.shape[0])  # no cumulative lengths (nested tensors); the longest ones
        seed = torch.zeros(1, dtype=torch.int64, device=q.device)  # only dropout reads it
        if kernel == "cudnn":
            stats = stats[..., None] if _cudnn_lse_dim(q.device) == 4 else stats
            gradients = _ops._scaled_dot_product_cudnn_attention_backward(
                dout_, q_, k_, v_, out_, stats, seed, seed, None, *lengths, *options, scale=scale
            )
        else:
            gradients = _ops._scaled_dot_product_flash_attention_backward(
                dout_, q_, k_, v_, out_, stats, *lengths, *options, seed, seed, scale=scale
            )
    return tuple(g[0].transpose(0, 1)[..., : x.shape[2]] for g, x in zip(gradients, (q, k, v), strict=True))


def choose_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, steady: bool) -> str:
    """The kernel for `q` `[n, H, D]`, `k` `[m, H, D]`, `v` `[m, H, Dv]`, by the table above.

    torch's own switches (``torch.backends.cuda.enable_cudnn_sdp``, ``torch.nn.attention.sdpa_kernel``, ...) apply.
    """
    if scale <= 0:
        return "math"
    if q.device.type != "cuda":
        return "cpu"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return "math"
    if steady and _prefers_cudnn(q.device) and max(q.shape[2], v.shape[2]) <= 128:
        if can_use_cudnn_attention(_parameters(q, k, v, (q.shape[2], q.shape[2], v.shape[2]), causal)):
            return "cudnn"
    wide = _flash_width(q, v)
    return "flash" if can_use_flash_attention(_parameters(q, k, v, (wide,) * 3, causal)) else "math"


def _parameters(q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int, int], causal: bool) -> SDPAParams:
    """What torch decides by, with other head sizes: tensors of the same shapes that take the memory of one row.

    They require gradients, since some head sizes have no backward kernel.
    """
    shaped = [x.new_empty(d).expand(1, x.shape[1], x.shape[0], d).requires_grad_() for x, d in zip((q, k, v), sizes)]
    query, key, value = shaped
    return SDPAParams(query, key, value, None, 0.0, causal, False)


@lru_cache(maxsize=8)
def _prefers_cudnn(device: torch.device) -> bool:
    version = torch.backends.cudnn.version()
    return gpu_of(device).capability[0] in (9, 10) and (version or 0) >= _CUDNN_FIXED


@lru_cache(maxsize=8)
def _cudnn_lse_dim(device: torch.device) -> int:
    """Dimensions of the log-sum-exp of torch's cuDNN operators: 3, or 4 with a trailing 1, depending on the version."""
    x = torch.zeros(1, 1, 128, 64, dtype=torch.bfloat16, device=device)
    return _ops._scaled_dot_product_cudnn_attention(x, x, x, None, True, 0.0, True)[1].dim()


def _flash_width(q: Tensor, v: Tensor) -> int:
    """One head size for queries, keys and values that flash accepts."""
    return (max(q.shape[2], v.shape[2]) + 7) // 8 * 8


def _prepared(kernel: str, *tensors: Tensor) -> list[Tensor]:
    """`[n, H, D]` as `[1, H, n, D]`, with head sizes padded as the kernel needs."""
    if kernel != "cudnn":
        q, _, v = tensors[:3]
        width = _flash_width(q, v) if kernel == "flash" else max(q.shape[2], v.shape[2])
        tensors = tuple(F.pad(x, (0, width - x.shape[2])) if x.shape[2] < width else x for x in tensors)
    return [x.transpose(0, 1).unsqueeze(0) for x in tensors]


def _math_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(q.dtype)
    values = v.transpose(0, 1).to(dtype)
    out = q.new_empty(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=dtype)
    for rows, score in _scores(q, k, scale, causal):
        lse[:, rows] = score.logsumexp(-1)
        out[rows] = (score.sub_(lse[:, rows, None]).exp_() @ values).transpose(0, 1)
    return out, lse


def _math_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(q.dtype)
    keys, values = (x.transpose(0, 1).to(dtype) for x in (k, v))
    dq = torch.empty_like(q, dtype=dtype)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for rows, score in _scores(q, k, scale, causal):
        weight = score.sub_(lse[:, rows, None]).exp_()
        upstream, mine = (x[rows].transpose(0, 1).to(dtype) for x in (dout, out))
        dv += weight.mT @ upstream
        dscore = (upstream @ values.mT).sub_((upstream * mine).sum(-1, keepdim=True)).mul_(weight).mul_(scale)
        dq[rows] = (dscore @ keys).transpose(0, 1)
        dk += dscore.mT @ q[rows].transpose(0, 1).to(dtype)
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows and their scores `[H, rows, m]`; -inf where a row does not see a key."""
    dtype = accumulate_dtype(q.dtype)
    keys = k.permute(1, 2, 0).to(dtype)
    step = max(1, _MATH_SCORES // (q.shape[1] * k.shape[0]))
    numbers = torch.arange(k.shape[0], device=q.device)
    for first in range(0, q.shape[0], step):
        rows = slice(first, min(first + step, q.shape[0]))
        score = (q[rows].transpose(0, 1).to(dtype) @ keys).mul_(scale)
        if causal:
            score.masked_fill_(numbers > numbers[rows, None], float("-inf"))
        yield rows, score
