"""Decoding kernels: the torch backend's results in another precision, and the centroids of a forward pass bit for bit."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.kernels import interpreter

decode = pytest.importorskip("moba_cp.kernels.decode")
from moba_cp.kernels import torch_backend  # noqa: E402
from moba_cp.kernels.centroids import centroids  # noqa: E402
from moba_cp.kernels.types import COUNT_TILE, QueryRows  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"
NAN = float("nan")


def test_in_interpreter():
    interpreter.run_module(__file__)


def cache(lengths, slots, heads, dim, dtype, seed=0):
    """Keys `[samples, slots, heads, dim]` as a transposed cache holds them, NaN where no content is, and the table of slots.

    Content is spread over the slots in order, for all heads and head sizes alike.
    """
    generator, places = torch.Generator().manual_seed(seed + dim), torch.Generator().manual_seed(seed)
    keys = torch.full((len(lengths), heads, slots, dim), NAN)
    table = torch.zeros(len(lengths), slots, dtype=torch.int32)
    for sample, length in enumerate(lengths):
        slot = torch.randperm(slots, generator=places)[:length].sort().values
        table[sample, :length] = slot.int()
        keys[sample, :, slot] = torch.randn(heads, length, dim, generator=generator)
    return keys.to(DEVICE, dtype).transpose(1, 2), table.to(DEVICE)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check_centroids(lengths, heads, dim, block_size, dtype):
    """New, then grown by one token, then cropped and overwritten: always the centroids of what is there."""
    most = max(lengths) // block_size + 2
    slots = max(lengths) + 2 * block_size
    count = torch.zeros(len(lengths), heads, -(-most // COUNT_TILE), dtype=torch.int32, device=DEVICE)
    kept = torch.full((len(lengths), most, heads, dim), NAN, dtype=dtype, device=DEVICE)
    steps = (
        (0, 0, most),
        (0, 1, 1),
        (-block_size, 3, 1),
        (block_size, 1, 4),
    )  # moved since, tokens of the step, at most
    length = integers(*lengths)
    for seed, (moved, tokens, at_most) in enumerate(steps):
        before = (length + moved).clamp(min=0)
        length = before + tokens
        k, table = cache(length.tolist(), slots, heads, dim, dtype)
        if moved > 0:  # grown by others, who left no centroids: none counts as known
            count.zero_()
        decode.update_centroids(
            k, slots=table, before=before, lengths=length, count=count, centroids=kept, block_size=block_size,
            at_most=at_most,
        )  # fmt: skip
        for sample, tokens_here in enumerate(length.tolist()):
            complete = tokens_here // block_size
            assert count[sample].sum(1).tolist() == [complete] * heads, (seed, sample)
            if moved < 0:
                continue  # other content than the kept centroids are of: only the count is checked
            content = k[sample, table[sample, :tokens_here].long()]
            start = torch.arange(complete, dtype=torch.int32, device=DEVICE) * block_size
            if seed in (0, 3):
                assert torch.equal(kept[sample, :complete], centroids(content, start=start, block_size=block_size))


def check_selection(lengths, q_heads, kv_heads, dim, block_size, topk, dtype, missing):
    """Of the gate in fp64 but for near ties, whether centroids are known or `missing`; and padding has no effect."""
    most = 1 << (max(lengths) // block_size).bit_length()
    k, table = cache(lengths, max(lengths) + 5, kv_heads, dim, dtype)
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(len(lengths), q_heads, dim, generator=generator).to(DEVICE, dtype)
    length = integers(*lengths)
    position = length - 1
    first = torch.arange(len(lengths), dtype=torch.int32, device=DEVICE) * most
    own = position.clamp(min=0) // block_size
    rows = QueryRows(first + own, first, position.clamp(min=0) % block_size, first.new_empty(0, 4))
    count = torch.zeros(len(lengths), kv_heads, -(-most // COUNT_TILE), dtype=torch.int32, device=DEVICE)
    means = torch.full((len(lengths), most, kv_heads, dim), NAN, dtype=dtype, device=DEVICE)
    arguments = {"slots": table, "before": length - 1, "lengths": length, "count": count, "centroids": means}
    if not missing:
        decode.update_centroids(k, **arguments, block_size=block_size, at_most=most)
    more = {"position": position, "rows": rows, "block_size": block_size, "topk": topk}
    selected = decode.select_for_decoding(q, k, **arguments, **more)
    assert count.sum(2)[:, 0].tolist() == [n // block_size for n in lengths]
    expected = torch_backend.select_blocks(q, centroids=means.flatten(0, 1).nan_to_num(), rows=rows, topk=topk)
    assert selected.dtype == expected.dtype
    # Scores are sums of `dim` products in fp32, in another order than the torch backend's.
    assert (selected != expected).float().mean() < (0.002 if max(lengths) > 1000 else 1e-9)
    again = decode.select_for_decoding(q, k, **arguments, **more)
    assert torch.equal(again, selected)


def check_attend(lengths, q_heads, kv_heads, dim, dim_v, block_size, topk, dtype, tolerance):
    blocks = max(max(lengths) // block_size + 1, 1)
    slots = max(lengths) + 5
    k, table = cache(lengths, slots, kv_heads, dim, dtype)
    v, _ = cache(lengths, slots, kv_heads, dim_v, dtype)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(lengths), q_heads, dim + 3, generator=generator).to(DEVICE, dtype)[:, :, :dim]
    selected = torch.full((q_heads, len(lengths), topk), -1, dtype=torch.int16)
    for sample, length in enumerate(lengths):
        own = max(length - 1, 0) // block_size
        for head in range(q_heads):
            chosen = torch.randperm(own, generator=generator)[: topk - 1].tolist()
            chosen = sorted([*chosen, own])
            selected[head, sample, topk - len(chosen) :] = torch.tensor(chosen, dtype=torch.int16) + sample * blocks
    arguments = {
        "slots": table, "position": integers(*lengths) - 1, "selected": selected.to(DEVICE), "blocks": blocks,
        "block_size": block_size, "scale": 0.3,
    }  # fmt: skip
    actual = decode.attend_selected(q, k, v, **arguments)
    expected = torch_backend.attend_selected(q.double(), k.double(), v.double(), **arguments)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    assert not actual[[i for i, length in enumerate(lengths) if length == 0]].any()


# Rounding of weights and of the output to bf16 (8 bits) and fp16 (11 bits); sums are fp32.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


@interpreter.interpreted
@pytest.mark.parametrize(("dim", "block_size", "dtype"), [(16, 16, torch.bfloat16), (24, 20, torch.float16)])
def test_centroids(dim, block_size, dtype):
    check_centroids([3 * block_size + 5, 0, 2 * block_size], 2, dim, block_size, dtype)


@interpreter.interpreted
@pytest.mark.parametrize("missing", [True, False])
@pytest.mark.parametrize("topk", [1, 3, 65])
def test_selection(topk, missing):
    check_selection([300, 0, 17, 32], 4, 2, 16, 16, topk, torch.float16, missing)


@interpreter.interpreted
def test_equal_scores_and_nan():
    """Of equal scores the later block; a block whose score is NaN first of all."""
    k, table = cache([100], 100, 1, 16, torch.float16)
    k[0, :, 0] = 1.0
    count = torch.zeros(1, 1, 1, dtype=torch.int32)
    means, length = torch.empty(1, 8, 1, 16, dtype=torch.float16), integers(100)
    rows = QueryRows(integers(6), integers(0), integers(3), torch.empty(0, 4, dtype=torch.int32))
    for nan, expected in ((None, [4, 5, 6]), (1, [1, 5, 6])):
        if nan is not None:
            k[0, table[0, nan * 16 : nan * 16 + 16].long()] = NAN
            count.zero_()
        selected = decode.select_for_decoding(
            torch.ones(1, 2, 16, dtype=torch.float16), k, slots=table, before=length - 1, lengths=length,
            position=length - 1, rows=rows, count=count, centroids=means, block_size=16, topk=3,
        )  # fmt: skip
        assert selected.tolist() == [[expected]] * 2


@interpreter.interpreted
@pytest.mark.parametrize(
    ("lengths", "block_size", "topk", "dtype"),
    [
        ([70, 0, 17, 64], 16, 3, torch.bfloat16),
        ([1], 16, 2, torch.float16),
        ([700, 300], 300, 2, torch.float16),  # two splits, the second a short one
    ],
    ids=str,
)
def test_attend(lengths, block_size, topk, dtype):
    check_attend(lengths, 4, 2, 16, 24, block_size, topk, dtype, TOLERANCE[dtype])


@interpreter.interpreted
def test_nan_stays_in_its_row_and_infinite_scores_have_weights():
    """A NaN key reaches the rows that select it; a row whose scores are -inf in one split takes the others."""
    k, table = cache([40, 40], 40, 1, 16, torch.float16)
    v = torch.ones_like(k)
    k[0, table[0, 3].long()] = NAN
    k[1, table[1, :16].long()] = torch.finfo(torch.float16).min
    q = torch.full((2, 1, 16), 1e4, dtype=torch.float16)
    out = decode.attend_selected(
        q, k, v, slots=table, position=integers(39, 39), selected=torch.tensor([[[0, 2], [3, 5]]]).short(), blocks=3,
        block_size=16, scale=1e30,
    )  # fmt: skip
    assert out[0].isnan().all()
    assert torch.equal(out[1], torch.ones_like(out[1]))


class TestGPU:
    pytestmark = interpreter.gpu

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_centroids(self, dtype):
        check_centroids([5000, 0, 1024, 3], 2, 128, 512, dtype)

    @pytest.mark.parametrize("missing", [True, False])
    @pytest.mark.parametrize(("block_size", "topk"), [(512, 8), (128, 8), (16, 8), (128, 20), (128, 1), (16, 70)])
    def test_selection(self, block_size, topk, missing):
        check_selection([20000, 0, 777, 1], 8, 2, 128, block_size, topk, torch.bfloat16, missing)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(("block_size", "topk"), [(512, 8), (128, 8), (4096, 3), (100, 20)])
    def test_attend(self, block_size, topk, dtype):
        check_attend([20000, 0, 777, 1], 8, 2, 128, 128, block_size, topk, dtype, TOLERANCE[dtype])


def built(capability: int):
    """(name, registers and memory) of the kernels as they are launched for the published settings."""
    from triton.compiler import ASTSource

    from moba_cp.kernels import configs
    from moba_cp.kernels.sizes import cdiv, next_power_of_2, padded
    from tests.kernels import compiling

    integer_pointers = {"slots", "before", "lengths", "count", "position", "keys"}
    for dim, block_size, topk in ((128, 512, 8), (64, 4096, 12), (256, 100, 3)):
        split = min(configs.DECODE.split, padded(block_size))
        splits = cdiv(block_size, split)
        parts = {"TOPK": topk, "SPLITS": splits, "SPLIT": split, "BLOCK": block_size}
        sizes, values = {"D": dim, "D_PADDED": padded(dim)}, {"DV": dim, "DV_PADDED": padded(dim)}
        slots = {"SLOTS": next_power_of_2(topk)}
        means = {"BLOCK": block_size, "KEYS": configs.centroids(dim, block_size, 2).keys, "TILE": COUNT_TILE, **sizes}
        merged = {"PARTS_PADDED": next_power_of_2(topk * splits), "AT_ONCE": 16}
        for kernel, constants in (
            (decode.update_centroids_kernel, {**means, "LANES": 1}),
            (decode.score_kernel, {**means, "ROWS": configs.GATE_ROWS}),
            (decode.select_kernel, {"BLOCK": block_size, "TOPK": topk, "BLOCKS": 1024, **slots}),
            (
                decode.attend_selected_kernel,
                {**sizes, **values, **parts, **slots, "KEYS": min(configs.DECODE.keys, split), "ROWS": 16},
            ),
            (decode.merge_splits_kernel, {**values, **parts, **merged}),
        ):
            signature, attributes = {}, {}
            for index, parameter in enumerate(kernel.params):
                name = parameter.name
                if name in constants:
                    signature[name] = "constexpr"
                elif name in integer_pointers:
                    signature[name] = "*i32"
                elif name == "selected":
                    signature[name] = "*i16"
                elif name in ("partial", "partial_lse"):
                    signature[name] = "*fp32"
                elif name in ("q", "k", "v", "out", "centroids"):
                    signature[name] = "*bf16"
                    attributes[(index,)] = compiling.ALIGNED
                elif name == "scale_log2":
                    signature[name] = "fp32"
                else:
                    signature[name] = "i32"
                    if name.startswith(("q_s", "q_head", "k_", "v_")) and name != "q_heads":
                        attributes[(index,)] = compiling.ALIGNED
            source = ASTSource(kernel, signature, constants, attributes)
            yield f"{kernel.__name__} {constants}", compiling.build(source, divmod(capability, 10), num_warps=4)


@pytest.mark.skipif(interpreter.ACTIVE, reason="runs in the main process")
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills(capability):
    lines = interpreter.run_without_interpreter(__file__, str(capability)).splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert len(results) == 15
    assert [r for r in results if r["spill"]] == []


if __name__ == "__main__":
    for name_, result_ in built(int(sys.argv[1])):
        print(json.dumps({"kernel": name_, **result_}), flush=True)
