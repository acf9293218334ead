"""Gluon kernel for the partial dq on Hopper where the gradients of scores, dS, were kept: one product instead of three.

`dkdv_kernel` keeps dS of each work item, transposed and with rows in the order of `in_ds_order`. `gluon_rows.py` has the rules of
ordering.
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

from ..gluon_rows import barrier, decode, gather_layout, line_layout, offset_of, product_layout, store_layout
from .portable_kernels import UNALIGNED, VARYING
from .rows_sm90 import block_of, row_in_ds_order


@gluon.jit
def _copy_tile(
    ds, k, held, tile, k_row, ds_s, k_s, ds_key, ds_cols, key, cols, there, ROWS: gl.constexpr, KEYS: gl.constexpr
):
    """Start the copies of an item's gradients for one tile of keys, and of the keys; zeros past the block's end."""
    ds_key += tile * KEYS
    key += tile * KEYS
    ds_mask = ((ds_key < held) & there)[:, None] & (ds_cols >= 0)[None, :]
    mask = ((key < held) & there)[:, None] & (cols >= 0)[None, :]
    async_copy.async_copy_global_to_shared(ds_s, ds + ds_key[:, None] * ROWS + ds_cols[None, :], mask=ds_mask)
    async_copy.async_copy_global_to_shared(k_s, k + (key.to(gl.int64) * k_row)[:, None] + cols[None, :], mask=mask)
    async_copy.commit_group()


@gluon.jit(do_not_specialize=[*VARYING, "place_head"], do_not_specialize_on_alignment=[*UNALIGNED, "place"])
def dq_of_ds_kernel(
    ds, k, entry, item_bin, item_start, item_end, start, length, place, k_row, k_head, place_head, place_token,
    start_head, n_blocks, group, scale,
    D: gl.constexpr, HEAD_BITS: gl.constexpr, SLOT_BITS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr,
    BLOCK: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One program: partial dq of one work item of at most ROWS rows, `[ROWS, D]`, in place of the item's dS^T `[BLOCK, ROWS]`.

    Reads 2 * ROWS bytes of dS and 2 * D of K (from L2) per key; writes 2 * D bytes and 4 of `place` per row. All reads of dS
    precede the first write.
    """
    item = gl.program_id(0)
    bin_ = gl.load(item_bin + item)
    first = gl.load(item_start + item)
    end = gl.load(item_end + item)
    kv_head, first_key, held = block_of(start, length, bin_, n_blocks, start_head)
    if held == 0:
        return

    GATHER: gl.constexpr = gather_layout(D, WARPS)
    DS: gl.constexpr = gather_layout(ROWS, WARPS)
    SUM: gl.constexpr = product_layout(D, WARPS)
    STORE: gl.constexpr = store_layout(ROWS, D, WARPS)
    DS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, ROWS], DTYPE)
    KEYS_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    ds_s = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, ROWS], DS_LAYOUT)
    k_s = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], KEYS_LAYOUT)
    ds_key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, DS))
    ds_cols = gl.arange(0, ROWS, layout=gl.SliceLayout(0, DS))
    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, GATHER))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, GATHER))
    ds += item.to(gl.int64) * (BLOCK * ROWS)
    k += first_key.to(gl.int64) * k_row + kv_head * k_head
    tiles = gl.maximum((held + KEYS - 1) // KEYS, 1)  # ptxas serialises the products of a loop that may not run
    for j in gl.static_range(STAGES - 1):
        _copy_tile(
            ds, k, held, j, k_row, ds_s.index(j), k_s.index(j), ds_key, ds_cols, key, cols, j < tiles, ROWS, KEYS
        )
    total = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, SUM))
    for i in range(tiles):
        async_copy.wait_group(STAGES - 2)
        fence_async_shared()
        total = warpgroup_mma_wait(0, deps=(total,))
        barrier()
        # The stage of tile i - 1: all warps have waited for its product before the barrier.
        ahead = (i + STAGES - 1) % STAGES
        _copy_tile(
            ds, k, held, i + STAGES - 1, k_row, ds_s.index(ahead), k_s.index(ahead), ds_key, ds_cols, key, cols,
            i + STAGES - 1 < tiles, ROWS, KEYS,
        )  # fmt: skip
        total = warpgroup_mma(ds_s.index(i % STAGES).permute((1, 0)), k_s.index(i % STAGES), total, is_async=True)
    async_copy.wait_group(0)
    barrier()
    line = gl.arange(0, ROWS, layout=line_layout(WARPS))
    row = first + row_in_ds_order(line)
    code = gl.load(entry + gl.minimum(row, end - 1))
    token, head = decode(code, HEAD_BITS, SLOT_BITS)
    at = offset_of(token, head, place_token, place_head, HEAD_BITS) + (code & ((1 << SLOT_BITS) - 1))
    gl.store(place + at + kv_head * group * place_head, item * (BLOCK * ROWS // D) + line, mask=row < end)
    total = warpgroup_mma_wait(0, deps=(total,))
    done = gl.convert_layout((total * scale).to(DTYPE), STORE)
    line_stored = gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
    gl.store(ds + line_stored[:, None] * D + columns[None, :], done)
