"""The table of kinds of faults names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_docs import names_of

ROOT = Path(__file__).parents[1]
ROWS = re.findall(r"^\| (\d+) \| (.*?) \| (.*) \| (.*?) ?\|$", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)


def test_every_kind_has_tests_that_exist() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, len(ROWS) + 1))
    for number, kind, tests, outcome in ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
        assert named, (number, kind)
        assert len(named) == tests.count("::"), (number, kind)
        for path, name in named:
            assert name in names_of(ROOT / path), f"{number}: {path}::{name}"
        assert outcome.startswith(("fails", "not there")), (number, outcome)
