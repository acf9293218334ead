"""Every shipped configuration of the backward compiles for its GPU, does not spill and fits in shared memory."""

import json

import pytest

from moba_cp.kernels.gpu import gpu_of_capability
from tests.kernels import compile_backward
from tests.kernels.interpreter import run_without_interpreter

HOPPER, AMPERE, CONSUMER = (9, 0), (8, 0), (8, 6)
CASES = [
    ["small", 128, "bf16", HOPPER],
    ["moving", 128, 128, "bf16", HOPPER],
    ["moving", 128, 128, "bf16", AMPERE],
    *[["hopper", 128, block, "bf16", HOPPER] for block in (128, 512, 4096)],
    ["portable", 128, 128, 512, "bf16", HOPPER],
    ["portable", 96, 96, 48, "bf16", HOPPER],
    ["portable", 128, 128, 64, "bf16", AMPERE],
    ["portable", 128, 128, 128, "bf16", CONSUMER],
]  # fmt: skip
"""What is compiled by default: each kernel and GPU. Where Triton has cached none, a case takes seconds."""
HEAVY = [
    *[["moving", dim, dim_v, "bf16", HOPPER] for dim, dim_v in ((64, 64), (192, 128), (256, 256))],
    *[["hopper", dim, block, "bf16", HOPPER] for dim, block in ((64, 128), (64, 64), (128, 192))],
    *[["hopper", *case, HOPPER] for case in ((128, 4096, "fp16"), (64, 4096, "fp16"))],
    *[["portable", 128, 128, block, "bf16", HOPPER] for block in (64, 128)],
    ["portable", 64, 64, 512, "fp16", HOPPER],
    ["portable", 192, 128, 512, "bf16", HOPPER],
    ["portable", 256, 256, 64, "bf16", HOPPER],
    ["portable", 64, 64, 64, "bf16", AMPERE],
    ["portable", 192, 128, 32, "bf16", AMPERE],
    ["portable", 128, 128, 512, "bf16", AMPERE],
    ["portable", 192, 128, 512, "bf16", AMPERE],
]  # fmt: skip
PARAMETERS = [
    pytest.param(case, id=" ".join(map(str, case)), marks=marks)
    for cases, marks in ((CASES, ()), (HEAVY, pytest.mark.heavy))
    for case in cases
]

pytestmark = pytest.mark.xdist_group("compile_backward")  # `built` once, not once per worker


@pytest.fixture(scope="module")
def built(request):
    """By case: what is known of each kernel. One process compiles all cases that are tested."""
    items = [item for item in request.session.items if item.path == request.path]
    cases = list({str(item.callspec.params["case"]): item.callspec.params["case"] for item in items}.values())
    results = json.loads(run_without_interpreter(compile_backward.__file__, json.dumps(cases)).splitlines()[-1])
    return dict(zip(map(str, cases), results, strict=True))


@pytest.mark.parametrize("case", PARAMETERS)
def test_no_spills(built, case):
    for kernel, usage in built[str(case)].items():
        assert "text" not in usage, usage.get("text")
        assert usage["spill"] == 0, (kernel, usage)
        assert usage["shared"] <= gpu_of_capability(tuple(case[-1])).shared_memory, (kernel, usage)


@pytest.mark.parametrize("case", [parameter for parameter in PARAMETERS if parameter.values[0][0] == "hopper"])
def test_products_are_not_serialised(built, case):
    """ptxas reports when it runs asynchronous products one after another, which would remove all overlap."""
    assert not any(usage["serialised"] for usage in built[str(case)].values()), built[str(case)]
