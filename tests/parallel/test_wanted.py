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
from moba_cp.parallel.cost import visible_tokens
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
    expected = torch.zeros(5, 5, 3, dtype=torch.int64)  # [destination, home, Hkv]
    for home in range(5):
        expected[:, home] = (masks * torch.from_numpy((plan.home == home) * plan.blocks.length)).sum(2)
    for rank in range(5):
        table = exchange_wanted(masks[rank], rank_plan(plan, rank), Gathered(masks, rank))  # type: ignore[arg-type]
        sent, received = table.tokens()
        assert sent.tolist() == expected[:, rank].tolist()
        assert received.tolist() == expected[rank].tolist()
        remote = expected.sum(2).fill_diagonal_(0).sum(1)
        assert table.remote_tokens().tolist() == remote.tolist()
        for destination in range(5):
            assert torch.equal(table.of_rank(destination), masks[destination])
        blocks = torch.tensor([3, 0, 17])
        assert torch.equal(table.of_blocks(blocks), masks[:, :, blocks])


def test_a_large_group_keeps_one_bit_per_pair() -> None:
    """128 ranks, 16M tokens in blocks of 128, 8 kv heads: 16 MiB kept from forward to backward."""
    plan = home_plan(SequenceLayout.zigzag([0, 16_000_000], 128), 128)
    mine = torch.zeros(8, len(plan.blocks), dtype=torch.bool)
    assert 128 * pack_bits(mine).numel() <= 16 << 20


def test_no_rank_counts_what_grows_with_the_square_of_the_group() -> None:
    """What goes to the host is two rows of P x Hkv; P x P x Hkv would be 1 GiB for 4,096 ranks and 8 kv heads."""
    plan = home_plan(SequenceLayout.contiguous([0, 512 * 4], 512), 4)
    masks = torch.zeros(512, 8, 512, dtype=torch.bool)
    masks[5, 3, :4] = True
    table = exchange_wanted(masks[5], rank_plan(plan, 5), Gathered(masks, 5))  # type: ignore[arg-type]
    sent, received = table.tokens()
    assert sent.shape == received.shape == (512, 8)
    assert (int(sent.sum()), int(received.sum())) == (0, 16)
    assert table.remote_tokens()[5] == 16
    assert visible_tokens(plan, 5).nbytes == 8 * 512
