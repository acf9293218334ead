"""Attention problems for the tests: drawn sizes, seeded inputs, layouts of every kind, and how to run one on a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

import moba_cp
from moba_cp import MoBAConfig, SequenceLayout, dense
from tests.ranks import run_ranks

COMMS = moba_cp.parallel.splits.COMMS
TRANSPORTS = tuple(moba_cp.parallel.exchanges.EXCHANGES)
NAMES = ("out", "dq", "dk", "dv")
DEFAULT_WORKSPACE = 1 << 30
FP64 = torch.float64

TO_DEFINITION = 1e-10  # fp64 sums of at most some hundred terms, in another order than the reference's: about 1e-14
TO_EACH_OTHER = 1e-12  # the same sums; only a BLAS that treats a row by the size of its matrix makes a difference


@dataclass(frozen=True)
class Case:
    """One attention problem; its inputs follow from `seed`."""

    lengths: tuple[int, ...]
    block_size: int
    topk: int
    q_heads: int = 2
    kv_heads: int = 1
    dim: int = 8
    v_dim: int = 8
    softmax_scale: float | None = None
    seed: int = 0

    @property
    def cu_seqlens(self) -> list[int]:
        return list(accumulate(self.lengths, initial=0))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def config(self) -> MoBAConfig:
        return MoBAConfig(self.block_size, self.topk, self.softmax_scale)

    def inputs(self, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the gradient of the output, of all tokens; the same in every process."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (
            (self.q_heads, self.dim),
            (self.kv_heads, self.dim),
            (self.kv_heads, self.v_dim),
            (self.q_heads, self.v_dim),
        )
        return tuple(torch.randn(self.tokens, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


# Documents of several blocks, one of no token, one of less than a block and one of a single token.
MIXED = Case(lengths=(29, 0, 3, 22, 1), block_size=5, topk=3, q_heads=6, kv_heads=3, dim=8, v_dim=5)


def reference(case: Case, dtype: torch.dtype = FP64) -> tuple[Tensor, ...]:
    """out, dq, dk, dv by the definition."""
    *qkv, dout = case.inputs(dtype)
    qkv = [x.requires_grad_() for x in qkv]
    out = moba_cp.reference.moba_attention(*qkv, case.cu_seqlens, case.config)
    if not out.requires_grad:  # no token at all
        return out, *(torch.zeros_like(x) for x in qkv)
    return out.detach(), *torch.autograd.grad(out, qkv, dout)


def on_rank(
    rank: int,
    world_size: int,
    case: Case,
    layout: SequenceLayout,
    comm: str = "auto",
    dtype: torch.dtype = FP64,
    workspace_bytes: int = DEFAULT_WORKSPACE,
    repeat: int = 1,
    **options: object,
) -> list[tuple[Tensor, ...]]:
    """out, dq, dk, dv of this rank's tokens, once for each repetition."""
    call = partial(
        moba_cp.moba_attention, config=case.config, layout=layout, comm=comm, workspace_bytes=workspace_bytes, **options
    )
    return [with_gradients(rank, case, layout, call, dtype) for _ in range(repeat)]


def full_on_rank(
    rank: int, case: Case, layout: SequenceLayout, dtype: torch.dtype = FP64, **options: object
) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of this rank's tokens by full causal attention."""
    call = partial(dense.causal_attention, softmax_scale=case.softmax_scale, layout=layout, **options)
    return with_gradients(rank, case, layout, call, dtype)


def with_gradients(
    rank: int, case: Case, layout: SequenceLayout, call: Callable[..., Tensor], dtype: torch.dtype = FP64
) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of this rank's tokens by `call(q, k, v)`."""
    *qkv, dout = (layout.shard(x, rank) for x in case.inputs(dtype))
    for x in qkv:
        x.requires_grad_()
    out = call(*qkv)
    out.backward(dout)
    return out.detach(), *(x.grad for x in qkv)


def whole(layout: SequenceLayout, per_rank: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Results of all tokens, out of those of each rank's."""
    return tuple(layout.unshard(parts) for parts in zip(*per_rank, strict=True))


def on_rank_many(rank: int, world_size: int, calls: list[tuple]) -> list[list[tuple[Tensor, ...]]]:
    """`on_rank` for several argument tuples, one after the other."""
    return [on_rank(rank, world_size, *call) for call in calls]


def comms_for(q_heads: int, cp_size: int) -> tuple[str, ...]:
    """Values of `comm` for a group on one host, without those that stand for another: heads that cannot be split are left out,
    and where all ranks split them, what would move keys and values between head groups."""
    size = max(u for u in range(1, cp_size + 1) if q_heads % u == 0 and cp_size % u == 0)
    hybrids = [comm for comm in COMMS if "+" in comm and 1 < size < cp_size]
    return ("auto", *TRANSPORTS, *["a2a"] * (size == cp_size), *hybrids)


def run_many(world_size: int, calls: list[tuple], timeout: float = 120.0) -> list[tuple[Tensor, ...]]:
    """out, dq, dk, dv of all tokens for each `(case, layout, comm, dtype, workspace_bytes)`."""
    per_rank = run_ranks(world_size, on_rank_many, calls, timeout=timeout)
    return [whole(call[1], [of_rank[i][0] for of_rank in per_rank]) for i, call in enumerate(calls)]


def run(world_size: int, *call: object, timeout: float = 60.0) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of all tokens of one call."""
    return run_many(world_size, [call], timeout)[0]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude of what is expected (1 where that is zero)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel() == 0:
        return 0.0
    scale = expected.double().abs().max().item() or 1.0
    return (actual.double() - expected.double()).abs().max().item() / scale


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float, what: object = "") -> None:
    """Every one of out, dq, dk, dv within `tolerance` of the largest magnitude."""
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        error = relative_error(a, e)
        assert error <= tolerance, f"{name} is off by {error:.2e} ({what})"


def interleaved(cu_seqlens: list[int], cp_size: int, width: int = 1, backward: bool = False) -> SequenceLayout:
    """Runs of `width` tokens dealt round the ranks; `backward` deals from the end, so each rank counts down."""
    total = cu_seqlens[-1]
    runs: list[list[tuple[int, int]]] = [[] for _ in range(cp_size)]
    for i, start in enumerate(range(0, total, width)):
        runs[i % cp_size].append((start, min(start + width, total)))
    return SequenceLayout.from_runs([r[::-1] for r in runs] if backward else runs, cu_seqlens)


def all_on(cu_seqlens: list[int], cp_size: int, rank: int) -> SequenceLayout:
    """Every token on one rank."""
    return SequenceLayout.from_runs([[(0, cu_seqlens[-1])] if r == rank else [] for r in range(cp_size)], cu_seqlens)


def every_layout(cu_seqlens: list[int], cp_size: int) -> dict[str, SequenceLayout]:
    """One layout of each kind."""
    return {
        "contiguous": SequenceLayout.contiguous(cu_seqlens, cp_size),
        "zigzag per document": SequenceLayout.zigzag(cu_seqlens, cp_size),
        "zigzag whole": SequenceLayout.zigzag(cu_seqlens, cp_size, per_document=False),
        "interleaved": interleaved(cu_seqlens, cp_size),
        "interleaved by 3, backward": interleaved(cu_seqlens, cp_size, 3, backward=True),
        "all on the last rank": all_on(cu_seqlens, cp_size, cp_size - 1),
    }


@st.composite
def cases(draw: st.DrawFn, max_documents: int = 4, max_blocks: int = 4) -> Case:
    """Documents of zero to a few blocks and not multiples of anything, MHA to MQA, Dv apart from D."""
    block_size = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, max_blocks * block_size + 3), max_size=max_documents))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 4), (2, 1), (2, 2), (3, 2)]))
    return Case(
        lengths=tuple(lengths),
        block_size=block_size,
        topk=draw(st.integers(1, max_blocks + 3)),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        dim=draw(st.sampled_from([1, 4, 7, 16])),
        v_dim=draw(st.sampled_from([1, 5, 16])),
        softmax_scale=draw(st.sampled_from([None, 0.5, 2.0])),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def layouts(draw: st.DrawFn, cu_seqlens: list[int], cp_size: int) -> SequenceLayout:
    """Any layout: the named ones, or the tokens cut anywhere, dealt to any rank, in any order."""
    kind = draw(st.sampled_from(["contiguous", "zigzag", "zigzag whole", "runs", "runs", "interleaved"]))
    match kind:
        case "contiguous":
            return SequenceLayout.contiguous(cu_seqlens, cp_size)
        case "zigzag" | "zigzag whole":
            return SequenceLayout.zigzag(cu_seqlens, cp_size, per_document=kind == "zigzag")
        case "interleaved":
            return interleaved(cu_seqlens, cp_size, draw(st.integers(1, 3)), draw(st.booleans()))
    total = cu_seqlens[-1]
    cuts = sorted(draw(st.sets(st.integers(0, total), max_size=12)) | {0, total})
    pieces = draw(st.permutations(list(zip(cuts[:-1], cuts[1:]))))
    holders = draw(st.lists(st.integers(0, cp_size - 1), min_size=len(pieces), max_size=len(pieces)))
    return SequenceLayout.from_runs(
        [[p for p, h in zip(pieces, holders) if h == r] for r in range(cp_size)], cu_seqlens
    )


def sub_groups(size: int) -> list[dist.ProcessGroup]:
    """The world cut into groups of `size` neighbours; every rank calls this once and keeps the list."""
    world = dist.get_world_size()
    return [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
