"""Gluon kernel for the partial dq on Hopper, for blocks of more than one tile of keys.

A program computes several work items. An item's rows are copied while the item before it is computed, and its list entries one
item earlier: otherwise an item would begin with three dependent accesses to memory, a quarter of its time with blocks of 512.
`gluon_rows.py` has the rules of ordering.
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
from ..sizes import MOST_ITEMS_PER_PROGRAM
from .portable_kernels import LOG2E, UNALIGNED, VARYING
from .rows_sm90 import block_of, load_scalars

_MOST_ITEMS = gl.constexpr(MOST_ITEMS_PER_PROGRAM)
_NO_ITEM = gl.constexpr(2**31 - 1)


@gluon.jit
def _item(item_bin, item_start, item_end, item, n_items):
    """Bin, first entry and end of a work item. Bin -1 and no entries where there is none."""
    there = item < n_items
    bin_ = gl.load(item_bin + item, mask=there, other=-1)
    first = gl.load(item_start + item, mask=there, other=0)
    end = gl.load(item_end + item, mask=there, other=0)
    return bin_, gl.where(bin_ < 0, 0, first), gl.where(bin_ < 0, 0, end)


@gluon.jit
def _turns(program, step, per_program, n_items):
    """First work item of a program, which takes every `step`-th one, and the end of the items of its wave of `step` programs."""
    wave = program // step
    return wave * step * per_program + program % step, gl.minimum(n_items, (wave + 1) * step * per_program)


@gluon.jit
def _held_items(first_item, end_item, step, item_bin, start, n_blocks, start_head, WARPS: gl.constexpr):
    """A program's items whose block the part holds, one per lane; `_NO_ITEM` in the other lanes.

    The lists are of all blocks, and other ranks hold most of them. An item of theirs would gather its rows for nothing.
    """
    item = first_item + step * gl.arange(0, _MOST_ITEMS, layout=warp_layout(_MOST_ITEMS, WARPS))
    bin_ = gl.load(item_bin + item, mask=item < end_item, other=-1)
    first_key = gl.load(
        start + (bin_ // n_blocks).to(gl.int64) * start_head + bin_ % n_blocks, mask=bin_ >= 0, other=-1
    )
    return gl.where(first_key >= 0, item, _NO_ITEM)


@gluon.jit
def _next(held_items, item):
    """The first of some items behind `item`; `_NO_ITEM` where there is none."""
    return gl.min(gl.where(held_items > item, held_items, _NO_ITEM), 0)


@gluon.jit
def _tiles(limit, held, KEYS: gl.constexpr):
    """Tiles of keys that some row of an item sees, at least one, and how many of them every row sees entirely.

    Keys that no row sees would add exact zeros: skipping them changes no bit.
    """
    tiles = gl.where(held > 0, gl.maximum((gl.max(limit, 0) + KEYS) // KEYS, 1), 1)
    return tiles, (gl.min(limit, 0) + 1) // KEYS


@gluon.jit
def _copy_codes(entry, first, end, line, code_s):
    """Start the copy of an item's entries. Those past its end repeat the last one."""
    async_copy.async_copy_global_to_shared(code_s, entry + gl.maximum(gl.minimum(first + line, end - 1), 0))


@gluon.jit
def _copy_keys(
    k, v, kv_head, first_key, held, tile, k_row, k_head, v_row, v_head, k_s, v_s, n, cols, KEYS: gl.constexpr
):
    """Start the copies of one tile of keys and values; zeros past the block's end."""
    key = tile * KEYS + n
    inside = (key < held)[:, None] & (cols >= 0)[None, :]
    row = key.to(gl.int64)
    k += first_key.to(gl.int64) * k_row + kv_head * k_head
    v += first_key.to(gl.int64) * v_row + kv_head * v_head
    async_copy.async_copy_global_to_shared(k_s, k + (row * k_row)[:, None] + cols[None, :], mask=inside)
    async_copy.async_copy_global_to_shared(v_s, v + (row * v_row)[:, None] + cols[None, :], mask=inside)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=[*VARYING, "n_items", "step", "per_program"], do_not_specialize_on_alignment=UNALIGNED)
def dq_kernel(
    q, dout, k, v, lse, delta, position, entry, item_bin, item_start, item_end, start, length, dq,
    q_token, q_head, dout_token, dout_head, k_row, k_head, v_row, v_head, lse_head, lse_token, delta_head, delta_token,
    dq_head, dq_token, dq_slot, start_head, n_blocks, group, scale, n_items, step, per_program,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, ROWS: gl.constexpr,
    KEYS: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One program: partial dq of those of `per_program` work items whose block the part holds, at most ROWS rows and one block
    each. Gathered rows stay, keys stream.

    The items of `step` programs, those that run at the same time, are consecutive: they take turns, so that blocks and rows that
    one of them reads are in L2 for the others.

    Reads 4 * D + 16 bytes and writes 2 * D bytes per row, and reads 4 * D bytes per key (from L2). A tile's product into dq
    overlaps with the next tile's scores, so a stage of keys is free two tiles later, and a stage of values one tile later.
    """
    STAGES: gl.constexpr = 3
    first_item, end_item = _turns(gl.program_id(0), step, per_program, n_items)
    held_items = _held_items(first_item, end_item, step, item_bin, start, n_blocks, start_head, WARPS)
    item = gl.min(held_items, 0)
    if item >= end_item:
        return

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    SCORE: gl.constexpr = product_layout(KEYS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    STORE: gl.constexpr = store_layout(ROWS, D, WARPS)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], KEYS_LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [2, KEYS, D], KEYS_LAYOUT)
    q_s = gl.allocate_shared_memory(DTYPE, [2, ROWS, D], ROWS_LAYOUT)
    do_s = gl.allocate_shared_memory(DTYPE, [2, ROWS, D], ROWS_LAYOUT)
    code_s = gl.allocate_shared_memory(
        entry.dtype.element_ty, [4, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )  # an item's entries are overwritten two items later
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    n = gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHER))
    row = gl.arange(0, ROWS, layout=BY_ROW)
    line = gl.arange(0, ROWS, layout=line_layout(WARPS))
    score_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORE))
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORE)
    factor = scale * LOG2E

    # Rows past an item's end repeat the last one and are not stored. Names end with how many items ahead something is.
    bin_, first, end = _item(item_bin, item_start, item_end, item, end_item)
    item = _next(held_items, item)
    bin_1, first_1, end_1 = _item(item_bin, item_start, item_end, item, end_item)
    kv_head, first_key, held = block_of(start, length, bin_, n_blocks, start_head)
    code = gl.load(entry + gl.maximum(gl.minimum(first + r, end - 1), 0))
    row_code = gl.load(entry + gl.maximum(gl.minimum(first + row, end - 1), 0))
    gather(q + kv_head * group * q_head, code, q_s.index(0), cols, q_token, q_head, HEAD_BITS, SLOT_BITS)
    gather(dout + kv_head * group * dout_head, code, do_s.index(0), cols, dout_token, dout_head, HEAD_BITS, SLOT_BITS)
    _copy_keys(
        k, v, kv_head, first_key, held, 0, k_row, k_head, v_row, v_head, k_s.index(0), v_s.index(0), n, cols, KEYS
    )
    row_lse, row_delta, limit = load_scalars(
        lse + kv_head * group * lse_head, delta + kv_head * group * delta_head, position, row_code, row >= 0, held,
        lse_head, lse_token, delta_head, delta_token, HEAD_BITS, SLOT_BITS, TOPK,
    )  # fmt: skip
    _copy_codes(entry, first, end, line, code_s.index(0))
    _copy_codes(entry, first_1, end_1, line, code_s.index(1))
    async_copy.commit_group()
    item = _next(held_items, item)
    bin_2, first_2, end_2 = _item(item_bin, item_start, item_end, item, end_item)
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()
    tiles, unmasked = _tiles(limit, held, KEYS)
    t = item * 0  # tiles so far
    for j in range(gl.sum((held_items < end_item).to(gl.int32), 0)):
        # All warps have waited for the last products that read the other buffer, and passed a barrier since.
        kv_head_1, first_key_1, held_1 = block_of(start, length, bin_1, n_blocks, start_head)
        code_1 = code_s.index((j + 1) % 4).load(gl.SliceLayout(1, GATHER))
        row_code_1 = code_s.index((j + 1) % 4).load(BY_ROW)
        gather(
            q + kv_head_1 * group * q_head, code_1, q_s.index((j + 1) % 2), cols, q_token, q_head, HEAD_BITS, SLOT_BITS
        )
        gather(
            dout + kv_head_1 * group * dout_head, code_1, do_s.index((j + 1) % 2), cols, dout_token, dout_head,
            HEAD_BITS, SLOT_BITS,
        )  # fmt: skip
        row_lse_1, row_delta_1, limit_1 = load_scalars(
            lse + kv_head_1 * group * lse_head, delta + kv_head_1 * group * delta_head, position, row_code_1, row >= 0, held_1,
            lse_head, lse_token, delta_head, delta_token, HEAD_BITS, SLOT_BITS, TOPK,
        )  # fmt: skip
        _copy_codes(entry, first_2, end_2, line, code_s.index((j + 2) % 4))
        item = _next(held_items, item)
        bin_3, first_3, end_3 = _item(item_bin, item_start, item_end, item, end_item)
        q_i = q_s.index(j % 2)
        do_i = do_s.index(j % 2)
        total = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, SUM))
        ds_left = gl.zeros([ROWS, KEYS], DTYPE, LEFT)
        for i in range(tiles):
            # The stage that is overwritten was read two tiles ago. All warps waited for its products before the barrier.
            ahead = (t + 1) % STAGES
            if i + 1 < tiles:
                _copy_keys(
                    k, v, kv_head, first_key, held, i + 1, k_row, k_head, v_row, v_head, k_s.index(ahead), v_s.index((t + 1) % 2),
                    n, cols, KEYS,
                )  # fmt: skip
            else:
                _copy_keys(
                    k, v, kv_head_1, first_key_1, held_1, 0, k_row, k_head, v_row, v_head, k_s.index(ahead),
                    v_s.index((t + 1) % 2), n, cols, KEYS,
                )  # fmt: skip
            k_i = k_s.index(t % STAGES)
            s_run = warpgroup_mma(q_i, k_i.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp_run = warpgroup_mma(do_i, v_s.index(t % 2).permute((1, 0)), zero, use_acc=False, is_async=True)
            s, ds_left = warpgroup_mma_wait(1, deps=(s_run, ds_left))  # and the last tile's sum
            p = gl.exp2(s * factor - row_lse[:, None])
            # Masked before dP: ptxas moves exponentials behind a wait in the same basic block.
            if i >= unmasked:
                p = gl.where(i * KEYS + score_key[None, :] <= limit[:, None], p, 0.0)
            dp = warpgroup_mma_wait(0, deps=(dp_run,))
            ds = p * (dp - row_delta[:, None])
            ds_left = gl.convert_layout(ds.to(DTYPE), LEFT)
            total = warpgroup_mma(ds_left, k_i, total, is_async=True)
            async_copy.wait_group(0)
            fence_async_shared()
            barrier()
            t += 1
        row_code = code_s.index(j % 4).load(BY_ROW)
        token, head = decode(row_code, HEAD_BITS, SLOT_BITS)
        at = (offset_of(token, head, dq_token, dq_head, HEAD_BITS) + (row_code & ((1 << SLOT_BITS) - 1))).to(gl.int64)
        at += kv_head * group * dq_head
        stored = (first + row < end) & (held > 0)
        at = gl.convert_layout(at, gl.SliceLayout(1, STORE))
        stored = gl.convert_layout(stored, gl.SliceLayout(1, STORE))
        tiles, unmasked = _tiles(limit_1, held_1, KEYS)
        total, ds_left = warpgroup_mma_wait(0, deps=(total, ds_left))
        done = gl.convert_layout((total * scale).to(DTYPE), STORE)
        columns = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
        gl.store(dq + (at * dq_slot)[:, None] + columns[None, :], done, mask=stored[:, None])
        kv_head, first_key, held, first, end = kv_head_1, first_key_1, held_1, first_1, end_1
        row_lse, row_delta, limit = row_lse_1, row_delta_1, limit_1
        bin_1, first_1, end_1 = bin_2, first_2, end_2
        bin_2, first_2, end_2 = bin_3, first_3, end_3
    async_copy.wait_group(0)
