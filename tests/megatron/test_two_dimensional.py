"""Heads over some context-parallel ranks and the sequence over the others, in Megatron's words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")

from megatron.core.transformer.enums import AttnMaskType

from moba_cp import MoBAConfig
from moba_cp.megatron import MoBASettings
from moba_cp.megatron.heads import full_comm_of, resolve_head_parallel
from tests.megatron.test_core_attention import (
    DIM,
    HEADS,
    MOBA,
    TO_DEFINITION,
    build,
    expected,
    random_qkv,
    sbhd_on_rank,
    zigzag,
)
from tests.ranks import run_ranks

FULL = MoBAConfig(MOBA.block_size, topk=1000)
"""Every block is selected: full attention by the definition."""


def errors_on_rank(rank: int, world_size: int, comm: str, levels: list[int] | None, full: bool) -> float:
    """Largest error of output and gradients on this rank, with ``cp_comm_type`` and ``hierarchical_context_parallel_sizes``."""
    length = 24 * world_size
    settings = MoBASettings(MOBA, full_attention_last_n_layers=2 if full else 0)
    config = {"context_parallel_size": world_size, "hierarchical_context_parallel_sizes": levels}
    core = build(dist.group.WORLD, config=config, cp_comm_type=comm, settings=settings)
    q, k, v = random_qkv(length, 1)
    local = [zigzag(x, rank, world_size).requires_grad_() for x in (q, k, v)]
    out = core(*local, None, attn_mask_type=AttnMaskType.causal)
    assert out.shape == (length // world_size, 1, HEADS * DIM)
    got = [out, *torch.autograd.grad(out.square().sum(), local)]
    leaves = [x[:, 0].clone().requires_grad_() for x in (q, k, v)]
    if full:
        from moba_cp import reference

        whole = reference.moba_attention(*leaves, [0, length], FULL)
        wanted = [whole.detach(), *torch.autograd.grad(whole.square().sum(), leaves)]
    else:
        wanted = expected([x.detach() for x in leaves], [0, length])
    errors = (
        (mine[:, 0].reshape(len(mine), -1) - zigzag(theirs, rank, world_size).flatten(1)).abs().max().item()
        for mine, theirs in zip(got, wanted, strict=True)
    )
    return max(errors)


@pytest.mark.parametrize("full", [False, True], ids=["moba", "full"])
@pytest.mark.parametrize(
    ("world_size", "comm", "levels"),
    [
        (2, "moba_a2a", None),
        (2, "moba_a2a", [2, 1]),
        (2, "moba_auto", [2, 1]),
        (4, "moba_a2a+fetch", [2, 2]),
        (4, "moba_a2a+ring", [2, 2]),
        (4, "moba_auto", [2, 2]),
    ],
)
def test_layers_equal_the_definition(world_size: int, comm: str, levels: list[int] | None, full: bool) -> None:
    assert max(run_ranks(world_size, errors_on_rank, comm, levels, full)) < TO_DEFINITION


def test_batches_of_two() -> None:
    assert max(run_ranks(2, sbhd_on_rank, 2)) < TO_DEFINITION


def resolve(
    comm: str,
    cp_size: int,
    levels: list[int] | None = None,
    head_parallel: int | None = None,
    heads: int = 16,
    tp: int = 1,
) -> int | None:
    config: Any = SimpleNamespace(hierarchical_context_parallel_sizes=levels, num_attention_heads=heads)
    settings = MoBASettings(MOBA, head_parallel=head_parallel)
    return resolve_head_parallel(config, settings, comm, cp_size, tp, layer_number=3)


def test_megatrons_sizes_are_heads_then_sequence() -> None:
    assert resolve("a2a+fetch", 8, [4, 2]) == 4
    assert resolve("auto", 8, [4, 2]) == 4
    assert resolve("ring", 8, [4, 2]) is None  # of use with transports that split heads only
    assert resolve("a2a", 8) is None
    assert resolve("a2a+ring", 8, head_parallel=2) == 2
    assert resolve("a2a+ring", 1, [4, 2]) is None  # no context parallelism


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"comm": "a2a+fetch", "cp_size": 8, "levels": [4, 4]}, "with product 8"),
        ({"comm": "a2a+fetch", "cp_size": 8, "levels": [2, 2, 2]}, r"\[ranks that split heads, ranks that split the sequence\]"),
        ({"comm": "a2a+fetch", "cp_size": 8, "levels": [4, 2], "head_parallel": 2}, "head_parallel=2 contradicts"),
        ({"comm": "a2a", "cp_size": 8, "levels": [4, 2]}, "says 4; name what moves .*moba_a2a.fetch"),
        ({"comm": "auto", "cp_size": 1, "head_parallel": 2}, "head_parallel=2 must divide the 1 context-parallel ranks"),
        ({"comm": "fetch", "cp_size": 8, "head_parallel": 2}, "comm='fetch' does not split heads"),
        ({"comm": "a2a+fetch", "cp_size": 8, "levels": [8, 1], "tp": 4}, "leave 4 on a rank, which cannot be split over 8"),
        ({"comm": "a2a", "cp_size": 8, "heads": 4}, "leave 4 on a rank, which cannot be split over 8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"layer 3.*{message}"):
        resolve(**arguments)


def test_full_layers_follow_the_named_transport() -> None:
    assert [full_comm_of(x) for x in ("a2a", "a2a+ring", "a2a+fetch", "a2a+pull", "ring", "fetch", "")] == [
        "a2a", "a2a+ring", "a2a+ring", "a2a+ring", "ring", None, None,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="head_parallel must be None or at least 1, got 0"):
        MoBASettings(MOBA, head_parallel=0)
