"""Gluon kernels for block attention on Hopper, blocks of more than 128 keys; `hopper_forward.py` launches them.

Rows stay, and keys and values stream past them in tiles that TMA brings. They are waited for by their barrier alone: TMA
writes shared memory through the path by which products read it. A tile of keys is asked for two tiles ahead, as soon as the
scores of the tile whose place it takes are done; values one tile ahead. The other rules of ordering are those of
`hopper_backward_kernels`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_backward_kernels import _decode, _offset, barrier
from .hopper_forward_kernels import _store_layout


@gluon.jit
def _new_barriers():
    """Two for tiles of keys and two for tiles of values. Before a kernel returns early: else loads move behind the return."""
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(v_full.index(j), count=1)
    fence_async_shared()
    barrier()
    return k_full, v_full


@gluon.jit
def _fetch(tiles, head, row, full, tile_s, there, SIZE: gl.constexpr):
    """Start the copy of one tile of keys or values, SIZE bytes, if it is `there`."""
    mbarrier.expect(full, SIZE, pred=there)
    tma.async_copy_global_to_shared(tiles, [head, row, 0], full, tile_s, pred=there)


@gluon.jit
def _fetch_two(tiles, head, row, full, tile_s, there, tiles2, head2, row2, full2, tile2_s, there2, SIZE: gl.constexpr):
    """As `_fetch` for two tiles; together they need one barrier of the compiler's less."""
    mbarrier.expect(full, SIZE, pred=there)
    mbarrier.expect(full2, SIZE, pred=there2)
    tma.async_copy_global_to_shared(tiles, [head, row, 0], full, tile_s, pred=there)
    tma.async_copy_global_to_shared(tiles2, [head2, row2, 0], full2, tile2_s, pred=there2)


@gluon.jit
def _begin(
    R: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, T: gl.constexpr, SCORE: gl.constexpr, SUM: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Maximum, sum, zeros for scores, output and weights before the first tile; the rows' copies are waited for."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    m = gl.full([R], float("-inf"), gl.float32, BY_ROW)
    norm = gl.zeros([R], gl.float32, BY_ROW)
    zero = gl.zeros([R, BN], gl.float32, SCORE)
    acc = warpgroup_mma_init(gl.zeros([R, D], gl.float32, SUM))
    p_left = gl.zeros([R, BN], T, LEFT)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    return m, norm, zero, acc, p_left


@gluon.jit
def _softmax_step(s, m, norm, total, scale, T: gl.constexpr, SUM: gl.constexpr, LEFT: gl.constexpr):
    """As `forward_kernels._softmax_step`; the weights come as the left side of the product to follow."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - m_new[:, None])
    rescale = gl.exp2(m - m_new)
    norm = norm * rescale + gl.sum(p, 1)
    total = total * gl.convert_layout(rescale, gl.SliceLayout(1, SUM))[:, None]
    return gl.convert_layout(p.to(T), LEFT), m_new, norm, total


@gluon.jit
def _store_rows(out, at, stored, total, norm, R: gl.constexpr, D: gl.constexpr, T: gl.constexpr, SUM: gl.constexpr):
    """Store normalised rows at rows `at` of `out` where `stored`, both as `_store_layout` has the rows."""
    STORE: gl.constexpr = _store_layout(R, D)
    o = total * gl.convert_layout(1.0 / norm, gl.SliceLayout(1, SUM))[:, None]
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    gl.store(out + (at * D)[:, None] + cols[None, :], gl.convert_layout(o.to(T), STORE), mask=stored[:, None])


@gluon.jit(
    do_not_specialize=["tokens", "n_blocks", "start_head"],
    do_not_specialize_on_alignment=["start", "entry", "item_bin", "item_start", "item_end"],
)
def hold_rows_kernel(
    q, k_tiles, v_tiles, start, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, group, scale, start_head, q_t, q_h, k_head, v_head,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, TILES: gl.constexpr,
    R: gl.constexpr, BN: gl.constexpr, NW: gl.constexpr, T: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """As `forward_kernels.hold_rows_kernel` without own rows: one work item, R rows; reads and writes the same.

    The block is at least two whole tiles of BN keys.
    """
    item = gl.program_id(0)
    bin_ = gl.load(item_bin + item)
    begin = gl.load(item_start + item)
    end = gl.load(item_end + item)
    k_full, v_full = _new_barriers()
    if bin_ < 0:
        return
    kv_head = bin_ // n_blocks
    WARP: gl.constexpr = gl.BlockedLayout([R // 32], [32], [NW], [0])  # every warp holds all rows
    slots = gl.load(entry + gl.minimum(begin + gl.arange(0, R, layout=WARP), end - 1)) & ((1 << SLOT_BITS) - 1)
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    code = gl.load(entry + gl.minimum(begin + gl.arange(0, R, layout=gl.SliceLayout(1, GATHER)), end - 1))
    first_key = gl.load(start + kv_head.to(gl.int64) * start_head + bin_ % n_blocks)
    if (first_key < 0) | (gl.min(slots, 0) == TOPK - 1):
        return

    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BN, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    k_s = gl.allocate_shared_memory(T, [2, 1, BN, D], k_tiles.layout)
    v_s = gl.allocate_shared_memory(T, [2, 1, BN, D], v_tiles.layout)
    q_s = gl.allocate_shared_memory(T, [R, D], ROWS)
    k_at = kv_head * k_head
    v_at = kv_head * v_head
    _fetch_two(
        k_tiles, k_at, first_key, k_full.index(0), k_s.index(0), True,
        v_tiles, v_at, first_key, v_full.index(0), v_s.index(0), True, BN * D * 2,
    )  # fmt: skip
    _fetch(k_tiles, k_at, first_key + BN, k_full.index(1), k_s.index(1), True, BN * D * 2)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    q += kv_head.to(gl.int64) * group * q_h
    async_copy.async_copy_global_to_shared(q_s, q + _offset(token, head, q_t, q_h, HEAD_BITS)[:, None] + cols[None, :])
    async_copy.commit_group()

    m, norm, zero, acc, p_left = _begin(R, BN, D, T, SCORE, SUM, LEFT)
    for i in range(TILES):
        stage = i % 2
        phase = i // 2 % 2
        mbarrier.wait(k_full.index(stage), phase)
        s_run = warpgroup_mma(
            q_s, k_s.index(stage).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True
        )  # fmt: skip
        s, total, p_left = warpgroup_mma_wait(0, deps=(s_run, acc, p_left))
        barrier()
        key = first_key + i * BN
        _fetch_two(
            v_tiles, v_at, key + BN, v_full.index(1 - stage), v_s.index(1 - stage), i + 1 < TILES,
            k_tiles, k_at, key + 2 * BN, k_full.index(stage), k_s.index(stage), i + 2 < TILES, BN * D * 2,
        )  # fmt: skip
        if NEGATIVE:
            s = -s
        p_left, m, norm, total = _softmax_step(s, m, norm, total, scale, T, SUM, LEFT)
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p_left, v_s.index(stage).reshape([BN, D]), total, is_async=True)
    row = begin + gl.arange(0, R, layout=BY_ROW)
    code = gl.load(entry + gl.minimum(row, end - 1), cache_modifier=".cg")  # read again: the loop needs every register
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    slot = code & ((1 << SLOT_BITS) - 1)
    at = ((kv_head * group).to(gl.int64) * tokens + _offset(token, head, 1, tokens, HEAD_BITS)) * TOPK + slot
    stored = (row < end) & (slot != TOPK - 1)
    gl.store(lse + at, m + gl.log2(norm), mask=stored)
    total, p_left = warpgroup_mma_wait(0, deps=(acc, p_left))
    STORED: gl.constexpr = gl.SliceLayout(1, _store_layout(R, D))
    _store_rows(out, gl.convert_layout(at, STORED), gl.convert_layout(stored, STORED), total, norm, R, D, T, SUM)
    for j in gl.static_range(2):
        mbarrier.invalidate(k_full.index(j))
        mbarrier.invalidate(v_full.index(j))


@gluon.jit(
    do_not_specialize=["offset", "tokens", "n_tiles", "q_heads", "start_head"],
    do_not_specialize_on_alignment=["start", "length", "own_tiles"],
)
def own_blocks_kernel(
    q, k, v, k_tiles, v_tiles, start, length, own_tiles, out, lse,
    offset, tokens, n_tiles, q_heads, group, scale, start_head, q_t, q_h, k_n, k_h, v_n, v_h,
    D: gl.constexpr, TOPK: gl.constexpr, R: gl.constexpr, BN: gl.constexpr, NW: gl.constexpr, T: gl.constexpr,
    NEGATIVE: gl.constexpr,
):  # fmt: skip
    """As `forward_kernels.own_blocks_kernel`: at most R consecutive rows, causally; reads and writes the same.

    A tile that reaches past a short block, the last of its program, is read by pointers: a descriptor would bring in another
    document's rows, where a NaN times a weight of 0 is NaN.
    """
    pid = gl.program_id(0)
    head = pid % q_heads
    fields = own_tiles + (n_tiles - 1 - pid // q_heads) * 4  # late rows have the most keys: long programs first
    token_first = gl.load(fields) - offset
    count = gl.load(fields + 1)
    block = gl.load(fields + 2)
    position_first = gl.load(fields + 3)
    kv_head = head // group
    first_key = gl.load(start + kv_head.to(gl.int64) * start_head + block)
    held = gl.load(length + block)
    k_full, v_full = _new_barriers()
    if (token_first >= tokens) | (token_first + count <= 0) | (first_key < 0):
        return

    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BN, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    k_s = gl.allocate_shared_memory(T, [2, 1, BN, D], k_tiles.layout)
    v_s = gl.allocate_shared_memory(T, [2, 1, BN, D], v_tiles.layout)
    q_s = gl.allocate_shared_memory(T, [R, D], ROWS)
    at_s = gl.allocate_shared_memory(gl.int64, [R], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Where the keys of the tiles that some row sees end. At least 1: products of a loop that may not run are serialised.
    end = gl.maximum(gl.minimum((position_first + count + BN - 1) // BN * BN, held), 1)
    k_at = gl.minimum(k_h, 1) * kv_head
    v_at = gl.minimum(v_h, 1) * kv_head
    _fetch_two(
        k_tiles, k_at, first_key, k_full.index(0), k_s.index(0), end >= BN,
        v_tiles, v_at, first_key, v_full.index(0), v_s.index(0), end >= BN, BN * D * 2,
    )  # fmt: skip
    _fetch(k_tiles, k_at, first_key + BN, k_full.index(1), k_s.index(1), end >= 2 * BN, BN * D * 2)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    token = gl.maximum(token_first + gl.arange(0, R, layout=gl.SliceLayout(1, GATHER)), 0)
    token = gl.minimum(token, gl.minimum(token_first + count, tokens) - 1)  # what is not stored repeats what is
    q += head.to(gl.int64) * q_h
    async_copy.async_copy_global_to_shared(q_s, q + (token.to(gl.int64) * q_t)[:, None] + cols[None, :])
    async_copy.commit_group()
    # Where rows are stored, -1 for nowhere: kept here, as the loop needs every register.
    r = gl.arange(0, R, layout=gl.BlockedLayout([1], [32], [NW], [0]))
    valid = (r < count) & (token_first + r >= 0) & (token_first + r < tokens)
    at_s.store(gl.where(valid, (head.to(gl.int64) * tokens + token_first + r) * TOPK + TOPK - 1, -1))

    row = gl.arange(0, R, layout=BY_ROW)[:, None]
    col = gl.arange(0, BN, layout=gl.SliceLayout(0, SCORE))[None, :]
    m, norm, zero, acc, p_left = _begin(R, BN, D, T, SCORE, SUM, LEFT)
    for i in range(0, end, BN):
        stage = i // BN % 2
        phase = i // BN // 2 % 2
        k_tile = k_s.index(stage).reshape([BN, D])
        v_tile = v_s.index(stage).reshape([BN, D])
        if i + BN <= end:
            mbarrier.wait(k_full.index(stage), phase)
        else:  # past the end the last key again: its weight there is 0
            key = gl.minimum(i + gl.arange(0, BN, layout=gl.SliceLayout(1, GATHER)), end - 1)
            from_row = (first_key + key).to(gl.int64)
            k_from = k + (from_row * k_n + k_at.to(gl.int64) * k_h)[:, None] + cols[None, :]
            v_from = v + (from_row * v_n + v_at.to(gl.int64) * v_h)[:, None] + cols[None, :]
            async_copy.async_copy_global_to_shared(k_tile, k_from)
            async_copy.async_copy_global_to_shared(v_tile, v_from)
            async_copy.commit_group()
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()
        s_run = warpgroup_mma(q_s, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, total, p_left = warpgroup_mma_wait(0, deps=(s_run, acc, p_left))
        barrier()
        _fetch_two(
            v_tiles, v_at, first_key + i + BN, v_full.index(1 - stage), v_s.index(1 - stage), i + 2 * BN <= end,
            k_tiles, k_at, first_key + i + 2 * BN, k_full.index(stage), k_s.index(stage), i + 3 * BN <= end, BN * D * 2,
        )  # fmt: skip
        if NEGATIVE:
            s = -s
        if i + BN - 1 > position_first:
            # The left side holds what a thread's registers differ in (`SCORE`), all constant; the right side is one number.
            s = gl.where((col & ~6) - (row & 72) <= (row & ~72) - (col & 6) + position_first - i, s, float("-inf"))
        p_left, m, norm, total = _softmax_step(s, m, norm, total, scale, T, SUM, LEFT)
        mbarrier.wait(v_full.index(stage), phase, pred=i + BN <= end)
        acc = warpgroup_mma(p_left, v_tile, total, is_async=True)
    at = at_s.load(BY_ROW)
    gl.store(lse + at, m + gl.log2(norm), mask=at >= 0)
    total, p_left = warpgroup_mma_wait(0, deps=(acc, p_left))
    at = at_s.load(gl.SliceLayout(1, _store_layout(R, D)))
    _store_rows(out, at, at >= 0, total, norm, R, D, T, SUM)
    for j in gl.static_range(2):
        mbarrier.invalidate(k_full.index(j))
        mbarrier.invalidate(v_full.index(j))
