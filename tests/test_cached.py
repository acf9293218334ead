"""Attention to a cache: the rows of one forward pass, however the text comes in and wherever its content lies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moba_cp import CachedTokens, CentroidCache, MoBAConfig, SequenceLayout, moba_attention, moba_attention_cached
from moba_cp.kernels import torch_backend
from moba_cp.reference import moba_attention as reference

LENGTHS = [40, 23, 0, 31]
SLOTS, WIDTH = 52, 40
Q_HEADS, KV_HEADS, D, DV = 4, 2, 8, 10
CONFIG = MoBAConfig(4, 3, softmax_scale=0.7)
NAN = float("nan")


def documents(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((Q_HEADS, D), (KV_HEADS, D), (KV_HEADS, DV))
    draw = lambda n: tuple(torch.randn(n, *shape, generator=generator).to(dtype) for shape in shapes)  # noqa: E731
    return [draw(length) for length in LENGTHS]


def content_of(padding: str) -> Tensor:
    """bool `[samples, WIDTH]`: which tokens of a padded batch are content."""
    content = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    for row, length in zip(content, LENGTHS, strict=True):
        match padding:
            case "left":
                row[WIDTH - length :] = True
            case "right":
                row[:length] = True
            case "scattered":
                row[torch.randperm(WIDTH, generator=generator)[:length]] = True
    return content


class Cache:
    """Keys and values as a cache of transformers holds them; NaN where nothing was written."""

    def __init__(self, content: Tensor, given: list[tuple[Tensor, Tensor, Tensor]], slots: int = SLOTS) -> None:
        samples = len(given)
        padded = lambda h, d: torch.full((samples, WIDTH, h, d), NAN, dtype=given[0][0].dtype)  # noqa: E731
        self.q, self.k_new, self.v_new = padded(Q_HEADS, D), padded(KV_HEADS, D), padded(KV_HEADS, DV)
        for sample, (q, k, v) in enumerate(given):
            self.q[sample, content[sample]] = q
            self.k_new[sample, content[sample]] = k
            self.v_new[sample, content[sample]] = v
        self.content, self.used, self.slots = content, 0, slots
        self.k = self.k_new.new_full((samples, KV_HEADS, slots, D), NAN)
        self.v = self.v_new.new_full((samples, KV_HEADS, slots, DV), NAN)

    def attend(self, queries: int, centroids: CentroidCache | None, **more: int) -> Tensor:
        """Append the next tokens, and attend."""
        new = slice(self.used, self.used + queries)
        self.k[:, :, new] = self.k_new[:, new].transpose(1, 2)
        self.v[:, :, new] = self.v_new[:, new].transpose(1, 2)
        tokens = CachedTokens.of(
            self.content[:, : new.stop], samples=len(self.k), queries=queries, slots=self.slots, offset=self.used,
            device=self.k.device,
        )  # fmt: skip
        self.used += queries
        k, v = self.k.transpose(1, 2), self.v.transpose(1, 2)
        return moba_attention_cached(self.q[:, new], k, v, CONFIG, tokens=tokens, centroids=centroids, **more)


def check(out: Tensor, content: Tensor, given: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Content as the reference has it, zeros for padding."""
    for sample, (q, k, v) in enumerate(given):
        expected = reference(q, k, v, [0, len(q)], CONFIG)
        torch.testing.assert_close(out[sample, content[sample]], expected, rtol=1e-12, atol=1e-12)
    assert not out[~content].any()


@pytest.mark.parametrize("kept", [True, False], ids=["centroids kept", "centroids anew"])
@pytest.mark.parametrize("padding", ["left", "right", "scattered"])
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 1, 20, 11], [5, 16, 19], [39, 1]], ids=str)
def test_every_split_is_one_forward_pass(chunks: list[int], padding: str, kept: bool) -> None:
    given, content = documents(), content_of(padding)
    cache, centroids = Cache(content, given), CentroidCache() if kept else None
    check(torch.cat([cache.attend(n, centroids) for n in chunks], 1), content, given)


@pytest.mark.parametrize("split", range(1, WIDTH))
def test_every_split_in_two(split: int) -> None:
    given, content = documents(), content_of("left")
    cache, centroids = Cache(content, given), CentroidCache()
    check(torch.cat([cache.attend(n, centroids) for n in (split, WIDTH - split)], 1), content, given)


def test_a_small_workspace_gives_the_same() -> None:
    given, content = documents(), content_of("scattered")
    cache = Cache(content, given)
    check(torch.cat([cache.attend(n, CentroidCache(), workspace_bytes=1) for n in (13, 27)], 1), content, given)


def test_calls_in_inference_mode_and_outside_share_a_cache() -> None:
    """A prompt read in inference mode, then steps without; centroids are allocated, and grow, in either."""
    given, content = documents(), content_of("left")
    cache, centroids = Cache(content, given, slots=10), CentroidCache()
    with torch.inference_mode():
        outputs = [cache.attend(9, centroids).clone()]
    outputs.append(cache.attend(1, centroids))
    whole = Cache(content, given)
    whole.k[:, :, :10], whole.v[:, :, :10], whole.used = cache.k, cache.v, 10
    with torch.inference_mode():
        outputs.append(whole.attend(1, centroids).clone())
    outputs += [whole.attend(n, centroids) for n in (1, 28)]
    check(torch.cat(outputs, 1), content, given)


def test_compiled_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(globals(), "moba_attention_cached", torch.compile(moba_attention_cached, backend="aot_eager"))
    given, content = documents(), content_of("right")
    cache, centroids = Cache(content, given), CentroidCache()
    check(torch.cat([cache.attend(n, centroids) for n in (30, 8, 1, 1)], 1), content, given)


def test_each_centroid_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the cache grows by one token and has other tensors each time."""
    computed = []
    mean = torch_backend.ordered_mean
    monkeypatch.setattr(torch_backend, "ordered_mean", lambda x: (computed.append(len(x)), mean(x))[1])
    given, content = documents(), content_of("left")
    cache, centroids = Cache(content, given), CentroidCache()
    for queries in (9, *[1] * 31):
        cache.attend(queries, centroids)
    assert sum(computed) == sum(length // CONFIG.block_size for length in LENGTHS)
    assert centroids.count is not None
    assert centroids.count.sum(2)[:, 0].tolist() == [length // CONFIG.block_size for length in LENGTHS]
    assert centroids.nbytes == centroids.values.nbytes + centroids.count.nbytes


def test_room_for_centroids_grows_with_the_cache() -> None:
    given, content = documents(), content_of("left")
    centroids, outputs, room = CentroidCache(), [], []
    big = Cache(content, given)
    for used in range(WIDTH):
        now = Cache(content, given, slots=used + 1)
        now.used = used
        now.k[:, :, :used], now.v[:, :, :used] = big.k[:, :, :used], big.v[:, :, :used]
        outputs.append(now.attend(1, centroids))
        big.k[:, :, : used + 1], big.v[:, :, : used + 1] = now.k, now.v
        room.append(centroids.values.shape[1])
    check(torch.cat(outputs, 1), content, given)
    assert room == sorted(room)
    assert len(set(room)) == 5  # 1, 2, 4, 8, 16 blocks


@pytest.mark.parametrize("queries", [1, 5])
def test_cropped_content(queries: int) -> None:
    """Centroids of blocks that are still whole stay; the others are of what comes next."""
    given, content = documents(), content_of("left")
    cache, centroids = Cache(content, given), CentroidCache()
    cache.attend(WIDTH, centroids)
    cache.used -= 14
    cache.k[:, :, cache.used :], cache.v[:, :, cache.used :] = NAN, NAN
    other = torch.randn(cache.k_new.shape, dtype=cache.k_new.dtype, generator=torch.Generator().manual_seed(7))
    cache.k_new[:, cache.used :] = other[:, cache.used :]
    changed = [(q, cache.k_new[i, content[i]], v) for i, (q, _, v) in enumerate(given)]
    first = cache.used
    out = torch.cat([cache.attend(n, centroids) for n in [queries] * (14 // queries)], 1)
    for sample, (q, k, v) in enumerate(changed):
        here = content[sample, first : first + out.shape[1]]
        expected = reference(q, k, v, [0, len(q)], CONFIG)
        seen = int(content[sample, :first].sum())
        torch.testing.assert_close(out[sample, here], expected[seen : seen + int(here.sum())], rtol=1e-12, atol=1e-12)


def test_a_call_without_queries_forgets_what_was_cropped() -> None:
    """Content that comes after it may have come without queries."""
    k = torch.randn(1, 24, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, centroids = torch.randn(1, 24, 4, 8, dtype=torch.float64), CentroidCache()

    def attend(k: Tensor, offset: int, queries: int, centroids: CentroidCache) -> Tensor:
        tokens = CachedTokens.of(None, samples=1, queries=queries, slots=24, offset=offset, device=k.device)
        return moba_attention_cached(q[:, offset : offset + queries], k, k, CONFIG, tokens=tokens, centroids=centroids)

    attend(k, 0, 20, centroids)
    assert attend(k, 8, 0, centroids).shape == (1, 0, 4, 8)
    other = torch.cat([k[:, :8], -k[:, 8:]], 1)
    assert torch.equal(attend(other, 20, 4, centroids), attend(other, 20, 4, CentroidCache()))


def test_nan_in_unused_slots_and_padding_reaches_nobody() -> None:
    """`Cache` fills them with NaN, and every test above compares with numbers; here keys are read nowhere else."""
    given, content = documents(), content_of("scattered")
    cache = Cache(content, given)
    assert not torch.cat([cache.attend(n, None) for n in (20, *[1] * 20)], 1).isnan().any()


def test_refusals() -> None:
    given, content = documents(), content_of("left")
    cache, centroids = Cache(content, given), CentroidCache()
    cache.attend(WIDTH, centroids)
    k, v, q = cache.k.transpose(1, 2), cache.v.transpose(1, 2), cache.q
    of = lambda **more: CachedTokens.of(  # noqa: E731
        **({"content": content, "samples": 4, "queries": 1, "slots": SLOTS, "offset": 39, "device": k.device} | more)
    )
    tokens = of()
    with pytest.raises(ValueError, match=r"\[samples, tokens, heads, head size\], got \(4, 4, 8\)"):
        moba_attention_cached(q[:, 0], k, v, CONFIG, tokens=tokens)
    with pytest.raises(ValueError, match=r"same samples.*q \(3, 1, 4, 8\)"):
        moba_attention_cached(q[:3, :1], k, v, CONFIG, tokens=tokens)
    with pytest.raises(ValueError, match=r"\[samples, queries\] \(4, 1\).*q is \(4, 2, 4, 8\)"):
        moba_attention_cached(q[:, :2], k, v, CONFIG, tokens=tokens)
    with pytest.raises(TypeError, match="q must not be inside a torch.func transform"):
        torch.func.vmap(lambda x: moba_attention_cached(x, k, v, CONFIG, tokens=tokens))(q[None, :, :1])
    with pytest.raises(TypeError, match="tokens must be CachedTokens, got NoneType"):
        moba_attention_cached(q[:, :1], k, v, CONFIG, tokens=None)
    with pytest.raises(ValueError, match=r"content must have shape \[4, at most 30\], got \(4, 40\)"):
        of(slots=30)
    with pytest.raises(TypeError, match=r"content must be bool, or integers where 0 is padding, got torch.float32"):
        of(content=content.float())
    with pytest.raises(ValueError, match="no gradient"):
        moba_attention_cached(q[:, :1].clone().requires_grad_(), k, v, CONFIG, tokens=tokens)
    with pytest.raises(ValueError, match="made for blocks of 4 keys.*got blocks of 8 keys"):
        moba_attention_cached(q[:, :1], k, v, MoBAConfig(8, 3), tokens=tokens, centroids=centroids)
    with pytest.raises(TypeError, match="one dtype"):
        moba_attention_cached(q[:, :1].float(), k, v, CONFIG, tokens=tokens)
    call = lambda q=q[:, :1], tokens=tokens, **more: moba_attention_cached(q, k, v, CONFIG, tokens=tokens, **more)  # noqa: E731
    with pytest.raises(TypeError, match="q must be a tensor, got NoneType"):
        call(q=None)
    with pytest.raises(TypeError, match="workspace_bytes must be an int, got 'much'"):
        call(workspace_bytes="much")
    with pytest.raises(ValueError, match="workspace_bytes must be at least 1, got 0"):
        call(workspace_bytes=0)
    with pytest.raises(TypeError, match="centroids must be a CentroidCache or None, got Tensor"):
        call(centroids=k)
    with pytest.raises(ValueError, match="tokens must be where q is, got tokens on meta, q on cpu"):
        call(tokens=of(content=None, device=torch.device("meta")))
    with pytest.raises(ValueError, match="2 queries from slot 51 on do not fit into 52 slots"):
        of(queries=2, offset=51)
    with pytest.raises(ValueError, match="offset must be at least 0, got -1"):
        of(offset=-1)
    with pytest.raises(ValueError, match="offset must be at least 0, got -1"):
        of(offset=torch.tensor([-1]))
    with pytest.raises(ValueError, match="2 queries from slot 51 on do not fit"):
        of(queries=2, offset=torch.tensor(51))
    with pytest.raises(TypeError, match=r"integer tensor of one element, got tensor\(\[1, 2\]\)"):
        of(offset=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="content must be a tensor, got list"):
        of(content=[[True]])
    with pytest.raises(TypeError, match="samples must be an int, got 4.0"):
        of(samples=4.0)
    with pytest.raises(TypeError, match="device must be a torch.device, got 5"):
        of(device=5)
    assert torch.equal(of(content=content.to(torch.uint8)).slots, tokens.slots)
    assert moba_attention_cached(q[:, :0], k, v, CONFIG, tokens=of(queries=0)).shape == (4, 0, Q_HEADS, DV)


def test_steps_after_the_first_refuse_the_same() -> None:
    """A step with the values of the one before is not checked again; any other is."""
    given, content = documents(), content_of("left")
    cache, centroids = Cache(content, given), CentroidCache()
    cache.attend(WIDTH - 3, centroids)
    cache.attend(1, centroids)
    outputs = [cache.attend(1, centroids) for _ in range(2)]
    check_rows = [(i, n - 2 + j) for i, n in enumerate(LENGTHS) for j in range(2) if n]
    for sample, row in check_rows:
        q, k, v = given[sample]
        expected = reference(q, k, v, [0, len(q)], CONFIG)[row]
        torch.testing.assert_close(outputs[row - LENGTHS[sample] + 2][sample, 0], expected, rtol=1e-12, atol=1e-12)

    k, v, q = cache.k.transpose(1, 2), cache.v.transpose(1, 2), cache.q[:, -1:]
    tokens = CachedTokens.of(content, samples=4, queries=1, slots=SLOTS, offset=39, device=k.device)
    more = {"tokens": tokens, "centroids": centroids}
    moba_attention_cached(q, k, v, CONFIG, **more)
    with pytest.raises(ValueError, match="no gradient"):
        moba_attention_cached(q.clone().requires_grad_(), k, v, CONFIG, **more)
    apart = dataclasses.replace(tokens, slots=tokens.slots.repeat_interleave(2, 1)[:, ::2])
    with pytest.raises(ValueError, match=r"last dimension of tokens.slots must be dense, got strides \(104, 2\)"):
        moba_attention_cached(q, k, v, CONFIG, **more | {"tokens": apart})
    with pytest.raises(ValueError, match="same slots"):
        moba_attention_cached(q, k, v[:, 1:], CONFIG, **more)
    with pytest.raises(ValueError, match=r"\[samples, slots\]"):
        moba_attention_cached(q, k[:, 1:], v[:, 1:], CONFIG, **more)
    with pytest.raises(TypeError, match="one dtype"):
        moba_attention_cached(q, k.float(), v, CONFIG, **more)
    with pytest.raises(ValueError, match="same head size"):
        moba_attention_cached(q[..., :7], k, v, CONFIG, **more)
    with pytest.raises(ValueError, match="CentroidCache made for blocks of 4"):
        moba_attention_cached(q, k, v, MoBAConfig(5, 3), **more)
    with pytest.raises(TypeError, match="tokens must be CachedTokens"):
        moba_attention_cached(q, k, v, CONFIG, tokens=None, centroids=centroids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="workspace_bytes must be an int, got True"):
        moba_attention_cached(q, k, v, CONFIG, **more, workspace_bytes=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert moba_attention_cached(q, k, v, CONFIG, **more).shape == (4, 1, Q_HEADS, DV)


def test_shapes_are_inferred_without_numbers() -> None:
    for context in (FakeTensorMode(), torch.device("meta")):
        with context:
            q, k, v = (torch.empty(2, *shape) for shape in ((3, 4, 8), (10, 2, 8), (10, 2, 6)))
            tokens = CachedTokens.of(None, samples=2, queries=3, slots=10, offset=7, device=q.device)
            out = moba_attention_cached(q, k, v, CONFIG, tokens=tokens)
        assert out.shape == (2, 3, 4, 6)


@pytest.mark.parametrize("block_size", [2**31, 2**40, 2**62, 2**31 + 5])
@pytest.mark.parametrize("queries", [1, 5])
def test_blocks_may_be_far_longer_than_the_cache(block_size: int, queries: int) -> None:
    q, k, v = (torch.randn(2, n, heads, 8, dtype=torch.float64) for n, heads in ((queries, 4), (40, 2), (40, 2)))
    tokens = CachedTokens.of(None, samples=2, queries=queries, slots=40, offset=40 - queries, device=q.device)
    out = moba_attention_cached(q, k, v, MoBAConfig(block_size, 3), tokens=tokens)
    full = moba_attention_cached(q, k, v, MoBAConfig(40, 1), tokens=tokens)
    torch.testing.assert_close(out, full, rtol=1e-12, atol=1e-12)  # as elsewhere in fp64


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "topk"), [(64, 3), (512, 2)])
def test_chunks_have_the_bits_of_a_forward_pass(block_size: int, topk: int) -> None:
    """bf16 on CUDA: chunks bit for bit; single tokens to rounding, where they select the same."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda h: torch.randn(1, h, 3000, 128, generator=generator, device="cuda").bfloat16()  # noqa: E731
    q, k, v = draw(4), draw(2), draw(2)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    config = MoBAConfig(block_size, topk)
    whole = moba_attention(*rows, config, layout=SequenceLayout.contiguous([0, 3000], 1))
    centroids, used = CentroidCache(), 0
    for queries in (1000, 7, 993, *[1] * 40, 960):
        new = slice(used, used + queries)
        tokens = CachedTokens.of(None, samples=1, queries=queries, slots=3000, offset=used, device=q.device)
        cached = [x.transpose(1, 2) for x in (q[:, :, new], k, v)]
        out = moba_attention_cached(*cached, config, tokens=tokens, centroids=centroids)[0]
        if queries > 1:
            assert torch.equal(out, whole[new])
        else:
            # The rounding of partial results to bf16, 2^-8, which only the forward pass makes.
            torch.testing.assert_close(out, whole[new], rtol=2**-7, atol=2**-7)
        used += queries


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_inference_mode_may_begin_and_end_between_calls(
    first: type[torch.inference_mode] | type[torch.no_grad],
) -> None:
    """Centroids are written to in calls outside of inference mode, whichever made them."""
    second = torch.no_grad if first is torch.inference_mode else torch.inference_mode
    given, content = documents(), content_of("left")
    cache, centroids, outputs = Cache(content, given), CentroidCache(), []
    for number, queries in enumerate((9, *[1] * 15, 7, *[1] * 9)):
        with (first, second)[number % 2]():
            outputs.append(cache.attend(queries, centroids))
    check(torch.cat(outputs, 1), content, given)


def test_tokens_compare_by_identity() -> None:
    """Their tensors have no single truth value."""
    made = [
        CachedTokens.of(None, samples=1, queries=2, slots=4, offset=0, device=torch.device("cpu")) for _ in range(2)
    ]
    assert made[0] != made[1]
    assert made[0] == made[0]
