"""A complete call on the Triton backend: the same primitives as torch's, and the definition's output and gradients."""

# ruff: noqa: C408  (keyword tables read better)
from __future__ import annotations

import inspect
import math
from dataclasses import replace

import pytest
import torch

from tests.kernels import interpreter

triton_backend = pytest.importorskip("moba_cp.kernels.triton_backend")
import moba_cp  # noqa: E402
from moba_cp import prepare  # noqa: E402
from moba_cp.kernels import torch_backend  # noqa: E402
from moba_cp.kernels.types import Partials, RoutingLists, list_shape  # noqa: E402
from tests.kernels.forward_cases import relative  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"


def lists_of(block_size, entries=0, n_blocks=7):
    """Lists of two kv heads; only shapes count."""
    shape = list_shape(torch.zeros(4, 1, 3), n_blocks, 2, block_size, 128)
    return RoutingLists(shape, *(torch.zeros(n, dtype=torch.int32) for n in (15, entries, 1, 1, 1)))


def test_in_interpreter():
    interpreter.run_module(__file__)


SIZES = ["bytes_per_slot", "dq_bytes", "kept_ds_bytes"]
PRIMITIVES = [
    "centroids",
    "select_blocks",
    "place_selection",
    "block_weights",
    "route",
    "attend",
    "merge",
    "new_lse",
    "delta",
    "attend_backward",
    "merge_dq",
]


@pytest.mark.parametrize("name", [*PRIMITIVES, *SIZES, "new_partials", "new_dq_partials"])
def test_same_signatures(name):
    """Same parameters in the same order and of the same kind. A backend may append optional ones."""
    ours, theirs = (inspect.signature(getattr(b, name)).parameters for b in (triton_backend, torch_backend))
    shape = lambda parameters: [(p.name, p.kind, p.default) for p in parameters]  # noqa: E731
    assert shape(ours.values())[: len(theirs)] == shape(theirs.values())
    assert all(p.default is not inspect.Parameter.empty for p in list(ours.values())[len(theirs) :])


def test_workspace_bytes_are_what_partials_take():
    selected = torch.zeros(3, 5, 4, dtype=torch.int32)
    partials = triton_backend.new_partials(selected, 96, torch.bfloat16)
    used = sum(x.numel() * x.element_size() for x in (partials.out, partials.lse))
    assert used == selected.numel() * triton_backend.bytes_per_slot(96, torch.bfloat16)
    q = torch.zeros(5, 3, 96, dtype=torch.bfloat16)
    dq = triton_backend.new_dq_partials(selected, lists_of(1024), q, q).dq
    assert triton_backend.dq_bytes(q, q, 1024, 7) == (2 * 96, 0)
    assert dq.nbytes == selected.numel() * 2 * 96 <= used


@pytest.mark.parametrize(
    ("block_size", "dim", "dim_v", "n_blocks", "sums"),
    [
        (512, 128, 128, 7, False),
        (640, 128, 128, 7, True),
        (4096, 128, 128, 1 << 12, True),
        (4096, 128, 128, (1 << 12) + 1, False),
        (4096, 64, 64, 7, False),
        (4096, 128, 64, 7, False),
        (576, 128, 128, 7, False),
        (1 << 18, 128, 128, 7, False),
    ],
)
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("entry", [torch.int32, torch.int64], ids=str)
def test_who_sums_dq(block_size, dim, dim_v, n_blocks, sums, hopper, entry, monkeypatch):
    """Sums take the bytes per slot and block that are promised, which do not depend on the device."""
    monkeypatch.setattr(triton_backend, "sm90_serves", lambda *_: hopper and dim == dim_v)
    selected = torch.zeros(4, 50, 3, dtype=torch.int32)
    q, v = (torch.zeros(50, 4, size, dtype=torch.bfloat16) for size in (dim, dim_v))
    lists = lists_of(block_size, selected.numel(), n_blocks)
    partials = triton_backend.new_dq_partials(selected, replace(lists, entry=lists.entry.to(entry)), q, v)
    assert partials.sums == (sums and hopper and entry == torch.int32)
    assert (partials.place is not None) == partials.sums
    per_slot, per_block = triton_backend.dq_bytes(q, v, block_size, n_blocks)
    assert (per_slot, per_block) == ((516, 64 * 512) if sums else (2 * dim, 0))
    taken = partials.dq.nbytes + (0 if partials.place is None else partials.place.nbytes)
    assert taken <= selected.numel() * per_slot + 2 * n_blocks * per_block


@pytest.mark.parametrize(
    ("block_size", "dim", "hopper", "keeps"),
    [
        (256, 128, True, True),
        (512, 128, True, True),
        (1024, 128, True, False),  # dq is summed
        (512, 64, True, False),
        (128, 128, True, False),
        (512, 128, False, False),
    ],
)
def test_who_keeps_gradients_of_scores(block_size, dim, hopper, keeps, monkeypatch):
    monkeypatch.setattr(triton_backend, "sm90_serves", lambda *_: hopper)
    q, v = (torch.zeros(1, heads, dim, dtype=torch.bfloat16) for heads in (4, 2))
    found = triton_backend.kept_ds_bytes(q, v, rows=1000, kv_heads=2, slots=3, n_blocks=7, block_size=block_size)
    entries = 2 * 3 * 1000
    assert found == (keeps and (-(-entries // 128) + 7) * 128 * block_size * 2 + 4 * entries)


def call(lengths, block_size, topk, q_heads, kv_heads, dim, dim_v, dtype, *, seed=0, workspace_bytes=1 << 30):
    """Output and gradients of `moba_attention`, and of the definition in fp32."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    tokens, cu_seqlens = sum(lengths), [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    sizes = ((q_heads, dim), (kv_heads, dim), (kv_heads, dim_v), (q_heads, dim_v))
    q, k, v, dout = (torch.randn(tokens, *s, device=DEVICE, generator=generator).to(dtype) for s in sizes)
    config = moba_cp.MoBAConfig(block_size, topk)
    layout = moba_cp.SequenceLayout.contiguous(cu_seqlens, 1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = moba_cp.moba_attention(q, k, v, config, layout=layout, workspace_bytes=workspace_bytes)
    actual = [out, *torch.autograd.grad(out, inputs, dout)]
    # The definition rounds centroids to the dtype of k for its selection, so inputs stay in that dtype; it attends in fp32.
    expected_out = moba_cp.reference.moba_attention(q, k, v, cu_seqlens, config)
    expected = [expected_out, *torch.autograd.grad(expected_out, inputs, dout)]
    return actual, expected


SMALL = {
    "small blocks": dict(lengths=[50], block_size=16, topk=3, q_heads=1, kv_heads=1, dim=16, dim_v=16),
    "packed documents, GQA": dict(lengths=[1, 0, 37], block_size=16, topk=2, q_heads=2, kv_heads=1, dim=16, dim_v=24),
    "large blocks": dict(lengths=[450], block_size=192, topk=2, q_heads=1, kv_heads=1, dim=16, dim_v=16),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_shares_of_blocks(scale):
    """Log-sum-exps are in base 2 here, natural in the reference; empty slots hold anything."""
    lse = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    lse = lse.to(torch.float32)
    selected = torch.arange(4).expand(3, 7, 4).clone()
    selected[:, 3:, :2] = -1
    expected = torch.exp2(lse.double() - lse.double().masked_fill(selected < 0, -torch.inf).amax(2, keepdim=True))
    expected = expected.masked_fill(selected < 0, 0.0)
    expected /= expected.sum(2, keepdim=True)
    lse[selected < 0] = torch.nan
    found = triton_backend.block_weights(Partials(torch.empty(3, 7, 4, 0), lse), selected=selected)
    natural = Partials(torch.empty(3, 7, 4, 0), lse * math.log(2))
    # Differences below the largest are exact to 1e-7 of the largest two, exponents of numbers below 100 to 1e-5.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    if scale == 1.0:  # else the reference's log-sum-exps are rounded by more
        torch.testing.assert_close(torch_backend.block_weights(natural, selected=selected), found, rtol=1e-5, atol=1e-7)


@interpreter.interpreted
@pytest.mark.parametrize("name", SMALL)
def test_definition(name, monkeypatch):
    monkeypatch.setattr(prepare, "backend_for", lambda device, dtype: triton_backend)
    for actual, expected in zip(*call(**SMALL[name], dtype=torch.float32)):
        assert relative(actual, expected) < 1e-4


REAL = {
    "(128, 8)": dict(lengths=[8192], block_size=128, topk=8, q_heads=2, kv_heads=2, dim=128, dim_v=128),
    "(512, 3)": dict(lengths=[8192], block_size=512, topk=3, q_heads=2, kv_heads=1, dim=128, dim_v=128),
    "(2048, 3)": dict(lengths=[9000], block_size=2048, topk=3, q_heads=1, kv_heads=1, dim=128, dim_v=128),
    "packed": dict(lengths=[1, 1000, 0, 3333, 17], block_size=128, topk=4, q_heads=4, kv_heads=2, dim=64, dim_v=128),
    "odd": dict(lengths=[2777, 300], block_size=100, topk=5, q_heads=3, kv_heads=1, dim=96, dim_v=64),
    "wide": dict(lengths=[3000], block_size=256, topk=3, q_heads=2, kv_heads=1, dim=256, dim_v=192),
    "topk covers all": dict(lengths=[2000], block_size=128, topk=40, q_heads=2, kv_heads=1, dim=128, dim_v=128),
    "topk 1": dict(lengths=[2000], block_size=128, topk=1, q_heads=2, kv_heads=1, dim=128, dim_v=128),
    "short": dict(lengths=[1], block_size=128, topk=8, q_heads=2, kv_heads=1, dim=128, dim_v=128),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(interpreter.ACTIVE, reason="compiled kernels")
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("name", REAL)
    def test_definition(self, name, dtype):
        """Rounding of a centroid or a score may route a few rows per thousand differently; the others agree to 6e-3."""
        actual, expected = call(**REAL[name], dtype=dtype)
        for got, want in zip(actual, expected):
            error = (got.double() - want.double()).flatten(1).norm(dim=1)
            off = error > 0.05 * want.double().flatten(1).norm(dim=1) + 1e-3
            assert off.float().mean() < 5e-3, (name, off.sum())
            # The dq of a single token is exactly zero; sums that cancel leave about 1e-6.
            assert float(error[~off].norm()) < 6e-3 * float(want.double().norm()) + 1e-5

    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_shares_of_blocks_are_those_of_fp64(self, scale):
        tokens, config = 3000, moba_cp.MoBAConfig(256, 4)
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(tokens, heads, 128, generator=generator).bfloat16() for heads in (4, 2, 2))
        options = {"layout": moba_cp.SequenceLayout.contiguous([0, tokens], 1), "return_selection": True}
        given = [x.cuda() for x in (q * scale, k, v)]
        _, selection = moba_cp.moba_attention(*given, config, **options)
        exact = [x.double().cpu() for x in given]
        _, expected = moba_cp.moba_attention(*exact, config, selection=selection.blocks.cpu(), **options)
        assert torch.equal(selection.blocks.cpu(), expected.blocks)
        # Four additions.
        torch.testing.assert_close(selection.weights.sum(2).cpu(), torch.ones(4, tokens), rtol=0, atol=5e-7)
        # Scores up to 30 * 15 in fp32, of 128 products: 1e-4 at most.
        torch.testing.assert_close(selection.weights.double().cpu(), expected.weights, rtol=0, atol=3e-6 * scale)

    def test_workspace_changes_no_bit_of_output_and_dq(self):
        sizes = dict(lengths=[5000, 1000], block_size=128, topk=4, q_heads=4, kv_heads=2, dim=128, dim_v=128)
        whole, _ = call(**sizes, dtype=torch.bfloat16)
        parts, _ = call(**sizes, dtype=torch.bfloat16, workspace_bytes=1 << 20)
        assert torch.equal(whole[0], parts[0])
        assert torch.equal(whole[1], parts[1])
        for a, b in zip(whole[2:], parts[2:]):
            assert relative(a, b) < 4e-3

    def test_twenty_runs(self):
        sizes = dict(lengths=[6000], block_size=128, topk=8, q_heads=2, kv_heads=1, dim=128, dim_v=128)
        first, _ = call(**sizes, dtype=torch.bfloat16)
        for _ in range(20):
            again, _ = call(**sizes, dtype=torch.bfloat16)
            assert all(torch.equal(a, b) for a, b in zip(first, again))

    @pytest.mark.parametrize("block_size", [128, 4096])
    def test_offsets_beyond_32_bits(self, block_size):
        """2M tokens, 32 q heads: elements of the last heads and rows lie past 2^31."""
        tokens, topk = 1 << 21, 3
        torch.cuda.empty_cache()  # free the memory that earlier tests cached
        free, _ = torch.cuda.mem_get_info()
        if free < 55 << 30:
            pytest.skip("needs 55 GiB")
        generator = torch.Generator(device="cuda").manual_seed(0)
        whole = torch.empty(tokens, 32, 128, device="cuda", dtype=torch.bfloat16)
        q = whole[:, 28:]
        q.normal_(generator=generator)
        k, v = (
            torch.empty(tokens, 1, 128, device="cuda", dtype=torch.bfloat16).normal_(generator=generator) for _ in "kv"
        )
        config, layout = moba_cp.MoBAConfig(block_size, topk), moba_cp.SequenceLayout.contiguous([0, tokens], 1)
        out = moba_cp.moba_attention(q.requires_grad_(), k, v, config, layout=layout, workspace_bytes=8 << 30)
        selected = out.grad_fn.saved_tensors[5]
        for row in (tokens - 1, tokens - block_size - 3, tokens // 2, 17):
            for head in (0, 3):
                blocks = selected[head, row].long()
                index = (blocks[blocks >= 0][:, None] * block_size + torch.arange(block_size, device="cuda")).flatten()
                index = index[index <= row]
                weight = torch.softmax(k[index, 0].float() @ q[row, head].float() * 128**-0.5, 0)
                assert relative(out[row, head].detach(), (weight @ v[index, 0].float()).detach()) < 1e-2
