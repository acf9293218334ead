"""Gluon kernel for the forward of block attention on Hopper; `hopper_forward.py` says when it serves and launches it.

The rules of ordering are those of `hopper_backward_kernels`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .backward_kernels import UNALIGNED
from .hopper_backward_kernels import _decode, _offset, barrier

_VARYING = ["tokens", "n_blocks", "start_h", "items", "scale"]


@gluon.jit
def _look_up(item, items, item_bin, item_start):
    """Bin and first entry of an item; bin -1 where there is none."""
    here = item < items
    return gl.load(item_bin + item, mask=here, other=-1), gl.load(item_start + item, mask=here, other=0)


@gluon.jit
def _locate(bin_, first, pointer, part_start, part_length, n_blocks, start_h, ITEM: gl.constexpr):
    """End of an item's entries, first row of its block (-1: not in this part) and the block's length."""
    here = bin_ >= 0
    safe = gl.maximum(bin_, 0)
    last = gl.load(pointer + safe + 1, mask=here, other=0)
    kv_head = (safe // n_blocks).to(gl.int64)
    start = gl.load(part_start + kv_head * start_h + safe % n_blocks, mask=here, other=-1)
    return gl.minimum(first + ITEM, last), start, gl.load(part_length + safe % n_blocks)


@gluon.jit
def _load_codes(entry, bin_, first, end, r):
    """Entries of an item; its last one again past the end."""
    return gl.load(entry + gl.minimum(first + r, end - 1), mask=(r >= 0) & (bin_ >= 0), other=0)


@gluon.jit
def _load_limit(position, code, length, SLOT_BITS: gl.constexpr, HEAD_BITS: gl.constexpr, TOPK: gl.constexpr):
    """Last key of the block that each row sees."""
    own = (code & ((1 << SLOT_BITS) - 1)) == TOPK - 1
    return gl.load(position + (code >> (HEAD_BITS + SLOT_BITS)), mask=own, other=length - 1)


@gluon.jit
def _copy_tile(at, stride, key, length, tile, cols):
    """Start the copy of one tile of keys or values; zeros past the block's end. Left to the next commit."""
    mask = (key < length)[:, None] & (cols >= 0)[None, :]
    async_copy.async_copy_global_to_shared(tile, at + (key.to(gl.int64) * stride)[:, None] + cols[None, :], mask=mask)


@gluon.jit
def _copy_tile_of(tile, tiles, at, length, next_at, next_length, stride, n, room, cols, BN: gl.constexpr):
    """Start the copy of tile `tile` of this item, or, past its last, of the next item's tile that follows."""
    beyond = tile >= tiles
    _copy_tile(
        gl.where(beyond, next_at, at), stride, gl.where(beyond, tile - tiles, tile) * BN + n,
        gl.where(beyond, next_length, length), room, cols,
    )  # fmt: skip


@gluon.jit
def _copy_queries(q, code, tile, cols, q_t, q_h, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr):
    """Start the copy of the rows of some entries. Left to the next commit."""
    token, head = _decode(code, HEAD_BITS, SLOT_BITS)
    async_copy.async_copy_global_to_shared(tile, q + _offset(token, head, q_t, q_h, HEAD_BITS)[:, None] + cols[None, :])


@gluon.jit
def _weights(s, key, limit, masked, m, norm, scale, NEGATIVE: gl.constexpr):
    """Weights of a tile of scores, the running maximum and sum with it, and the factor for what came before."""
    if NEGATIVE:
        s = -s
    if masked:
        s = gl.where(key[None, :] <= limit[:, None], s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - m_new[:, None])
    rescale = gl.exp2(m - m_new)
    return p, m_new, norm * rescale + gl.sum(p, 1), rescale


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=UNALIGNED)
def attend_kernel(
    q, k, v, position, pointer, entry, item_bin, item_start, part_start, part_length, out, lse,
    q_t, q_h, k_n, k_h, v_n, v_h, start_h, tokens, n_blocks, group, items, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, ITEM: gl.constexpr,
    R: gl.constexpr, BN: gl.constexpr, CHUNK: gl.constexpr, AHEAD: gl.constexpr,
    NW: gl.constexpr, T: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """Partial outputs of work items (ITEM <= R rows of one block), every `num_programs`-th: rows stay, keys stream by BN.

    Reads D elements of q and writes D elements and 4 bytes for each row; reads 2 D elements a key, from L2: programs work
    on neighbouring items, which share blocks. In iteration i of an item the scores of tile i + 1, or of the next item's first
    tile, and the weighted values of tile i are started, in this order; the weights of the former are computed beside the
    latter. Scores and outputs of items that are too short for the next one's rows to arrive in time are computed, but the
    next item starts anew.
    """
    CHUNKS: gl.constexpr = R // CHUNK
    STAGES: gl.constexpr = AHEAD + 1
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [NW, 1], [1, 0])
    SCORE: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, BN, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[NW, 1], instr_shape=[16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    QUERIES: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SCORE, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    BY_SUM: gl.constexpr = gl.SliceLayout(1, SUM)
    ROWS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([R, D], T)
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], T)
    k_s = gl.allocate_shared_memory(T, [STAGES, BN, D], KEYS)
    v_s = gl.allocate_shared_memory(T, [STAGES, BN, D], KEYS)
    q_s = gl.allocate_shared_memory(T, [2, R, D], ROWS)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    n = gl.arange(0, BN, layout=gl.SliceLayout(1, GATHER))
    some = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, GATHER))
    r = gl.arange(0, R, layout=gl.SliceLayout(1, GATHER))
    row = gl.arange(0, R, layout=BY_ROW)
    key = gl.arange(0, BN, layout=gl.SliceLayout(0, SCORE))
    zero = gl.zeros([R, BN], gl.float32, SCORE)
    nothing = gl.full([R], float("-inf"), gl.float32, BY_ROW)

    # Items this program will come to: the current one (0) and those after it, of which less and less is known.
    step = gl.num_programs(0)
    here = gl.program_id(0)
    bin0, first0 = _look_up(here, items, item_bin, item_start)
    bin1, first1 = _look_up(here + step, items, item_bin, item_start)
    bin2, first2 = _look_up(here + 2 * step, items, item_bin, item_start)
    bin3, first3 = _look_up(here + 3 * step, items, item_bin, item_start)
    end0, start0, length0 = _locate(bin0, first0, pointer, part_start, part_length, n_blocks, start_h, ITEM)
    end1, start1, length1 = _locate(bin1, first1, pointer, part_start, part_length, n_blocks, start_h, ITEM)
    end2, start2, length2 = _locate(bin2, first2, pointer, part_start, part_length, n_blocks, start_h, ITEM)
    code = _load_codes(entry, bin1, first1, end1, some)  # of the rows copied next
    row_code1 = _load_codes(entry, bin1, first1, end1, row)
    row_code0 = _load_codes(entry, bin0, first0, end0, row)
    limit = _load_limit(position, row_code0, length0, SLOT_BITS, HEAD_BITS, TOPK)
    highest, lowest = gl.max(limit, 0), gl.min(limit, 0)
    head0 = (gl.maximum(bin0, 0) // n_blocks).to(gl.int64)
    if start0 >= 0:
        code0 = _load_codes(entry, bin0, first0, end0, r)
        _copy_queries(q + head0 * group * q_h, code0, q_s.index(0), cols, q_t, q_h, HEAD_BITS, SLOT_BITS)
    t = 0  # tiles so far; stage t % STAGES of keys and values holds the current one
    room = 0  # which half of q_s holds the current item's rows
    primed = False  # whether the current item's first tile has been scored already
    m, norm = nothing, gl.zeros([R], gl.float32, BY_ROW)
    p_left = gl.zeros([R, BN], T, LEFT)
    q_left = gl.zeros([R, D], T, QUERIES)
    for item in range(here, items, step):
        head0 = (gl.maximum(bin0, 0) // n_blocks).to(gl.int64)
        head1 = (gl.maximum(bin1, 0) // n_blocks).to(gl.int64)
        limit1 = _load_limit(position, row_code1, length1, SLOT_BITS, HEAD_BITS, TOPK)
        k_at = k + start0.to(gl.int64) * k_n + head0 * k_h
        v_at = v + start0.to(gl.int64) * v_n + head0 * v_h
        k_next = k + start1.to(gl.int64) * k_n + head1 * k_h
        v_next = v + start1.to(gl.int64) * v_n + head1 * v_h
        length_next = gl.where(start1 >= 0, length1, 0)
        q_next = q + head1 * group * q_h
        # Keys that no row of the item sees change no bit: leave them out.
        tiles = gl.where(start0 >= 0, highest // BN + 1, 0)
        highest1, lowest1 = gl.max(limit1, 0), gl.min(limit1, 0)
        if (tiles > 0) & (not primed):
            async_copy.wait_group(0)  # copies on their way would be mixed with those that follow
            barrier()
            _copy_tile(k_at, k_n, n, length0, k_s.index(t % STAGES), cols)
            for j in gl.static_range(AHEAD):
                k_room, v_room = k_s.index((t + j + 1) % STAGES), v_s.index((t + j) % STAGES)
                _copy_tile_of(j + 1, tiles, k_at, length0, k_next, length_next, k_n, n, k_room, cols, BN)
                _copy_tile_of(j, tiles, v_at, length0, v_next, length_next, v_n, n, v_room, cols, BN)
                async_copy.commit_group()
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            barrier()
            q_left = q_s.index(room).load(QUERIES)
            s = warpgroup_mma(q_left, k_s.index(t % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
            s, q_left = warpgroup_mma_wait(0, deps=(s, q_left))
            p, m, norm, _ = _weights(s, key, limit, lowest < BN - 1, nothing, gl.zeros_like(norm), scale, NEGATIVE)
            p_left = gl.convert_layout(p.to(T), LEFT)
        acc = gl.zeros([R, D], gl.float32, SUM)
        m_done, norm_done = nothing, nothing
        for i in range(tiles):
            # Keys of the next tile and values of this one.
            async_copy.wait_group(AHEAD - 1)
            fence_async_shared()
            barrier()
            last = i + 1 == tiles
            if last:
                q_left = q_s.index(1 - room).load(QUERIES)
            k_i = k_s.index((t + 1) % STAGES).permute((1, 0))
            s_run = warpgroup_mma(q_left, k_i, zero, use_acc=False, is_async=True)
            acc_run = warpgroup_mma(p_left, v_s.index(t % STAGES), acc, is_async=True)
            # What was in these stages was read by products that all warps waited for before the barrier above.
            k_room, v_room = k_s.index(t % STAGES), v_s.index((t + AHEAD) % STAGES)
            _copy_tile_of(i + 1 + AHEAD, tiles, k_at, length0, k_next, length_next, k_n, n, k_room, cols, BN)
            _copy_tile_of(i + AHEAD, tiles, v_at, length0, v_next, length_next, v_n, n, v_room, cols, BN)
            async_copy.commit_group()
            s, q_left = warpgroup_mma_wait(1, deps=(s_run, q_left))
            m_done, norm_done = m, norm
            base = gl.where(last, 0, (i + 1) * BN)
            masked = gl.where(last, lowest1, lowest) < base + BN - 1
            p, m, norm, rescale = _weights(
                s, base + key, gl.where(last, limit1, limit), masked, gl.where(last, nothing, m),
                gl.where(last, 0.0, norm), scale, NEGATIVE,
            )  # fmt: skip
            acc, p_left = warpgroup_mma_wait(0, deps=(acc_run, p_left))
            # Rows of the next item, here, where no product runs: a branch beside one would serialise them all. They are
            # committed with the next tile's keys and waited for a tile later.
            for c in gl.static_range(CHUNKS):
                if i == c:
                    if start1 >= 0:
                        _copy_queries(
                            q_next, code, q_s.index(1 - room).slice(c * CHUNK, CHUNK), cols, q_t, q_h, HEAD_BITS,
                            SLOT_BITS,
                        )  # fmt: skip
                    code = _load_codes(entry, bin1, first1, end1, (c + 1) * CHUNK + some)
            acc = acc * gl.convert_layout(gl.where(last, 1.0, rescale), BY_SUM)[:, None]
            p_left = gl.convert_layout(p.to(T), LEFT)
            t += 1
        out_code = _load_codes(entry, bin0, first0, end0, r)
        row_code2 = _load_codes(entry, bin2, first2, end2, row)
        end3, start3, length3 = _locate(bin3, first3, pointer, part_start, part_length, n_blocks, start_h, ITEM)
        bin4, first4 = _look_up(item + 4 * step, items, item_bin, item_start)
        barrier()
        for c in gl.static_range(CHUNKS):
            if tiles <= c:
                if start1 >= 0:
                    _copy_queries(
                        q_next, code, q_s.index(1 - room).slice(c * CHUNK, CHUNK), cols, q_t, q_h, HEAD_BITS, SLOT_BITS
                    )
                code = _load_codes(entry, bin1, first1, end1, (c + 1) * CHUNK + some)
        async_copy.commit_group()
        # The last chunk is issued in tile CHUNKS - 1, committed in the next and waited for AHEAD tiles later.
        primed = (tiles > CHUNKS + AHEAD) & (start1 >= 0)
        if tiles > 0:
            # Through the room of q, which has been used, to rows that whole warps write.
            q_i = q_s.index(room)
            q_i.store((acc * gl.convert_layout(1.0 / norm_done, BY_SUM)[:, None]).to(T))
            barrier()
            token, head = _decode(out_code, HEAD_BITS, SLOT_BITS)
            at = ((head0 * group + head) * tokens + token) * TOPK + (out_code & ((1 << SLOT_BITS) - 1))
            inside = (first0 + r < end0)[:, None] & (cols >= 0)[None, :]
            gl.store(out + (at * D)[:, None] + cols[None, :], q_i.load(GATHER), mask=inside)
            token, head = _decode(row_code0, HEAD_BITS, SLOT_BITS)
            at = ((head0 * group + head) * tokens + token) * TOPK + (row_code0 & ((1 << SLOT_BITS) - 1))
            gl.store(lse + at, m_done + gl.log2(norm_done), mask=first0 + row < end0)
        code = _load_codes(entry, bin2, first2, end2, some)
        limit, highest, lowest = limit1, highest1, lowest1
        row_code0, row_code1 = row_code1, row_code2
        bin0, first0, end0, start0, length0 = bin1, first1, end1, start1, length1
        bin1, first1, end1, start1, length1 = bin2, first2, end2, start2, length2
        bin2, first2, end2, start2, length2 = bin3, first3, end3, start3, length3
        bin3, first3 = bin4, first4
        room = 1 - room
    async_copy.wait_group(0)
