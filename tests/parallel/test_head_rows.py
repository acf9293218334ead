"""Heads put together by member, and put back: torch and the Triton kernel against an index per head, targets poisoned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moba_cp.parallel.head_rows import put_heads, take_heads
from tests.kernels import interpreter

CASES = [
    # tokens, members, heads of a member, first and number of those that travel, copies, width
    (5, 2, 4, 0, 4, 1, 8),
    (7, 2, 3, 1, 2, 1, 5),
    (0, 2, 2, 0, 2, 1, 8),
    (300, 3, 2, 1, 1, 1, 64),  # several tiles
    (9, 4, 1, 0, 1, 4, 8),  # one kv head for all members
    (9, 3, 2, 0, 2, 3, 8),  # two kv heads, of which member 1 has one each
    (9, 3, 2, 1, 1, 3, 8),
    (300, 2, 4, 1, 2, 1, 1),  # one number per row and head
]
DTYPES = [torch.float32, torch.int32, torch.float16]


def take(x: Tensor, packed: Tensor, first: int, per_member: int, copies: int, kernel: bool) -> None:
    if kernel:
        from moba_cp.parallel import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, copies, puts=False)
    else:
        take_heads(x, packed.shape[0], first, packed.shape[2], per_member, copies, packed)


def put(packed: Tensor, x: Tensor, first: int, per_member: int, kernel: bool) -> None:
    if kernel:
        from moba_cp.parallel import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, 1, puts=True)
    else:
        put_heads(packed, x, first, per_member)


def check(case: tuple[int, ...], dtype: torch.dtype, device: str, kernel: bool) -> None:
    tokens, size, per_member, first, count, copies, width = case
    heads = size * per_member // copies
    values = torch.randint(-1000, 1000, (tokens, heads + 2, width), generator=torch.Generator().manual_seed(tokens))
    x = values.to(dtype).to(device)[:, 1 : heads + 1]  # heads cut out of a wider tensor
    if width == 1:  # as deltas are: head by head
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    packed = torch.full((size, tokens, count, width), 7777, dtype=dtype, device=device)
    take(x, packed, first, per_member, copies, kernel)
    for member in range(size):
        for j in range(count):
            assert torch.equal(packed[member, :, j], x[:, (member * per_member + first + j) // copies])
    if copies == 1:
        target = torch.full((tokens, heads, width), 7777, dtype=dtype, device=device)
        put(packed, target, first, per_member, kernel)
        for head in range(heads):
            travelled = first <= head % per_member < first + count
            expected = x[:, head] if travelled else torch.full_like(x[:, head], 7777)
            assert torch.equal(target[:, head], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(case, dtype, "cpu", kernel=False)


@interpreter.interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_interpreted(case: tuple[int, ...], dtype: torch.dtype) -> None:
    check(case, dtype, "cpu", kernel=True)


def test_in_interpreter() -> None:
    interpreter.run_module(__file__)


class TestOnGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", [*CASES, (4000, 2, 8, 2, 4, 1, 128)], ids=str)
    def test_kernel(self, case: tuple[int, ...], dtype: torch.dtype) -> None:
        check(case, dtype, "cuda", kernel=True)


def test_rows_that_do_not_stand_one_behind_another_are_refused() -> None:
    x, packed = torch.zeros(3, 4, 8), torch.zeros(2, 3, 2, 16)[..., :8]
    with pytest.raises(ValueError, match=r"packed must be contiguous, got shape \(2, 3, 2, 8\)"):
        put_heads(packed, x, 0, 2)
    with pytest.raises(ValueError, match="packed must be contiguous"):
        take_heads(x, 2, 0, 2, 2, packed=packed)
