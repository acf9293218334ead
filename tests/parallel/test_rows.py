"""Copying and adding rows of wanted blocks, and of pairs in messages: torch and the Triton kernels against loops, targets
poisoned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moba_cp.parallel import rows
from tests.kernels import interpreter

CASES = [
    # lengths of all blocks, which of them are here, kv heads, width, block size
    ([5, 5, 5, 3], [0, 2, 3], 2, 12, 5),
    ([7, 7, 2], [1], 1, 24, 7),
    ([4, 4], [], 3, 16, 4),
    ([300, 300, 17], [0, 2], 1, 256, 300),  # several tiles per block
]


def make(case: tuple, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """source (heads cut out of a wider tensor), wanted, start, length; unwanted rows of the source are NaN."""
    lengths, here, heads, width, _ = case
    generator = torch.Generator().manual_seed(len(lengths))
    start = torch.full((len(lengths),), -1, dtype=torch.int32)
    tokens = 0
    for block in here:
        start[block] = tokens
        tokens += lengths[block]
    wanted = (torch.rand(heads + 1, len(lengths), generator=generator) < 0.6).to(torch.uint8)[1:]
    source = torch.randn(tokens, heads + 2, width, generator=generator).to(dtype)[:, 1 : heads + 1]
    for head in range(heads):
        for block in here:
            if not wanted[head, block]:
                source[start[block] : start[block] + lengths[block], head] = float("nan")
    return tuple(x.to(device) for x in (source, wanted, start, torch.tensor(lengths)))


def expected(case: tuple, source: Tensor, wanted: Tensor, start: Tensor, before: Tensor, adds: bool) -> Tensor:
    result = before.clone()
    for head in range(wanted.shape[0]):
        for block in case[1]:
            if wanted[head, block]:
                at = slice(int(start[block]), int(start[block]) + case[0][block])
                result[at, head] = source[at, head] + (before[at, head] if adds else 0)
    return result


def check(case: tuple, dtype: torch.dtype, device: str, kernel: bool) -> None:
    source, wanted, start, length = make(case, dtype, device)
    block_size = case[4]

    def run(target: Tensor, adds: bool, first: bool) -> None:
        if kernel:
            from moba_cp.parallel import rows_kernel

            rows_kernel.launch(source, target, wanted, start, length, block_size, adds, first)
        elif adds:
            rows.add_wanted(source, target, wanted, start, length, block_size, first)
        else:
            rows.copy_wanted(source, target, wanted, start, length, block_size)

    poisoned = torch.full(source.shape, float("nan"), dtype=dtype, device=device)
    copied = poisoned.clone()
    run(copied, adds=False, first=False)
    torch.testing.assert_close(
        copied, expected(case, source, wanted, start, poisoned, False), rtol=0, atol=0, equal_nan=True
    )
    total = poisoned.clone()
    run(total, adds=True, first=True)
    once = expected(case, source, wanted, start, torch.zeros_like(poisoned), True)
    assert torch.equal(total, once)
    run(total, adds=True, first=False)
    assert torch.equal(total, expected(case, source, wanted, start, once, True))


PACKED = [(5, 2, 8, 12), (0, 2, 8, 8), (67, 3, 24, 40), (130, 1, 128, 128)]


def check_pack(tokens: int, heads: int, dim: int, dim_v: int, device: str, kernel: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    k, v = (
        torch.randn(tokens, heads + 2, n, generator=generator).to(torch.float16).to(device)[:, 1 : heads + 1]
        for n in (dim, dim_v)
    )
    packed = torch.full((tokens + 1, heads, dim + dim_v), float("nan"), dtype=k.dtype, device=device)
    if kernel:
        from moba_cp.parallel import rows_kernel

        rows_kernel.pack(k, v, packed[:tokens])
    else:
        rows.pack(k, v, packed[:tokens])
    assert torch.equal(packed[:tokens, :, :dim], k)
    assert torch.equal(packed[:tokens, :, dim:], v)
    assert packed[tokens:].isnan().all()


PAIRS = [
    # lengths of home blocks, ranks, kv heads, D, Dv, block size, share of pairs in the message
    ([5, 5, 3], 3, 2, 8, 12, 5, 0.6),
    ([70, 70, 1], 2, 3, 24, 40, 70, 0.5),  # several tiles per block where they are summed
    ([4], 4, 1, 8, 8, 4, 1.0),
    ([6, 6], 3, 2, 8, 8, 6, 0.0),
    ([130, 90], 2, 1, 128, 64, 130, 1.0),
]


def make_pairs(lengths: list[int], ranks: int, heads: int, block_size: int, share: float, device: str) -> tuple:
    """Pairs that lie in the message in any order, with poisoned rows between them, and its rows."""
    generator = torch.Generator().manual_seed(ranks + heads)
    at = torch.full((ranks, heads + 1, len(lengths)), -1)[:, 1:]
    chosen = (torch.rand(at.shape, generator=generator) < share).nonzero()
    size = 0
    for rank, head, block in chosen[torch.randperm(len(chosen), generator=generator)].tolist():
        at[rank, head, block] = size
        size += lengths[block]
    length = torch.tensor(lengths)
    pairs = rows.Pairs(at.to(device), (length.cumsum(0) - length).to(device), length.to(device), block_size)
    return pairs, size


def check_pairs(case: tuple, dtype: torch.dtype, device: str, kernel: bool) -> None:
    lengths, ranks, heads, dim, dim_v, block_size, share = case
    pairs, size = make_pairs(lengths, ranks, heads, block_size, share, device)
    generator = torch.Generator().manual_seed(size)
    tokens = sum(lengths)
    k, v = (
        torch.randn(tokens, heads + 2, n, generator=generator).to(dtype).to(device)[:, 1 : heads + 1]
        for n in (dim, dim_v)
    )
    message = torch.full((size, dim + dim_v), float("nan"), dtype=dtype, device=device)
    sums = [x.clone(memory_format=torch.contiguous_format) for x in (k, v)]
    values = torch.randn(size, dim + dim_v, generator=generator).to(dtype).to(device)
    if kernel:
        from moba_cp.parallel import rows_kernel

        rows_kernel.pack_pairs(k, v, pairs, message)
        rows_kernel.add_pairs(values, pairs, *sums)
    else:
        message = rows.pack_pairs(k, v, pairs, size)
        rows.add_pairs(values, pairs, *sums)
    expected, total = torch.full_like(message, float("nan")), [x.clone() for x in (k, v)]
    for rank in range(ranks):
        for head in range(heads):
            for block, n in enumerate(lengths):
                row, token = int(pairs.at[rank, head, block]), int(pairs.begin[block])
                if row < 0:
                    continue
                here = slice(token, token + n)
                expected[row : row + n] = torch.cat([k[here, head], v[here, head]], dim=1)
                total[0][here, head] += values[row : row + n, :dim]
                total[1][here, head] += values[row : row + n, dim:]
    assert torch.equal(message, expected)
    assert torch.equal(sums[0], total[0])
    assert torch.equal(sums[1], total[1])


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs(case: tuple) -> None:
    check_pairs(case, torch.float64, "cpu", kernel=False)


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs_interpreted(case: tuple, dtype: torch.dtype) -> None:
    check_pairs(case, dtype, "cpu", kernel=True)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_pack(case: tuple[int, ...]) -> None:
    check_pack(*case, "cpu", kernel=False)


@interpreter.interpreted
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_pack_interpreted(case: tuple[int, ...]) -> None:
    check_pack(*case, "cpu", kernel=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch(case: tuple) -> None:
    check(case, torch.float64, "cpu", kernel=False)


@interpreter.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_interpreted(case: tuple, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu", kernel=True)


def test_in_interpreter() -> None:
    interpreter.run_module(__file__)


class TestOnGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_kernel(self, case: tuple, dtype: torch.dtype) -> None:
        check(case, dtype, "cuda", kernel=True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("case", [*PAIRS, ([512] * 700 + [9], 5, 2, 128, 128, 512, 0.4)], ids=lambda x: str(x)[:40])
    def test_pairs(self, case: tuple, dtype: torch.dtype) -> None:
        check_pairs(case, dtype, "cuda", kernel=True)

    def test_heads_may_be_the_outermost_dimension(self) -> None:
        """Heads that lie more than 2^31 elements from the first."""
        memory = torch.zeros((1 << 31) + (1 << 13), dtype=torch.bfloat16, device="cuda")
        k = memory.as_strided((64, 3, 128), (128, 1 << 30, 1))
        k[:, 2] = torch.randn(64, 128, device="cuda")
        at = torch.tensor([[[-1], [-1], [0]]], device="cuda")
        pairs = rows.Pairs(at, torch.zeros_like(at[0, 0]), torch.full_like(at[0, 0], 64), 64)
        message = rows.pack_pairs(k, k, pairs, 64)
        assert torch.equal(message, torch.cat([k[:, 2], k[:, 2]], dim=1))

    @pytest.mark.parametrize("case", [*PACKED, (4000, 8, 128, 64)], ids=str)
    def test_pack(self, case: tuple[int, ...]) -> None:
        check_pack(*case, "cuda", kernel=True)
