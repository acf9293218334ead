"""Forward of block attention, the Hopper kernel: against plain torch and the portable kernels, and its bits."""

import pytest
import torch

from moba_cp.kernels import configs, forward, hopper_forward
from tests.kernels.forward_cases import fetched, make_case, relative, without
from tests.kernels.interpreter import gpu
from tests.kernels.test_forward import assert_matches, assert_same_bits, attend

pytestmark = gpu
CASES = {
    "block 192": {"lengths": [2000, 100], "block_size": 192, "topk": 3, "q_heads": 4, "kv_heads": 2},
    "block 256": {"lengths": [4000], "block_size": 256, "topk": 5, "q_heads": 2, "kv_heads": 2},
    "block 320, D 64": {"lengths": [3000, 1], "block_size": 320, "topk": 4, "q_heads": 4, "kv_heads": 1, "dim": 64},
    "block 512": {"lengths": [9000, 513], "block_size": 512, "topk": 8, "q_heads": 2, "kv_heads": 2},
    "block 512, MQA": {"lengths": [5000], "block_size": 512, "topk": 4, "q_heads": 8, "kv_heads": 1},
    "block 512, many short documents": {"lengths": [3] * 200, "block_size": 512, "topk": 2, "q_heads": 2},
    "block 4096": {"lengths": [17000], "block_size": 4096, "topk": 3, "q_heads": 2, "kv_heads": 1},
    "topk 1": {"lengths": [3000], "block_size": 512, "topk": 1, "q_heads": 2},
    "one token": {"lengths": [1], "block_size": 512, "topk": 2},
    "strided": {"lengths": [3000], "block_size": 512, "topk": 3, "q_heads": 4, "kv_heads": 2, "strided": True},
    "hot": {"lengths": [20000], "block_size": 256, "topk": 3, "hot": True},
    "cold": {"lengths": [3000], "block_size": 256, "topk": 3, "cold": True},
    "zigzag": {"lengths": [5000], "block_size": 512, "topk": 4, "order": "zigzag"},
    "shuffled": {"lengths": [3000], "block_size": 192, "topk": 4, "order": "shuffled"},
    "negative scale": {"lengths": [3000], "block_size": 256, "topk": 4, "scale": -0.1},
    "scale 0": {"lengths": [3000], "block_size": 256, "topk": 4, "scale": 0.0},
}  # fmt: skip


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


def case_of(dtype=torch.bfloat16, **settings):
    return make_case(**({"device": "cuda", "dim": 128, "dtype": dtype} | settings))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_torch_and_portable(name, dtype):
    case = case_of(dtype, **CASES[name])
    assert hopper_forward.supported(case.q, case.part, case.lists())
    assert_matches(case, tolerance=5e-3, path="hopper")
    found, portable = attend(case, path="hopper"), attend(case, path="portable")
    # The same products, rounded to the inputs' dtype at the same places; sums in another order.
    assert relative(found.out, portable.out) < (4e-3 if dtype == torch.bfloat16 else 1e-3)
    assert relative(found.lse, portable.lse) < 1e-5


@pytest.mark.parametrize("every", [2, 7])
def test_parts(every):
    """Items whose block is in another part lie between those to be done: one in `every`, then all the others."""
    case = case_of(lengths=[9000], block_size=256, topk=4, kv_heads=2, q_heads=4)
    whole = fetched(case.part)
    kept = torch.zeros(whole.start.numel(), dtype=torch.bool)
    kept[::every] = True
    one, others = without(whole, ~kept), without(whole, kept)
    assert_matches(case, one, tolerance=5e-3, path="hopper")
    at_once, by_parts = attend(case, path="hopper"), case.poisoned_partials()
    attend(case, one, by_parts, path="hopper")
    attend(case, others, by_parts, path="hopper")
    assert_same_bits(at_once, by_parts)


def test_one_pair_alone():
    case = case_of(lengths=[30000], block_size=256, topk=4, kv_heads=2, q_heads=2)
    for pair in (0, 117, 118, case.part.start.numel() - 1):
        kept = torch.ones(case.part.start.numel(), dtype=torch.bool)
        kept[pair] = False
        assert_matches(case, without(case.part, kept), tolerance=5e-3, path="hopper")


@pytest.mark.parametrize("block_size", [192, 256, 512])
def test_bits_do_not_depend_on_the_launch(block_size):
    """How early tiles and rows are copied, and with how many programs, changes no bit."""
    case = case_of(lengths=[20000], block_size=block_size, topk=4, q_heads=4, kv_heads=2)
    first, lists = attend(case, path="hopper"), case.lists()
    shipped = hopper_forward.constants(128, block_size)
    for change in ({"AHEAD": 1}, {"CHUNK": 32}, {"CHUNK": 128}, {"AHEAD": 1, "CHUNK": 32}):
        partials = case.poisoned_partials()
        scale = forward._scores_scale(case.scale)
        rest = (case.rows, case.selected, *scale, partials, shipped | change)
        hopper_forward.attend(case.q, case.part, lists, *rest)
        assert_same_bits(first, partials)


def test_nan_key_shows_only_in_rows_that_see_it():
    case = case_of(lengths=[1100], block_size=512, topk=3)
    case.part.k[512 + 3] = float("nan")  # block 1
    partials = attend(case, path="hopper")
    sees = (case.selected == 1) & ((case.rows.block != 1) | (case.rows.position >= 3))[None, :, None]
    wrong = partials.out.isnan().all(-1) != (sees | (case.selected < 0))
    assert not wrong.any(), wrong.nonzero()[:5]


def test_other_sizes_take_the_portable_path():
    for settings in ({"dim": 96}, {"dim": 128, "dim_v": 64}, {"dim": 256}, {"block_size": 520}, {"block_size": 128}):
        case = case_of(**({"lengths": [1500], "block_size": 512, "topk": 2} | settings))
        assert not hopper_forward.supported(case.q, case.part, case.lists())
        assert_matches(case, tolerance=5e-3)
    with pytest.raises(ValueError, match="nonsense"):
        attend(case, path="nonsense")
    assert configs.capability(case.q.device) == (9, 0)
