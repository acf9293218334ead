"""Backward of block attention, Hopper kernels: results equal plain torch's and the portable kernels'. Timings: -s -k timing."""

import pytest
import torch

from moba_cp.kernels import backward, dispatch, lists, merge, sizes, triton_backend
from moba_cp.kernels.backward import segments
from moba_cp.kernels.types import DqPartials, KVPart
from tests.kernels.backward_cases import Case, document_rows, make_case, relative, written_slots
from tests.kernels.interpreter import gpu
from tests.kernels.test_backward import check, run

pytestmark = gpu
CASES = {
    "block 128": {"lengths": [3000, 1, 77, 128], "block_size": 128, "topk": 4, "q_heads": 4, "kv_heads": 2, "dim": 128},
    "block 128, D 64": {"lengths": [3000], "block_size": 128, "topk": 8, "q_heads": 2, "kv_heads": 2, "dim": 64},
    "block 64, D 64": {"lengths": [900, 900], "block_size": 64, "topk": 3, "q_heads": 8, "kv_heads": 1, "dim": 64},
    "block 128, 3 kv heads": {
        "lengths": [3000, 1],
        "block_size": 128,
        "topk": 4,
        "q_heads": 6,
        "kv_heads": 3,
        "dim": 128,
    },
    "block 512, 3 kv heads": {"lengths": [5000], "block_size": 512, "topk": 3, "q_heads": 3, "kv_heads": 3, "dim": 128},
    "block 192": {"lengths": [2000, 100], "block_size": 192, "topk": 3, "q_heads": 4, "kv_heads": 2, "dim": 128},
    "block 192, D 64": {"lengths": [2000], "block_size": 192, "topk": 3, "q_heads": 4, "kv_heads": 2, "dim": 64},
    "block 512": {"lengths": [5000, 513], "block_size": 512, "topk": 3, "q_heads": 4, "kv_heads": 4, "dim": 128},
    "block 512, D 64": {"lengths": [5000], "block_size": 512, "topk": 3, "q_heads": 4, "kv_heads": 2, "dim": 64},
    "block 4096": {"lengths": [9000], "block_size": 4096, "topk": 2, "q_heads": 2, "kv_heads": 1, "dim": 128},
    "one token": {"lengths": [1], "block_size": 128, "topk": 2, "dim": 128},
    "absent pairs": {"lengths": [2000], "block_size": 128, "topk": 4, "kv_heads": 2, "dim": 128, "absent": True},
    "absent pairs, block 512": {
        "lengths": [4000, 90],
        "block_size": 512,
        "topk": 3,
        "q_heads": 4,
        "kv_heads": 2,
        "dim": 128,
        "absent": True,
    },
    "absent pairs, several items per program": {
        "lengths": [30000],
        "block_size": 256,
        "topk": 8,
        "q_heads": 4,
        "kv_heads": 2,
        "dim": 64,
        "absent": True,
    },
    "fetched pairs": {"lengths": [4000], "block_size": 512, "topk": 3, "kv_heads": 2, "dim": 128, "fetched": True},
    "strided": {"lengths": [2000], "block_size": 128, "topk": 4, "kv_heads": 2, "dim": 128, "strided": True},
    "blocks nobody wants": {"lengths": [4000], "block_size": 128, "topk": 2, "dim": 128, "cold": True},
    "hot block": {"lengths": [40000], "block_size": 128, "topk": 2, "dim": 128, "hot": True},
    "hot block of several tiles": {"lengths": [80000], "block_size": 512, "topk": 2, "dim": 64, "hot": True},
}


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_torch_and_portable(name, dtype):
    case = make_case(**CASES[name], dtype=dtype, device="cuda")
    assert dispatch.choose_variant(case.q, case.part, case.lists, case.dout) == "sm90"
    if name.startswith("hot"):
        assert segments.segment_count(len(case.rows), case.lists.shape)
    first = check(case, variant="sm90")
    check(case, variant="sm90", accumulate=True)
    check(case, variant="sm90", gradient=dtype)
    portable = run(case)
    for x, y in zip(first, portable):
        x, y = (z[~z.isnan()] for z in (x, y))
        assert relative(x, y) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def run_keeping(case: Case, *, accumulate: bool = False) -> tuple[torch.Tensor, ...]:
    """dk, dv and partial dq as of `run`, where gradients of scores are kept; all buffers are poisoned."""
    dk, dv = (
        torch.full(x.shape, 1.0 if accumulate else float("nan"), device="cuda") for x in (case.part.k, case.part.v)
    )
    partials = triton_backend.new_dq_partials(case.selected, case.lists, case.q, case.dout, keeps_ds=True)
    partials.dq.fill_(float("nan"))
    partials.place.fill_(-1)
    backward.attend_backward(
        case.part, case.lists, case.rows, q=case.q, dout=case.dout, lse=case.lse, delta=case.delta, scale=case.scale,
        dk=dk, dv=dv, dq_partials=partials, accumulate=accumulate,
    )  # fmt: skip
    assert torch.equal(partials.place >= 0, written_slots(case))
    merged = torch.full_like(case.q, float("nan"))
    if bool(written_slots(case).sum() == (case.selected >= 0).sum()):
        merge.merge_dq(partials, selected=case.selected, dq=merged)
    dq = partials.dq.view(-1, case.q.shape[2])[partials.place.clamp(min=0).long()]
    return dk, dv, dq.masked_fill((partials.place < 0)[..., None], float("nan")), merged


@pytest.mark.parametrize("segment_blocks", [32, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if sizes.can_keep_ds(case["block_size"])])
def test_keeping_gradients_of_scores_changes_no_bit(name, dtype, segment_blocks, monkeypatch):
    """dq then takes one product of the same dS; with short segments, bins are cut everywhere."""
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", segment_blocks)
    case = make_case(**CASES[name], dtype=dtype, device="cuda")
    for accumulate in (False, True):
        *kept, merged = run_keeping(case, accumulate=accumulate)
        dk, dv, dq = run(case, variant="sm90", accumulate=accumulate)
        held = dk.isnan() if not accumulate else dk == 1
        for x, y in zip(kept[:2], (dk, dv), strict=True):
            assert torch.equal(x.masked_fill(held, 7.0), y.masked_fill(held, 7.0))
        assert torch.equal(kept[2].nan_to_num(7.0), dq.nan_to_num(7.0))
        if not case.part.start.lt(0).any():
            expected = torch.empty_like(case.q)
            merge.merge_dq(DqPartials(dq), selected=case.selected, dq=expected)
            assert torch.equal(merged, expected)


def test_kept_gradients_take_the_bytes_that_were_promised():
    case = make_case([5000, 557], 512, 3, q_heads=4, kv_heads=4, dim=128, dtype=torch.bfloat16, device="cuda")
    shape = case.lists.shape
    made = lists.route(case.selected, n_blocks=shape.n_blocks, kv_heads=shape.kv_heads, block_size=shape.block_size)
    partials = triton_backend.new_dq_partials(case.selected, made, case.q, case.dout, keeps_ds=True)
    of_head = triton_backend.kept_ds_bytes(
        case.q, case.dout, rows=len(case.rows), kv_heads=4, slots=3, n_blocks=shape.n_blocks, block_size=512
    )
    assert partials.dq.nbytes + partials.place.nbytes <= 4 * of_head


@pytest.mark.parametrize(("block_size", "variant"), [(128, "sm90"), (192, "sm90"), (512, "portable")])
def test_gradients_of_scores_that_cannot_be_kept(block_size, variant):
    case = make_case([1000], block_size, 2, dim=128, dtype=torch.bfloat16, device="cuda")
    partials = triton_backend.new_dq_partials(case.selected, case.lists, case.q, case.dout, keeps_ds=True)
    empty = torch.empty(case.part.k.shape, device="cuda")
    with pytest.raises(ValueError, match=f"not kept by variant '{variant}' for blocks of {block_size} keys"):
        backward.attend_backward(
            case.part, case.lists, case.rows, q=case.q, dout=case.dout, lse=case.lse, delta=case.delta, scale=case.scale,
            dk=empty, dv=empty, dq_partials=partials, accumulate=False, variant=variant,
        )  # fmt: skip


def test_gradients_of_scores_of_other_lists_are_refused():
    case = make_case(**CASES["block 512"], dtype=torch.bfloat16, device="cuda")
    partials = triton_backend.new_dq_partials(case.selected, case.lists, case.q, case.dout, keeps_ds=True)
    other = DqPartials(partials.dq[1:], partials.place)
    empty = torch.empty(case.part.k.shape, device="cuda")
    with pytest.raises(ValueError, match="gradients of scores need .* those of the lists, got"):
        backward.attend_backward(
            case.part, case.lists, case.rows, q=case.q, dout=case.dout, lse=case.lse, delta=case.delta, scale=case.scale,
            dk=empty, dv=empty, dq_partials=other, accumulate=False,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["block 128", "block 512", "hot block"])
def test_same_bits_every_time(name):
    case = make_case(**CASES[name], dtype=torch.bfloat16, device="cuda")
    first = run(case, variant="sm90")
    for _ in range(20):
        for x, y in zip(first, run(case, variant="sm90")):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("heads", [(8, 8), (12, 3), (5, 5)], ids=str)
@pytest.mark.parametrize("block_size", [128, 512])
@pytest.mark.parametrize("hot", [False, True])
def test_order_of_programs_changes_no_bit(hot, block_size, heads, monkeypatch):
    """Kv heads take turns in short calls; rows of 0 bytes at once stand for a long one. With a hot block, segments too."""
    monkeypatch.setattr(segments, "SEGMENT_BLOCKS", 2)
    q_heads, kv_heads = heads
    case = make_case(
        [3000, 129, 1], block_size, 4, q_heads=q_heads, kv_heads=kv_heads, dim=128, dtype=torch.bfloat16, device="cuda",
        hot=hot, absent=True,
    )  # fmt: skip
    in_turns = [run(case, variant="sm90", accumulate=accumulate) for accumulate in (False, True)]
    monkeypatch.setattr(sizes, "ROWS_AT_ONCE", 0)
    for accumulate, first in zip((False, True), in_turns, strict=True):
        for x, y in zip(first, run(case, variant="sm90", accumulate=accumulate), strict=True):
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("block_size", [128, 512])
def test_dq_does_not_depend_on_the_other_rows(block_size):
    case = make_case([3000], block_size, 3, q_heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16, device="cuda")
    whole = run(case, variant="sm90")[2]
    chunk = slice(701, 2345)
    rows, selected = case.rows.slice(chunk.start, chunk.stop), case.selected[:, chunk]
    route = lists.route(selected, n_blocks=case.lists.shape.n_blocks, kv_heads=2, block_size=block_size)
    dk, dv = (torch.empty(x.shape, device="cuda") for x in (case.part.k, case.part.v))
    dq = torch.full((*selected.shape, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    backward.attend_backward(
        case.part, route, rows, q=case.q[chunk], dout=case.dout[chunk], lse=case.lse[:, chunk],
        delta=case.delta[:, chunk], scale=case.scale, dk=dk, dv=dv, dq_partials=DqPartials(dq), accumulate=False,
        variant="sm90",
    )  # fmt: skip
    assert torch.equal(dq.nan_to_num(7.0), whole[:, chunk].nan_to_num(7.0))


@pytest.mark.parametrize("variant", ["sm90", "portable"])
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("block_size", [128, 512])
def test_no_rows_give_zeros(block_size, topk, variant):
    """Ranks with fewer rows have empty chunks: nothing may be read, and dK and dV are zero."""
    case = make_case([1000], block_size, topk, q_heads=4, kv_heads=2, dim=128, dtype=torch.bfloat16, device="cuda")
    rows, selected = case.rows.slice(300, 300), case.selected[:, 300:300]
    route = lists.route(selected, n_blocks=case.lists.shape.n_blocks, kv_heads=2, block_size=block_size)
    dk, dv = (torch.full(x.shape, float("nan"), device="cuda") for x in (case.part.k, case.part.v))
    dq = torch.empty(*selected.shape, 128, device="cuda", dtype=torch.bfloat16)
    backward.attend_backward(
        case.part, route, rows, q=case.q[300:300], dout=case.dout[300:300], lse=case.lse[:, 300:300],
        delta=case.delta[:, 300:300], scale=case.scale, dk=dk, dv=dv, dq_partials=DqPartials(dq), accumulate=False,
        variant=variant,
    )  # fmt: skip
    torch.cuda.synchronize()
    assert not dk.any()
    assert not dv.any()


def test_other_sizes_take_the_portable_kernels():
    for settings in ({"dim": 96}, {"dim": 128, "value_dim": 64}, {"dim": 256}):
        case = make_case([300], 128, 2, dtype=torch.bfloat16, device="cuda", **settings)
        assert dispatch.choose_variant(case.q, case.part, case.lists, case.dout) == "portable"
    case = make_case([300], 100, 2, dim=128, dtype=torch.bfloat16, device="cuda")
    assert dispatch.choose_variant(case.q, case.part, case.lists, case.dout) == "portable"


def timed(call) -> float:
    """Median milliseconds of five calls."""
    call()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[2]


@pytest.mark.parametrize(("block_size", "topk"), [(128, 8), (512, 8), (4096, 12)])
@pytest.mark.parametrize("dim", [128, 64])
def test_timing(block_size, topk, dim):
    """Prints milliseconds of `attend_backward` for 4 of 16 heads at 128K tokens, uniform routing, both variants."""
    tokens, heads = 1 << 17, 4
    rows, start, length = document_rows([tokens], block_size, "cuda")
    n_blocks = start.numel()
    number = torch.arange(n_blocks, device="cuda")
    selected = []
    for _ in range(heads):
        score = torch.rand(tokens, n_blocks, device="cuda").masked_fill(number >= rows.block[:, None], -1)
        best = score.topk(topk - 1, dim=1)
        best = best.indices.masked_fill(best.values < 0, -1).sort(1).values
        selected.append(torch.cat([best, rows.block[:, None]], 1).to(torch.int32))
    selected = torch.stack(selected)
    q, k, v, dout = (torch.randn(tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    part = KVPart(k, v, start.expand(heads, n_blocks), length)
    route = lists.route(selected, n_blocks=n_blocks, kv_heads=heads, block_size=block_size)
    lse, delta = torch.full((heads, tokens), 12.0, device="cuda"), torch.zeros(heads, tokens, device="cuda")
    dk, dv = (torch.empty(x.shape, device="cuda") for x in (k, v))
    dq = DqPartials(torch.empty(*selected.shape, dim, device="cuda", dtype=torch.bfloat16))
    for variant in ("sm90", "portable"):

        def call(variant=variant):
            backward.attend_backward(
                part, route, rows, q=q, dout=dout, lse=lse, delta=delta, scale=dim**-0.5, dk=dk, dv=dv, dq_partials=dq,
                accumulate=False, variant=variant,
            )  # fmt: skip

        print(
            f"\nattend_backward {variant} ({block_size}, {topk}) D={dim}: {timed(call):.2f} ms for 4 heads (x4 for 16)"
        )
    print(f"sm90 kernels know Triton {dispatch.TRITON_VERSIONS}")
