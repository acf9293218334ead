"""The table of wanted pairs: eight to a byte, and no more memory than that and a bounded workspace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moba_cp import SequenceLayout
from moba_cp.parallel import wanted
from moba_cp.parallel.blocks import home_plan, rank_plan
from moba_cp.parallel.wanted import exchange_wanted, pack_bits, unpack_bits


@given(shape=st.tuples(st.integers(0, 3), st.integers(0, 20)), seed=st.integers(0, 99))
def test_bits_come_back(shape: tuple[int, int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert packed.shape == (shape[0], -(-shape[1] // 8))
    assert torch.equal(unpack_bits(packed, shape[1]), mask)


class Gathered:
    """A communicator whose all-gather gives what the test says all ranks sent."""

    def __init__(self, masks: Tensor, rank: int) -> None:
        self.size, self.rank, self.sent = len(masks), rank, pack_bits(masks)

    def all_gather(self, x: Tensor, stage: str) -> Gathered:
        assert torch.equal(x, self.sent[self.rank])
        return self

    def wait(self) -> Tensor:
        return self.sent


@pytest.mark.parametrize("at_once", [1, 1 << 23])
def test_tokens_and_masks_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(wanted, "_AT_ONCE", at_once)
    plan = home_plan(SequenceLayout.zigzag([0, 70, 70, 203], 5), 8)
    masks = torch.rand(5, 3, len(plan.blocks), generator=torch.Generator().manual_seed(0)) < 0.3
    table = exchange_wanted(masks[2], rank_plan(plan, 2), Gathered(masks, 2))  # type: ignore[arg-type]
    for destination in range(5):
        assert torch.equal(table.of_rank(destination, slice(1, 3)), masks[destination, 1:3])
        for home in range(5):
            here = torch.from_numpy((plan.home == home) * plan.blocks.length)
            assert table.tokens()[destination, home].tolist() == (masks[destination] * here).sum(1).tolist()
    blocks = torch.tensor([3, 0, 17])
    assert torch.equal(table.of_blocks(blocks, slice(0, 2)), masks[:, :2, blocks])


def test_a_large_group_keeps_one_bit_per_pair() -> None:
    """128 ranks, 16M tokens in blocks of 128, 8 kv heads: 16 MiB kept from forward to backward."""
    plan = home_plan(SequenceLayout.zigzag([0, 16_000_000], 128), 128)
    mine = torch.zeros(8, len(plan.blocks), dtype=torch.bool)
    assert 128 * pack_bits(mine).numel() <= 16 << 20
