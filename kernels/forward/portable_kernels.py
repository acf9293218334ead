"""Triton kernels of block attention, forward, for sm_80 and newer.

All three write the same thing, one normalised partial output and log-sum-exp (base 2) per (q head, row, slot):

- `stream_rows_kernel`, blocks of at most 128 keys: one program holds the block's K and V and streams up to 2048 rows.
- `hold_rows_kernel`, larger blocks: one program holds up to 128 rows and streams the block's K and V. It skips own rows.
- `own_blocks_kernel`, the own rows of larger blocks: as `hold_rows_kernel`, for consecutive rows, causally.

Tiles of keys are aligned to the block's start and tile sizes are fixed (`configs`), so a row's partial does not depend on the
rows that share its tile.
"""

import triton
import triton.language as tl

from ..softmax import LOWEST, MOST_RISE, inverse

# Counts and strides that change from chunk to chunk, and int32 views that start at any address: one compiled kernel serves all.
_VARYING = ["tokens", "n_tiles", "n_blocks", "q_heads", "offset", "start_head"]
_UNALIGNED = ["start", "length", "position", "entry", "item_bin", "item_start", "item_end", "own_tiles"]


@triton.jit
def _decode(e, HEAD_BITS: tl.constexpr, SLOT_BITS: tl.constexpr):
    """Entry -> (token, head in group, slot). Bit fields, because dividing by a runtime length costs a fifth of the kernel."""
    slot = (e & ((1 << SLOT_BITS) - 1)).to(tl.int32)
    head = ((e >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(tl.int32)
    return (e >> (HEAD_BITS + SLOT_BITS)).to(tl.int64), head, slot


@triton.jit
def _load_tile(
    base, first, held, stride, KEYS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):
    """Rows `first + [0, KEYS)` of a block at `base`. Zero in the padding columns and, with MASKED, from row `held` on.

    One 64-bit offset per tile and 32-bit offsets inside it: 64-bit offsets per row would spill.
    """
    row = tl.arange(0, KEYS)
    d = tl.arange(0, PADDED)
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if MASKED:
        return tl.load(pointers, mask=(row < held - first)[:, None] & (d < SIZE)[None, :], other=0.0)
    elif SIZE != PADDED:
        return tl.load(pointers, mask=(d < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load_to_end(base, first, held, stride, KEYS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """As `_load_tile`, but from row `held` on the last row is repeated, for keys whose weight is 0. Needs no masks."""
    row = tl.minimum(tl.arange(0, KEYS), held - first - 1)
    d = tl.arange(0, PADDED)
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if SIZE != PADDED:
        return tl.load(pointers, mask=(d < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _softmax_step(s, m, norm, acc, scale):
    """One tile of scores into the running sum and output, relative to `m`; also returns the tile's weights."""
    highest = tl.max(s, 1) * scale
    m_new = tl.where(highest - m > MOST_RISE, highest, m)
    p = tl.exp2(s * scale - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    return p, m_new, norm * rescale + tl.sum(p, 1), acc * rescale[:, None]


@triton.jit
def _store_partial(out, lse, row, valid, o, row_lse, DV: tl.constexpr, DV_PADDED: tl.constexpr, STORE: tl.constexpr):
    d = tl.arange(0, DV_PADDED)
    mask = valid[:, None] if DV == DV_PADDED else valid[:, None] & (d < DV)[None, :]
    tl.store(out + row[:, None] * DV + d[None, :], o.to(out.dtype.element_ty), mask=mask, cache_modifier=STORE)
    tl.store(lse + row, row_lse, mask=valid)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def stream_rows_kernel(
    q, k, v, start, length, position, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, TOPK: tl.constexpr, HEAD_BITS: tl.constexpr, SLOT_BITS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program: one work item, the entries of one (kv head, block), past and own rows alike.

    Reads the block's K and V once (2 * BLOCK * (D + DV) bytes), then 4 or 8 bytes of list and 2 * D bytes of q per entry
    (mostly from L2: the rows of a bin belong to one kv head); writes 2 * DV + 4 bytes per entry.
    """
    item = tl.program_id(0)
    bin_ = tl.load(item_bin + item)
    if bin_ < 0:
        return
    kv_head = bin_ // n_blocks
    block = bin_ - kv_head * n_blocks
    first_key = tl.load(start + kv_head * start_head + block)
    if first_key < 0:  # another part has it
        return
    held = tl.load(length + block)
    begin = tl.load(item_start + item)
    end = tl.load(item_end + item)

    key = tl.arange(0, KEYS)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    # A short block is the last of its document. Only its own rows read it, and their positions mask its end.
    first = tl.zeros([], tl.int32)
    k_base = k + first_key.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head
    v_base = v + first_key.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head
    k_tile = _load_tile(k_base, first, held, k_row, KEYS, D, D_PADDED, True)
    v_tile = _load_tile(v_base, first, held, v_row, KEYS, DV, DV_PADDED, True)
    # Entries are loaded one tile ahead, into registers, so that the gather of q is the only load the compiler pipelines. If it
    # had to pipeline the entries as well, it would issue the gather just before its result is needed.
    e_next = tl.load(entry + begin + r, mask=begin + r < end, other=0)
    for i in tl.range(begin, end, ROWS, num_stages=STAGES):
        valid = i + r < end
        e = e_next
        e_next = tl.load(entry + i + ROWS + r, mask=i + ROWS + r < end, other=0)
        token, head, slot = _decode(e, HEAD_BITS, SLOT_BITS)
        head += kv_head * GROUP
        pointers = q + token[:, None] * q_token + head.to(tl.int64)[:, None] * q_head + d[None, :]
        if D == D_PADDED:
            q_tile = tl.load(pointers)
        else:
            q_tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if NEGATIVE:
            s = -s
        # Past rows load no position, so most tiles do not wait for a second gather.
        own = valid & (slot == TOPK - 1)
        last = tl.load(position + token, mask=own, other=BLOCK - 1)
        s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        m = tl.maximum(tl.max(s, 1) * scale, LOWEST)
        p = tl.exp2(s * scale - m[:, None])
        norm = tl.sum(p, 1)
        o = tl.dot(p.to(v_tile.dtype), v_tile)
        row = (head.to(tl.int64) * tokens + token) * TOPK + slot
        _store_partial(out, lse, row, valid, o * inverse(norm)[:, None], m + tl.log2(norm), DV, DV_PADDED, STORE)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def hold_rows_kernel(
    q, k, v, start, length, position, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, TOPK: tl.constexpr, HEAD_BITS: tl.constexpr, SLOT_BITS: tl.constexpr, ITEM: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
    WITH_OWN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: ROWS entries of one work item of one (kv head, block), against the whole block.

    Reads 4 or 8 bytes of list and 2 * D of q per row, and 2 * BLOCK * (D + DV) bytes of K and V (from L2: neighbouring
    programs read the same block); writes 2 * DV + 4 bytes per row.

    With TMA, `k` and `v` are descriptors over [heads, rows, D]: the same tiles in the same shared-memory layout, so the same
    bits. WITH_OWN includes own rows, with masks for them and for short blocks. Without it own rows are skipped; most of them
    fill whole programs, which return.
    """
    SUB: tl.constexpr = ITEM // ROWS
    MASKED: tl.constexpr = WITH_OWN or BLOCK % KEYS != 0
    # A program is short (few tiles of keys), so all loads before its first product are issued as early as possible.
    item = tl.program_id(0) // SUB
    bin_ = tl.load(item_bin + item)
    begin = tl.load(item_start + item) + tl.program_id(0) % SUB * ROWS
    end = tl.load(item_end + item)
    if bin_ < 0 or begin >= end:
        return
    r = begin + tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    valid = r < end
    e = tl.load(entry + r, mask=valid, other=0)
    kv_head = bin_ // n_blocks
    block = bin_ - kv_head * n_blocks
    first_key = tl.load(start + kv_head * start_head + block)
    if first_key < 0:  # another part has it
        return
    if WITH_OWN:
        held = tl.load(length + block)
    else:
        held = BLOCK

    token, head, slot = _decode(e, HEAD_BITS, SLOT_BITS)
    if not WITH_OWN:
        if tl.max((valid & (slot != TOPK - 1)).to(tl.int32), 0) == 0:
            return
    head += kv_head * GROUP
    pointers = q + token[:, None] * q_token + head.to(tl.int64)[:, None] * q_head + d[None, :]
    if D == D_PADDED:
        q_tile = tl.load(pointers)
    else:
        q_tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    last = tl.full([ROWS], BLOCK - 1, tl.int32)
    if WITH_OWN:
        last = tl.load(position + token, mask=valid & (slot == TOPK - 1), other=BLOCK - 1)
    if not TMA:
        k_base = k + first_key.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head
        v_base = v + first_key.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head

    m = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    for i in tl.range(0, BLOCK, KEYS, num_stages=STAGES):
        key = i + tl.arange(0, KEYS)
        if TMA:
            k_tile = k.load([kv_head * k_head, first_key + i, 0]).reshape(KEYS, D_PADDED)
        else:
            k_tile = _load_tile(k_base, i, held, k_row, KEYS, D, D_PADDED, MASKED)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if NEGATIVE:
            s = -s
        if MASKED:
            s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        p, m, norm, acc = _softmax_step(s, m, norm, acc, scale)
        if TMA:
            v_tile = v.load([kv_head * v_head, first_key + i, 0]).reshape(KEYS, DV_PADDED)
        else:
            v_tile = _load_tile(v_base, i, held, v_row, KEYS, DV, DV_PADDED, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    # Loaded again: the loop needs every register. The eviction policy keeps the compiler from merging these loads with the first.
    kv_head = tl.load(item_bin + item, eviction_policy="evict_first") // n_blocks
    valid = r < end
    e = tl.load(entry + r, mask=valid, other=0, eviction_policy="evict_first")
    token, head, slot = _decode(e, HEAD_BITS, SLOT_BITS)
    if not WITH_OWN:
        valid &= slot != TOPK - 1
    row = ((kv_head * GROUP + head).to(tl.int64) * tokens + token) * TOPK + slot
    _store_partial(out, lse, row, valid, acc * inverse(norm)[:, None], m + tl.log2(norm), DV, DV_PADDED, STORE)


@triton.jit
def _see_keys(
    m, norm, acc, q_tile, k, v, k_base, v_base, k_at, v_at, first_key, begin, end, held, position_first, scale,
    k_row, v_row, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DIAGONAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tiles of keys `[begin, end)` of a block into the running sum and output of consecutive rows, relative to `m`."""
    for i in tl.range(begin, end, KEYS, num_stages=STAGES):
        if TMA:
            k_tile = k.load([k_at, first_key + i, 0]).reshape(KEYS, D_PADDED)
        elif DIAGONAL:
            k_tile = _load_to_end(k_base, i, held, k_row, KEYS, D, D_PADDED)
        else:
            k_tile = _load_tile(k_base, i, held, k_row, KEYS, D, D_PADDED, False)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if NEGATIVE:
            s = -s
        if DIAGONAL:
            ahead = i - position_first + tl.arange(0, KEYS)
            s = tl.where(ahead[None, :] <= tl.arange(0, ROWS)[:, None], s, float("-inf"))
        p, m, norm, acc = _softmax_step(s, m, norm, acc, scale)
        if TMA:
            v_tile = v.load([v_at, first_key + i, 0]).reshape(KEYS, DV_PADDED)
        elif DIAGONAL:
            v_tile = _load_to_end(v_base, i, held, v_row, KEYS, DV, DV_PADDED)
        else:
            v_tile = _load_tile(v_base, i, held, v_row, KEYS, DV, DV_PADDED, False)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    return m, norm, acc


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def own_blocks_kernel(
    q, k, v, k_tiles, v_tiles, start, length, own_tiles, out, lse,
    offset, tokens, n_tiles, q_heads, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, TOPK: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One program: at most ROWS consecutive rows of one q head against the keys of their own block, causally.

    Reads 2 * D bytes of q per row and 2 * (D + DV) bytes per key up to the last row; writes 2 * DV + 4 bytes per row, at slot
    TOPK - 1. Tiles that every row sees in full come first, as in `hold_rows_kernel` (with TMA, `k_tiles` and `v_tiles` are
    descriptors), then the tiles on the diagonal, masked.

    The first row of the program changes no bit of any row: a mask that hides nothing selects the same scores of the same
    products, a tile hidden in full adds zeros and rescales by one, and tiles that no row sees are skipped.
    """
    SUB: tl.constexpr = TILE // ROWS
    pid = tl.program_id(0)
    head = pid % q_heads
    tile = n_tiles * SUB - 1 - pid // q_heads  # late rows see the most keys: long programs first
    fields = own_tiles + tile // SUB * 4
    skip = tile % SUB * ROWS
    count = tl.load(fields + 1) - skip
    token_first = tl.load(fields) + skip - offset
    if (count <= 0) | (token_first >= tokens) | (token_first + count <= 0):
        return
    block = tl.load(fields + 2)
    position_first = tl.load(fields + 3) + skip
    kv_head = head // GROUP
    first_key = tl.load(start + kv_head * start_head + block)
    if first_key < 0:
        return
    held = tl.load(length + block)

    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    token = token_first + r
    valid = (r < count) & (token >= 0) & (token < tokens)
    token = tl.where(valid, token, tl.maximum(token_first, 0)).to(tl.int64)
    pointers = q + token[:, None] * q_token + head.to(tl.int64) * q_head + d[None, :]
    if D == D_PADDED:
        q_tile = tl.load(pointers)
    else:
        q_tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    k_base = k + first_key.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head
    v_base = v + first_key.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head
    k_at = tl.minimum(k_head, 1) * kv_head
    v_at = tl.minimum(v_head, 1) * kv_head

    m = tl.full([ROWS], LOWEST, tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    whole = (position_first + 1) // KEYS * KEYS
    seen = position_first + tl.minimum(count, ROWS)
    m, norm, acc = _see_keys(
        m, norm, acc, q_tile, k_tiles, v_tiles, k_base, v_base, k_at, v_at, first_key, 0, whole, held, position_first,
        scale, k_row, v_row, D, D_PADDED, DV, DV_PADDED, NEGATIVE, ROWS, KEYS, STAGES, False, TMA,
    )  # fmt: skip
    # By pointers: TMA would read past the end of a short block, and a NaN there times a weight of 0 is NaN.
    m, norm, acc = _see_keys(
        m, norm, acc, q_tile, k_tiles, v_tiles, k_base, v_base, k_at, v_at, first_key, whole, seen, held, position_first,
        scale, k_row, v_row, D, D_PADDED, DV, DV_PADDED, NEGATIVE, ROWS, KEYS, STAGES, True, False,
    )  # fmt: skip
    # Loaded again, as in `hold_rows_kernel`.
    count = tl.load(fields + 1, eviction_policy="evict_first") - skip
    token = tl.load(fields, eviction_policy="evict_first") + skip - offset + r
    valid = (r < count) & (token >= 0) & (token < tokens)
    row = (head.to(tl.int64) * tokens + token) * TOPK + TOPK - 1
    _store_partial(out, lse, row, valid, acc * inverse(norm)[:, None], m + tl.log2(norm), DV, DV_PADDED, STORE)
