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
]
DTYPES = [torch.float32, torch.int32, torch.float16]


def take(x: Tensor, packed: Tensor, first: int, per_member: int, copies: int, skip: int | None, kernel: bool) -> None:
    if kernel:
        from moba_cp.parallel import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, copies, skip, puts=False)
    else:
        size = packed.shape[0] + (skip is not None)
        take_heads(x, size, first, packed.shape[2], per_member, copies, packed, skip)


def put(packed: Tensor, x: Tensor, first: int, per_member: int, skip: int | None, kernel: bool) -> None:
    if kernel:
        from moba_cp.parallel import head_rows_kernel

        head_rows_kernel.launch(x, packed, first, per_member, 1, skip, puts=True)
    else:
        put_heads(packed, x, first, per_member, skip)


def check(case: tuple[int, ...], dtype: torch.dtype, device: str, kernel: bool) -> None:
    tokens, size, per_member, first, count, copies, width = case
    heads = size * per_member // copies
    values = torch.randint(-1000, 1000, (tokens, heads + 2, width), generator=torch.Generator().manual_seed(tokens))
    x = values.to(dtype).to(device)[:, 1 : heads + 1]  # heads cut out of a wider tensor
    for skip in (None, 0, size - 1):
        members = [member for member in range(size) if member != skip]
        packed = torch.full((len(members), tokens, count, width), 7777, dtype=dtype, device=device)
        take(x, packed, first, per_member, copies, skip, kernel)
        for slot, member in enumerate(members):
            for j in range(count):
                assert torch.equal(packed[slot, :, j], x[:, (member * per_member + first + j) // copies])
        if copies > 1:
            continue
        target = torch.full((tokens, heads, width), 7777, dtype=dtype, device=device)
        put(packed, target, first, per_member, skip, kernel)
        for head in range(heads):
            travelled = head // per_member in members and first <= head % per_member < first + count
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
