"""Gluon kernel of block attention on Hopper to past blocks of more than 128 keys: rows stay, keys and values stream past them.

A program computes several work items. What an item needs is requested while the item before it is computed: its list entries
from the start, its rows and first tiles of keys as soon as the last scores are done, so that the last product and the stores hide
the latency. All of it goes through shared memory: the loop over tiles needs every register. `own_blocks_sm90.py` says how tiles
of keys and values arrive.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..gluon_rows import (
    barrier,
    decode,
    gather,
    gather_layout,
    line_layout,
    offset_of,
    product_layout,
    store_layout,
    warp_layout,
)
from .own_blocks_sm90 import fetch, fetch_two, new_barriers, softmax_step, store_rows


@gluon.jit
def _item(item_bin, item_start, item_end, item, n_items):
    """Bin, first entry and end of a work item; bin -1 and no entries where there is none."""
    there = item < n_items
    bin_ = gl.load(item_bin + item, mask=there, other=-1)
    begin = gl.load(item_start + item, mask=there, other=0)
    end = gl.load(item_end + item, mask=there, other=0)
    return bin_, gl.where(bin_ < 0, 0, begin), gl.where(bin_ < 0, 0, end)


@gluon.jit
def _request(
    entry, start, item, bin_, begin, end, n_blocks, start_head, line, ONE: gl.constexpr, code_s, field_s, slot
):
    """Start the copies of an item's entries and of its block's first key. Store the other fields; kv head -1: no item."""
    safe = gl.maximum(bin_, 0)
    kv_head = safe // n_blocks
    one = gl.arange(0, 1, layout=ONE)
    async_copy.async_copy_global_to_shared(code_s, entry + gl.maximum(gl.minimum(begin + line, end - 1), 0))
    async_copy.async_copy_global_to_shared(
        field_s.index(slot * 5 + 3), start + kv_head.to(gl.int64) * start_head + safe % n_blocks + one
    )
    async_copy.commit_group()
    field_s.index(slot * 5 + 0).store(one + gl.where(bin_ < 0, -1, kv_head))
    field_s.index(slot * 5 + 1).store(one + begin)
    field_s.index(slot * 5 + 2).store(one + end)
    field_s.index(slot * 5 + 4).store(one + item)


@gluon.jit
def _field(field_s, slot, NUMBER: gl.constexpr, ONE: gl.constexpr):
    """Of the item in `slot`: 0 its kv head, 1 its first entry, 2 its end, 3 its block's first key, 4 its index."""
    return gl.max(field_s.index(slot * 5 + NUMBER).load(ONE), 0)


@gluon.jit
def _useless(code_s, field_s, slot, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, WARP: gl.constexpr, ONE: gl.constexpr):
    """Whether there is nothing to do: no item, a block that the part does not hold, or own rows only."""
    slots = code_s.load(WARP) & ((1 << SLOT_BITS) - 1)
    return (_field(field_s, slot, 0, ONE) < 0) | (_field(field_s, slot, 3, ONE) < 0) | (gl.min(slots, 0) == TOPK - 1)


@gluon.jit
def _find(
    entry, start, item_bin, item_start, item_end, item, step, n_items, n_blocks, start_head, line, code_s, field_s, slot,
    SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, WARP: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """The program's first item from `item` on that has something to do, or an index past the last one.

    The entries and fields of `item` have been requested; those of the item found are in shared memory.
    """
    while (item < n_items) & _useless(code_s, field_s, slot, SLOT_BITS, TOPK, WARP, ONE):
        item += step
        bin_, begin, end = _item(item_bin, item_start, item_end, item, n_items)
        barrier()
        _request(entry, start, item, bin_, begin, end, n_blocks, start_head, line, ONE, code_s, field_s, slot)
        async_copy.wait_group(0)
        barrier()
    return item


@gluon.jit
def _start(
    q, k_tiles, v_tiles, code_s, field_s, slot, q_s, k_s, v_s, k_full, v_full, t, there, n_blocks, group, q_token, q_head,
    k_head, v_head, cols, D: gl.constexpr, KEYS: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr,
    GATHER: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """Start the copies of an item's rows and first tiles, if it is `there`; `t` tiles came before."""
    kv_head = gl.maximum(_field(field_s, slot, 0, ONE), 0)
    first_key = gl.maximum(_field(field_s, slot, 3, ONE), 0)
    fetch_two(
        k_tiles, kv_head * k_head, first_key, k_full.index(t & 1), k_s.index(t & 1), there,
        v_tiles, kv_head * v_head, first_key, v_full.index(t & 1), v_s.index(t & 1), there, KEYS * D * 2,
    )  # fmt: skip
    fetch(
        k_tiles, kv_head * k_head, first_key + KEYS, k_full.index((t + 1) & 1), k_s.index((t + 1) & 1), there,
        KEYS * D * 2,
    )  # fmt: skip
    if there:
        code = code_s.load(gl.SliceLayout(1, GATHER))
        gather(
            q + (kv_head * group).to(gl.int64) * q_head, code, q_s.index(0), cols, q_token, q_head, HEAD_BITS, SLOT_BITS
        )
    async_copy.commit_group()


@gluon.jit(
    do_not_specialize=["tokens", "n_blocks", "start_head", "n_items"],
    do_not_specialize_on_alignment=["start", "entry", "item_bin", "item_start", "item_end"],
)
def hold_rows_kernel(
    q, k_tiles, v_tiles, start, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, group, scale, start_head, q_token, q_head, k_head, v_head, n_items,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, TILES: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr, NEGATIVE: gl.constexpr,
):  # fmt: skip
    """One program: every n-th work item of at most ROWS rows against a past block of TILES >= 2 whole tiles of KEYS keys.

    Reads 4 bytes of list and 2 * D of q per row and 4 * TILES * KEYS * D bytes of K and V (from L2: neighbouring programs
    read the same block); writes 2 * D + 4 bytes per row. Own rows are skipped, as in `portable_kernels.hold_rows_kernel`
    without WITH_OWN.
    """
    # Strides that may be negative would need two registers each.
    gl.assume((q_token >= 0) & (q_head >= 0) & (tokens >= 0) & (start_head >= 0) & (n_blocks > 0) & (group > 0))
    WARP: gl.constexpr = warp_layout(ROWS, WARPS)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    GATHER: gl.constexpr = gather_layout(D, WARPS)
    SCORE: gl.constexpr = product_layout(KEYS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    k_full, v_full = new_barriers()
    k_s = gl.allocate_shared_memory(DTYPE, [2, 1, KEYS, D], k_tiles.layout)
    v_s = gl.allocate_shared_memory(DTYPE, [2, 1, KEYS, D], v_tiles.layout)
    q_s = gl.allocate_shared_memory(DTYPE, [1, ROWS, D], ROWS_LAYOUT)
    code_s = gl.allocate_shared_memory(entry.dtype.element_ty, [2, ROWS], FLAT)
    field_s = gl.allocate_shared_memory(gl.int32, [10, 1], FLAT)
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    line = gl.arange(0, ROWS, layout=line_layout(WARPS))
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORE)
    step = gl.num_programs(0)
    item = gl.program_id(0)
    bin_, begin, end = _item(item_bin, item_start, item_end, item, n_items)
    _request(entry, start, item, bin_, begin, end, n_blocks, start_head, line, ONE, code_s.index(0), field_s, 0)
    async_copy.wait_group(0)
    barrier()
    item = _find(
        entry, start, item_bin, item_start, item_end, item, step, n_items, n_blocks, start_head, line,
        code_s.index(0), field_s, 0, SLOT_BITS, TOPK, WARP, ONE,
    )  # fmt: skip
    t = item * 0
    b = item * 0
    _start(
        q, k_tiles, v_tiles, code_s.index(0), field_s, 0, q_s, k_s, v_s, k_full, v_full, t, item < n_items,
        n_blocks, group, q_token, q_head, k_head, v_head, cols, D, KEYS, HEAD_BITS, SLOT_BITS, GATHER, ONE,
    )  # fmt: skip
    bin_, begin, end = _item(item_bin, item_start, item_end, item + step, n_items)
    while item < n_items:
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        item += step
        _request(
            entry, start, item, bin_, begin, end, n_blocks, start_head, line, ONE, code_s.index(1 - b), field_s, 1 - b
        )
        m = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        norm = gl.zeros([ROWS], gl.float32, BY_ROW)
        acc = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, SUM))
        p_left = gl.zeros([ROWS, KEYS], DTYPE, LEFT)
        stop = t + TILES + (item >> 31)  # t + TILES, but no constant number: peeled or unrolled, the loop spills
        gl.assume(t < stop)  # ptxas serialises the products of a loop that may not run
        for tile in range(t, stop):
            stage = tile & 1
            phase = (tile >> 1) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s_run = warpgroup_mma(
                q_s.index(tile >> 31),  # 0, but descriptors are not kept in registers over all items
                k_s.index(stage).reshape([KEYS, D]).permute((1, 0)), zero, use_acc=False, is_async=True
            )  # fmt: skip
            s, total, p_left = warpgroup_mma_wait(0, deps=(s_run, acc, p_left))
            barrier()
            key = _field(field_s, b, 3, ONE) + (tile - t) * KEYS
            head = _field(field_s, b, 0, ONE)
            fetch_two(
                v_tiles, head * v_head, key + KEYS, v_full.index(1 - stage), v_s.index(1 - stage), tile + 1 < stop,
                k_tiles, head * k_head, key + 2 * KEYS, k_full.index(stage), k_s.index(stage), tile + 2 < stop, KEYS * D * 2,
            )  # fmt: skip
            if NEGATIVE:
                s = -s
            p_left, m, norm, total = softmax_step(s, m, norm, total, scale, DTYPE, SUM, LEFT)
            mbarrier.wait(v_full.index(stage), phase)
            acc = warpgroup_mma(p_left, v_s.index(stage).reshape([KEYS, D]), total, is_async=True)
        t = stop
        async_copy.wait_group(0)
        barrier()
        # All warps waited for the last scores before the last barrier: rows and keys may be overwritten.
        item = _find(
            entry, start, item_bin, item_start, item_end, _field(field_s, 1 - b, 4, ONE), step, n_items, n_blocks, start_head,
            line, code_s.index(1 - b), field_s, 1 - b, SLOT_BITS, TOPK, WARP, ONE,
        )  # fmt: skip
        _start(
            q, k_tiles, v_tiles, code_s.index(1 - b), field_s, 1 - b, q_s, k_s, v_s, k_full, v_full, t, item < n_items,
            n_blocks, group, q_token, q_head, k_head, v_head, cols, D, KEYS, HEAD_BITS, SLOT_BITS, GATHER, ONE,
        )  # fmt: skip
        bin_, begin, end = _item(item_bin, item_start, item_end, item + step, n_items)
        row = _field(field_s, b, 1, ONE) + gl.arange(0, ROWS, layout=BY_ROW)
        code = code_s.index(b).load(BY_ROW)
        head_of = (_field(field_s, b, 0, ONE) * group).to(gl.int64)
        token, head = decode(code, HEAD_BITS, SLOT_BITS)
        slot = code & ((1 << SLOT_BITS) - 1)
        at = (head_of * tokens + offset_of(token, head, 1, tokens, HEAD_BITS)) * TOPK + slot
        stored = (row < _field(field_s, b, 2, ONE)) & (slot != TOPK - 1)
        gl.store(lse + at, m + gl.log2(norm), mask=stored)
        total, p_left = warpgroup_mma_wait(0, deps=(acc, p_left))
        STORED: gl.constexpr = gl.SliceLayout(1, store_layout(ROWS, D, WARPS))
        store_rows(
            out, gl.convert_layout(at, STORED), gl.convert_layout(stored, STORED), total, norm, ROWS, D, DTYPE, SUM
        )
        b = 1 - b
    async_copy.wait_group(0)
    for j in gl.static_range(2):
        mbarrier.invalidate(k_full.index(j))
        mbarrier.invalidate(v_full.index(j))
