"""The kernels that make routing lists in shared memory compile, and their words are all that they keep there."""

from __future__ import annotations

import json

import pytest

from moba_cp.kernels import list_configs
from moba_cp.kernels.gpu import gpu_of_capability
from tests.kernels.interpreter import run_without_interpreter

pytest.importorskip("triton.experimental.gluon")
from tests.kernels import compile_lists

HOPPER = (9, 0)
CASES = [
    ["shared", n_blocks, slots, selection, entry, HOPPER]
    for n_blocks, slots, selection, entry in (
        (1024, 8, "*i16", "*i32"),
        (8192, 8, "*i16", "*i32"),
        (32, 12, "*i16", "*i64"),
        (4096, 64, "*i32", "*i32"),
        (1, 1, "*i16", "*i32"),
    )
]


@pytest.fixture(scope="module")
def built():
    return json.loads(run_without_interpreter(compile_lists.__file__, json.dumps(CASES)).splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(map(str, CASES[index])))
def test_nothing_but_words_in_shared_memory(built, index):
    """Scratch of the compiler's own would move the words from where `shared_words` expects them."""
    for kernel, usage in built[index].items():
        assert "text" not in usage, usage.get("text")
        assert usage["spill"] == 0, (kernel, usage)
        assert usage["shared"] == usage["words"] <= gpu_of_capability(HOPPER).shared_memory, (kernel, usage)


@pytest.mark.parametrize("slots", [1, 8, 12, 64])
def test_every_configuration_fits(slots):
    """Whatever the number of blocks, up to those that are left to sorting in registers."""
    gpu = gpu_of_capability(HOPPER)
    for n_blocks in (1, 33, 511, 1025, 3000, 5000, 8192):
        config = list_configs.shared_lists(n_blocks, slots, gpu)
        assert config is not None
        assert config.bins >= n_blocks
        assert config.width >= slots
        assert 4 * ((2 * config.tiles + 1) * config.bins + config.entries) <= gpu.shared_memory
        assert config.entries >= max(config.bins, 32 * config.tiles * config.width)
        assert (config.bins - 1).bit_length() + (config.entries - 1).bit_length() < 32, "a sorted entry is one word"
    assert list_configs.shared_lists(8193, slots, gpu) is None
    assert list_configs.shared_lists(8, 65, gpu) is None
    assert list_configs.shared_lists(8, slots, gpu_of_capability((8, 0))) is None
