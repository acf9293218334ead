"""Block attention, forward: gathered query rows times one block of keys and values.

Three kernels write the same thing, one normalised partial output and log-sum-exp (base 2) for each (q head, row, slot):

- `_stream_rows`, blocks of at most 128 keys: one program holds the block's K and V and streams up to 2048 rows by.
- `_hold_rows`, larger blocks: one program holds 128 rows and streams the block's K and V by; it leaves own blocks to
- `_own_blocks`: as `_hold_rows`, but for consecutive rows, causally.

On Hopper `hopper_forward` serves blocks of at most 128 keys, with the bits of `_stream_rows`.

Tiles of keys are aligned to the block's start and tile sizes are fixed (`configs`), so a row's partial does not depend
on which other rows share its tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs, hopper_forward
from .types import OWN_TILE, KVPart, QueryRows

LOG2E = 1.4426950408889634

# Counts and strides that change from chunk to chunk, int32 views that start anywhere: one compiled kernel serves all.
_VARYING = ["tokens", "n_tiles", "n_blocks", "q_heads", "offset", "start_head"]
_UNALIGNED = ["start", "length", "position", "entry", "item_bin", "item_start", "item_end", "own_tiles"]


@triton.jit
def _decode(e, HEAD_BITS: tl.constexpr, SLOT_BITS: tl.constexpr):
    """Entry -> (token, head in group, slot). Bit fields: a division by a runtime length costs a fifth of the kernel."""
    slot = (e & ((1 << SLOT_BITS) - 1)).to(tl.int32)
    head = ((e >> SLOT_BITS) & ((1 << HEAD_BITS) - 1)).to(tl.int32)
    return (e >> (HEAD_BITS + SLOT_BITS)).to(tl.int64), head, slot


@triton.jit
def _load_tile(
    base, first, held, stride, KEYS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr
):
    """Rows `first + [0, KEYS)` of a block at `base`, zero from row `held` on (if MASKED) and in the padding columns.

    One 64-bit offset for the tile and 32-bit ones inside it: 64-bit pointers for every row would spill.
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
    """As `_load_tile`, but from row `held` on the last row again: for keys whose weight is 0. Needs no masks."""
    row = tl.minimum(tl.arange(0, KEYS), held - first - 1)
    d = tl.arange(0, PADDED)
    pointers = base + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if SIZE != PADDED:
        return tl.load(pointers, mask=(d < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _softmax_step(s, m, norm, acc, scale):
    """One tile of scores into the running maximum, sum and output; returns the tile's weights too."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
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
def _stream_rows(
    q, k, v, start, length, position, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, TOPK: tl.constexpr, HEAD_BITS: tl.constexpr, SLOT_BITS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, NEGATIVE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """One program: one work item, entries of one (kv head, block), past and own rows alike.

    Reads the block's K and V once (2 * BLOCK * (D + DV) bytes), then for each entry 4-8 bytes of list and a row of q
    (2 * D, mostly from L2: a bin's rows are one kv head's); writes 2 * DV + 4 bytes an entry.
    """
    item = tl.program_id(0)
    bin_ = tl.load(item_bin + item)
    if bin_ < 0:
        return
    kv_head = bin_ // n_blocks
    block = bin_ - kv_head * n_blocks
    first_key = tl.load(start + kv_head * start_head + block)
    if first_key < 0:  # another part's
        return
    held = tl.load(length + block)
    begin = tl.load(item_start + item)
    end = tl.load(item_end + item)

    key = tl.arange(0, KEYS)
    r = tl.arange(0, ROWS)
    d = tl.arange(0, D_PADDED)
    # A short block is the last of its document; only its own rows read it, and their position masks its end.
    first = tl.zeros([], tl.int32)
    k_base = k + first_key.to(tl.int64) * k_row + kv_head.to(tl.int64) * k_head
    v_base = v + first_key.to(tl.int64) * v_row + kv_head.to(tl.int64) * v_head
    k_tile = _load_tile(k_base, first, held, k_row, KEYS, D, D_PADDED, True)
    v_tile = _load_tile(v_base, first, held, v_row, KEYS, DV, DV_PADDED, True)
    # Entries run a tile ahead in registers, so that the gather of q is the only load the compiler has to pipeline: behind a
    # pipelined load of entries it would be asked for just before it is needed.
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
        # Rows of past blocks ask for no position, so most tiles wait for no second gather.
        own = valid & (slot == TOPK - 1)
        last = tl.load(position + token, mask=own, other=BLOCK - 1)
        s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
        m = tl.max(s, 1) * scale
        p = tl.exp2(s * scale - m[:, None])
        norm = tl.sum(p, 1)
        o = tl.dot(p.to(v_tile.dtype), v_tile)
        row = (head.to(tl.int64) * tokens + token) * TOPK + slot
        _store_partial(out, lse, row, valid, o * (1.0 / norm)[:, None], m + tl.log2(norm), DV, DV_PADDED, STORE)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _hold_rows(
    q, k, v, start, length, position, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, TOPK: tl.constexpr, HEAD_BITS: tl.constexpr, SLOT_BITS: tl.constexpr, ITEM: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
    WITH_OWN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One program: ROWS entries of one work item of one (kv head, block), against the whole block.

    Reads ROWS rows of q and 2 * BLOCK * (D + DV) bytes of K and V (from L2: neighbours read the same block); writes
    ROWS * (2 * DV + 4) bytes. With TMA, `k` and `v` are descriptors over [heads, rows, D]: the same tiles in the same
    shared-memory layout, so the same bits. Past blocks are whole; WITH_OWN takes own rows too, with masks for them and for
    short blocks; without it they are left out, and most of them fill programs of their own.
    """
    SUB: tl.constexpr = ITEM // ROWS
    MASKED: tl.constexpr = WITH_OWN or BLOCK % KEYS != 0
    # A program is short (few tiles of keys), so what it looks up before its first product is asked for as early as can be.
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
    if first_key < 0:  # another part's
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

    m = tl.full([ROWS], float("-inf"), tl.float32)
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
    # Read again rather than kept: the loop needs every register. (The other policy keeps the compiler from merging loads.)
    kv_head = tl.load(item_bin + item, eviction_policy="evict_first") // n_blocks
    valid = r < end
    e = tl.load(entry + r, mask=valid, other=0, eviction_policy="evict_first")
    token, head, slot = _decode(e, HEAD_BITS, SLOT_BITS)
    if not WITH_OWN:
        valid &= slot != TOPK - 1
    row = ((kv_head * GROUP + head).to(tl.int64) * tokens + token) * TOPK + slot
    _store_partial(out, lse, row, valid, acc * (1.0 / norm)[:, None], m + tl.log2(norm), DV, DV_PADDED, STORE)


@triton.jit
def _see_keys(
    m, norm, acc, q_tile, k, v, k_base, v_base, k_at, v_at, first_key, begin, end, held, position_first, scale,
    k_row, v_row, D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DIAGONAL: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and output of consecutive rows after the tiles of keys in `[begin, end)` of their block."""
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
def _own_blocks(
    q, k, v, k_tiles, v_tiles, start, length, own_tiles, out, lse,
    offset, tokens, n_tiles, q_heads, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    GROUP: tl.constexpr, TOPK: tl.constexpr, TILE: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr,
    NEGATIVE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, STORE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One program: at most ROWS consecutive rows of one q head against the keys of their own block, causally.

    Reads the rows of q and the block's keys up to the last row (2 * (D + DV) bytes each); writes 2 * DV + 4 bytes a
    row, at slot TOPK - 1. Keys that every row sees come first, as in `_hold_rows` (with TMA, `k_tiles` and `v_tiles` are
    descriptors), then the tiles on the diagonal, masked. Where a tile of rows begins changes no bit of a row: a mask that
    hides nothing selects the same scores of the same products, a tile hidden whole adds zeros, rescaled by one, and tiles
    that no row of the program sees are left out.
    """
    SUB: tl.constexpr = TILE // ROWS
    pid = tl.program_id(0)
    head = pid % q_heads
    tile = n_tiles * SUB - 1 - pid // q_heads  # late rows have the most keys: long programs first
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

    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    whole = (position_first + 1) // KEYS * KEYS
    seen = position_first + tl.minimum(count, ROWS)
    m, norm, acc = _see_keys(
        m, norm, acc, q_tile, k_tiles, v_tiles, k_base, v_base, k_at, v_at, first_key, 0, whole, held, position_first,
        scale, k_row, v_row, D, D_PADDED, DV, DV_PADDED, NEGATIVE, ROWS, KEYS, STAGES, False, TMA,
    )  # fmt: skip
    # By pointers: a descriptor would bring in what lies beyond a short block, where a NaN times a weight of 0 is NaN.
    m, norm, acc = _see_keys(
        m, norm, acc, q_tile, k_tiles, v_tiles, k_base, v_base, k_at, v_at, first_key, whole, seen, held, position_first,
        scale, k_row, v_row, D, D_PADDED, DV, DV_PADDED, NEGATIVE, ROWS, KEYS, STAGES, True, False,
    )  # fmt: skip
    # Read again rather than kept, as in `_hold_rows`.
    count = tl.load(fields + 1, eviction_policy="evict_first") - skip
    token = tl.load(fields, eviction_policy="evict_first") + skip - offset + r
    valid = (r < count) & (token >= 0) & (token < tokens)
    row = (head.to(tl.int64) * tokens + token) * TOPK + TOPK - 1
    _store_partial(out, lse, row, valid, acc * (1.0 / norm)[:, None], m + tl.log2(norm), DV, DV_PADDED, STORE)


def _heads_stride(x: Tensor) -> int:
    """Stride between the kv heads' rows; 0 where all (kv head, block) pairs have rows of their own."""
    return x.stride(1) if x.shape[1] > 1 else 0


def _descriptor(x: Tensor, keys: int) -> TensorDescriptor:
    """TMA descriptor over `[heads, rows, D]` of `[rows, heads, D]`, one tile of `keys` rows at a time."""
    rows, heads, dim = x.shape
    one = _heads_stride(x) == 0  # one head, or the same rows for every head: TMA knows no stride of 0
    shape, strides = [1 if one else heads, rows, dim], [x.stride(0) if one else x.stride(1), x.stride(0), 1]
    return TensorDescriptor(x, shape, strides, [1, keys, configs.padded(dim)])


def _tma_can_read(x: Tensor) -> bool:
    strides = (x.stride(0), x.stride(1) if x.shape[1] > 1 else 0)
    return x.data_ptr() % 16 == 0 and x.stride(0) > 0 and all(s * x.element_size() % 16 == 0 for s in strides)


def _scores_scale(scale: float) -> tuple[float, bool]:
    """Positive factor in base 2, and whether scores change sign. 0 becomes tiny: 0 * -inf (a masked score) is NaN."""
    return max(abs(scale) * LOG2E, 1e-30), scale < 0


def attend_listed(
    q: Tensor, part: KVPart, lists, rows: QueryRows, selected: Tensor, scale: float, partials,
    launch: configs.Launch, *, stream: bool, tma: bool,
) -> None:  # fmt: skip
    """Every listed entry by `_stream_rows`, or by `_hold_rows`, which leaves own rows of blocks of more than 128 keys to
    `attend_own`. `tma`: descriptors may be used, which changes no bit."""
    n_items, block_size = lists.item_bin.numel(), lists.block_size
    if n_items == 0 or part.k.shape[0] == 0:
        return
    (tokens, _, dim), dim_v = q.shape, part.v.shape[2]
    scale, negative = _scores_scale(scale)
    k, v, k_head, v_head = part.k, part.v, _heads_stride(part.k), _heads_stride(part.v)
    options = {}
    kernel, programs = _stream_rows, n_items
    if not stream:
        # TMA reads whole tiles: a block's ragged tail would bring in another block's rows.
        with_own = block_size <= configs.SMALL_BLOCK
        tma = tma and not with_own and block_size % launch.keys == 0 and _tma_can_read(k) and _tma_can_read(v)
        if tma:
            k, v, k_head, v_head = (
                _descriptor(k, launch.keys),
                _descriptor(v, launch.keys),
                int(k_head > 0),
                int(v_head > 0),
            )
        kernel, programs = _hold_rows, n_items * (lists.rows_per_item // launch.rows)
        options = {"ITEM": lists.rows_per_item, "WITH_OWN": with_own, "TMA": tma}
    kernel[(programs,)](
        q, k, v, part.start, part.length, rows.position, lists.entry, lists.item_bin, lists.item_start, lists.item_end,
        partials.out, partials.lse, tokens, lists.n_blocks, scale, part.start.stride(0),
        q.stride(0), q.stride(1), part.k.stride(0), k_head, part.v.stride(0), v_head,
        GROUP=lists.group_size, TOPK=selected.shape[2], HEAD_BITS=lists.head_bits, SLOT_BITS=lists.slot_bits,
        BLOCK=block_size, D=dim, D_PADDED=configs.padded(dim), DV=dim_v,
        DV_PADDED=configs.padded(dim_v), NEGATIVE=negative, ROWS=launch.rows, KEYS=launch.keys,
        STAGES=launch.num_stages, STORE=launch.store, num_warps=launch.num_warps, **options,
    )  # fmt: skip


def attend_own(
    q: Tensor, part: KVPart, lists, rows: QueryRows, selected: Tensor, scale: float, partials,
    launch: configs.Launch, *, tma: bool,
) -> None:  # fmt: skip
    """The causal own blocks, by `rows.own_tiles`, into the last slot. `tma`: descriptors may be used; changes no bit."""
    tiles = rows.own_tiles.shape[0]
    if tiles == 0 or part.k.shape[0] == 0:
        return
    (tokens, q_heads, dim), dim_v = q.shape, part.v.shape[2]
    scale, negative = _scores_scale(scale)
    tma = tma and _tma_can_read(part.k) and _tma_can_read(part.v)
    k_tiles, v_tiles = (_descriptor(x, launch.keys) if tma else x for x in (part.k, part.v))
    _own_blocks[(tiles * (OWN_TILE // launch.rows) * q_heads,)](
        q, part.k, part.v, k_tiles, v_tiles, part.start, part.length, rows.own_tiles, partials.out, partials.lse,
        rows.offset, tokens, tiles, q_heads, scale, part.start.stride(0), q.stride(0), q.stride(1),
        part.k.stride(0), _heads_stride(part.k), part.v.stride(0), _heads_stride(part.v),
        GROUP=lists.group_size, TOPK=selected.shape[2], TILE=OWN_TILE, D=dim, D_PADDED=configs.padded(dim), DV=dim_v,
        DV_PADDED=configs.padded(dim_v), NEGATIVE=negative, ROWS=launch.rows, KEYS=launch.keys,
        STAGES=launch.num_stages, STORE=launch.store, TMA=tma, num_warps=launch.num_warps,
    )  # fmt: skip


def attend(
    q: Tensor, part: KVPart, lists, rows: QueryRows, selected: Tensor, scale: float, partials, *,
    path: str | None = None,
) -> None:  # fmt: skip
    """Attention of every routed row to every block of the part; see `torch_backend.attend`.

    Args:
        path: "portable", or "hopper" where `hopper_forward.supported`; by default "hopper" where it is. The bits are the
            same.
    """
    if q.shape[0] == 0 or lists.n_blocks == 0 or part.k.shape[0] == 0:
        return
    if path is None:
        path = "hopper" if hopper_forward.supported(q, part, lists) else "portable"
    if path == "hopper":
        hopper_forward.attend(q, part, lists, rows, selected.shape[2], *_scores_scale(scale), partials)
    elif path == "portable":
        attend_portable(q, part, lists, rows, selected, scale, partials)
    else:
        raise ValueError(f"path must be 'portable', 'hopper' or None, got {path!r}")


def attend_portable(q: Tensor, part: KVPart, lists, rows: QueryRows, selected: Tensor, scale: float, partials) -> None:
    """The kernels of this file."""
    device = configs.capability(q.device)
    dim, dim_v = q.shape[2], part.v.shape[2]
    hold = configs.stationary(dim, dim_v, lists.block_size, device)
    stream = configs.streaming(dim, dim_v, lists.block_size, device)
    # TMA pays on Hopper, where two programs share a multiprocessor; Blackwell's consumer chips have it too, untested.
    shared, tma = (q, part, lists, rows, selected, scale, partials), device == (9, 0)
    attend_listed(*shared, stream or hold, stream=stream is not None, tma=tma)
    if lists.block_size > configs.SMALL_BLOCK:
        attend_own(*shared, configs.own_blocks(dim, dim_v, device), tma=tma)
