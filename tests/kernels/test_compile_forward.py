"""Every shipped configuration of the forward compiles for its GPU, fits in shared memory, and spills little or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kernels import interpreter

triton = pytest.importorskip("triton")
HELPER = str(Path(__file__).with_name("compile_forward.py"))
KIB = {(8, 0): 163, (8, 9): 99, (9, 0): 227}


def heavy(cases):
    """More of the same kind: where Triton has cached none, each takes seconds."""
    return pytest.param(cases, marks=pytest.mark.heavy)


def build(cases):
    return json.loads(interpreter.run_without_interpreter(HELPER, json.dumps(cases)))


def check(cases, most_spilled, most_spilled_own=0):
    for case, kernels in zip(cases, build(cases), strict=True):
        for name, used in kernels.items():
            assert name != "error", (case, used)
            most = max(most_spilled, most_spilled_own) if name == "own" else most_spilled
            assert used["spill"] <= most, (case, name, used)
            assert used["shared"] <= KIB[tuple(case[-1])] * 1024, (case, name, used)


ATTEND = [["attend", 128, 128, block, "bf16", [9, 0]] for block in (128, 512)]
ATTEND += [["attend", 96, 96, 512, "fp16", [9, 0]], ["attend", 192, 192, 128, "bf16", [9, 0]]]
ATTEND_HEAVY = [["attend", 128, 128, block, "bf16", [9, 0]] for block in (16, 64, 100, 520, 4096)]
ATTEND_HEAVY += [
    ["attend", *dims, block, "bf16", [9, 0]] for dims in ((64, 64), (192, 128), (256, 256)) for block in (128, 512)
]


@pytest.mark.parametrize("cases", [ATTEND, heavy(ATTEND_HEAVY)])
def test_hopper_attend(cases):
    """`hold_rows_kernel` may spill 8 bytes: one register kept across its loop, written and read once per program.

    `own_blocks_kernel` may spill 20 registers across its loop over unmasked tiles; some are read again on the diagonal.
    """
    check(cases, 8, most_spilled_own=80)


@pytest.mark.parametrize(
    "sizes", [((128, 128), (128, 512)), heavy(((64, 128), (64, 64), (128, 4096), (64, 192)))], ids=str
)
def test_hopper_gluon(sizes):
    """No spills, and ptxas does not run asynchronous products one after another ("serialised")."""
    cases = [["attend", dim, dim, block, "fp16", [9, 0]] for dim, block in sizes]
    for case, kernels in zip(cases, build(cases), strict=True):
        used = {name: usage for name, usage in kernels.items() if name.startswith("hopper")}
        assert len(used) == (1 if case[3] <= 128 else 2)
        assert not any(usage["spill"] or usage["serialised"] for usage in used.values()), (case, used)


@pytest.mark.parametrize("sizes", [((128, 128), (128, 512)), heavy(((64, 128), (64, 64), (128, 4096)))], ids=str)
def test_hopper_gluon_in_turns_and_without_groups(sizes):
    """Kv heads that take turns, and a group of 1, which Triton compiles as a constant: no spills, nothing serialised."""
    cases = [["launched", dim, block, "bf16", [9, 0]] for dim, block in sizes]
    for case, kernels in zip(cases, build(cases), strict=True):
        assert len(kernels) == (3 if case[2] <= 128 else 2), kernels
        assert not any(usage["spill"] or usage["serialised"] for usage in kernels.values()), (case, kernels)


def test_hopper_merge():
    most = 0 if triton.__version__.startswith("3.6.") else 8  # Triton 3.7 spills two registers at D = 96
    check([["merge", dim, 8, "bf16", [9, 0]] for dim in (64, 96, 128, 192, 256)], most)


def test_two_programs_a_multiprocessor():
    """D = 128 is fast because registers and shared memory suffice for two programs of four warps per multiprocessor."""
    for kernels in build([["attend", 128, 128, block, "bf16", [9, 0]] for block in (64, 512)]):
        for used in kernels.values():
            assert used["registers"] <= 255
            assert 2 * (used["shared"] + 1024) <= 228 * 1024


@pytest.mark.parametrize("dims", [(128, 128), heavy((256, 256))], ids=str)
def test_ampere_and_ada(dims):
    cases = [["attend", *dims, block, "bf16", gpu] for gpu in ([8, 0], [8, 9]) for block in (128, 512)]
    cases += [["merge", 128, 8, "fp16", [8, 0]]]
    check(cases, 400)
