"""Calls under another default device, as `torch.set_default_device("cuda")` sets it: every tensor is made where it belongs.

The meta device stands in for a GPU: its tensors hold no numbers, so a call that makes one by mistake fails.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moba_cp
from moba_cp.config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from moba_cp.dense import causal_attention
from moba_cp.parallel.comm import HostCopy
from moba_cp.parallel.plan_cache import PLANS
from tests.calls import CASE, TWO
from tests.ranks import run_ranks

CONFIG = CASE.config


def calls(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Outputs of calls of every kind, then the gradient of each with respect to q. Nothing is kept from earlier calls."""
    PLANS.clear()
    where = {"layout": TWO, "group": group}
    outs = [
        moba_cp.moba_attention(q, k, v, CONFIG, **where, comm=comm)
        for comm in ("fetch", "pull", "ring", "a2a", "a2a+ring")
    ]
    outs += [causal_attention(q, k, v, None, **where, comm=comm) for comm in ("ring", "all_gather", "a2a")]
    outs.append(moba_cp.moba_attention(q, k, v, CONFIG, **where, return_report=True)[0])
    out, selection = moba_cp.moba_attention(q, k, v, CONFIG, **where, return_selection=True)
    outs += [out, moba_cp.block_scores(q, k, selection.blocks, CONFIG, **where)]
    outs.append(
        torch.ops.moba_cp.attention(
            q, k, v, torch.as_tensor(TWO.description, device="cpu"), None, None, None, CONFIG.block_size, CONFIG.topk, None,
            group.group_name, "fetch", True, False, True, DEFAULT_WORKSPACE_BYTES, DEFAULT_EXCHANGE_BYTES, None,
        )[0]
    )  # fmt: skip
    return [*outs, *(torch.autograd.grad(out.sum(), q)[0] for out in outs)]


def under_both(rank: int, size: int) -> tuple[list[Tensor], list[Tensor]]:
    q, k, v = (TWO.shard(x, rank).requires_grad_() for x in CASE.inputs()[:3])
    found = []
    for device in ("meta", "cpu"):
        group = dist.new_group([0, 1])
        with torch.device(device):
            found.append([x.detach() for x in calls(q, k, v, group)])
        dist.destroy_process_group(group)
    return tuple(found)


def test_calls_do_not_depend_on_the_default_device() -> None:
    for other, usual in run_ranks(2, under_both):
        for x, expected in zip(other, usual, strict=True):
            assert torch.equal(x, expected)


class Asked(Exception):
    """Where memory was asked for."""


def test_a_copy_to_the_host_is_on_the_host() -> None:
    def empty(*size: object, device: str | None = None, **options: object) -> Tensor:
        raise Asked(f"{device}, pinned: {options['pin_memory']}")

    x = torch.zeros(2, device="meta")
    with mock.patch.object(torch, "empty", empty), pytest.raises(Asked, match="^cpu, pinned: True$"):
        HostCopy(x)
