"""Bad input of one rank alone, in every public function that communicates: all raise with its values, and the group works."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import moba_cp
from moba_cp import diagnostics
from moba_cp.dense import causal_attention
from moba_cp.parallel import peer_memory
from moba_cp.torchtitan import TitanAttention
from tests.calls import TWO, assert_works, full_result, good_call, zeros
from tests.ranks import run_ranks

BLOCKS = torch.zeros(4, 8, 1, dtype=torch.int64)


def attention(rank: int, **bad: Any) -> object:
    return moba_cp.moba_attention(**good_call(rank) | bad)


def full(rank: int, **bad: Any) -> object:
    call = {name: x for name, x in good_call(rank).items() if name not in ("config", "comm")}
    return causal_attention(**{"softmax_scale": None} | call | bad)


def scores(rank: int, **bad: Any) -> object:
    call = {"q_gate": zeros(8, 4, 8), "k_gate": zeros(8, 2, 8), "blocks": BLOCKS, "config": good_call(rank)["config"]}
    return moba_cp.block_scores(**call | {"layout": TWO} | bad)


def picture(rank: int, **bad: Any) -> object:
    _, report = attention(rank, return_report=True)
    return diagnostics.plot_block_selection(**{"report": report, "path": os.devnull, "layout": TWO} | bad)


def histogram(rank: int, **bad: Any) -> object:
    _, report = attention(rank, return_report=True)
    group = torch.distributed.group.WORLD
    return diagnostics.plot_distance_histogram(**{"report": report, "path": os.devnull, "group": group} | bad)


def node(rank: int, **bad: Any) -> object:
    with mock.patch.dict(os.environ, {"MOBA_CP_NODE": "x" * 65} if bad else {}):
        return attention(rank, comm="a2a+ring", head_parallel=2)


def compiled(rank: int, **bad: Any) -> object:
    return torch.compile(moba_cp.moba_attention, backend="eager")(**good_call(rank) | bad)


def module(rank: int, **bad: Any) -> object:
    """A compiled `MoBAAttention` of a batch of two, on ranks that share no graph."""
    call = {name: zeros(2, 4, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    attend = moba_cp.MoBAAttention(moba_cp.MoBAConfig(4, 2), group=torch.distributed.group.WORLD)
    return torch.compile(attend, backend="eager")(**call | bad)


def titan(rank: int, **bad: Any) -> object:
    call = {name: zeros(2, 4, heads, 8) for name, heads in (("q_BLNH", 4), ("k_BLNH", 2), ("v_BLNH", 2))}
    attend = TitanAttention(moba_cp.MoBAConfig(4, 2), group=torch.distributed.group.WORLD)
    return torch.compile(attend, backend="eager")(**call | bad)


def traffic(rank: int, **bad: Any) -> object:
    _, report = attention(rank, return_report=True)
    return diagnostics.gather_traffic(**{"report": report, "group": torch.distributed.group.WORLD} | bad)


def gathered(rank: int, **bad: Any) -> object:
    _, report = attention(rank, return_report=True)
    return diagnostics.gather_selection(**{"report": report, "layout": TWO} | bad)


def of_one_rank() -> moba_cp.MoBAReport:
    alone = moba_cp.SequenceLayout.contiguous([0, 8], 1)
    qkv = [zeros(8, heads, 8) for heads in (4, 2, 2)]
    return moba_cp.moba_attention(*qkv, moba_cp.MoBAConfig(4, 2), layout=alone, return_report=True)[1]


def mapped(given: Callable[..., object], name: str, x: torch.Tensor) -> Callable[..., object]:
    """`given(rank, name=x)`, where x is bad inside `torch.func.vmap`."""

    def call(rank: int, **bad: Any) -> object:
        if bad:
            return torch.func.vmap(lambda y: given(rank, **{name: y}), randomness="same")(x[None])
        return given(rank, **{name: x})

    return call


def tangent(given: Callable[..., object], name: str, x: torch.Tensor) -> Callable[..., object]:
    """`given(rank, name=x)`, where x has a tangent of forward mode."""

    def call(rank: int, **bad: Any) -> object:
        with forward_ad.dual_level():
            return given(rank, **{name: forward_ad.make_dual(x, x)} if bad else {})

    return call


def around(given: Callable[..., object]) -> Callable[..., object]:
    """`given(rank)`, inside `torch.func.vmap` of other tensors."""

    def call(rank: int, **bad: Any) -> object:
        return torch.func.vmap(lambda x: (given(rank), x)[1], randomness="same")(zeros(2)) if bad else given(rank)

    return call


def gated(rank: int, *, q_gate: torch.Tensor) -> object:
    return attention(rank, routing=(q_gate, zeros(8, 2, 8)))


META = {"q": zeros(8, 4, 8, device="meta"), "k": zeros(8, 2, 8, device="meta"), "v": zeros(8, 2, 4, device="meta")}
FP8 = [zeros(8, heads, 8, dtype=torch.float8_e4m3fn) for heads in (4, 2)]

# The function, what rank 1 passes to it, and what both ranks' messages carry.
ALONE: dict[str, tuple[Callable[..., object], dict[str, Any], str]] = {
    "tensors without numbers": (attention, META, "q, k and v are on meta"),
    "full attention of tensors without numbers": (full, META, "q, k and v are on meta"),
    "traffic": (full, {"traffic": 3}, "traffic must be a Traffic or None, got int"),
    "name of a node": (node, {"bad": True}, "MOBA_CP_NODE must have at most 64 characters"),
    "gates in eight bits": (scores, {"q_gate": FP8[0], "k_gate": FP8[1]}, "q_gate must be fp64, fp32, bf16 or fp16"),
    "gates without a head": (scores, {"q_gate": zeros(8, 0, 8)}, r"at least one head .*\(8, 0, 8\)"),
    "gates apart": (scores, {"k_gate": zeros(8, 2, 8, device="meta")}, "one device, got q_gate cpu, k_gate meta"),
    "blocks apart": (scores, {"blocks": BLOCKS.to("meta")}, "blocks meta"),
    "heads": (picture, {"heads": "a"}, "heads must be an int or a list of ints, got 'a'"),
    "path": (picture, {"path": None}, "path must be a str or a path, got None"),
    "two dtypes in a graph": (compiled, {"q": zeros(8, 4, 8, dtype=torch.float32)}, "q, k and v must have one dtype"),
    "flag in a graph": (compiled, {"check_selection": None}, "check_selection must be True or False, got None"),
    "size in a graph": (compiled, {"workspace_bytes": 1e9}, "workspace_bytes must be an int, got 1000000000.0"),
    "selection in a graph": (compiled, {"selection": [[0]]}, r"selection must be a tensor, got list"),
    "layout in a graph": (compiled, {"layout": [0, 16]}, "layout must be a SequenceLayout, got list"),
    "config in a graph": (compiled, {"config": (4, 2)}, "config must be a MoBAConfig, got tuple"),
    "routing in a graph": (compiled, {"routing": zeros(2, 8, 4, 8)}, "routing must be a pair .*, got Tensor"),
    "heads in a graph": (compiled, {"head_parallel": True}, "head_parallel must be an int or None, got True"),
    "keys of a compiled module": (module, {"k": zeros(8, 2, 8)}, r"must have the same batch and length"),
    "values of a compiled module": (module, {"v": [1]}, "v must be a tensor, got list"),
    "no layout of a compiled module": (
        module,
        {name: zeros(8, heads, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))},
        "need a layout, got",
    ),
    "a mask of a compiled module": (titan, {"is_causal": False}, "MoBA attention is causal, got is_causal=False"),
    "no layout to gather by": (gathered, {"layout": None}, "layout must be a SequenceLayout, got NoneType"),
    "report of one rank": (traffic, {"report": of_one_rank()}, "group has 2 ranks, but the report is of 1"),
    "picture of one rank": (histogram, {"report": of_one_rank()}, "group has 2 ranks, but the report is of 1"),
    "a name that is empty": (histogram, {"path": ""}, "path must name a file, got ''"),
    "layout of a picture": (picture, {"layout": 3}, "layout must be a SequenceLayout, got int"),
    "a kind of picture": (picture, {"path": "a.xyz"}, "path must end with one of .*png.* got 'a.xyz'"),
    "a kind of histogram": (histogram, {"path": "a.xyz"}, "path must end with one of .*png.* got 'a.xyz'"),
    "scale of a compiled module": (titan, {"scale": "x"}, "softmax_scale"),
    "group of ranks in a graph": (
        compiled,
        {"group": [0, 1]},
        r"group must be a torch.distributed ProcessGroup .*, got \[0, 1\]",
    ),
    "bytes in a graph": (
        compiled,
        {"workspace_bytes": -(1 << 64)},
        "workspace_bytes must be at least 1, got -18446744073709551616",
    ),
    "path of a histogram": (histogram, {"path": None}, "path must be a str or a path, got None"),
    "group": (attention, {"group": "cp"}, "group must be a torch.distributed ProcessGroup .* got 'cp'"),
    "group of full attention": (full, {"group": 3}, "group must be a torch.distributed ProcessGroup .* got 3"),
    "group of scores": (scores, {"group": [0, 1]}, r"group must be a torch.distributed ProcessGroup .* got \[0, 1\]"),
    "group in a graph": (compiled, {"group": "cp"}, "group must be a torch.distributed ProcessGroup .* got 'cp'"),
    "a mapped selection": (
        mapped(attention, "selection", BLOCKS),
        {"bad": 1},
        "selection must not be inside a torch.func",
    ),
    "mapped gates": (mapped(gated, "q_gate", zeros(8, 4, 8)), {"bad": 1}, "q_gate must not be inside a torch.func"),
    "mapped scores": (mapped(scores, "k_gate", zeros(8, 2, 8)), {"bad": 1}, "k_gate must not be inside a torch.func"),
    "a transform around": (around(attention), {"bad": 1}, "a call of moba_cp must not be inside a torch.func"),
    "a transform around full attention": (
        around(full),
        {"bad": 1},
        "a call of moba_cp must not be inside a torch.func",
    ),
    "a transform around scores": (around(scores), {"bad": 1}, "a call of moba_cp must not be inside a torch.func"),
    "a tangent": (
        tangent(attention, "k", zeros(8, 2, 8)),
        {"bad": 1},
        "no forward-mode derivative .*, got k with a tangent",
    ),
    "a tangent of full attention": (tangent(full, "v", zeros(8, 2, 4)), {"bad": 1}, "got v with a tangent"),
    "a tangent of scores": (tangent(scores, "k_gate", zeros(8, 2, 8)), {"bad": 1}, "got k_gate with a tangent"),
    "another layout to gather by": (
        gathered,
        {"layout": moba_cp.SequenceLayout.contiguous([0, 9, 16], 2)},
        "the report is of another layout",
    ),
    "no report": (histogram, {"report": None}, "report must be a MoBAReport, got NoneType"),
}


def refusing(rank: int, size: int) -> tuple[dict[str, str], tuple[torch.Tensor, ...]]:
    told = {}
    for name, (call, bad, _) in ALONE.items():
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:  # the text is looked at below
            call(rank, **bad if rank else {})
        told[name] = f"{type(error.value).__name__}: {error.value}"
    return told, full_result(rank)


def test_both_ranks_raise_and_the_group_works_on() -> None:
    pytest.importorskip("matplotlib")
    (first, _), (second, _) = per_rank = run_ranks(2, refusing, timeout=200)  # it compiles a dozen calls
    for name, (_, _, text) in ALONE.items():
        with pytest.raises(ValueError, match=text):
            raise ValueError(second[name])
        assert first[name] == f"ValueError: rank 1 refused its input: {second[name]}"[: len(first[name])], name
    assert_works([good for _, good in per_rank])


def outside_of_a_mesh(rank: int, size: int) -> None:
    mesh = DeviceMesh("cpu", [0])
    alone = moba_cp.SequenceLayout.contiguous([0, 8], 1)
    if rank:
        for call in (attention, full, scores):
            with pytest.raises(ValueError, match=r"a DeviceMesh that this rank belongs to, got DeviceMesh.* on rank 1"):
                call(rank, layout=alone, group=mesh)
        with pytest.raises(ValueError, match="a DeviceMesh that this rank belongs to"):
            moba_cp.MoBAAttention(moba_cp.MoBAConfig(4, 2), group=mesh)
    else:
        for call in (attention, full, scores):
            call(rank, layout=alone, group=mesh)


def test_a_rank_that_a_mesh_leaves_out_is_told_so() -> None:
    run_ranks(2, outside_of_a_mesh)


def with_a_mesh(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))["cp"]
    full(rank, group=mesh)
    scores(rank, group=mesh)
    picture(rank, group=mesh)
    histogram(rank, group=mesh)
    _, report = attention(rank, group=mesh, return_report=True)
    diagnostics.plot_traffic(report, os.devnull, group=mesh)
    assert len(diagnostics.gather_traffic(report, mesh)) == size
    assert diagnostics.gather_selection(report, TWO, mesh).shape == (4, 16, 2)
    attention(rank, group=mesh, comm="pull")
    assert moba_cp.kept_bytes(mesh).shared > 0
    peer_memory.release(mesh)
    assert moba_cp.kept_bytes(mesh).shared == 0


def test_every_group_may_be_a_mesh() -> None:
    pytest.importorskip("matplotlib")
    run_ranks(2, with_a_mesh)
