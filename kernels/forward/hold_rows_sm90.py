"""Gluon kernels of block attention on Hopper for blocks of more than 128 keys.

Rows stay in shared memory; keys and values stream past them in tiles that TMA copies. A tile is ready when its mbarrier is: TMA
writes shared memory through the proxy that products read through, so no fence is needed. A tile of keys is requested two tiles
ahead, as soon as the scores of the tile whose stage it takes are done, and a tile of values one tile ahead. `gluon_rows.py` has
the other rules of ordering.
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

from ..gluon_rows import (
    aligned_offset_of,
    barrier,
    decode,
    gather_layout,
    line_layout,
    normalised,
    offset_of,
    product_layout,
    store_layout,
    warp_layout,
)
from ..softmax import LOWEST, MOST_RISE


@gluon.jit
def _new_barriers():
    """Two mbarriers for tiles of keys and two for tiles of values.

    Called before a kernel's early return: after it, the compiler would move the kernel's first loads behind the return.
    """
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
    """Start the copy of one tile of keys or values, SIZE bytes, if it is `there` (exists)."""
    mbarrier.expect(full, SIZE, pred=there)
    tma.async_copy_global_to_shared(tiles, [head, row, 0], full, tile_s, pred=there)


@gluon.jit
def _fetch_two(tiles, head, row, full, tile_s, there, tiles2, head2, row2, full2, tile2_s, there2, SIZE: gl.constexpr):
    """`_fetch` of two tiles. Issued together, they need one compiler-inserted barrier less."""
    mbarrier.expect(full, SIZE, pred=there)
    mbarrier.expect(full2, SIZE, pred=there2)
    tma.async_copy_global_to_shared(tiles, [head, row, 0], full, tile_s, pred=there)
    tma.async_copy_global_to_shared(tiles2, [head2, row2, 0], full2, tile2_s, pred=there2)


@gluon.jit
def _begin(
    ROWS: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr, DTYPE: gl.constexpr, SCORE: gl.constexpr, SUM: gl.constexpr,
    LEFT: gl.constexpr,
):  # fmt: skip
    """Before the first tile: what weights are relative to, their sum, zero scores, output, weights. Waits for copies of rows."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    m = gl.full([ROWS], LOWEST, gl.float32, BY_ROW)
    norm = gl.zeros([ROWS], gl.float32, BY_ROW)
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORE)
    acc = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, SUM))
    p_left = gl.zeros([ROWS, KEYS], DTYPE, LEFT)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    return m, norm, zero, acc, p_left


@gluon.constexpr_function
def _rescale_asm(count: int) -> str:
    """Multiplies `count` numbers of each thread, unless all factors of the warp are 1. A thread has four rows."""
    multiply = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i}; " for i in range(count))
    rows = (0, 2, count // 2, count // 2 + 2)
    compare = "".join(f"setp.neu.f32 one, ${2 * count + i}, 0f3F800000; or.pred any, any, one; " for i in rows)
    return (
        "{ .reg .pred one, any; setp.ne.s32 any, 0, 0; "
        + compare
        + "vote.sync.any.pred any, any, 0xffffffff; @!any bra.uni done; "
        + multiply
        + "done: }"
    )


@gluon.constexpr_function
def _rescale_constraints(count: int) -> str:
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def _rescale(total, factors):
    """`total * factors`. A warp whose factors are all 1, as nearly always, skips the multiplications."""
    gl.static_assert((total.shape[0] == 128) & (gl.num_warps() == 4))
    return gl.inline_asm_elementwise(
        _rescale_asm(total.shape[1]), _rescale_constraints(total.shape[1]), [total, factors], dtype=gl.float32,
        is_pure=False, pack=total.shape[1],
    )  # fmt: skip


@gluon.jit
def _softmax_step(s, m, norm, total, scale, DTYPE: gl.constexpr, SUM: gl.constexpr, LEFT: gl.constexpr):
    """One tile of scores into the running sum and output, relative to `m`, as `portable_kernels._softmax_step`. The weights are
    the left operand of the next product.
    """
    highest = gl.max(s, 1) * scale
    m_new = gl.where(highest - m > MOST_RISE, highest, m)
    p = gl.exp2(s * scale - m_new[:, None])
    rescale = gl.exp2(m - m_new)
    norm = norm * rescale + gl.sum(p, 1)
    total = _rescale(total, gl.convert_layout(rescale, gl.SliceLayout(1, SUM))[:, None])
    return gl.convert_layout(p.to(DTYPE), LEFT), m_new, norm, total


@gluon.jit
def _store_rows(
    out, at, stored, total, norm, ROWS: gl.constexpr, D: gl.constexpr, DTYPE: gl.constexpr, SUM: gl.constexpr
):
    """Store normalised rows at rows `at` of `out` where `stored`; both in the rows' slice of `store_layout`."""
    STORE: gl.constexpr = store_layout(ROWS, D, 4)
    o = normalised(total, norm, SUM)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    gl.store(
        out + (at.to(gl.int64) * D)[:, None] + cols[None, :],
        gl.convert_layout(o.to(DTYPE), STORE),
        mask=stored[:, None],
    )


@gluon.jit(
    do_not_specialize=["tokens", "n_blocks", "start_head"],
    do_not_specialize_on_alignment=["start", "entry", "item_bin", "item_start", "item_end"],
)
def hold_rows_kernel(
    q, k_tiles, v_tiles, start, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, group, scale, start_head, q_token, q_head, k_head, v_head,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, TILES: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """One program: one work item of at most ROWS rows against a past block of TILES >= 2 whole tiles of KEYS keys.

    Reads 4 bytes of list and 2 * D of q per row and 4 * TILES * KEYS * D bytes of K and V (from L2: neighbouring programs
    read the same block); writes 2 * D + 4 bytes per row. Own rows are skipped, as in `portable_kernels.hold_rows_kernel`
    without WITH_OWN.
    """
    item = gl.program_id(0)
    bin_ = gl.load(item_bin + item)
    begin = gl.load(item_start + item)
    end = gl.load(item_end + item)
    k_full, v_full = _new_barriers()
    if bin_ < 0:
        return
    kv_head = bin_ // n_blocks
    WARP: gl.constexpr = warp_layout(ROWS, WARPS)
    slots = gl.load(entry + gl.minimum(begin + gl.arange(0, ROWS, layout=WARP), end - 1)) & ((1 << SLOT_BITS) - 1)
    GATHER: gl.constexpr = gather_layout(D, WARPS)
    code = gl.load(entry + gl.minimum(begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHER)), end - 1))
    first_key = gl.load(start + kv_head.to(gl.int64) * start_head + bin_ % n_blocks)
    if (first_key < 0) | (gl.min(slots, 0) == TOPK - 1):
        return

    SCORE: gl.constexpr = product_layout(KEYS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    k_s = gl.allocate_shared_memory(DTYPE, [2, 1, KEYS, D], k_tiles.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [2, 1, KEYS, D], v_tiles.layout)
    q_s = gl.allocate_shared_memory(DTYPE, [ROWS, D], ROWS_LAYOUT)
    k_at = kv_head * k_head
    v_at = kv_head * v_head
    _fetch_two(
        k_tiles, k_at, first_key, k_full.index(0), k_s.index(0), True,
        v_tiles, v_at, first_key, v_full.index(0), v_s.index(0), True, KEYS * D * 2,
    )  # fmt: skip
    _fetch(k_tiles, k_at, first_key + KEYS, k_full.index(1), k_s.index(1), True, KEYS * D * 2)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    q += kv_head.to(gl.int64) * group * q_head
    async_copy.async_copy_global_to_shared(
        q_s, q + aligned_offset_of(token, head, q_token, q_head, HEAD_BITS)[:, None] + cols[None, :]
    )
    async_copy.commit_group()

    m, norm, zero, acc, p_left = _begin(ROWS, KEYS, D, DTYPE, SCORE, SUM, LEFT)
    for i in range(TILES):
        stage = i % 2
        phase = i // 2 % 2
        mbarrier.wait(k_full.index(stage), phase)
        s_run = warpgroup_mma(
            q_s, k_s.index(stage).reshape([KEYS, D]).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        s, total, p_left = warpgroup_mma_wait(0, deps=(s_run, acc, p_left))
        barrier()
        key = first_key + i * KEYS
        _fetch_two(
            v_tiles, v_at, key + KEYS, v_full.index(1 - stage), v_s.index(1 - stage), i + 1 < TILES,
            k_tiles, k_at, key + 2 * KEYS, k_full.index(stage), k_s.index(stage), i + 2 < TILES, KEYS * D * 2,
        )  # fmt: skip
        if NEGATIVE:
            s = -s
        p_left, m, norm, total = _softmax_step(s, m, norm, total, scale, DTYPE, SUM, LEFT)
        mbarrier.wait(v_full.index(stage), phase)
        acc = warpgroup_mma(p_left, v_s.index(stage).reshape([KEYS, D]), total, is_async=True)
    row = begin + gl.arange(0, ROWS, layout=BY_ROW)
    code = gl.load(
        entry + gl.minimum(row, end - 1), cache_modifier=".cg"
    )  # loaded again: the loop needs every register
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    slot = code & ((1 << SLOT_BITS) - 1)
    at = (offset_of(token, head, 1, tokens, HEAD_BITS) + kv_head * group * tokens) * TOPK + slot
    stored = (row < end) & (slot != TOPK - 1)
    gl.store(lse + at, m + gl.log2(norm), mask=stored)
    total, p_left = warpgroup_mma_wait(0, deps=(acc, p_left))
    STORED: gl.constexpr = gl.SliceLayout(1, store_layout(ROWS, D, 4))
    _store_rows(out, gl.convert_layout(at, STORED), gl.convert_layout(stored, STORED), total, norm, ROWS, D, DTYPE, SUM)
    for j in gl.static_range(2):
        mbarrier.invalidate(k_full.index(j))
        mbarrier.invalidate(v_full.index(j))


@gluon.jit(
    do_not_specialize=["offset", "tokens", "n_tiles", "q_heads", "start_head"],
    do_not_specialize_on_alignment=["start", "length", "own_tiles"],
)
def own_blocks_kernel(
    q, k, v, k_tiles, v_tiles, start, length, own_tiles, out, lse,
    offset, tokens, n_tiles, q_heads, group, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head,
    D: gl.constexpr, TOPK: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
    NEGATIVE: gl.constexpr,
):  # fmt: skip
    """One program: at most ROWS consecutive rows of one q head against the keys of their own block, causally.

    Reads 2 * D bytes of q per row and 4 * D bytes per key up to the last row; writes 2 * D + 4 bytes per row, at slot
    TOPK - 1: as `portable_kernels.own_blocks_kernel`.

    The last tile of a short block reaches past the block's end and is read by pointers: TMA would read another document's
    rows, and a NaN there times a weight of 0 is NaN.
    """
    pid = gl.program_id(0)
    head = pid % q_heads
    fields = own_tiles + (n_tiles - 1 - pid // q_heads) * 4  # late rows see the most keys: long programs first
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

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    SCORE: gl.constexpr = product_layout(KEYS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    k_s = gl.allocate_shared_memory(DTYPE, [2, 1, KEYS, D], k_tiles.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [2, 1, KEYS, D], v_tiles.layout)
    q_s = gl.allocate_shared_memory(DTYPE, [ROWS, D], ROWS_LAYOUT)
    at_s = gl.allocate_shared_memory(gl.int64, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # End of the tiles of keys that some row sees. At least 1: ptxas serialises the products of a loop that may not run.
    end = gl.maximum(gl.minimum((position_first + count + KEYS - 1) // KEYS * KEYS, held), 1)
    k_at = gl.minimum(k_head, 1) * kv_head
    v_at = gl.minimum(v_head, 1) * kv_head
    _fetch_two(
        k_tiles, k_at, first_key, k_full.index(0), k_s.index(0), end >= KEYS,
        v_tiles, v_at, first_key, v_full.index(0), v_s.index(0), end >= KEYS, KEYS * D * 2,
    )  # fmt: skip
    _fetch(k_tiles, k_at, first_key + KEYS, k_full.index(1), k_s.index(1), end >= 2 * KEYS, KEYS * D * 2)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    token = gl.maximum(token_first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHER)), 0)
    token = gl.minimum(
        token, gl.minimum(token_first + count, tokens) - 1
    )  # rows that are not stored repeat one that is
    q += head.to(gl.int64) * q_head
    async_copy.async_copy_global_to_shared(q_s, q + (token.to(gl.int64) * q_token)[:, None] + cols[None, :])
    async_copy.commit_group()
    # Output rows, -1 for rows that are not stored. Kept in shared memory: the loop needs every register.
    r = gl.arange(0, ROWS, layout=line_layout(WARPS))
    valid = (r < count) & (token_first + r >= 0) & (token_first + r < tokens)
    at_s.store(gl.where(valid, (head.to(gl.int64) * tokens + token_first + r) * TOPK + TOPK - 1, -1))

    row = gl.arange(0, ROWS, layout=BY_ROW)[:, None]
    col = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORE))[None, :]
    m, norm, zero, acc, p_left = _begin(ROWS, KEYS, D, DTYPE, SCORE, SUM, LEFT)
    for i in range(0, end, KEYS):
        stage = i // KEYS % 2
        phase = i // KEYS // 2 % 2
        k_tile = k_s.index(stage).reshape([KEYS, D])
        v_tile = v_s.index(stage).reshape([KEYS, D])
        if i + KEYS <= end:
            mbarrier.wait(k_full.index(stage), phase)
        else:  # past the end the last key is repeated; its weight there is 0
            key = gl.minimum(i + gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER)), end - 1)
            from_row = (first_key + key).to(gl.int64)
            k_from = k + (from_row * k_row + k_at.to(gl.int64) * k_head)[:, None] + cols[None, :]
            v_from = v + (from_row * v_row + v_at.to(gl.int64) * v_head)[:, None] + cols[None, :]
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
            v_tiles, v_at, first_key + i + KEYS, v_full.index(1 - stage), v_s.index(1 - stage), i + 2 * KEYS <= end,
            k_tiles, k_at, first_key + i + 2 * KEYS, k_full.index(stage), k_s.index(stage), i + 3 * KEYS <= end, KEYS * D * 2,
        )  # fmt: skip
        if NEGATIVE:
            s = -s
        if i + KEYS - 1 > position_first:
            # Left: the bits in which a thread's registers differ (`SCORE`), all constants. Right: one number per thread.
            s = gl.where((col & ~6) - (row & 72) <= (row & ~72) - (col & 6) + position_first - i, s, float("-inf"))
        p_left, m, norm, total = _softmax_step(s, m, norm, total, scale, DTYPE, SUM, LEFT)
        mbarrier.wait(v_full.index(stage), phase, pred=i + KEYS <= end)
        acc = warpgroup_mma(p_left, v_tile, total, is_async=True)
    at = at_s.load(BY_ROW)
    gl.store(lse + at, m + gl.log2(norm), mask=at >= 0)
    total, p_left = warpgroup_mma_wait(0, deps=(acc, p_left))
    at = at_s.load(gl.SliceLayout(1, store_layout(ROWS, D, 4)))
    _store_rows(out, at, at >= 0, total, norm, ROWS, D, DTYPE, SUM)
    for j in gl.static_range(2):
        mbarrier.invalidate(k_full.index(j))
        mbarrier.invalidate(v_full.index(j))
