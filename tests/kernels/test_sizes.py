"""Host arithmetic on sizes equals Triton's."""

from __future__ import annotations

import pytest

from moba_cp.kernels import sizes

triton = pytest.importorskip("triton")


def test_equal_to_triton():
    for n in [*range(300), 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 1]:
        assert sizes.next_power_of_2(n) == triton.next_power_of_2(n), n
        assert [sizes.cdiv(n, d) for d in (1, 7, 64)] == [triton.cdiv(n, d) for d in (1, 7, 64)], n
