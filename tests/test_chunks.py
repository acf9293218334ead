"""What is worked on together, by sizes alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moba_cp.chunks import LONG_ROWS, heads_that_keep_ds, most_at_once


@pytest.mark.parametrize(
    ("of_head", "together", "rows", "expected"),
    [
        (0, 101, LONG_ROWS, 0),  # cannot be kept
        (101, 101, LONG_ROWS, 0),  # do not fit
        (50, 101, LONG_ROWS // 2, 2),  # partial results come in ranges anyway
        (50, 101, LONG_ROWS // 2 - 1, 0),  # two heads are not work enough
        (1, 101, LONG_ROWS // 8, 8),
        (25, 75, LONG_ROWS // 3 + 1, 3),  # partial results fit: no more memory than they take
        (25, 74, LONG_ROWS // 3 + 1, 0),
        (50, 100, LONG_ROWS, 2),
        (100, 50, LONG_ROWS, 1),  # memory doubles
        (100, 49, LONG_ROWS, 0),
        (50, 49, LONG_ROWS, 1),
    ],
)
def test_heads_that_keep_gradients_of_scores(of_head: int, together: int, rows: int, expected: int) -> None:
    assert heads_that_keep_ds(of_head, together, 8, rows, 100) == expected


@given(*[st.integers(0, 1000)] * 2, st.integers(1, 16), st.integers(1, 2 * LONG_ROWS), st.integers(1, 1000))
def test_kept_gradients_of_scores_fit(of_head: int, together: int, kv_heads: int, rows: int, workspace: int) -> None:
    heads = heads_that_keep_ds(of_head, together, kv_heads, rows, workspace)
    assert 0 <= heads <= kv_heads
    assert heads * of_head <= workspace
    assert heads * of_head <= max(workspace * (together > workspace), 2 * together)
    assert heads <= heads_that_keep_ds(of_head, together, kv_heads, rows, workspace + 1)


@given(*[st.integers(1, 1000)] * 3, st.integers(1, 8), st.integers(1, 4))
def test_all_rows_that_fit_are_worked_on_together(
    most: int, head_bytes: int, more: int, kv_heads: int, group: int
) -> None:
    """Chunks end at multiples of 128 rows, but not where there is one only."""
    workspace = most * head_bytes * group + more
    per_range, per_chunk = most_at_once(most, kv_heads * group, kv_heads, head_bytes, workspace)
    assert per_range == min(kv_heads, workspace // (most * head_bytes * group))
    assert per_chunk >= most
    if most > 128:
        assert most_at_once(most, kv_heads * group, kv_heads, head_bytes, workspace - more - 1)[1] % 128 == 0


def test_a_rank_without_rows_has_a_chunk() -> None:
    assert most_at_once(0, 4, 2, 1 << 20, 1) == (1, 128)
