"""Gluon kernel for dK, dV and dq on Hopper, for large blocks: five products per tile where two kernels need seven.

The programs of a block's tiles of keys walk the same rows. Each adds its tile's product into dq to fp32 sums in L2. They add in
order of the tiles, so sums have the same bits every time: a program adds to a tile of rows after the program of the tile of keys
before it has. `gluon_rows.py` has the rules of ordering.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_rows import barrier, decode, gather_layout, line_layout, offset_of, product_layout, warp_layout
from .portable_kernels import LOG2E, UNALIGNED, VARYING
from .rows_sm90 import copy_block, copy_rows, load_scalars, start_rows, store_dkdv, unit_bounds, unseen_rows, work_unit


@gluon.constexpr_function
def _sum_layout() -> gl.DistributedLinearLayout:
    """Of a tile's sums in order of memory: the registers of a product `[64, 128]`, 16 bytes of a thread at a time."""
    return gl.DistributedLinearLayout(
        [[1], [2], [128], [256], [512]], [[4], [8], [16], [32], [64]], [[1024], [2048], [4096]], [], [8192]
    )


@gluon.jit
def _in_sum_order(dq):
    """A product `[64, 128]` of two warpgroups that split its columns, flat, in the order in which sums are kept.

    From the outermost: half of the columns (2), warp's rows (4), half of these (2), columns (4), row (8), columns (4, 2, 2).
    Sixteen columns of a row are adjacent, and no value moves to another thread. `merge.merge_dq_kernel` reads it.
    """
    rows_and_columns = dq.reshape([4, 2, 8, 2, 4, 2, 4, 2])
    return gl.convert_layout(rows_and_columns.permute((3, 0, 1, 4, 2, 6, 5, 7)).reshape([8192]), _sum_layout())


@gluon.jit
def _add_to_sums(dq, sums, there, tile):
    """Add a tile's product to the sums of its rows; the first tile of keys stores them."""
    dq = _in_sum_order(dq)
    index = gl.arange(0, 8192, layout=_sum_layout())
    gl.store(sums + index, dq, mask=(index >= 0) & (there & (tile == 0)))
    gl.atomic_add(sums + index, dq, mask=(index >= 0) & (there & (tile > 0)), sem="relaxed")


@gluon.jit
def _wait_for(progress, least, known):
    """Wait until `progress` is at least `least`, and return it; what was written before it is then visible.

    Args:
        progress: pointer to what another program signals.
        known: what was read earlier. Nothing is read where it is enough.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; mov.b32 $0, $3; setp.ge.s32 p, $3, $2; @p bra enough; "
        "again: ld.acquire.gpu.global.b32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra again; enough: }",
        "=&r,l,r,r", [progress.to(gl.int64), least, known], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _signal(progress, value):
    """Write `value`, visible after all that the program's threads wrote before the last barrier."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.s32 p, t, 0; "
        "@p st.release.gpu.global.b32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [progress.to(gl.int64), value], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _unit_and_tile(ticket, units_at_once, TILES: gl.constexpr):
    """Work unit, as an index in the order of programs, and tile of keys of the program that starts as number `ticket`.

    `units_at_once` units at a time: their first tiles of keys, then their second ones, and so on. Programs of one unit then
    start one behind the other, as they have to work.
    """
    first = ticket // (units_at_once * TILES) * units_at_once
    here = gl.minimum(gl.num_programs(0) // TILES - first, units_at_once)
    within = ticket - first * TILES
    return first + within % here, within // here


@gluon.jit
def _store_places(
    place,
    entry,
    count,
    first_row,
    place_head,
    place_token,
    WARPS: gl.constexpr,
    HEAD_BITS: gl.constexpr,
    SLOT_BITS: gl.constexpr,
):
    """Say for each row of the unit which row of the sums it has: `first_row` and those after it."""
    index = gl.arange(0, 128 * WARPS, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    for j in range(0, count, 128 * WARPS):
        here = j + index < count
        code = gl.load(entry + j + index, mask=here, other=0)
        token, head = decode(code, HEAD_BITS, SLOT_BITS)
        at = offset_of(token, head, place_token, place_head, HEAD_BITS) + (code & ((1 << SLOT_BITS) - 1))
        gl.store(place + at, first_row + j + index, mask=here)


@gluon.jit(
    do_not_specialize=[*VARYING, "place_head", "units_at_once"], do_not_specialize_on_alignment=[*UNALIGNED, "place"]
)
def dkdv_dq_tiles_kernel(
    q, dout, k, v, lse, delta, position, pointer, entry, start, length, segment_bin, dk, dv, dq, sums,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, dk_row, dk_head, dv_row, dv_head,
    lse_head, lse_token, delta_head, delta_token, place_head, place_token, start_head, n_bins, n_blocks, group, scale,
    place, progress, units_at_once,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, KEYS: gl.constexpr,
    ROWS: gl.constexpr, TILES: gl.constexpr, AHEAD: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
    SEGMENT: gl.constexpr, ACCUMULATE: gl.constexpr, HEADS: gl.constexpr,
):  # fmt: skip
    """One program: dK and dV of KEYS keys of one block, and what these keys add to dq, over the rows of its bin or of one segment
    of it.

    As `dkdv_sm90.dkdv_kernel`, which has no dq. `dq` are the sums of `DqPartials`, by tiles of ROWS entries of a bin: 4 * D bytes
    per row are added to in L2. The product into dq of a tile is issued one tile later, before that tile's S^T.

    `progress` is zeros: int32 `[1 + programs]`. A program takes a ticket from its first element when it starts, and waits only
    for one with a lower ticket, which runs already or has ended. The others count the tiles of rows, from the unit's first one,
    whose sums a program has added to.
    """
    STAGES: gl.constexpr = AHEAD + 2
    index, tile = _unit_and_tile(gl.atomic_add(progress, 1, sem="relaxed"), units_at_once, TILES)
    program = index * TILES + tile
    unit = work_unit(program, n_bins, n_blocks, TILES, HEADS)
    bin_, before, begin, count, first_key, held = unit_bounds(
        unit, pointer, segment_bin, start, length, n_bins, n_blocks, start_head, SEGMENT
    )
    if (first_key < 0) | (tile * KEYS >= held) | ((count == 0) & ACCUMULATE):
        return
    kv_head = (bin_ // n_blocks).to(gl.int64)
    first_head = kv_head * group
    tiles_before = gl.load(pointer + bin_) // ROWS + bin_ + before // ROWS
    dq += tiles_before.to(gl.int64) * (ROWS * D)
    progress += 1 + program
    entry += begin
    if tile == 0:
        _store_places(
            place + first_head * place_head, entry, count, tiles_before * ROWS, place_head, place_token,
            WARPS, HEAD_BITS, SLOT_BITS,
        )  # fmt: skip

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER))
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], DTYPE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    # The wait for the first tile of rows covers these copies.
    copy_block(k, v, k_s, v_s, kv_head, first_key, key, held, cols, k_row, k_head, v_row, v_head)
    q_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], ROWS_LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D], ROWS_LAYOUT)
    # Two stages suffice: each is overwritten two tiles, and so two barriers, later.
    ds_s = gl.allocate_shared_memory(DTYPE, [2, KEYS, ROWS], DS_LAYOUT)
    lse_s = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    delta_s = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)
    limit_s = gl.allocate_shared_memory(gl.int32, [2, ROWS], FLAT)
    code_s = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], FLAT)

    SCORE: gl.constexpr = product_layout(ROWS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    DQ: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, D // 2, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, SCORE)
    LINE: gl.constexpr = line_layout(WARPS)
    WARP: gl.constexpr = warp_layout(ROWS, WARPS)
    score_key = tile * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORE))
    zero = gl.zeros([KEYS, ROWS], gl.float32, SCORE)
    zero_dq = gl.zeros([ROWS, D], gl.float32, DQ)
    line = gl.arange(0, ROWS, layout=LINE)
    unseen = unseen_rows(entry, position, count, tile * KEYS, ROWS, WARPS, HEAD_BITS, SLOT_BITS, TOPK)
    entry += unseen
    count -= unseen
    done = unseen // ROWS  # tiles of rows before the first one
    dq += unseen.to(gl.int64) * D
    q += first_head * q_head
    dout += first_head * dout_head
    lse += first_head * lse_head
    delta += first_head * delta_head
    last_key = tile * KEYS + KEYS - 1
    factor = scale * LOG2E
    n = (count + ROWS - 1) // ROWS
    row_lse, row_delta, limit, line_code = start_rows(
        q, dout, lse, delta, position, entry, count, n, held, q_s, do_s, code_s, cols,
        q_token, q_head, dout_token, dout_head, lse_head, lse_token, delta_head, delta_token,
        ROWS, D, AHEAD, WARPS, HEAD_BITS, SLOT_BITS, TOPK,
    )  # fmt: skip
    dk_sum = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, SUM))
    dv_sum = warpgroup_mma_init(gl.zeros([KEYS, D], gl.float32, SUM))
    p_left = gl.zeros([KEYS, ROWS], DTYPE, LEFT)
    ds_left = gl.zeros([KEYS, ROWS], DTYPE, LEFT)
    known = done * 0
    for i in range(n):
        stage = i % STAGES
        nxt = (i + AHEAD) % STAGES
        async_copy.wait_group(AHEAD - 1)
        lse_s.index(i % 2).store(row_lse)
        delta_s.index(i % 2).store(row_delta)
        limit_s.index(i % 2).store(limit)
        code_s.index(nxt).store(line_code)
        fence_async_shared()
        barrier()
        if i > 1:
            _signal(progress, done + i - 1)  # sums of tiles up to i - 2 were added to before the barrier
        q_i = q_s.index(stage)
        do_i = do_s.index(stage)
        # Of the tile before, whose dS is in shared memory since the barrier; in the first tile, of nothing. Then this tile's S^T
        # runs while sums are added to. All at once would need too many registers, so each waits for those before the last.
        dq_run = warpgroup_mma(ds_s.index((i + 1) % 2).permute((1, 0)), k_s, zero_dq, use_acc=False, is_async=True)
        p_left, ds_left = warpgroup_mma_wait(1, deps=(p_left, ds_left))
        s_run = warpgroup_mma(k_s, q_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        dq_tile = warpgroup_mma_wait(1, deps=(dq_run,))
        if (tile > 0) & (i > 0):
            known = _wait_for(progress - 1, done + i, known)
        _add_to_sums(dq_tile * scale, dq + (i - 1) * (ROWS * D), i > 0, tile)
        dp_run = warpgroup_mma(v_s, do_i.permute((1, 0)), zero, use_acc=False, is_async=True)
        # Rows of tile i + AHEAD, in the stage of tile i - 2: all warps have waited for that tile's products, and passed a barrier
        # since. The compiler puts a barrier between these copies and the next product that reads rows.
        copy_rows(
            q, dout, code_s.index(nxt).load(gl.SliceLayout(1, GATHER)), q_s.index(nxt), do_s.index(nxt), cols,
            q_token, q_head, dout_token, dout_head, HEAD_BITS, SLOT_BITS,
        )  # fmt: skip
        row_lse, row_delta, limit = load_scalars(
            lse, delta, position, code_s.index((i + 1) % STAGES).load(LINE), (i + 1) * ROWS + line < count, held,
            lse_head, lse_token, delta_head, delta_token, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        line_code = gl.load(entry + gl.minimum((i + 1 + AHEAD) * ROWS + line, gl.maximum(count - 1, 0)))
        masked = gl.min(limit_s.index(i % 2).load(WARP), 0) < last_key
        s = warpgroup_mma_wait(1, deps=(s_run,))
        p = gl.exp2(s * factor - lse_s.index(i % 2).load(BY_ROW)[None, :])
        if masked:  # few tiles contain own rows
            p = gl.where(score_key[:, None] <= limit_s.index(i % 2).load(BY_ROW)[None, :], p, 0.0)
        p_left = gl.convert_layout(p.to(DTYPE), LEFT)
        dv_sum = warpgroup_mma(p_left, do_i, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_run,))
        # Zero where p is zero, so not masked again.
        ds = (p * (dp - delta_s.index(i % 2).load(BY_ROW)[None, :])).to(DTYPE)
        ds_s.index(i % 2).store(ds)
        ds_left = gl.convert_layout(ds, LEFT)
        dk_sum = warpgroup_mma(ds_left, q_i, dk_sum, is_async=True)
    dv_sum, p_left, dk_sum, ds_left = warpgroup_mma_wait(0, deps=(dv_sum, p_left, dk_sum, ds_left))
    async_copy.wait_group(0)
    if n > 0:
        fence_async_shared()
        barrier()
        dq_tile = warpgroup_mma(ds_s.index((n + 1) % 2).permute((1, 0)), k_s, zero_dq, use_acc=False)
        if tile > 0:
            known = _wait_for(progress - 1, done + n, known)
        _add_to_sums(dq_tile * scale, dq + (n - 1) * (ROWS * D), n > 0, tile)
        barrier()
        _signal(progress, done + n)
    store_dkdv(
        program, dk_sum, dv_sum, scale, dk, dv, sums, segment_bin, start, length, dk_row, dk_head, dv_row, dv_head,
        n_bins, n_blocks, start_head, D, KEYS, TILES, ACCUMULATE, WARPS, HEADS,
    )  # fmt: skip
