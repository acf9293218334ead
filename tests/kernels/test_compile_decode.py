"""Decoding kernels compiled for sm_80 and sm_90 without a GPU: nothing spills."""

from __future__ import annotations

import json
import sys

import pytest

decode = pytest.importorskip("moba_cp.kernels.decode")
from moba_cp.kernels import configs  # noqa: E402
from moba_cp.kernels.sizes import next_power_of_2, padded  # noqa: E402
from moba_cp.kernels.types import COUNT_TILE  # noqa: E402
from tests.kernels import compiling, interpreter  # noqa: E402

TYPES = (
    dict.fromkeys(("slots", "before", "lengths", "count", "position", "keys", "arrived"), "*i32")
    | dict.fromkeys(("partial", "partial_lse"), "*fp32")
    | dict.fromkeys(("q", "k", "v", "out", "centroids"), "*bf16")
    | {"selected": "*i16", "scale_log2": "fp32"}
)
"""Of parameters that are neither constants nor int32 numbers."""


def type_of(parameter) -> str:
    return TYPES.get(parameter.name, "i32")


def is_aligned(parameter, kind: str) -> bool:
    name = parameter.name
    return kind == "*bf16" or (kind == "i32" and name.startswith(("q_s", "q_head", "k_", "v_")) and name != "q_heads")


def built(capability: int):
    """(name, registers and memory) of the kernels as they are launched for the published settings."""
    for dim, block_size, topk in ((128, 512, 8), (64, 4096, 12), (256, 100, 3)):
        select = configs.decode_select(dim, block_size, 2, 4, 1024)
        attend = configs.decode_attend(dim, dim, block_size, 4)
        sizes = {"D": dim, "D_PADDED": padded(dim)}
        means = {"BLOCK": block_size, "KEYS": select.keys, "TILE": COUNT_TILE, **sizes}
        chosen = {"TOPK": topk, "SLOTS": next_power_of_2(topk), "OVERLAP": capability >= 90}
        selects = {"ROWS": configs.GATE_ROWS, "BLOCKS": 1024, "HEADS": select.heads}
        attends = {
            "SPLITS": attend.splits, "SPLIT": attend.split, "BLOCK": block_size, "DV": dim, "DV_PADDED": padded(dim),
            "KEYS": attend.keys, "ROWS": 16, "STAGES": attend.num_stages, "HEADS": attend.heads, "AT_ONCE": attend.at_once,
        }  # fmt: skip
        for kernel, constants, warps in (
            (decode.update_centroids_kernel, {**means, "LANES": 1}, 4),
            (decode.select_kernel, {**means, **chosen, **selects}, 4),
            (decode.attend_selected_kernel, {**sizes, **chosen, **attends}, attend.num_warps),
        ):
            source = compiling.source_of(kernel, constants, type_of, is_aligned)
            yield f"{kernel.__name__} {constants}", compiling.build(source, divmod(capability, 10), num_warps=warps)


@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills(capability):
    lines = interpreter.run_without_interpreter(__file__, str(capability)).splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(results) == 9
    assert [r for r in results if r["spill"]] == []


if __name__ == "__main__":
    for name_, result_ in built(int(sys.argv[1])):
        print(json.dumps({"kernel": name_, **result_}), flush=True)
