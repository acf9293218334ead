"""The attention function under context parallelism; in its own file, since ranks import it, and models take long to import."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("transformers")
from moba_cp import SequenceLayout
from moba_cp.transformers.attention import _are_as_in_documents, moba_attention_forward
from tests.ranks import run_ranks
from tests.transformers.packed import ENDS, POSITIONS, TOKENS


class Layer(torch.nn.Module):
    """What the attention function reads of an attention module."""

    def __init__(self, index: int) -> None:
        super().__init__()
        settings = {"block_size": 4, "topk": 3, "layer_pattern": [1, 0]}
        self.config, self.layer_idx = SimpleNamespace(num_hidden_layers=2, moba=settings), index


def attended_on_rank(rank: int, world_size: int, q: Tensor, k: Tensor, v: Tensor, index: int) -> tuple[Tensor, ...]:
    """Output and gradients of the rank's tokens."""
    layout = SequenceLayout.zigzag(ENDS, world_size)
    here = [layout.shard(x, rank, dim=2).requires_grad_() for x in (q, k, v)]
    group = dist.group.WORLD
    out, _ = moba_attention_forward(Layer(index), *here, None, scaling=0.3, moba_layout=layout, moba_group=group)
    out.square().sum().backward()
    return out.detach(), *(x.grad for x in here)


@pytest.mark.parametrize("index", [0, 1], ids=["moba", "full"])
def test_context_parallelism(index: int) -> None:
    """A layout as an argument: outputs and gradients of one process that holds all tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, TOKENS, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    ranks = run_ranks(2, attended_on_rank, q, k, v, index)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = moba_attention_forward(Layer(index), *leaves, None, scaling=0.3, position_ids=POSITIONS)
    out.square().sum().backward()
    layout = SequenceLayout.zigzag(ENDS, 2)
    expected = (out, *(x.grad for x in leaves))
    for number, whole_tensor in enumerate(expected):
        together = layout.unshard([part[number] for part in ranks], dim=2 if number else 1)
        torch.testing.assert_close(together, whole_tensor, rtol=1e-12, atol=1e-12)


ALONE = {
    "no dropout, got 0.1": {"dropout": 0.1},
    "no softcap, got 30": {"softcap": 30},
    "give cu_seq_lens or moba_layout, not both": {"cu_seq_lens_q": torch.tensor([0, 4])},
    "one sample without padding and without a cache": {"attention_mask": torch.zeros(1, 1, 4, 4)},
    "needs position_ids of this rank's tokens, .* rank 1 got 0 to 3, which are not those of SequenceLayout": {
        "position_ids": torch.arange(4)[None]
    },
}


@pytest.mark.parametrize(
    ("layout", "rank", "taken"),
    [
        (SequenceLayout.contiguous([0, 8], 1), 0, True),
        (
            SequenceLayout.contiguous([0, 3, 8], 1),
            0,
            True,
        ),  # documents that are whole: positions count from another token
        (SequenceLayout.contiguous([0, 8], 2), 0, True),
        (SequenceLayout.contiguous([0, 8], 2), 1, False),
        (SequenceLayout.contiguous([0, 4, 8], 2), 1, True),
        (SequenceLayout.zigzag([0, 8], 2), 0, False),
        (SequenceLayout.from_runs([[(3, 4), (0, 2)], [(2, 3), (4, 8)]], [0, 2, 8]), 0, False),
        (SequenceLayout.from_runs([[(0, 8)], []], [0, 8]), 1, True),
    ],
)
def test_which_default_positions_are_right(layout: SequenceLayout, rank: int, taken: bool) -> None:
    """A model makes 0, 1, ... where it is given none. Rotary embedding knows distances only."""
    assert _are_as_in_documents(np.arange(layout.local_tokens(rank)), layout, rank) is taken


def refused_on_ranks(rank: int, world_size: int) -> list[str]:
    """What a rank is told where rank 1 alone passes something that is refused, and whether the group works on."""
    layout, x = SequenceLayout.contiguous([0, 8], world_size), torch.ones(1, 2, 4, 8, dtype=torch.float64)
    told = []
    for bad in ALONE.values():
        call = {"attention_mask": None, "moba_layout": layout} | (bad if rank == 1 else {})
        with pytest.raises(ValueError) as refused:
            moba_attention_forward(Layer(0), x, x, x, **call)
        told.append(str(refused.value))
    out, _ = moba_attention_forward(Layer(0), x, x, x, None, moba_layout=layout)
    return [*told, f"{out.sum().item():g}"]


def test_what_one_rank_refuses_ends_the_others_too() -> None:
    for told in run_ranks(2, refused_on_ranks):
        assert told.pop() == "64"
        assert all(re.search(text, message) for text, message in zip(ALONE, told, strict=True)), told
