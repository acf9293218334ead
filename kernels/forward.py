"""Block attention, forward: gathered query rows times one block of keys and values.

On Hopper `hopper_forward` serves where it can, with the bits of the kernels of `forward_kernels`.
"""

from __future__ import annotations

from torch import Tensor

from . import configs, hopper_forward
from .descriptors import heads_step, tile_descriptor, tma_can_read
from .forward_kernels import hold_rows_kernel, own_blocks_kernel, stream_rows_kernel
from .types import OWN_TILE, KVPart, QueryRows, heads_stride

LOG2E = 1.4426950408889634


def _scores_scale(scale: float) -> tuple[float, bool]:
    """Positive factor in base 2, and whether scores change sign. 0 becomes tiny: 0 * -inf (a masked score) is NaN."""
    return max(abs(scale) * LOG2E, 1e-30), scale < 0


def attend_listed(
    q: Tensor, part: KVPart, lists, rows: QueryRows, selected: Tensor, scale: float, partials,
    launch: configs.Launch, *, stream: bool, tma: bool,
) -> None:  # fmt: skip
    """Every listed entry by `stream_rows_kernel`, or by `hold_rows_kernel`, which leaves own rows of blocks of more than 128
    keys to `attend_own`. `tma`: descriptors may be used, which changes no bit."""
    n_items, block_size = lists.item_bin.numel(), lists.block_size
    if n_items == 0 or part.k.shape[0] == 0:
        return
    (tokens, _, dim), dim_v = q.shape, part.v.shape[2]
    scale, negative = _scores_scale(scale)
    k, v, k_head, v_head = part.k, part.v, heads_stride(part.k), heads_stride(part.v)
    options = {}
    kernel, programs = stream_rows_kernel, n_items
    if not stream:
        # TMA reads whole tiles: a block's ragged tail would bring in another block's rows.
        with_own = block_size <= configs.SMALL_BLOCK
        tma = tma and not with_own and block_size % launch.keys == 0 and tma_can_read(k) and tma_can_read(v)
        if tma:
            k_head, v_head = heads_step(k), heads_step(v)
            k, v = tile_descriptor(k, launch.keys), tile_descriptor(v, launch.keys)
        kernel, programs = hold_rows_kernel, n_items * (lists.rows_per_item // launch.rows)
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
    tma = tma and tma_can_read(part.k) and tma_can_read(part.v)
    k_tiles, v_tiles = (tile_descriptor(x, launch.keys) if tma else x for x in (part.k, part.v))
    own_blocks_kernel[(tiles * (OWN_TILE // launch.rows) * q_heads,)](
        q, part.k, part.v, k_tiles, v_tiles, part.start, part.length, rows.own_tiles, partials.out, partials.lse,
        rows.offset, tokens, tiles, q_heads, scale, part.start.stride(0), q.stride(0), q.stride(1),
        part.k.stride(0), heads_stride(part.k), part.v.stride(0), heads_stride(part.v),
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
    """The kernels of `forward_kernels`."""
    device = configs.capability(q.device)
    dim, dim_v = q.shape[2], part.v.shape[2]
    hold = configs.stationary(dim, dim_v, lists.block_size, device)
    stream = configs.streaming(dim, dim_v, lists.block_size, device)
    # TMA pays on Hopper, where two programs share a multiprocessor; Blackwell's consumer chips have it too, untested.
    shared, tma = (q, part, lists, rows, selected, scale, partials), device == (9, 0)
    attend_listed(*shared, stream or hold, stream=stream is not None, tma=tma)
    if lists.block_size > configs.SMALL_BLOCK:
        attend_own(*shared, configs.own_blocks(dim, dim_v, device), tma=tma)
