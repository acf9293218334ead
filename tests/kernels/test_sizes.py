"""Host arithmetic on sizes equals Triton's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moba_cp.kernels import configs, gpu, sizes

triton = pytest.importorskip("triton")


def test_equal_to_triton():
    for n in [*range(300), 2**31 - 1, 2**31, 2**31 + 1, 2**40 + 1]:
        assert sizes.next_power_of_2(n) == triton.next_power_of_2(n), n
        assert [sizes.cdiv(n, d) for d in (1, 7, 64)] == [triton.cdiv(n, d) for d in (1, 7, 64)], n


def test_programs_for():
    """Full waves of programs with about `ITEMS_PER_PROGRAM` items each; no more programs than items, and one wave at least."""
    for resident in (1, 132, 264):
        for n_items in (1, 100, 264, 32 * resident - 1, 32 * resident, 7168, 131000, 2**22):
            programs = sizes.programs_for(n_items, resident)
            assert 1 <= programs <= n_items
            if n_items >= resident:
                assert programs % resident == 0
            assert sizes.cdiv(n_items, programs) <= sizes.MOST_ITEMS_PER_PROGRAM
            if programs > resident:
                assert sizes.ITEMS_PER_PROGRAM <= n_items / programs < 2 * sizes.ITEMS_PER_PROGRAM


def test_heads_at_once():
    """The largest power of two of kv heads whose rows fit, and at least one head."""
    for heads in (1, 2, 3, 7, 8, 16):
        for group in (1, 3, 4, 32):
            for q_bytes in (0, 1, 1 << 20, 2 << 20, 11 << 20, 32 << 20, 1 << 40):
                at_once = sizes.heads_at_once(heads, group, q_bytes)
                assert at_once & (at_once - 1) == 0
                fits = [
                    n
                    for n in (1, 2, 4, 8, 16)
                    if n <= heads
                    and 2 * n * q_bytes <= sizes.ROWS_AT_ONCE
                    and 2 * n * group * q_bytes <= sizes.GROUPS_AT_ONCE
                ]
                assert at_once == max(fits, default=1)
    row = 2 * 128  # bytes of one row of q, bf16
    assert [sizes.heads_at_once(16, 1, tokens * row) for tokens in (8192, 16384, 32768, 65536)] == [8, 4, 2, 1]
    assert [sizes.heads_at_once(8, 4, tokens * row) for tokens in (8192, 16384, 32768)] == [4, 2, 1]


def test_units_at_once():
    """As many as have 98,304 entries together, one to four."""
    of_bins = {1: 4, 24576: 4, 24577: 3, 32768: 3, 32769: 2, 49152: 2, 49153: 1, 1 << 30: 1}
    for entries, units in of_bins.items():
        assert sizes.units_at_once(7 * entries, 7) == units, entries
    assert sizes.units_at_once(0, 5) == 4
    assert sizes.units_at_once(0, 0) == 1


@given(st.integers(16, 2**62), st.integers(1, 2**21), st.sampled_from([64, 96, 128, 256]))
def test_a_block_larger_than_all_documents_takes_few_programs_of_the_same_kind(
    block_size: int, longest: int, dim: int
) -> None:
    taken = sizes.block_size_of_kernels(block_size, longest)
    assert min(longest, block_size) <= taken <= block_size
    assert taken < max(longest, sizes.LARGEST_CHOICE) + 128
    if block_size <= max(longest, sizes.LARGEST_CHOICE):
        assert taken == block_size
    for capability in ((8, 0), (8, 6), (9, 0)):
        of = gpu.gpu_of_capability(capability)
        for choose in (configs.backward, configs.hold_rows, configs.stream_rows):
            assert choose(dim, dim, taken, of) == choose(dim, dim, block_size, of)
    assert configs.sm90_dkdv(dim, taken) == configs.sm90_dkdv(dim, block_size)
    assert taken % 128 == block_size % 128
    assert sizes.sums_dq(taken, dim, 7) == sizes.sums_dq(block_size, dim, 7)
    assert sizes.can_keep_ds(taken) == sizes.can_keep_ds(block_size)
