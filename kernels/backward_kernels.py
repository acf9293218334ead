"""Triton kernels of the backward of block attention (sm_80 and newer); `backward.py` says how they work together.

Sizes and strides that change from chunk to chunk are not specialised on, and small integer views may start anywhere:
one compiled kernel serves every step.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
VARYING = ["lse_h", "delta_h", "dq_h", "n_bins", "n_blocks", "start_h", "scale"]
UNALIGNED = [
    "lse", "delta", "position", "pointer", "entry", "part_start", "part_length", "piece_bin", "item_bin",
    "item_start", "item_end",
]  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def delta_kernel(
    out, dout, delta, tokens, out_t, out_h, dout_t, dout_h, DV: tl.constexpr, DVP: tl.constexpr, R: tl.constexpr
):
    """delta[h, t] = sum(out[t, h] * dout[t, h]) for R tokens of one head. Reads 2 R DV elements, writes 4 R bytes."""
    head = tl.program_id(1)
    t = tl.program_id(0) * R + tl.arange(0, R)
    d = tl.arange(0, DVP)
    mask = (t < tokens)[:, None] & (d < DV)[None, :]
    t64 = t.to(tl.int64)[:, None]
    x = tl.load(out + t64 * out_t + head.to(tl.int64) * out_h + d[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(dout + t64 * dout_t + head.to(tl.int64) * dout_h + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * tokens + t, tl.sum(x * y, 1), mask=t < tokens)


@triton.jit(do_not_specialize=["n_bins", "n_pieces", "rounds"])
def find_pieces_kernel(pointer, piece_bin, n_bins, n_pieces, rounds, PIECE: tl.constexpr, SIZE: tl.constexpr):
    """The bin cut at entry c * PIECE, or -1, for SIZE values of c: one binary search in the bins' offsets for all.

    Reads log2(n_bins) offsets a piece, writes 4 bytes.
    """
    c = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    cut = c * PIECE
    low = tl.zeros([SIZE], tl.int32)
    high = low + n_bins + 1  # low: the first index whose offset is at or past the cut
    for _ in range(rounds):
        middle = (low + high) // 2
        before = (tl.load(pointer + tl.minimum(middle, n_bins)) < cut) & (low < high)
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    bin_ = low - 1
    inside = (bin_ >= 0) & (bin_ < n_bins)
    first = tl.load(pointer + bin_, mask=inside, other=0)
    last = tl.load(pointer + bin_ + 1, mask=inside, other=0)
    long = inside & (cut < last) & (last - first > 2 * PIECE)
    tl.store(piece_bin + c, tl.where(long, bin_, -1), mask=c < n_pieces)


@triton.jit
def unit_of(place, units, n_bins):
    """Bin (below `n_bins`) or piece (`n_bins` and on) that comes at a place in the order of programs: pieces, the longest,
    come first, so that none of them is left over at the end."""
    pieces = units - n_bins
    return tl.where(place < pieces, place + n_bins, place - pieces)


@triton.jit
def piece_bounds(first, last, c, PIECE: tl.constexpr):
    """Entries of piece c of a long bin `[first, last)`: its first piece also takes what lies before the first cut."""
    begin = tl.where(first // PIECE + 1 == c, first, c * PIECE)
    return begin, tl.minimum(last, (c + 1) * PIECE)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def dkdv_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, part_start, part_length, piece_bin,
    dk, dv, dq, pieces,
    q_t, q_h, dout_t, dout_h, k_n, k_h, v_n, v_h, dk_n, dk_h, dv_n, dv_h, lse_h, lse_t, delta_h, delta_t,
    dq_h, dq_t, dq_s, start_h, n_bins, n_blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, HEAD_BITS: tl.constexpr,
    SLOT_BITS: tl.constexpr, TOPK: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, NT: tl.constexpr,
    STAGES: tl.constexpr, PIECE: tl.constexpr, FUSED: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BK keys of one block over the rows of its bin (or of one piece of it); with FUSED their dq too.

    Units, NT programs each, come as `unit_of` says: a bin of ordinary length, all of it, or a piece of a long bin, into
    `pieces`.
    Reads BK (D + DV) elements once and D + DV elements + 16 bytes for each row; writes BK (D + DV) sums, and with FUSED
    D elements a row.
    """
    unit = unit_of(tl.program_id(0) // NT, tl.num_programs(0) // NT, n_bins)
    tile = tl.program_id(0) % NT
    is_piece = unit >= n_bins
    c = tl.maximum(unit - n_bins, 0)
    bin_ = tl.where(is_piece, tl.load(piece_bin + c, mask=is_piece, other=-1), unit)
    if bin_ < 0:
        return
    first = tl.load(pointer + bin_)
    last = tl.load(pointer + bin_ + 1)
    if (last - first > 2 * PIECE) != is_piece:
        return
    kv_head = bin_ // n_blocks
    block = bin_ % n_blocks
    start = tl.load(part_start + kv_head.to(tl.int64) * start_h + block)
    length = tl.load(part_length + block)
    if (start < 0) | (tile * BK >= length) | ((first == last) & ACCUMULATE):
        return
    piece_begin, piece_end = piece_bounds(first, last, c, PIECE)
    begin = tl.where(is_piece, piece_begin, first)
    end = tl.where(is_piece, piece_end, last)

    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    r = tl.arange(0, R)
    key = tile * BK + tl.arange(0, BK)
    key_row = (start + key).to(tl.int64)[:, None]
    k_mask = (key < length)[:, None] & (d < D)[None, :]
    v_mask = (key < length)[:, None] & (e < DV)[None, :]
    head64 = kv_head.to(tl.int64)
    k_tile = tl.load(k + key_row * k_n + head64 * k_h + d[None, :], mask=k_mask, other=0.0)
    v_tile = tl.load(v + key_row * v_n + head64 * v_h + e[None, :], mask=v_mask, other=0.0)
    dk_sum = tl.zeros([BK, DP], tl.float32)
    dv_sum = tl.zeros([BK, DVP], tl.float32)
    for i in tl.range(begin, end, R, num_stages=STAGES):
        ok = i + r < end
        code = tl.load(entry + i + r, mask=ok, other=0)
        slot = (code & ((1 << SLOT_BITS) - 1)).to(tl.int32)
        head = ((code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(tl.int64) + head64 * group
        token = (code >> (HEAD_BITS + SLOT_BITS)).to(tl.int64)
        q_rows = tl.load(
            q + (token * q_t + head * q_h)[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
        )
        # The own block is always in the last slot; every key of an earlier block is visible.
        limit = tl.load(position + token, mask=ok & (slot == TOPK - 1), other=0)
        limit = tl.where(slot == TOPK - 1, limit, length - 1)
        row_lse = tl.load(lse + head * lse_h + token * lse_t, mask=ok, other=float("inf"))
        row_delta = tl.load(delta + head * delta_h + token * delta_t, mask=ok, other=0.0)
        do_rows = tl.load(
            dout + (token * dout_t + head * dout_h)[:, None] + e[None, :],
            mask=ok[:, None] & (e < DV)[None, :], other=0.0,
        )  # fmt: skip
        # S^T straight from K Q^T: a transposed result of a dot must not be an operand of the next on Hopper.
        s = tl.dot(k_tile, tl.trans(q_rows), input_precision="ieee")
        visible = key[:, None] <= limit[None, :]
        p = tl.where(visible, tl.exp2(s * (scale * LOG2E) - row_lse[None, :]), 0.0)
        dv_sum = tl.dot(p.to(do_rows.dtype), do_rows, dv_sum, input_precision="ieee")
        dp = tl.dot(v_tile, tl.trans(do_rows), input_precision="ieee")
        ds = tl.where(visible, p * (dp - row_delta[None, :]), 0.0).to(q_rows.dtype)
        dk_sum = tl.dot(ds, q_rows, dk_sum, input_precision="ieee")
        if FUSED:
            dq_rows = tl.dot(tl.trans(k_tile), ds, input_precision="ieee") * scale
            dq_at = dq + (head * dq_h + token * dq_t + slot) * dq_s
            tl.store(dq_at[None, :] + d[:, None], dq_rows.to(dq.dtype.element_ty), mask=ok[None, :] & (d < D)[:, None])
    dk_sum *= scale
    if is_piece:
        at = pieces + (c.to(tl.int64) * NT * BK + key)[:, None] * (D + DV)
        tl.store(at + d[None, :], dk_sum, mask=k_mask)
        tl.store(at + D + e[None, :], dv_sum, mask=v_mask)
    else:
        dk_at = dk + key_row * dk_n + head64 * dk_h + d[None, :]
        dv_at = dv + key_row * dv_n + head64 * dv_h + e[None, :]
        if ACCUMULATE:
            dk_sum += tl.load(dk_at, mask=k_mask, other=0.0).to(tl.float32)
            dv_sum += tl.load(dv_at, mask=v_mask, other=0.0).to(tl.float32)
        tl.store(dk_at, dk_sum.to(dk.dtype.element_ty), mask=k_mask)
        tl.store(dv_at, dv_sum.to(dv.dtype.element_ty), mask=v_mask)


@triton.jit
def _add_piece_sums(pieces, target, target_row, c, last_piece, key, mask, d, first_column,
                    ROWS: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr, DP: tl.constexpr,
                    ACCUMULATE: tl.constexpr):  # fmt: skip
    total = tl.zeros([BK, DP], tl.float32)
    at = pieces + (c.to(tl.int64) * ROWS + key)[:, None] * WIDTH + first_column + d[None, :]
    for _ in range(c, last_piece + 1):
        total += tl.load(at, mask=mask, other=0.0)
        at += ROWS * WIDTH
    at = target + target_row + d[None, :]
    if ACCUMULATE:
        total += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_blocks", "start_h"])
def sum_pieces_kernel(
    pieces, piece_bin, pointer, part_start, part_length, dk, dv, dk_n, dk_h, dv_n, dv_h, start_h, n_blocks,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BK: tl.constexpr, NT: tl.constexpr,
    PIECE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BK keys of one long bin: the sums of its pieces, in order. Reads 4 BK (D + DV) bytes a piece.

    The program of a bin's first piece does it; all others have nothing to do.
    """
    c = tl.program_id(0) // NT
    tile = tl.program_id(0) % NT
    bin_ = tl.load(piece_bin + c)
    if bin_ < 0:
        return
    first = tl.load(pointer + bin_)
    last_piece = (tl.load(pointer + bin_ + 1) - 1) // PIECE
    kv_head = (bin_ // n_blocks).to(tl.int64)
    start = tl.load(part_start + kv_head * start_h + bin_ % n_blocks)
    length = tl.load(part_length + bin_ % n_blocks)
    if (first // PIECE + 1 != c) | (start < 0) | (tile * BK >= length):
        return
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    key = tile * BK + tl.arange(0, BK)
    row = (start + key).to(tl.int64)[:, None]
    inside = (key < length)[:, None]
    _add_piece_sums(pieces, dk, row * dk_n + kv_head * dk_h, c, last_piece, key, inside & (d < D)[None, :], d, 0,
                    NT * BK, D + DV, BK, DP, ACCUMULATE)  # fmt: skip
    _add_piece_sums(pieces, dv, row * dv_n + kv_head * dv_h, c, last_piece, key, inside & (e < DV)[None, :], e, D,
                    NT * BK, D + DV, BK, DVP, ACCUMULATE)  # fmt: skip


@triton.jit(do_not_specialize=["lse_h", "delta_h", "dq_h", "n_blocks", "start_h"])
def dq_kernel(
    q, dout, k, v, lse, delta, position, entry, item_bin, item_start, item_end, part_start, part_length, dq,
    q_t, q_h, dout_t, dout_h, k_n, k_h, v_n, v_h, lse_h, lse_t, delta_h, delta_t, dq_h, dq_t, dq_s,
    start_h, n_blocks, group, scale,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, HEAD_BITS: tl.constexpr,
    SLOT_BITS: tl.constexpr, TOPK: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial dq of one work item's rows for its block: R gathered rows stay while the block's keys stream by BN.

    Reads D + DV elements and writes D for each row, and reads D + DV elements a key for every R rows.
    """
    bin_ = tl.load(item_bin + tl.program_id(0))
    if bin_ < 0:
        return
    kv_head = (bin_ // n_blocks).to(tl.int64)
    block = bin_ % n_blocks
    start = tl.load(part_start + kv_head * start_h + block)
    length = tl.load(part_length + block)
    if start < 0:
        return
    first = tl.load(item_start + tl.program_id(0))
    end = tl.load(item_end + tl.program_id(0))
    d = tl.arange(0, DP)
    e = tl.arange(0, DVP)
    r = tl.arange(0, R)
    n = tl.arange(0, BN)
    k_head = k + kv_head * k_h
    v_head = v + kv_head * v_h
    for i in range(first, end, R):
        ok = i + r < end
        code = tl.load(entry + i + r, mask=ok, other=0)
        slot = (code & ((1 << SLOT_BITS) - 1)).to(tl.int32)
        head = ((code >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(tl.int64) + kv_head * group
        token = (code >> (HEAD_BITS + SLOT_BITS)).to(tl.int64)
        q_rows = tl.load(
            q + (token * q_t + head * q_h)[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0
        )
        do_rows = tl.load(
            dout + (token * dout_t + head * dout_h)[:, None] + e[None, :],
            mask=ok[:, None] & (e < DV)[None, :], other=0.0,
        )  # fmt: skip
        own = ok & (slot == TOPK - 1)
        limit = tl.where(own, tl.load(position + token, mask=own, other=0), length - 1)
        limit = tl.where(ok, limit, -1)
        row_lse = tl.load(lse + head * lse_h + token * lse_t, mask=ok, other=float("inf"))
        row_delta = tl.load(delta + head * delta_h + token * delta_t, mask=ok, other=0.0)
        total = tl.zeros([R, DP], tl.float32)
        # Keys that no row of the tile sees add exact zeros: leaving them out changes no bit.
        for j in tl.range(0, tl.max(limit, 0) + 1, BN, num_stages=STAGES):
            key = j + n
            key_row = (start + key).to(tl.int64)[:, None]
            inside = (key < length)[:, None]
            k_tile = tl.load(k_head + key_row * k_n + d[None, :], mask=inside & (d < D)[None, :], other=0.0)
            v_tile = tl.load(v_head + key_row * v_n + e[None, :], mask=inside & (e < DV)[None, :], other=0.0)
            s = tl.dot(q_rows, tl.trans(k_tile), input_precision="ieee")
            dp = tl.dot(do_rows, tl.trans(v_tile), input_precision="ieee")
            p = tl.exp2(s * (scale * LOG2E) - row_lse[:, None])
            ds = tl.where(key[None, :] <= limit[:, None], p * (dp - row_delta[:, None]), 0.0)
            total = tl.dot(ds.to(k_tile.dtype), k_tile, total, input_precision="ieee")
        dq_at = dq + (head * dq_h + token * dq_t + slot) * dq_s
        tl.store(
            dq_at[:, None] + d[None, :], (total * scale).to(dq.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :]
        )
