"""The torch backend: the order of selection, complete routing lists, and results that do not depend on parts or chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moba_cp.kernels import KVPart, query_rows, torch_backend

ROUNDING = 1e-13  # fp64 sums of about ten terms in another order


def rows_of(lengths: list[int], block_size: int):
    """Query rows of packed documents, and the length of each block."""
    block, first, position, block_lengths = [], [], [], []
    for length in lengths:
        begin = len(block_lengths)
        block += [begin + t // block_size for t in range(length)]
        first += [begin] * length
        position += [t % block_size for t in range(length)]
        block_lengths += [min(block_size, length - b) for b in range(0, length, block_size)]
    rows = query_rows(np.array(block, dtype=int), np.array(first, dtype=int), np.array(position, dtype=int), "cpu")
    return rows, torch.tensor(block_lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 8, 17, 64, 128])
def test_equal_centroids_tie_at_every_size(dtype: torch.dtype, dim: int) -> None:
    """The rounding of a BLAS product may depend on position and size of the matrix; scores may not."""
    for n_blocks in (3, 7, 8, 13, 17, 33, 63, 130):
        for tokens in (1, 7, 33):
            generator = torch.Generator().manual_seed(n_blocks * tokens)
            centroids = torch.randn(1, 1, dim, generator=generator).to(dtype).repeat(n_blocks, 1, 1)
            q = torch.randn(tokens, 1, dim, generator=generator).to(dtype)
            rows = query_rows(np.full(tokens, n_blocks - 1), np.zeros(tokens), np.zeros(tokens), "cpu")
            selected = torch_backend.select_blocks(q, centroids=centroids, rows=rows, topk=3)
            assert (selected == torch.tensor([n_blocks - 3, n_blocks - 2, n_blocks - 1])).all(), (n_blocks, tokens)


def test_scores_do_not_depend_on_other_rows() -> None:
    """Centroids differ in the last bits of fp32, so that one bit decides. Rows alone, together and in any order."""
    generator = torch.Generator().manual_seed(0)
    q, centroids = (
        torch.randn(90, 2, 24, generator=generator),
        torch.randn(1, 1, 24, generator=generator).repeat(30, 1, 1),
    )
    centroids += torch.randn(30, 1, 24, generator=generator) * 1e-7
    rows, _ = rows_of([90], 3)
    whole = torch_backend.select_blocks(q, centroids=centroids, rows=rows, topk=5)
    order = torch.randperm(90, generator=generator)
    columns = (x[order].numpy() for x in (rows.block, rows.first_block, rows.position))
    shuffled = query_rows(*columns, "cpu")
    assert torch.equal(
        torch_backend.select_blocks(q[order], centroids=centroids, rows=shuffled, topk=5), whole[:, order]
    )
    for t in range(0, 90, 7):
        alone = torch_backend.select_blocks(q[t : t + 1], centroids=centroids, rows=rows.slice(t, t + 1), topk=5)
        assert torch.equal(alone, whole[:, t : t + 1])


def test_centroids_are_the_same_bits_whatever_the_strides() -> None:
    k = torch.randn(70, 3, 5, dtype=torch.float64)
    wide = torch.cat([k, torch.randn(70, 3, 4, dtype=torch.float64)], -1)[..., :5]
    heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    start = torch.arange(0, 70, 10, dtype=torch.int32)
    expected = torch_backend.centroids(k, start=start, block_size=10)
    for other in (wide, heads_first):
        assert torch.equal(torch_backend.centroids(other, start=start, block_size=10), expected)
    assert torch.equal(torch_backend.centroids(k[:, 1:2], start=start, block_size=10), expected[:, 1:2])
    assert torch.equal(torch_backend.centroids(k, start=start[3:4], block_size=10), expected[3:4])


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4), block_size=st.integers(1, 6), topk=st.integers(1, 5)
)
def test_lists_hold_every_selected_slot_once(lengths: list[int], block_size: int, topk: int) -> None:
    rows, block_lengths = rows_of(lengths, block_size)
    n_blocks, tokens = len(block_lengths), len(rows)
    q, centroids = torch.randn(tokens, 4, 3), torch.randn(n_blocks, 2, 3)
    selected = torch_backend.select_blocks(q, centroids=centroids, rows=rows, topk=topk)
    lists = torch_backend.route(selected, n_blocks=n_blocks, kv_heads=2, block_size=block_size)
    seen = set()
    for kv_head, block, columns in torch_backend.listed_bins(lists):
        for head, token, slot in zip(*(x.tolist() for x in columns), strict=True):
            assert head // 2 == kv_head
            assert selected[head, token, slot] == block
            seen.add((head, token, slot))
    assert seen == {tuple(i) for i in (selected >= 0).nonzero().tolist()}
    assert lists.pointer[-1] == len(seen)


def attended(q, k, v, rows, block_lengths, selected, parts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp with the blocks distributed over parts."""
    n_blocks = len(block_lengths)
    first_key = torch.cumsum(block_lengths, 0) - block_lengths
    lists = torch_backend.route(selected, n_blocks=n_blocks, kv_heads=k.shape[1], block_size=4)
    partials = torch_backend.new_partials(selected, v.shape[-1], q.dtype)
    for blocks in parts:
        start = torch.full((k.shape[1], n_blocks), -1, dtype=torch.int32)
        start[:, blocks] = first_key[blocks].to(torch.int32)
        part = KVPart(k, v, start, block_lengths)
        torch_backend.attend(q, part, lists, rows, 0.5, partials)
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), torch_backend.new_lse(q)
    torch_backend.merge(partials, selected=selected, out=out, lse=lse)
    return out, lse


def test_parts_and_chunks_do_not_change_the_result() -> None:
    rows, block_lengths = rows_of([23, 0, 18], 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(41, h, 6, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    n_blocks = len(block_lengths)
    centroids = torch.randn(n_blocks, 2, 6, generator=generator, dtype=torch.float64)
    selected = torch_backend.select_blocks(q, centroids=centroids, rows=rows, topk=3)
    everything = list(range(n_blocks))
    out, lse = attended(q, k, v, rows, block_lengths, selected, [everything])
    split = attended(q, k, v, rows, block_lengths, selected, [everything[1::2], [], everything[::2]])
    assert torch.equal(split[0], out)
    assert torch.equal(split[1], lse)
    for begin, end in ((0, 17), (17, 41)):
        part = attended(q[begin:end], k, v, rows.slice(begin, end), block_lengths, selected[:, begin:end], [everything])
        assert (part[0] - out[begin:end]).abs().max() < ROUNDING
        assert (part[1] - lse[:, begin:end]).abs().max() < ROUNDING
