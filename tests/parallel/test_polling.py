"""Ranks that wait for a late one ask the store less and less often."""

from __future__ import annotations

from itertools import accumulate, takewhile

import pytest

from moba_cp.parallel.notes import _pauses


@pytest.mark.parametrize(("longest", "most"), [(1.0, 16), (0.1, 105)])
def test_polls_of_ten_seconds(longest: float, most: int) -> None:
    """Polls every 20 ms would be 500. The first comes within 20 ms all the same."""
    pauses = list(takewhile(lambda time: time < 10, accumulate(_pauses(lambda: longest))))
    assert pauses[0] == 0.02
    assert len(pauses) <= most


def test_the_longest_pause_may_change_on_the_way() -> None:
    longest = [1.0]
    pauses = _pauses(lambda: longest[0])
    assert max(next(pauses) for _ in range(10)) == 1.0
    longest[0] = 0.1
    assert next(pauses) == 0.1
