"""What is worked on together, by sizes alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moba_cp.chunks import LONG_ROWS, heads_that_keep_ds


@pytest.mark.parametrize(
    ("of_head", "together", "rows", "expected"),
    [
        (0, 101, LONG_ROWS, 0),  # cannot be kept
        (101, 101, LONG_ROWS, 0),  # do not fit
        (50, 101, 1, 2),  # partial results come in ranges anyway
        (30, 101, 1, 3),
        (1, 101, 1, 8),
        (50, 100, LONG_ROWS - 1, 0),  # partial results fit, and a head is not work enough
        (50, 100, LONG_ROWS, 2),
        (100, 50, LONG_ROWS, 1),  # memory doubles
        (100, 49, LONG_ROWS, 0),  # more than doubles
        (50, 49, LONG_ROWS, 0),
    ],
)
def test_heads_that_keep_gradients_of_scores(of_head: int, together: int, rows: int, expected: int) -> None:
    assert heads_that_keep_ds(of_head, together, 8, rows, 100) == expected


@given(*[st.integers(0, 1000)] * 2, st.integers(1, 16), st.sampled_from([1, LONG_ROWS]), st.integers(1, 1000))
def test_kept_gradients_of_scores_fit(of_head: int, together: int, kv_heads: int, rows: int, workspace: int) -> None:
    heads = heads_that_keep_ds(of_head, together, kv_heads, rows, workspace)
    assert 0 <= heads <= kv_heads
    assert heads * of_head <= workspace
    assert heads * of_head <= max(workspace * (together > workspace), 2 * together)
