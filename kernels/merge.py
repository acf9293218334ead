"""Merge of a row's partial results, in slot order: outputs by their log-sum-exps (forward), dq by plain sums (backward).

Both kernels are bound by memory: they read every used slot once and write one row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .configs import RowConfig
from .launch import launch_kernel
from .sizes import cdiv, padded
from .softmax import LOWEST
from .types import DqPartials, Partials

_VARYING = [
    "tokens", "selected_head", "selected_token", "selected_slot", "merged_token", "merged_head", "merged_lse_head",
]  # fmt: skip
_UNALIGNED = ["selected", "lse", "merged_lse", "place"]


@triton.jit
def _slot_rows(selected, tokens, selected_head, selected_token, ROWS: tl.constexpr, TOPK: tl.constexpr):
    """The program's q head, its tokens, which of them exist, their rows of `selected`, and their first partials."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (
        head,
        token,
        token < tokens,
        selected + head * selected_head + token * selected_token,
        (head * tokens + token) * TOPK,
    )


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def merge_kernel(
    partial, lse, selected, merged, merged_lse, tokens, selected_head, selected_token, selected_slot,
    merged_token, merged_head, merged_lse_head,
    TOPK: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of ROWS rows of one q head, by a running softmax over their slots.

    Reads TOPK * (2 * DV + 6) bytes per row (2 per empty slot), writes 2 * DV + 4. The loop over slots is not unrolled:
    unrolled, it spills.
    """
    head, token, valid, chosen, first = _slot_rows(selected, tokens, selected_head, selected_token, ROWS, TOPK)
    d = tl.arange(0, DV_PADDED)
    column = (d < DV)[None, :]
    # Finite, so that an empty slot before the first used one has weight exp2(-inf) = 0 and not exp2(-inf + inf).
    m = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    for slot in tl.range(0, TOPK, num_stages=STAGES):
        used = tl.load(chosen + slot * selected_slot, mask=valid, other=-1) >= 0
        slot_lse = tl.load(lse + first + slot, mask=used, other=float("-inf"))
        o = tl.load(partial + (first + slot)[:, None] * DV + d[None, :], mask=used[:, None] & column, other=0.0)
        m_new = tl.maximum(m, slot_lse)
        rescale = tl.exp2(m - m_new)
        weight = tl.exp2(slot_lse - m_new)
        acc = acc * rescale[:, None] + weight[:, None] * o.to(tl.float32)
        norm = norm * rescale + weight
        m = m_new
    acc = acc * (1.0 / norm)[:, None]
    pointers = merged + head * merged_head + token[:, None] * merged_token + d[None, :]
    tl.store(pointers, acc.to(merged.dtype.element_ty), mask=valid[:, None] & column)
    tl.store(merged_lse + head * merged_lse_head + token, m + tl.log2(norm), mask=valid)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def merge_dq_kernel(
    partial, place, selected, merged, tokens, selected_head, selected_token, selected_slot, merged_token, merged_head,
    TOPK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    PLACED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One program: dq of ROWS rows of one q head, fp32 sums over slots.

    Reads TOPK * (2 * D + 2) bytes per row (2 per empty slot), writes 2 * D. With PLACED, `place` says where partials are, in D
    elements, and takes 4 bytes per used slot. With SUMS, it says which row of the sums a partial is, which takes 4 * D bytes, and
    D is 128: see `dkdv_dq_tiles_sm90._in_sum_order`, whose order of columns the accumulator has until the end.
    """
    head, token, valid, chosen, first = _slot_rows(selected, tokens, selected_head, selected_token, ROWS, TOPK)
    d = tl.arange(0, D_PADDED)
    column = (d < D)[None, :]
    sums_column = d // 64 * 4096 + d // 16 % 4 * 128 + d % 16
    acc = tl.zeros([ROWS, D_PADDED], tl.float32)
    for slot in tl.range(0, TOPK, num_stages=STAGES):
        used = tl.load(chosen + slot * selected_slot, mask=valid, other=-1) >= 0
        at = first + slot
        if PLACED:
            at = tl.load(place + at, mask=used, other=0).to(tl.int64)
        if SUMS:
            at = at // 64 * 8192 + at % 64 // 8 * 512 + at % 8 * 16
            dq = tl.load(partial + at[:, None] + sums_column[None, :], mask=used[:, None] & column, other=0.0)
        else:
            dq = tl.load(partial + at[:, None] * D + d[None, :], mask=used[:, None] & column, other=0.0)
        acc += dq.to(tl.float32)
    if SUMS:
        acc = acc.reshape(ROWS, 8, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(ROWS, D)
    pointers = merged + head * merged_head + token[:, None] * merged_token + d[None, :]
    tl.store(pointers, acc.to(merged.dtype.element_ty), mask=valid[:, None] & column)


def merge(partials: Partials, *, selected: Tensor, out: Tensor, lse: Tensor, config: RowConfig | None = None) -> None:
    """See `backend.Backend.merge`. `lse` is fp32, in base 2."""
    q_heads, tokens, topk = selected.shape
    if tokens == 0 or q_heads == 0:
        return
    dim_v = out.shape[2]
    config = config or configs.merge(dim_v)
    launch_kernel(merge_kernel, (cdiv(tokens, config.rows), q_heads),
        partials.out, partials.lse, selected, out, lse, tokens, *selected.stride(), out.stride(0), out.stride(1),
        lse.stride(0), TOPK=topk, DV=dim_v, DV_PADDED=padded(dim_v), ROWS=config.rows, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip


def merge_dq(dq_partials: DqPartials, *, selected: Tensor, dq: Tensor, config: RowConfig | None = None) -> None:
    """See `backend.Backend.merge_dq`."""
    q_heads, tokens, topk = selected.shape
    if tokens == 0 or q_heads == 0:
        return
    dim = dq.shape[2]
    config = config or configs.merge_dq(dim)
    placed = dq_partials.place is not None
    launch_kernel(merge_dq_kernel, (cdiv(tokens, config.rows), q_heads),
        dq_partials.dq, dq_partials.place if placed else selected, selected, dq, tokens, *selected.stride(), dq.stride(0),
        dq.stride(1), TOPK=topk, D=dim, D_PADDED=padded(dim), ROWS=config.rows, STAGES=config.num_stages, PLACED=placed,
        SUMS=dq_partials.sums, num_warps=config.num_warps,
    )  # fmt: skip
