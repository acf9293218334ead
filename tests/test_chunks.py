"""What is worked on together, by sizes alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moba_cp.chunks import (
    LEAST_CHUNK_BYTES,
    LONG_ROWS,
    MOST_KEPT_BYTES,
    estimated_workspace,
    least_chunk_of_ds,
    most_at_once,
    most_keeping_ds,
)
from moba_cp.config import DEFAULT_WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("of_head", "together", "rows", "expected"),
    [
        (0, 101, LONG_ROWS, 0),  # cannot be kept
        (50, 101, LONG_ROWS // 2, 2),  # partial results come in ranges anyway
        (50, 101, LONG_ROWS // 2 - 1, 0),  # two heads are not work enough
        (1, 101, LONG_ROWS // 8, 8),
        (14, 101, LONG_ROWS // 7 + 1, 4),  # seven fit, and are work enough: two ranges of four
        (25, 75, LONG_ROWS // 3 + 1, 3),  # partial results fit: no more memory than they take
        (25, 74, LONG_ROWS // 3 + 1, 0),
        (50, 100, LONG_ROWS, 2),
        (100, 50, LONG_ROWS, 1),  # memory doubles
        (50, 49, LONG_ROWS, 1),
        (101, 101, LONG_ROWS - 1, 0),  # chunks of rows would not be work enough
    ],
)
def test_heads_that_keep_gradients_of_scores(of_head: int, together: int, rows: int, expected: int) -> None:
    """With all their rows."""
    found = most_keeping_ds(lambda n: of_head * n // rows, together, 1, 8, rows, 100)
    assert found == (expected, rows if expected else 0)


def test_a_workspace_above_the_default_is_used_whole() -> None:
    """In ranges of nearly equal size, of all heads where rows are few."""
    whole, more = DEFAULT_WORKSPACE_BYTES // 8, DEFAULT_WORKSPACE_BYTES + 1

    def heads(kv_heads: int, rows: int, workspace: int) -> int:
        return most_keeping_ds(lambda n: whole * n // rows, 1, 1, kv_heads, rows, workspace)[0]

    assert heads(8, 8192, more) == 8
    assert heads(9, 8192, more) == 0
    assert heads(9, LONG_ROWS, more) == 5
    assert heads(8, 8192, DEFAULT_WORKSPACE_BYTES) == heads(8, LONG_ROWS, DEFAULT_WORKSPACE_BYTES) == 0


def chunk(whole: int, together: int, least: int = 0, partly: int = 0) -> int:
    """Rows per chunk of heads of `LONG_ROWS` rows with a workspace of 600,000 bytes."""
    heads, rows = most_keeping_ds(lambda n: partly + whole * n // LONG_ROWS, together, least, 8, LONG_ROWS, 600_000)
    assert heads == (rows > 0)
    return rows


def test_rows_of_a_head_that_does_not_fit_come_in_chunks() -> None:
    assert chunk(600_001, 10**6) == 50_048  # halves, at a multiple of 128
    assert chunk(1_200_000, 10**6) == 33_408  # halves that end at a multiple of 128 are too large
    assert chunk(600_001, 250_000) == 50_048  # memory doubles: 500,000 bytes
    assert chunk(600_001, 150_000) == 33_408  # 300,000 bytes
    assert chunk(10**9, 10**6) == 0  # not even 128 rows fit
    assert chunk(600_001, 10**6, partly=599_999) == 0


def test_chunks_take_more_bytes_than_adding_costs() -> None:
    size = 600_001 * 50_048 // LONG_ROWS
    assert chunk(600_001, 10**6, size) == 50_048
    assert chunk(600_001, 10**6, size + 1) == 0


def test_chunks_stay_below_what_places_can_count() -> None:
    """A head of any size comes in chunks, however large the workspace."""
    rows, whole = LONG_ROWS, 10 * MOST_KEPT_BYTES
    heads, chunk_rows = most_keeping_ds(lambda n: whole * n // rows, whole, 1, 8, rows, 20 * MOST_KEPT_BYTES)
    assert heads == 1
    assert MOST_KEPT_BYTES * 9 // 10 < whole * chunk_rows // rows <= MOST_KEPT_BYTES


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "block_size", "topk", "workspace", "keeps_ds", "kept", "sums"),
    [
        (16, 16, 512, 8, 5 << 28, False, 0, 0),
        (16, 16, 512, 8, 5 << 28, True, (8192 + 256) * 128 * 1024 + 4 * 8 * 131072, 0),
        (32, 8, 512, 8, 5 << 28, True, 5 << 28, 131072 * 256 * 4),
        (32, 8, 512, 8, 1 << 29, True, 1 << 29, 131072 * 256 * 4),  # too small to keep any: partial results in chunks
        (1, 1, 512, 8, 5 << 28, False, 0, 0),
    ],
)
def test_estimated_workspace(
    q_heads: int, kv_heads: int, block_size: int, topk: int, workspace: int, keeps_ds: bool, kept: int, sums: int
) -> None:
    """128K tokens, D 128. Estimates take the bound where partial results are more."""
    found = estimated_workspace(
        rows=131072, slots=topk, q_heads=q_heads, kv_heads=kv_heads, dim=128, block_size=block_size, slot_bytes=260,
        blocks=131072 // block_size, block_bytes=0, workspace_bytes=workspace, keeps_ds=keeps_ds,
    )  # fmt: skip
    assert found == max(kept, min(workspace, q_heads * topk * 131072 * 260)) + sums


def test_bytes_with_which_a_chunk_pays() -> None:
    assert least_chunk_of_ds(1 << 20, 256) == 2 * (1 << 20) * 256 * 4
    assert least_chunk_of_ds(1000, 256) == LEAST_CHUNK_BYTES


@given(
    *[st.integers(0, 1000)] * 2,
    st.integers(0, 100),
    st.integers(1, 16),
    st.integers(1, 2 * LONG_ROWS),
    st.integers(1, 1000),
)
def test_kept_gradients_of_scores_fit(
    per_row: int, together: int, least: int, kv_heads: int, rows: int, workspace: int
) -> None:
    def of_head(n: int) -> int:
        return per_row * (n + 100) // 500

    heads, together_rows = most_keeping_ds(of_head, together, least, kv_heads, rows, workspace)
    size = heads * of_head(together_rows)
    assert 0 <= heads <= kv_heads
    assert size <= workspace
    assert size <= max(workspace * (together > workspace), 2 * together)
    if heads and together_rows < rows:
        assert (heads, together_rows % 128) == (1, 0)
        assert size >= least
        assert rows >= LONG_ROWS


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


@given(*[st.integers(1, 1000)] * 3, st.integers(1, 8), st.integers(0, 100_000), st.integers(0, 1 << 20))
def test_bytes_of_a_kv_head_count_once(
    most: int, head_bytes: int, group: int, kv_heads: int, fixed: int, workspace: int
) -> None:
    """Whatever rows a chunk has. One kv head and 128 rows are worked on together even where they do not fit, and rows take at
    least half of the workspace."""
    per_range, per_chunk = most_at_once(most, kv_heads * group, kv_heads, head_bytes, workspace, fixed)
    taken = per_range * (fixed + min(most, per_chunk) * group * head_bytes)
    assert taken <= workspace or (per_range == 1 and (per_chunk == 128 or taken <= workspace // 2 + fixed))
    if not fixed:
        assert (per_range, per_chunk) == most_at_once(most, kv_heads * group, kv_heads, head_bytes, workspace)


def test_a_rank_without_rows_has_a_chunk() -> None:
    assert most_at_once(0, 4, 2, 1 << 20, 1) == (1, 128)
