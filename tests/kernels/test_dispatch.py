"""The choice between kernels, and what each launch hands to its kernel: arguments and strides under the right names."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.kernels import interpreter

triton = pytest.importorskip("triton")
from moba_cp.kernels import backward, dispatch, forward, launch, sizes  # noqa: E402
from moba_cp.kernels.types import DqPartials, Partials  # noqa: E402
from tests.kernels.backward_cases import Case, make_case  # noqa: E402

pytestmark = pytest.mark.skipif(interpreter.ACTIVE, reason="the interpreter launches in another way")
AXES = {"token": 0, "row": 0, "head": 1, "slot": 2}  # of q, dout, k, v, dk, dv
SIZES = {"small blocks": 128, "large blocks": 512}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict]]:
    """Arguments of the launches by kernel and parameter; nothing is compiled or run."""
    found: dict[str, dict] = {}

    def run(self, *args, grid, warmup, num_warps, **kwargs):
        bound = inspect.signature(self.fn).bind(*args, **kwargs)  # every parameter has one argument
        found[self.fn.__name__] = bound.arguments

    monkeypatch.setattr(triton.runtime.JITFunction, "run", run)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    return found


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and dtype are served by the Hopper kernels, as on a Hopper."""
    monkeypatch.setattr(dispatch, "sm90_serves", lambda *_: True)


def case_of(block_size: int) -> Case:
    sizes = {"q_heads": 4, "kv_heads": 2, "dim": 128, "dtype": torch.bfloat16}
    return make_case([2 * block_size], block_size, 2, **sizes)


def attend(case: Case, **variant: str) -> None:
    partials = Partials(torch.empty(*case.selected.shape, 128, dtype=case.q.dtype), torch.empty(case.selected.shape))
    forward.attend(case.q, case.part, case.lists, case.rows, case.scale, partials, **variant)


def attend_backward(case: Case, kept: DqPartials | None = None, **variant: str) -> dict[str, torch.Tensor]:
    dk, dv = (torch.empty(x.shape) for x in (case.part.k, case.part.v))
    dq = torch.empty(*case.selected.shape, case.q.shape[2], dtype=case.q.dtype)
    backward.attend_backward(
        case.part, case.lists, case.rows, q=case.q, dout=case.dout, lse=case.lse, delta=case.delta, scale=case.scale,
        dk=dk, dv=dv, dq_partials=kept or DqPartials(dq), accumulate=False, **variant,
    )  # fmt: skip
    return {"dk": dk, "dv": dv, "dq": dq}


def check(arguments: dict, case: Case, **tensors: torch.Tensor) -> None:
    """Tensors, strides and sizes are those that the parameters' names say. Strides beside a descriptor are left out."""
    inputs = {"q": case.q, "k": case.part.k, "v": case.part.v, "dout": case.dout, "lse": case.lse, "delta": case.delta}
    others = {"start": case.part.start, "length": case.part.length, "position": case.rows.position}
    lists = {name: getattr(case.lists, name) for name in ("pointer", "entry", "item_bin", "item_start", "item_end")}
    tensors = inputs | others | lists | tensors
    checked = 0
    for name, value in arguments.items():
        tensor, _, axis = name.rpartition("_")
        if name in tensors and isinstance(value, torch.Tensor):
            assert value is tensors[name], name
        elif (
            tensor in ("q", "dout", "k", "v", "dk", "dv")
            and axis in AXES
            and isinstance(arguments.get(tensor), torch.Tensor)
        ):
            assert value == tensors[tensor].stride(AXES[axis]), name
        elif tensor in ("lse", "delta") and axis in ("head", "token"):
            assert value == tensors[tensor].stride(("head", "token").index(axis)), name
        else:
            continue
        checked += 1
    assert checked > 8
    shape = case.lists.shape
    known = {"n_blocks": shape.n_blocks, "group": shape.group_size, "GROUP": shape.group_size, "n_bins": shape.n_bins,
             "TOPK": shape.topk, "HEAD_BITS": shape.head_bits, "SLOT_BITS": shape.slot_bits, "D": 128, "DV": 128,
             "start_head": case.part.start.stride(0)}  # fmt: skip
    for name in known.keys() & arguments.keys():
        assert arguments[name] == known[name], name


@pytest.mark.parametrize("variant", ["sm90", "portable"])
@pytest.mark.parametrize("block_size", SIZES.values(), ids=SIZES)
@pytest.mark.usefixtures("hopper")
def test_forward_launches(launches: dict[str, dict], block_size: int, variant: str) -> None:
    case = case_of(block_size)
    attend(case, variant=variant)
    small = block_size <= 128
    assert list(launches) == (["stream_rows_kernel"] if small else ["hold_rows_kernel", "own_blocks_kernel"])
    for arguments in launches.values():
        check(arguments, case, lse=arguments["lse"])  # that of the partials
        assert ("WARPS" in arguments) == (variant == "sm90")


@pytest.mark.parametrize("variant", ["sm90", "portable"])
@pytest.mark.parametrize("block_size", SIZES.values(), ids=SIZES)
@pytest.mark.usefixtures("hopper")
def test_backward_launches(launches: dict[str, dict], block_size: int, variant: str) -> None:
    case = case_of(block_size)
    results = attend_backward(case, variant=variant)
    fused = "dkdv_dq_kernel" if variant == "sm90" else "dkdv_kernel"
    assert list(launches) == ([fused] if block_size <= 128 else ["dkdv_kernel", "dq_kernel"])
    for arguments in launches.values():
        check(arguments, case, **results)
        assert ("WARPS" in arguments) == (variant == "sm90")
    if "dq_kernel" in launches and variant == "sm90":
        dq, items = launches["dq_kernel"], case.lists.item_bin.numel()
        programs = sizes.programs_for(items, 1)  # as on a GPU of one multiprocessor
        assert (dq["n_items"], dq["step"], dq["per_program"]) == (items, 1, sizes.cdiv(items, programs))


@pytest.mark.usefixtures("hopper")
def test_programs_of_dq_have_no_more_items_than_they_look_at(
    launches: dict[str, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would skip the others, and their partial dq would stay uninitialised."""
    case = case_of(SIZES["large blocks"])
    items = case.lists.item_bin.numel()
    monkeypatch.setattr("moba_cp.kernels.backward.sm90.MOST_ITEMS_PER_PROGRAM", items - 1)
    monkeypatch.setattr("moba_cp.kernels.backward.sm90.programs_for", lambda n_items, resident: 1)
    with pytest.raises(ValueError, match=f"programs must have at most {items - 1} work items, got {items}"):
        attend_backward(case, variant="sm90")


@pytest.mark.usefixtures("hopper")
def test_backward_launches_where_gradients_of_scores_are_kept(launches: dict[str, dict]) -> None:
    case = case_of(SIZES["large blocks"])
    items = (case.lists.item_bin.numel(), case.block_size, 128)
    kept = DqPartials(torch.empty(items, dtype=case.q.dtype), torch.empty(case.selected.shape, dtype=torch.int32))
    attend_backward(case, kept)
    assert list(launches) == ["dkdv_kernel", "dq_of_ds_kernel"]
    assert launches["dkdv_kernel"]["KEEPS"]
    assert launches["dkdv_kernel"]["dq"] is launches["dq_of_ds_kernel"]["ds"] is kept.dq
    reading = launches["dq_of_ds_kernel"]
    check(reading, case, place=kept.place)
    assert (reading["place_head"], reading["place_token"]) == kept.place.stride()[:2]
    assert (reading["BLOCK"], reading["ROWS"]) == items[1:]


@pytest.mark.usefixtures("hopper")
def test_backward_launches_where_dq_is_summed(launches: dict[str, dict]) -> None:
    case = case_of(1024)
    tiles = sizes.tiles_of_sums(case.selected.numel(), case.lists.shape.n_bins)
    place = torch.empty(case.selected.shape, dtype=torch.int32)
    partials = DqPartials(torch.empty(tiles, 64 * 128), place, sums=True)
    results = attend_backward(case, partials)
    assert list(launches) == ["dkdv_dq_tiles_kernel"]
    launched = launches["dkdv_dq_tiles_kernel"]
    check(launched, case, **results | {"dq": partials.dq}, place=place)
    assert (launched["place_head"], launched["place_token"]) == place.stride()[:2]
    programs = case.lists.shape.n_bins * launched["TILES"]
    assert launched["progress"].tolist() == [0] * (1 + programs)
    assert launched["units_at_once"] == sizes.units_at_once(case.selected.numel(), case.lists.shape.n_bins)
    with pytest.raises(ValueError, match="dq is not summed by variant 'portable' for blocks of 1024 keys and D 128"):
        attend_backward(case, partials, variant="portable")


@pytest.mark.usefixtures("hopper")
def test_misaligned_tensors_are_portable() -> None:
    case = case_of(128)
    odd = torch.nn.functional.pad(case.dout, (0, 8))[..., :128]
    assert dispatch.choose_variant(case.q, case.part, case.lists) == "sm90"
    assert dispatch.choose_variant(case.q, case.part, case.lists, case.dout) == "sm90"
    assert dispatch.choose_variant(case.q, case.part, case.lists, odd) == "portable"


@pytest.mark.usefixtures("hopper")
def test_rows_far_apart_are_portable() -> None:
    """Hopper kernels count offsets in 32 bits, in units of 16 elements."""
    last = torch.empty(1 << 24, 32, 128, dtype=torch.bfloat16, device="meta")
    beyond = torch.empty((1 << 24) + 1, 32, 128, dtype=torch.bfloat16, device="meta")
    assert sizes.aligned(last)
    assert not sizes.aligned(beyond)
    assert sizes.aligned(beyond[:, :1][:2])
    assert sizes.aligned(last[:0])


@pytest.mark.usefixtures("hopper", "launches")
def test_slots_that_the_hopper_kernel_cannot_count_are_refused() -> None:
    case = case_of(128)
    odd = torch.empty(*case.selected.shape, 136, dtype=case.q.dtype)[..., :128]
    with pytest.raises(ValueError, match="multiples of 16 elements apart.*136, 1"):
        attend_backward(case, DqPartials(odd), variant="sm90")
    attend_backward(case, DqPartials(odd), variant="portable")


def test_a_variant_that_does_not_serve_is_refused() -> None:
    case = case_of(128)
    for call in (attend, attend_backward):
        with pytest.raises(ValueError, match="'portable'.*got 'sm90'"):
            call(case, variant="sm90")
        with pytest.raises(ValueError, match="got 'fastest'"):
            call(case, variant="fastest")
