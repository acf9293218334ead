"""Decoding kernels: the torch backend's results in another precision, and the centroids of a forward pass bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import interpreter

decode = pytest.importorskip("moba_cp.kernels.decode")
from moba_cp import CachedTokens, CentroidCache, MoBAConfig, cached, decoding, moba_attention_cached  # noqa: E402
from moba_cp.kernels import torch_backend, triton_backend  # noqa: E402
from moba_cp.kernels.centroids import centroids  # noqa: E402
from moba_cp.kernels.types import COUNT_TILE, QueryRows  # noqa: E402

DEVICE = "cuda" if interpreter.CUDA and not interpreter.ACTIVE else "cpu"
NAN = float("nan")


def test_in_interpreter():
    interpreter.run_module(__file__)


def cache(lengths, slots, heads, dim, dtype, seed=0, scattered=True):
    """Keys `[samples, slots, heads, dim]` as a transposed cache holds them, NaN where no content is, and the table of slots.

    Content is spread over the slots in order, for all heads and head sizes alike; or the last slots hold it.
    """
    generator, places = torch.Generator().manual_seed(seed + dim), torch.Generator().manual_seed(seed)
    keys = torch.full((len(lengths), heads, slots, dim), NAN)
    table = torch.zeros(len(lengths), slots, dtype=torch.int32)
    for sample, length in enumerate(lengths):
        slot = torch.randperm(slots, generator=places)[:length].sort().values
        if not scattered:
            slot = torch.arange(slots - length, slots)
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


def check_selection(lengths, q_heads, kv_heads, dim, block_size, topk, dtype, missing, scattered=True):
    """Of the gate in fp64 but for near ties, whether centroids are known or `missing`; and padding has no effect."""
    most = 1 << (max(lengths) // block_size).bit_length()
    k, table = cache(lengths, max(lengths) + 5, kv_heads, dim, dtype, scattered=scattered)
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
    arrived = torch.zeros(len(lengths), kv_heads, dtype=torch.int32, device=DEVICE)
    more = {"position": position, "arrived": arrived, "block_size": block_size, "topk": topk}
    selected = decode.select_for_decoding(q, k, **arguments, **more)
    assert count.sum(2)[:, 0].tolist() == [n // block_size for n in lengths]
    for sample, tokens_here in enumerate(lengths):
        complete = tokens_here // block_size
        start = torch.arange(complete, dtype=torch.int32, device=DEVICE) * block_size
        content = k[sample, table[sample, :tokens_here].long()]
        assert torch.equal(means[sample, :complete], centroids(content, start=start, block_size=block_size))
    expected = torch_backend.select_blocks(q, centroids=means.flatten(0, 1).nan_to_num(), rows=rows, topk=topk)
    assert selected.dtype == expected.dtype
    # Scores are sums of `dim` products in fp32, in another order than the torch backend's.
    assert (selected != expected).float().mean() < (0.002 if max(lengths) > 1000 else 1e-9)
    again = decode.select_for_decoding(q, k, **arguments, **more)
    assert torch.equal(again, selected)
    assert not arrived.any()


def attend_arguments(lengths, q_heads, kv_heads, dim, dim_v, block_size, topk, dtype, scattered=True):
    """q, k, v and the other arguments of `attend_selected`, with random selections."""
    blocks = max(max(lengths) // block_size + 1, 1)
    slots = max(lengths) + 5
    k, table = cache(lengths, slots, kv_heads, dim, dtype, scattered=scattered)
    v, _ = cache(lengths, slots, kv_heads, dim_v, dtype, scattered=scattered)
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(len(lengths), q_heads, dim + 3, generator=generator).to(DEVICE, dtype)[:, :, :dim]
    selected = torch.full((q_heads, len(lengths), topk), -1, dtype=torch.int16)
    for sample, length in enumerate(lengths):
        own = max(length - 1, 0) // block_size
        for head in range(q_heads):
            chosen = torch.randperm(own, generator=generator)[: topk - 1].tolist()
            chosen = sorted([*chosen, own])
            selected[head, sample, topk - len(chosen) :] = torch.tensor(chosen, dtype=torch.int16) + sample * blocks
    return (q, k, v), {
        "slots": table, "position": integers(*lengths) - 1, "selected": selected.to(DEVICE), "blocks": blocks,
        "block_size": block_size, "scale": 0.3,
        "arrived": torch.zeros(len(lengths), kv_heads, dtype=torch.int32, device=DEVICE),
    }  # fmt: skip


def check_attend(*sizes, tolerance):
    """The torch backend's results in fp64."""
    (q, k, v), arguments = attend_arguments(*sizes)
    actual = decode.attend_selected(q, k, v, **arguments)
    expected = torch_backend.attend_selected(q.double(), k.double(), v.double(), **arguments)
    assert actual.dtype == q.dtype
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    assert not actual[[i for i, length in enumerate(sizes[0]) if length == 0]].any()
    assert not arguments["arrived"].any()


def check_bits(*sizes):
    """The same bits where slots are consecutive, and for each sample alone."""
    (q, k, v), arguments = attend_arguments(*sizes)
    actual = decode.attend_selected(q, k, v, **arguments)
    same, others = attend_arguments(*sizes, scattered=False)
    assert not others["slots"].equal(arguments["slots"])
    assert torch.equal(decode.attend_selected(*same, **others), actual)
    for sample in range(len(sizes[0])):
        here = slice(sample, sample + 1)
        alone = arguments | {name: arguments[name][here] for name in ("slots", "position", "arrived")}
        chosen = arguments["selected"][:, here]
        chosen = torch.where(chosen >= 0, chosen - sample * arguments["blocks"], -1).to(chosen.dtype)
        alone = decode.attend_selected(q[here], k[here], v[here], **alone | {"selected": chosen.contiguous()})
        assert torch.equal(alone, actual[here])


def check_memory(monkeypatch, dtype, **sizes):
    """New memory may hold anything: results have the same bits with NaN and with other numbers in it."""
    found, empty = [], torch.empty
    for poison in (NAN, 7.0):

        def poisoned(*shape, dtype=torch.float32, poison=poison, **options):
            new = empty(*shape, dtype=dtype, **options)
            return new.fill_(poison if dtype.is_floating_point else 7 if poison == 7 else -9)

        monkeypatch.setattr(torch, "empty", poisoned)
        inputs, arguments = attend_arguments(**sizes, dtype=dtype)
        found.append(decode.attend_selected(*inputs, **arguments))
        check_selection(sizes["lengths"], 4, 2, 16, sizes["block_size"], sizes["topk"], dtype, missing=True)
        monkeypatch.undo()
    assert torch.equal(*found)
    assert not found[0].isnan().any()


def check_steps(monkeypatch, slots, dtype, lengths, topk, dim):
    """Bound launches give the bits of the two primitives, step after step, also where blocks become complete and arguments
    change; each step's output is new memory."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE, dtype)  # noqa: E731
    config, used = MoBAConfig(16, topk), max(lengths)
    samples = len(lengths)
    k, v = draw(samples, 1, slots, dim).transpose(1, 2), draw(samples, 1, slots, dim).transpose(1, 2)
    content = torch.arange(slots, device=DEVICE) >= used - torch.tensor(lengths, device=DEVICE)[:, None]
    monkeypatch.setattr(cached, "backend_for", lambda device, dtype: triton_backend)
    make_room = CentroidCache.make_room

    def with_counters(self, k, block_size):  # as on a GPU
        new = make_room(self, k, block_size)
        self.arrived = self.count.new_zeros(samples, 1) if self.arrived is None else self.arrived
        return new

    monkeypatch.setattr(CentroidCache, "make_room", with_counters)
    kept, bound, outputs = CentroidCache(), 0, []
    for step in range(10):
        wide = draw(samples, 1, 2, dim + 16 * (step == 5))[..., :dim]  # other strides once
        tokens = CachedTokens.of(content, samples=samples, queries=1, slots=slots, offset=used, device=k.device)
        used += 1
        bound += kept._step.run is not None and step != 5
        out = moba_attention_cached(wide, k, v, config, tokens=tokens, centroids=kept)
        anew = CentroidCache()
        anew.make_room(k, 16)
        triton_backend.update_centroids(
            k, slots=tokens.slots, before=tokens.before, lengths=tokens.lengths, count=anew.count, centroids=anew.values,
            block_size=16, at_most=8,
        )  # fmt: skip
        expected, _ = decoding.decode(triton_backend, wide, k, v, config, tokens, anew, bind=False)
        assert torch.equal(out, expected), step
        outputs.append((out, out.clone()))
    assert bound == 2 + 2
    assert all(torch.equal(*pair) for pair in outputs)
    assert kept.nbytes > kept.values.nbytes + kept.count.nbytes + kept.arrived.nbytes


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
    check_selection([300, 0, 17, 32], 4, 2, 16, 16, topk, torch.float16, missing, scattered=topk != 3)


@interpreter.interpreted
def test_equal_scores_and_nan():
    """Of equal scores the later block; a block whose score is NaN first of all."""
    k, table = cache([100], 100, 1, 16, torch.float16)
    k[0, :, 0] = 1.0
    count = torch.zeros(1, 1, 1, dtype=torch.int32)
    means, length = torch.empty(1, 8, 1, 16, dtype=torch.float16), integers(100)
    arrived = torch.zeros(1, 1, dtype=torch.int32)
    for nan, expected in ((None, [4, 5, 6]), (1, [1, 5, 6])):
        if nan is not None:
            k[0, table[0, nan * 16 : nan * 16 + 16].long()] = NAN
            count.zero_()
        selected = decode.select_for_decoding(
            torch.ones(1, 2, 16, dtype=torch.float16), k, slots=table, before=length - 1, lengths=length,
            position=length - 1, count=count, arrived=arrived, centroids=means, block_size=16, topk=3,
        )  # fmt: skip
        assert selected.tolist() == [[expected]] * 2


@interpreter.interpreted
@pytest.mark.parametrize(
    ("lengths", "block_size", "topk", "dtype"),
    [
        ([70, 0, 17, 64], 16, 3, torch.bfloat16),
        ([33, 16, 15], 16, 5, torch.float16),  # more slots than blocks; at edges of blocks
        ([1], 16, 2, torch.float16),
        ([700, 300], 300, 2, torch.float16),  # two splits, the second a short one
    ],
    ids=str,
)
def test_attend(lengths, block_size, topk, dtype):
    check_attend(lengths, 4, 2, 16, 24, block_size, topk, dtype, tolerance=TOLERANCE[dtype])


@interpreter.interpreted
def test_bits_do_not_depend_on_slots_and_batch():
    check_bits([33, 0, 17], 4, 2, 16, 16, 16, 2, torch.float16)


@interpreter.interpreted
def test_memory(monkeypatch):
    sizes = {"q_heads": 4, "kv_heads": 2, "dim": 16, "dim_v": 24}
    check_memory(monkeypatch, torch.float16, lengths=[40, 0], block_size=16, topk=3, **sizes)


@interpreter.interpreted
def test_steps(monkeypatch):
    check_steps(monkeypatch, 60, torch.float16, lengths=(42,), topk=2, dim=16)


@interpreter.interpreted
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(3, 1), (20, 1)])
def test_groups(q_heads, kv_heads):
    """Groups that are no power of two, and larger than a tile of rows."""
    check_attend([20], q_heads, kv_heads, 16, 16, 16, 2, torch.float16, tolerance=TOLERANCE[torch.float16])
    check_selection([40], q_heads, kv_heads, 16, 16, 2, torch.float16, True)


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
        block_size=16, scale=1e30, arrived=torch.zeros(2, 1, dtype=torch.int32),
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
        check_selection([20000, 0, 777, 1], 8, 2, 128, block_size, topk, torch.bfloat16, missing, scattered=topk != 8)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize(("block_size", "topk"), [(512, 8), (128, 8), (4096, 3), (100, 20)])
    def test_attend(self, block_size, topk, dtype):
        sizes = ([20000, 0, 777, 1], 8, 2, 128, 128, block_size, topk, dtype)
        check_attend(*sizes, tolerance=TOLERANCE[dtype])
        check_bits(*sizes)

    @pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (7, 1), (16, 16)])
    def test_groups(self, q_heads, kv_heads):
        sizes = ([5000, 130], q_heads, kv_heads, 64, 64, 128, 5, torch.bfloat16)
        check_attend(*sizes, tolerance=TOLERANCE[torch.bfloat16])
        check_bits(*sizes)
        check_selection([5000, 130], q_heads, kv_heads, 64, 128, 5, torch.bfloat16, True)

    def test_memory(self, monkeypatch):
        sizes = {"q_heads": 8, "kv_heads": 2, "dim": 128, "dim_v": 128}
        check_memory(monkeypatch, torch.bfloat16, lengths=[20000, 0, 777, 1], block_size=128, topk=8, **sizes)

    def test_steps(self, monkeypatch):
        check_steps(monkeypatch, 3000, torch.bfloat16, lengths=(2500, 333), topk=8, dim=128)

    def test_many_steps_have_the_same_bits(self):
        """Whichever program arrives last."""
        sizes = ([60000, 777], 32, 8, 128, 128, 128, 8, torch.bfloat16)
        inputs, arguments = attend_arguments(*sizes)
        first = decode.attend_selected(*inputs, **arguments)
        for _ in range(200):
            assert torch.equal(decode.attend_selected(*inputs, **arguments), first)
        assert not arguments["arrived"].any()
