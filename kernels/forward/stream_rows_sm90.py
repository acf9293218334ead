"""Gluon kernel of block attention on Hopper for blocks of at most 128 keys: one tile of keys holds the block.

`gluon_rows.py` has the rules of ordering.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..gluon_rows import (
    barrier,
    decode,
    gather,
    gather_layout,
    in_turns,
    line_layout,
    normalised,
    offset_of,
    product_layout,
    store_layout,
    warp_layout,
)
from ..softmax import LOWEST


@gluon.jit
def _limits(position, code, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, KEYS: gl.constexpr):
    """Last visible key of the rows of the entries `code`; rows of past blocks see all keys and load nothing."""
    own = (code & ((1 << SLOT_BITS) - 1)) == TOPK - 1
    return gl.load(position + (code >> (HEAD_BITS + SLOT_BITS)), mask=own, other=KEYS - 1)


@gluon.jit
def _item(
    item_bin, item_start, item_end, pointer, n_blocks, per_head, n_items, HEADS: gl.constexpr, ITEM: gl.constexpr
):
    """Bin, first entry and entries of a program's work item; bin -1 where there is none.

    With HEADS > 1, items of HEADS kv heads in turns: `per_head` programs each, at least as many as any head has items. A head's
    items begin where those of its first bin do, see `RoutingLists`.
    """
    item = gl.program_id(0)
    if HEADS > 1:
        head, number = in_turns(item, gl.num_programs(0), per_head, HEADS)
        first_bin = head * n_blocks
        item = gl.load(pointer + first_bin) // ITEM + first_bin + number
        there = item < n_items
        bin_ = gl.load(item_bin + item, mask=there, other=-1)
        begin = gl.load(item_start + item, mask=there, other=0)
        end = gl.load(item_end + item, mask=there, other=0)
        bin_ = gl.where(bin_ < first_bin + n_blocks, bin_, -1)  # the next head's programs compute its items
    else:
        bin_ = gl.load(item_bin + item)
        begin = gl.load(item_start + item)
        end = gl.load(item_end + item)
    return bin_, begin, end - begin


@gluon.jit(
    do_not_specialize=["tokens", "n_blocks", "start_head", "per_head", "n_items"],
    do_not_specialize_on_alignment=[
        "start", "length", "position", "entry", "item_bin", "item_start", "item_end", "pointer",
    ],
)  # fmt: skip
def stream_rows_kernel(
    q, k, v, start, length, position, entry, item_bin, item_start, item_end, out, lse,
    tokens, n_blocks, group, scale, start_head, q_token, q_head, k_row, k_head, v_row, v_head, pointer,
    per_head, n_items,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, TOPK: gl.constexpr, KEYS: gl.constexpr,
    ROWS: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr, NEGATIVE: gl.constexpr,
    HEADS: gl.constexpr, ITEM: gl.constexpr,
):  # fmt: skip
    """One program: one work item, ROWS of its rows at a time past the block's K and V, which stay in shared memory.

    Reads the block's K and V once (4 * KEYS * D bytes), then 4 bytes of list and 2 * D of q per entry; writes 2 * D + 4
    bytes per entry: as `portable_kernels.stream_rows_kernel`.

    S = q K^T of a tile is issued one tile ahead. Per tile: wait for S, start the copy of the rows of the tile after next into
    the stage that S has read, compute the weights, issue O = P V and the next tile's S, store O while that S runs.
    """
    CODES: gl.constexpr = 4  # stages: entries of tile i are written at tile i - 2 and last read when tile i is stored
    bin_, begin, count = _item(item_bin, item_start, item_end, pointer, n_blocks, per_head, n_items, HEADS, ITEM)
    safe = gl.maximum(bin_, 0)
    kv_head = (safe // n_blocks).to(gl.int64)
    first_key = gl.load(start + kv_head * start_head + safe % n_blocks)
    held = gl.load(length + safe % n_blocks)
    if (bin_ < 0) | (first_key < 0):
        return

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    SCORE: gl.constexpr = product_layout(KEYS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2)
    STORE: gl.constexpr = store_layout(ROWS, D, WARPS)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORE)
    LINE: gl.constexpr = line_layout(WARPS)
    WARP: gl.constexpr = warp_layout(ROWS, WARPS)
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    ROWS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], DTYPE)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    v_s = gl.allocate_shared_memory(DTYPE, [KEYS, D], KEYS_LAYOUT)
    q_s = gl.allocate_shared_memory(DTYPE, [2, ROWS, D], ROWS_LAYOUT)
    code_s = gl.allocate_shared_memory(gl.int32, [CODES, ROWS], FLAT)

    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    # Past the end of a short block the last key is repeated; its weight there is 0, since no row sees those positions.
    key = gl.minimum(gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER)), held - 1)
    row = (first_key + key).to(gl.int64)
    async_copy.async_copy_global_to_shared(k_s, k + (row * k_row + kv_head * k_head)[:, None] + cols[None, :])
    async_copy.async_copy_global_to_shared(v_s, v + (row * v_row + kv_head * v_head)[:, None] + cols[None, :])
    entry += begin
    q += kv_head * group * q_head
    first_row = (kv_head * group * tokens).to(gl.uint32)
    last = count - 1  # rows past the end repeat the last one and are not stored
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, GATHER))
    line = gl.arange(0, ROWS, layout=LINE)
    by_row = gl.arange(0, ROWS, layout=BY_ROW)
    stored = gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
    out_cols = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    score_key = gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORE))
    zero = gl.zeros([ROWS, KEYS], gl.float32, SCORE)
    zero_out = gl.zeros([ROWS, D], gl.float32, SUM)
    for j in gl.static_range(2):
        code = gl.load(entry + gl.minimum(j * ROWS + r, last))
        gather(q, code, q_s.index(j), cols, q_token, q_head, HEAD_BITS, SLOT_BITS)
        async_copy.commit_group()
        code_s.index(j).store(gl.load(entry + gl.minimum(j * ROWS + line, last)))
    limit = _limits(position, gl.load(entry + gl.minimum(by_row, last)), HEAD_BITS, SLOT_BITS, TOPK, KEYS)
    line_code = gl.load(entry + gl.minimum(2 * ROWS + line, last))
    async_copy.wait_group(1)
    fence_async_shared()
    barrier()
    s_run = warpgroup_mma(q_s.index(0), k_s.permute((1, 0)), zero, use_acc=False, is_async=True)
    for i in range((count + ROWS - 1) // ROWS):
        code_s.index((i + 2) % CODES).store(line_code)
        s = warpgroup_mma_wait(0, deps=(s_run,))
        barrier()
        code = code_s.index((i + 2) % CODES).load(gl.SliceLayout(1, GATHER))
        gather(q, code, q_s.index(i % 2), cols, q_token, q_head, HEAD_BITS, SLOT_BITS)
        async_copy.commit_group()
        line_code = gl.load(entry + gl.minimum((i + 3) * ROWS + line, last))
        if NEGATIVE:
            s = -s
        slots = code_s.index(i % CODES).load(WARP) & ((1 << SLOT_BITS) - 1)
        if gl.max(slots, 0) == TOPK - 1:  # few tiles contain own rows
            s = gl.where(score_key[None, :] <= limit[:, None], s, float("-inf"))
        m = gl.maximum(gl.max(s, 1) * scale, LOWEST)
        p = gl.exp2(s * scale - m[:, None])
        norm = gl.sum(p, 1)
        p_left = gl.convert_layout(p.to(DTYPE), LEFT)
        o_run = warpgroup_mma(p_left, v_s, zero_out, use_acc=False, is_async=True)
        async_copy.wait_group(1)
        fence_async_shared()
        barrier()
        s_run = warpgroup_mma(q_s.index((i + 1) % 2), k_s.permute((1, 0)), zero, use_acc=False, is_async=True)
        limit = _limits(position, code_s.index((i + 1) % CODES).load(BY_ROW), HEAD_BITS, SLOT_BITS, TOPK, KEYS)
        row_code = code_s.index(i % CODES).load(BY_ROW)
        token, head = decode(row_code, HEAD_BITS, SLOT_BITS)
        at = (offset_of(token, head, 1, tokens, HEAD_BITS) + first_row) * TOPK + (row_code & ((1 << SLOT_BITS) - 1))
        gl.store(lse + at, m + gl.log2(norm), mask=i * ROWS + by_row < count)
        o, p_left = warpgroup_mma_wait(1, deps=(o_run, p_left))
        o = normalised(o, norm, SUM)
        at = gl.convert_layout(at, gl.SliceLayout(1, STORE))
        gl.store(
            out + (at.to(gl.int64) * D)[:, None] + out_cols[None, :], gl.convert_layout(o.to(DTYPE), STORE),
            mask=(i * ROWS + stored < count)[:, None], cache_modifier=".cs",
        )  # fmt: skip
    warpgroup_mma_wait(0, deps=(s_run,))
    async_copy.wait_group(0)
