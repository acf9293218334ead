"""Backward of block attention in portable Triton (sm_80 and newer): delta, dK and dV, partial dq.

Keys stay, rows stream: one program owns the dK and dV of a tile of one block's keys and walks the rows that selected
the block, in list order, so the sums are the same bits every time. The partial dq of a (row, block) goes to the row's
slot: from the same program where one tile holds a whole block, else from a second kernel in which rows stay and keys
stream.

A bin (kv head, block) that very many rows selected would keep one program busy long after all others are done. Bins of
more than two pieces are cut at the multiples of `piece_rows` in the entry array; a piece's sums go to a buffer, and a
small kernel adds them in order. The buffer is bounded on the host: one slot a multiple, an eighth of the dq partials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import configs
from .backward_kernels import delta_kernel, dkdv_kernel, dq_kernel, find_pieces_kernel, sum_pieces_kernel
from .sizes import cdiv, next_power_of_2
from .types import heads_stride

if TYPE_CHECKING:
    from .lists import RoutingLists
    from .torch_backend import Partials
    from .types import KVPart, QueryRows

PIECE_BLOCKS = 32
"""Rows of a piece of a hot bin, in block sizes: the buffer for pieces is 4 / PIECE_BLOCKS of the bf16 dq partials."""
_SEARCH = 128  # pieces that one program of `find_pieces_kernel` looks up


@dataclass(frozen=True)
class Tiles:
    """Tile shapes, a function of head sizes, block size and shared memory alone: never of the number of rows.

    Attributes:
        keys, rows, warps, stages: of the kernel for dK and dV.
        fused: one tile of keys holds a block, so the same kernel writes dq.
        dq_rows, dq_keys, dq_warps, dq_stages: of the kernel for dq.
    """

    keys: int
    rows: int
    warps: int
    stages: int
    fused: bool
    dq_rows: int
    dq_keys: int
    dq_warps: int
    dq_stages: int


def choose_tiles(dim: int, value_dim: int, block_size: int, shared_memory: int = 227 << 10) -> Tiles:
    """Tiles for `[., dim]` queries and keys, `[., value_dim]` values and `shared_memory` bytes a program."""
    # Larger tiles of rows spill; tests compile all of these.
    wide = max(next_power_of_2(dim), next_power_of_2(value_dim))
    block = configs.padded(block_size)
    if shared_memory < 160 << 10:  # consumer parts: sm_86, sm_89, sm_120
        keys = min(block, 64 if wide <= 128 else 32)
        return Tiles(keys, 32, 4, 1, block <= keys, 64 if wide <= 128 else 32, min(block, 32), 4, 1)
    if shared_memory < 200 << 10:  # sm_80: sums and products share the registers
        keys, fused = min(block, 64), block <= 64 and wide <= 128
        rows = 16 if wide > 128 or (fused and wide > 64) else 32 if fused else 64
        return Tiles(keys, rows, 8 if keys >= 64 else 4, 2, fused, 128 if wide <= 128 else 64, min(block, 32), 8, 2)
    if wide <= 128:
        keys = min(block, 128)
        return Tiles(
            keys, 32 if wide == 128 else 64, 8 if keys >= 64 else 4, 2, block <= keys, 128, min(block, 64), 8, 2
        )
    keys = min(block, 64)
    return Tiles(keys, 32, 8 if keys >= 64 else 4, 2, block <= keys, 64, min(block, 32), 8, 2)


def piece_rows(block_size: int) -> int:
    """Entries between two cuts of a hot bin."""
    return PIECE_BLOCKS * block_size


def piece_count(tokens: int, q_heads: int, kv_heads: int, topk: int, block_size: int) -> int:
    """Slots of the buffer for pieces: 0 where no bin can be long enough to be cut."""
    step = piece_rows(block_size)
    if tokens * (q_heads // kv_heads) <= 2 * step:
        return 0
    return tokens * q_heads * topk // step + 1


def delta(out: Tensor, dout: Tensor) -> Tensor:
    """`sum(out * dout)` over the last dimension: `[T, Hq, Dv]` twice -> fp32 `[Hq, T]`."""
    tokens, heads, dim = out.shape
    result = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    if result.numel():
        delta_kernel[(cdiv(tokens, 32), heads)](
            out, dout, result, tokens, *out.stride()[:2], *dout.stride()[:2],
            DV=dim, DVP=next_power_of_2(dim), R=32, num_warps=4,
        )  # fmt: skip
    return result


def find_pieces(pointer: Tensor, n_pieces: int, block_size: int) -> Tensor:
    """int32 `[n_pieces]`: the long bin that is cut at entry `c * piece_rows`, -1 where the cut falls in no such bin."""
    piece_bin = torch.empty(n_pieces, dtype=torch.int32, device=pointer.device)
    n_bins = pointer.numel() - 1
    find_pieces_kernel[(cdiv(n_pieces, _SEARCH),)](
        pointer, piece_bin, n_bins, n_pieces, (n_bins + 1).bit_length(), PIECE=piece_rows(block_size), SIZE=_SEARCH,
        num_warps=4,
    )  # fmt: skip
    return piece_bin


def backward_path(q: Tensor, part: KVPart, block_size: int) -> str:
    """Which kernels `attend_backward` takes for inputs like these: "hopper" or "portable"."""
    from . import hopper_backward

    return "hopper" if hopper_backward.supported(q, part, block_size) else "portable"


def attend_backward(
    q: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    part: KVPart,
    lists: RoutingLists,
    rows: QueryRows,
    selected: Tensor,
    scale: float,
    dk: Tensor,
    dv: Tensor,
    dq_partials: Partials,
    accumulate: bool,
    *,
    path: str | None = None,
) -> None:
    """Gradients of `attend` followed by `merge`, one part at a time; see `torch_backend.attend_backward`.

    Args:
        lse: fp32, base 2, any strides; so `delta`.
        path: "portable" or "hopper"; by default what `backward_path` says.
    """
    tokens, q_heads, _ = q.shape
    block_size = lists.block_size
    n_bins = lists.kv_heads * lists.n_blocks
    if n_bins == 0 or part.k.shape[0] == 0:
        return
    if path is None:
        path = backward_path(q, part, block_size)
    topk = selected.shape[2]
    n_pieces = piece_count(tokens, q_heads, lists.kv_heads, topk, block_size)
    piece_bin = find_pieces(lists.pointer, n_pieces, block_size) if n_pieces else lists.pointer
    call = Call(q, dout, lse, delta, part, lists, rows, topk, scale, dk, dv, dq_partials.out, accumulate, n_pieces,
                piece_bin)  # fmt: skip
    if path == "hopper":
        from . import hopper_backward

        hopper_backward.launch(call)
    elif path == "portable":
        launch(call)
    else:
        raise ValueError(f"path must be 'portable', 'hopper' or None, got {path!r}")


@dataclass(frozen=True)
class Call:
    """What one launch of the kernels works on: the arguments of `attend_backward` and the pieces of hot bins."""

    q: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor
    part: KVPart
    lists: RoutingLists
    rows: QueryRows
    topk: int
    scale: float
    dk: Tensor
    dv: Tensor
    dq: Tensor
    accumulate: bool
    n_pieces: int
    piece_bin: Tensor

    def row_strides(self) -> tuple[int, ...]:
        """(token, head) strides of q and dout."""
        return (*self.q.stride()[:2], *self.dout.stride()[:2])

    def key_strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """(row, kv head) strides of `[N, H, .]` tensors; head stride 0 where every pair has rows of its own."""
        return tuple(s for x in tensors for s in (x.stride(0), heads_stride(x)))

    def score_strides(self) -> tuple[int, ...]:
        """(head, token) strides of lse and delta."""
        return (*self.lse.stride(), *self.delta.stride())

    def dq_strides(self) -> tuple[int, int, int]:
        """Head and token strides of the partial dq in slots, and the stride of a slot in elements.

        The two large ones change with the number of tokens; in slots they leave the alignment of a row to the third.
        """
        head, token, slot, _ = self.dq.stride()
        if slot and not head % slot and not token % slot:
            return head // slot, token // slot, slot
        raise ValueError(f"partial dq must keep its slots evenly apart, got strides {self.dq.stride()}")

    def pieces(self, key_rows: int) -> Tensor:
        """fp32 buffer for the sums of pieces: `[n_pieces, key_rows, D + Dv]`."""
        width = self.part.k.shape[2] + self.part.v.shape[2]
        return torch.empty(self.n_pieces, key_rows, width, dtype=torch.float32, device=self.q.device)

    def sizes(self) -> dict[str, int]:
        """Head sizes, and the same padded for the dots."""
        dim, value_dim = self.part.k.shape[2], self.part.v.shape[2]
        return {"D": dim, "DV": value_dim, "DP": configs.padded(dim), "DVP": configs.padded(value_dim)}

    def bits(self) -> dict[str, int]:
        """How an entry is put together."""
        return {"HEAD_BITS": self.lists.head_bits, "SLOT_BITS": self.lists.slot_bits, "TOPK": self.topk}


def launch(call: Call) -> None:
    """The portable kernels."""
    part = call.part
    tiles = choose_tiles(part.k.shape[2], part.v.shape[2], call.lists.block_size, shared_memory(call.q.device))
    launch_dkdv(call, tiles)
    if not tiles.fused:
        launch_dq(call, tiles)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs


def launch_dkdv(call: Call, tiles: Tiles) -> None:
    """dK and dV, and dq where a tile of keys holds a block."""
    part, lists = call.part, call.lists
    n_bins, n_tiles = lists.kv_heads * lists.n_blocks, cdiv(call.lists.block_size, tiles.keys)
    pieces = call.pieces(n_tiles * tiles.keys)
    dkdv_kernel[((n_bins + call.n_pieces) * n_tiles,)](
        call.q, call.dout, part.k, part.v, call.lse, call.delta, call.rows.position, lists.pointer, lists.entry,
        part.start, part.length, call.piece_bin, call.dk, call.dv, call.dq, pieces,
        *call.row_strides(), *call.key_strides(part.k, part.v, call.dk, call.dv), *call.score_strides(),
        *call.dq_strides(), part.start.stride(0), n_bins, lists.n_blocks, lists.group_size, call.scale,
        **call.sizes(), **call.bits(), BK=tiles.keys, R=tiles.rows, NT=n_tiles, STAGES=tiles.stages,
        PIECE=piece_rows(call.lists.block_size), FUSED=tiles.fused, ACCUMULATE=call.accumulate, num_warps=tiles.warps,
    )  # fmt: skip
    sum_pieces(call, pieces, tiles.keys, n_tiles)


def sum_pieces(call: Call, pieces: Tensor, keys: int, n_tiles: int) -> None:
    """dK and dV of long bins from the sums of their pieces."""
    if not call.n_pieces:
        return
    part, lists = call.part, call.lists
    sum_pieces_kernel[(call.n_pieces * n_tiles,)](
        pieces, call.piece_bin, lists.pointer, part.start, part.length, call.dk, call.dv,
        *call.key_strides(call.dk, call.dv), part.start.stride(0), lists.n_blocks, **call.sizes(), BK=keys, NT=n_tiles,
        PIECE=piece_rows(call.lists.block_size), ACCUMULATE=call.accumulate, num_warps=8,
    )  # fmt: skip


def launch_dq(call: Call, tiles: Tiles) -> None:
    """Partial dq by work items, for blocks of more than one tile of keys."""
    part, lists = call.part, call.lists
    if not lists.item_bin.numel():
        return
    dq_kernel[(lists.item_bin.numel(),)](
        call.q, call.dout, part.k, part.v, call.lse, call.delta, call.rows.position, lists.entry, lists.item_bin,
        lists.item_start, lists.item_end, part.start, part.length, call.dq,
        *call.row_strides(), *call.key_strides(part.k, part.v), *call.score_strides(), *call.dq_strides(),
        part.start.stride(0), lists.n_blocks, lists.group_size, call.scale, **call.sizes(), **call.bits(),
        R=tiles.dq_rows, BN=tiles.dq_keys, STAGES=tiles.dq_stages, num_warps=tiles.dq_warps,
    )  # fmt: skip
