"""Triton kernels for what a transformer computes between its matrices: norms with the residual, SwiGLU, rotary embedding, and the
loss.

All are bound by memory. Each rounds once, from fp32 to the dtype of its output.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, other, weight, total, normed, eps, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ADD: tl.constexpr
):
    """One program: one row of `total = x + other`, rounded, and of `normed = total / rms(total) * weight`.

    Reads 2 * WIDTH values per row and writes as many with ADD, half of that without.
    """
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, WIDTH_PADDED)
    inside = column < WIDTH
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(other + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    result = value * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + column, result.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    total, weight, dnormed, dtotal, dx, dweight, rows, eps,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program: dx of rows `program_id + n * programs`, and their share of the weight's gradient, one fp32 row of `dweight`.

    Reads 3 * WIDTH values per row with ADD (`dtotal` is added to dx), else 2 * WIDTH; writes WIDTH.
    """
    column = tl.arange(0, WIDTH_PADDED)
    inside = column < WIDTH
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros([WIDTH_PADDED], tl.float32)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * WIDTH + column
        value = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
        value *= scale
        acc += gradient * value
        gradient *= factor
        result = (gradient - value * (tl.sum(gradient * value, axis=0) / WIDTH)) * scale
        if ADD:
            result += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * WIDTH + column, acc, mask=inside)


@triton.jit
def swiglu_kernel(x, y, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: COLUMNS values of a row of `silu(x[:WIDTH]) * x[WIDTH:]`. Reads 2 values per value written."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(x, dy, dx, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """One program: COLUMNS values of a row of both halves of dx. Reads 3 values and writes 2 per value of dy."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    gate = tl.load(x + row * 2 * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * WIDTH + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dgate = gradient * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(dx + row * 2 * WIDTH + column, dgate.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + row * 2 * WIDTH + WIDTH + column, (gradient * silu).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _head(GROUP: tl.constexpr, GROUPS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """Heads that rotate: numbers, which exist, which are queries, their first place in a row of `mixed` (in heads), and their
    number among the queries or the keys."""
    head = tl.arange(0, HEADS_PADDED)
    group = head // (GROUP + 1)
    member = head % (GROUP + 1)
    is_query = member < GROUP
    return (
        head < GROUPS * (GROUP + 1),
        is_query,
        group * (GROUP + 2) + member,
        tl.where(is_query, group * GROUP + member, group),
    )


@triton.jit
def split_rotate_kernel(
    mixed, cos, sin, q, k, batch,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: q and k of one row, their first 2 * HALF dimensions rotated.

    A row of `mixed` holds, for each of GROUPS kv heads, its GROUP q heads, its key and its value. Reads and writes
    (GROUP + 1) * GROUPS * DIM values, and reads 2 * HALF in fp32.
    """
    row = tl.program_id(0).to(tl.int64)
    valid, is_query, place, number = _head(GROUP, GROUPS, HEADS_PADDED)
    d = tl.arange(0, HALF_PADDED)
    mask = valid[:, None] & (d < HALF)[None, :]
    source = mixed + row * GROUPS * (GROUP + 2) * DIM + place[:, None] * DIM
    to_q = q + row * GROUPS * GROUP * DIM + number[:, None] * DIM
    to_k = k + row * GROUPS * DIM + number[:, None] * DIM
    first = tl.load(source + d[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + d[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + (row // batch) * HALF + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + (row // batch) * HALF + d, mask=d < HALF, other=0.0)[None, :]
    a = (first * c - second * s).to(q.dtype.element_ty)
    b = (second * c + first * s).to(q.dtype.element_ty)
    to_queries = mask & is_query[:, None]
    to_keys = mask & (is_query == 0)[:, None]
    tl.store(to_q + d[None, :], a, mask=to_queries)
    tl.store(to_q + HALF + d[None, :], b, mask=to_queries)
    tl.store(to_k + d[None, :], a, mask=to_keys)
    tl.store(to_k + HALF + d[None, :], b, mask=to_keys)
    if REST_PADDED > 0:
        r = 2 * HALF + tl.arange(0, REST_PADDED)
        rest = valid[:, None] & (r < DIM)[None, :]
        same = tl.load(source + r[None, :], mask=rest, other=0.0)
        tl.store(to_q + r[None, :], same, mask=rest & is_query[:, None])
        tl.store(to_k + r[None, :], same, mask=rest & (is_query == 0)[:, None])


@triton.jit
def split_rotate_backward_kernel(
    dq, dk, dv, cos, sin, dmixed, batch, dq_row, dq_head, dk_row, dk_head, dv_row, dv_head,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, HEADS_PADDED: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST_PADDED: tl.constexpr,
):  # fmt: skip
    """One program: one row of `dmixed` from dq, dk and dv. Reads and writes (GROUP + 2) * GROUPS * DIM values."""
    row = tl.program_id(0).to(tl.int64)
    valid, is_query, place, number = _head(GROUP, GROUPS, HEADS_PADDED)
    d = tl.arange(0, HALF_PADDED)
    mask = valid[:, None] & (d < HALF)[None, :]
    target = dmixed + row * GROUPS * (GROUP + 2) * DIM
    of_q = dq + row * dq_row + number[:, None] * dq_head
    of_k = dk + row * dk_row + number[:, None] * dk_head
    from_queries = mask & is_query[:, None]
    from_keys = mask & (is_query == 0)[:, None]
    # A head is a query or a key, so one of the two loads is zero.
    a = tl.load(of_q + d[None, :], mask=from_queries, other=0.0).to(tl.float32)
    a += tl.load(of_k + d[None, :], mask=from_keys, other=0.0).to(tl.float32)
    b = tl.load(of_q + HALF + d[None, :], mask=from_queries, other=0.0).to(tl.float32)
    b += tl.load(of_k + HALF + d[None, :], mask=from_keys, other=0.0).to(tl.float32)
    c = tl.load(cos + (row // batch) * HALF + d, mask=d < HALF, other=0.0)[None, :]
    s = tl.load(sin + (row // batch) * HALF + d, mask=d < HALF, other=0.0)[None, :]
    to = target + place[:, None] * DIM
    tl.store(to + d[None, :], (a * c + b * s).to(dmixed.dtype.element_ty), mask=mask)
    tl.store(to + HALF + d[None, :], (b * c - a * s).to(dmixed.dtype.element_ty), mask=mask)
    if REST_PADDED > 0:
        r = 2 * HALF + tl.arange(0, REST_PADDED)
        rest = valid[:, None] & (r < DIM)[None, :]
        same = tl.load(of_q + r[None, :], mask=rest & is_query[:, None], other=0.0).to(tl.float32)
        same += tl.load(of_k + r[None, :], mask=rest & (is_query == 0)[:, None], other=0.0).to(tl.float32)
        tl.store(to + r[None, :], same.to(dmixed.dtype.element_ty), mask=rest)
    group = tl.arange(0, GROUPS_PADDED)
    e = tl.arange(0, DIM_PADDED)
    values = (group < GROUPS)[:, None] & (e < DIM)[None, :]
    value = tl.load(dv + row * dv_row + group[:, None] * dv_head + e[None, :], mask=values, other=0.0)
    tl.store(target + (group * (GROUP + 2) + GROUP + 1)[:, None] * DIM + e[None, :], value, mask=values)


@triton.jit
def cross_entropy_kernel(logits, labels, loss, sums, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row's loss `log(sum(exp(logits))) - logits[label]`, and its log-sum-exp, both fp32.

    A label outside the vocabulary counts as a logit that equals the largest one. Reads VOCAB values per row and one more.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    most, total = float("-inf"), 0.0
    for begin in range(0, VOCAB, BLOCK):
        inside = begin + column < VOCAB
        value = tl.load(logits + row * VOCAB + begin + column, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(value, axis=0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(value - larger), axis=0)
        most = larger
    label = tl.load(labels + row)
    known = (label >= 0) & (label < VOCAB)
    wanted = tl.load(logits + row * VOCAB + label, mask=known, other=0.0).to(tl.float32)
    tl.store(loss + row, tl.log(total) + tl.where(known, most - wanted, 0.0))
    tl.store(sums + row, most + tl.log(total))


@triton.jit
def cross_entropy_backward_kernel(
    logits, labels, sums, dloss, dlogits, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program: `(softmax(logits) - onehot(label)) * dloss` of BLOCK columns of one row. Reads and writes BLOCK values."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < VOCAB
    value = tl.load(logits + row * VOCAB + column, mask=inside, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - tl.load(sums + row))
    gradient = tl.where(column == tl.load(labels + row), share - 1.0, share) * tl.load(dloss + row)
    tl.store(dlogits + row * VOCAB + column, gradient.to(dlogits.dtype.element_ty), mask=inside)
