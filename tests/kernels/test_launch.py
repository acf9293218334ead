"""Launches run the compiled kernel that Triton would run, with the same arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels import interpreter

pytest.importorskip("triton")
HELPER = str(Path(__file__).with_name("launching.py"))


@pytest.fixture(scope="module")
def found():
    return json.loads(interpreter.run_without_interpreter(HELPER))


def test_same_kernels_and_arguments(found):
    """Over dtypes, alignments, numbers that Triton specializes on, constants, options, grids, descriptors and devices; also where
    the table is too small for all of them."""
    rounds = found["rounds"]
    assert len(rounds) == 9
    for first in range(0, 9, 3):
        triton, once, again = rounds[first : first + 3]
        assert len(triton["launched"]) == found["cases"]
        assert once["launched"] == triton["launched"]
        assert again["launched"] == triton["launched"]
    stream = 3
    assert {launch[stream] for launch in rounds[0]["launched"]} == {1000}
    assert {launch[stream] for launch in rounds[3]["launched"]} == {1001}


def test_repeated_launches_are_not_left_to_triton(found):
    """Except those of unaligned tensors, which are three of the cases: one kind of tensor and three grids."""
    assert found["rounds"][0]["left"] == found["cases"]
    assert [found["rounds"][index]["left"] for index in (2, 5)] == [3, 3]


def test_kept_launches_are_bounded(found):
    assert found["rounds"][5]["kept"] > 4
    assert found["rounds"][8]["kept"] <= 4


def test_bound_launches_are_the_same(found):
    """Those of unaligned tensors are left to Triton. On another device, `launch_kernel` does it."""
    triton = found["rounds"][0]["launched"]
    others = found["rounds"][3]["launched"]
    for index, expected in ((0, triton), (1, triton), (2, others), (3, triton)):
        assert found["bound"][index]["launched"] == expected[: len(found["bound"][0]["launched"])]
    assert len(found["bound"][0]["launched"]) == found["cases"] - 3
    assert [found["bound"][index]["left"] for index in (1, 3)] == [3, 3]
