"""Prefill, chunks and decoding with a cache: always the logits of one forward pass over the whole text."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")
from moba_cp import MoBAConfig
from moba_cp.kernels import torch_backend
from moba_cp.transformers import configure, kept
from tests.transformers.models import (
    CACHE,
    CONFIG,
    KINDS,
    LAYERS,
    TOLERANCE,
    in_chunks,
    new_cache,
    text,
    tiny,
    use_reference,
    whole,
)

TOKENS = 26
caches = pytest.mark.parametrize("cache", ["dynamic", "static"])
LEFT, RIGHT, GAP = (
    torch.tensor([[1] * TOKENS, of_second])
    for of_second in ([0] * 9 + [1] * 17, [1] * 17 + [0] * 9, [1] * 10 + [0] * 9 + [1] * 7)
)
"""Masks of a first sample without padding and a second one with some; the gap is that of a prompt with padding on the right."""
BOTH = torch.tensor([[0] * 8 + [1] * 18, [0] * 11 + [1] * 15])
"""All samples begin with padding, in which a first chunk may end."""


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """What `generate` passes: positions count content."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_the_reference(kind: str) -> None:
    model, ids = tiny(kind, full_last=1), text(2, TOKENS)
    logits = whole(model, ids)
    use_reference(model)
    torch.testing.assert_close(logits, whole(model, ids), **TOLERANCE)


@caches
@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token(kind: str, cache: str) -> None:
    model, ids = tiny(kind, full_last=1), text(2, TOKENS)
    logits = in_chunks(model, ids, [1] * TOKENS, new_cache(model, cache))
    torch.testing.assert_close(logits, whole(model, ids), **TOLERANCE)


@caches
@pytest.mark.parametrize(
    ("first", "then"),
    [
        pytest.param(slice(0, 0), slice(12, 15), id="masked later"),
        pytest.param(slice(0, 0), slice(0, 6), id="the oldest masked later"),
        pytest.param(slice(0, 9), slice(0, 0), id="left padding unmasked"),
        pytest.param(slice(12, 15), slice(0, 0), id="a gap unmasked"),
    ],
)
def test_a_mask_that_changes_over_cached_tokens(cache: str, first: slice, then: slice) -> None:
    """Centroids are those of the new mask, as of a cache that was copied and has none. The other sample's mask stays."""
    model, ids = tiny(full_last=1), text(2, TOKENS)
    masks = [torch.ones(2, TOKENS, dtype=torch.long) for _ in range(2)]
    masks[0][1, first], masks[1][1, then] = 0, 0

    def logits(fresh: bool) -> torch.Tensor:
        past, found = new_cache(model, cache), []
        for begin, end, mask in ((0, 17, 0), (17, 18, 0), (18, 22, 1), (22, 23, 1), (23, TOKENS, 1)):
            past = copy.deepcopy(past) if fresh else past
            at = torch.arange(begin, end).expand(2, -1)
            given = {"attention_mask": masks[mask][:, :end], "position_ids": at, CACHE: past, "use_cache": True}
            with torch.no_grad():
                found.append(model(ids[:, begin:end], **given).logits)
        return torch.cat(found[2:], 1)

    assert torch.equal(logits(fresh=False), logits(fresh=True))


@caches
def test_every_split_of_the_prefill(cache: str) -> None:
    """In two chunks, then token by token."""
    model, ids = tiny(full_last=1), text(2, TOKENS)
    expected = whole(model, ids)
    for first in range(1, TOKENS - 3):
        logits = in_chunks(model, ids, [first, TOKENS - 3 - first, 1, 1, 1], new_cache(model, cache))
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@caches
@pytest.mark.parametrize("chunks", [[TOKENS], [7, 12, 1, 1, 5], [1] * TOKENS], ids=str)
@pytest.mark.parametrize("mask", [LEFT, RIGHT, GAP, BOTH], ids=["left", "right", "gap", "both"])
def test_padding(mask: torch.Tensor, chunks: list[int], cache: str) -> None:
    """Blocks are counted from content: a padded sample has the logits that it has alone."""
    model, ids = tiny(full_last=1), text(2, TOKENS)
    logits = in_chunks(
        model, ids, chunks, new_cache(model, cache), attention_mask=mask, position_ids=positions_of(mask)
    )
    for sample, content in enumerate(mask.bool()):
        alone = whole(model, ids[sample : sample + 1, content])
        torch.testing.assert_close(logits[sample : sample + 1, content], alone, **TOLERANCE)


@caches
@pytest.mark.parametrize("full_last", [0, LAYERS])
def test_a_first_chunk_of_padding(full_last: int, cache: str) -> None:
    """Queries that are the first content stand behind slots of padding, whose keys and values are nobody's."""
    model, ids = tiny(full_last=full_last), text(2, TOKENS)
    for chunks in ([8, 1, 17], [5, 21], [8, 18]):
        logits = in_chunks(
            model, ids, chunks, new_cache(model, cache), attention_mask=BOTH, position_ids=positions_of(BOTH)
        )
        for sample, content in enumerate(BOTH.bool()):
            alone = whole(model, ids[sample : sample + 1, content])
            torch.testing.assert_close(logits[sample : sample + 1, content], alone, **TOLERANCE)


def test_another_block_size_for_a_cache_that_lives() -> None:
    """Centroids of the old one are of no use; those of the new one are computed anew."""
    model, ids = tiny(), text(1, TOKENS)
    cache = new_cache(model, "dynamic")
    in_chunks(model, ids, [20, 1], cache)
    fresh = copy.deepcopy(cache)
    for layer in fresh.layers:
        kept.take(layer.keys)
    configure(model, MoBAConfig(3, CONFIG.topk))
    logits = in_chunks(model, ids[:, 21:], [1] * 5, cache)
    assert torch.equal(logits, in_chunks(model, ids[:, 21:], [1] * 5, fresh))


@caches
def test_generate_from_padded_prompts(cache: str) -> None:
    """`generate` itself gives wrong positions to tokens that follow padding, so prompts are padded on the left."""
    model, ids = tiny(full_last=1), text(2, TOKENS)
    options = {"max_new_tokens": 12, "do_sample": False}
    together = model.generate(ids, attention_mask=LEFT, cache_implementation=cache, **options)
    for sample in range(2):
        prompt = ids[sample : sample + 1, LEFT[sample].bool()]
        alone = model.generate(prompt, use_cache=False, **options)
        assert torch.equal(alone[0, prompt.shape[1] :], together[sample, TOKENS:])


@caches
def test_beams(cache: str) -> None:
    model, ids = tiny(full_last=1), text(2, TOKENS)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with_cache = model.generate(ids, attention_mask=LEFT, cache_implementation=cache, **options)
    assert torch.equal(with_cache, model.generate(ids, attention_mask=LEFT, use_cache=False, **options))


@caches
def test_each_centroid_is_computed_once(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding after a prefill: those of the prompt at the first token, then one per block that becomes complete."""
    model, ids = tiny(), text(2, TOKENS)
    state = new_cache(model, cache)
    in_chunks(model, ids, [10], state)
    computed = []
    mean = torch_backend.ordered_mean
    monkeypatch.setattr(torch_backend, "ordered_mean", lambda x: (computed.append(len(x)), mean(x))[1])
    with torch.no_grad():
        for token in range(10, TOKENS):
            model(ids[:, token : token + 1], **{CACHE: state}, use_cache=True)
    assert sum(computed) == 2 * LAYERS * (TOKENS // CONFIG.block_size)


@caches
@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "reset", "write"])
def test_a_cache_that_is_changed_in_between(change: str, cache: str) -> None:
    """Centroids never outlive the keys that they are of."""
    if cache == "static" and change == "repeat":
        pytest.skip("static caches cannot be repeated")
    model, ids, other = tiny(), text(2, TOKENS), text(2, TOKENS, seed=1)
    state, seen = new_cache(model, cache), ids
    if cache == "static" and change == "crop" and not all(hasattr(layer, "crop") for layer in state.layers):
        pytest.skip("static caches cannot be cropped in this version of transformers")
    in_chunks(model, ids, [18, 1, 1], state)
    match change:
        case "crop":
            state.crop(-9)
            seen = torch.cat([ids[:, :11], other[:, 11:]], 1)
        case "reorder":
            state.reorder_cache(torch.tensor([1, 1]))
            seen = ids[[1, 1]]
        case "repeat":
            state.batch_repeat_interleave(2)
            seen = ids[[0, 0, 1, 1]]
        case "reset":
            state.reset() if cache == "static" else None
            state, seen = (state if cache == "static" else new_cache(model, cache)), other
        case "write":
            state.layers[0].keys[:, :, :8] = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    begin = {"crop": 11, "reset": 0}.get(change, 20)
    chunks = [12, *[1] * 8] if change == "reset" else [1] * (TOKENS - begin)
    fresh = copy.deepcopy(state)
    for layer in fresh.layers:
        kept.take(layer.keys)  # without centroids
    logits = in_chunks(model, seen[:, begin:], chunks, state)
    torch.testing.assert_close(logits, in_chunks(model, seen[:, begin:], chunks, fresh), rtol=0, atol=0)
    if change != "write":
        torch.testing.assert_close(logits, whole(model, seen)[:, begin : begin + logits.shape[1]], **TOLERANCE)


@caches
def test_two_continuations_of_one_cache(cache: str) -> None:
    """A copy goes its own way: centroids are not shared by what comes after."""
    model, ids, other = tiny(), text(1, TOKENS), text(1, TOKENS, seed=1)
    state = new_cache(model, cache)
    in_chunks(model, ids, [13, 1], state)
    forked = copy.deepcopy(state)
    for ids_here, cache_here in ((ids, state), (torch.cat([ids[:, :14], other[:, 14:]], 1), forked)):
        logits = in_chunks(model, ids_here[:, 14:], [1] * 12, cache_here)
        torch.testing.assert_close(logits, whole(model, ids_here)[:, 14:], **TOLERANCE)


@caches
@torch.inference_mode()
def test_inference_mode(cache: str) -> None:
    """Tensors made there do not count writes; a cache that is reset or cropped is still told apart."""
    model, ids = tiny(), text(1, TOKENS)
    state = new_cache(model, cache)
    torch.testing.assert_close(in_chunks(model, ids, [11, *[1] * 15], state), whole(model, ids), **TOLERANCE)
    if cache == "static":
        state.reset()
        other = text(1, TOKENS, seed=1)
        torch.testing.assert_close(in_chunks(model, other, [6, *[1] * 20], state), whole(model, other), **TOLERANCE)


@caches
def test_full_attention_in_decoding(cache: str) -> None:
    """`decode="full"`: with one layer, whose keys do not depend on attention, a decoded token has full attention's logits."""
    model, full = tiny(layers=1, decode="full"), tiny(layers=1, config=MoBAConfig(4, 100))
    ids = text(2, TOKENS)
    logits = in_chunks(model, ids, [20, *[1] * 6], new_cache(model, cache))
    torch.testing.assert_close(logits[:, :20], whole(model, ids)[:, :20], **TOLERANCE)
    torch.testing.assert_close(logits[:, 20:], whole(full, ids)[:, 20:], **TOLERANCE)
    assert (whole(full, ids) - whole(model, ids))[:, 20:].abs().max() > 0.01  # they differ


@caches
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["no padding", "left", "right"])
def test_top_k_that_covers_everything_is_sdpa(mask: torch.Tensor | None, kind: str, cache: str) -> None:
    model, ids = tiny(kind, config=MoBAConfig(4, 100), layer_pattern=(1, 0, 1)), text(2, TOKENS)
    more = {} if mask is None else {"attention_mask": mask, "position_ids": positions_of(mask)}
    content = torch.ones_like(ids).bool() if mask is None else mask.bool()
    chunks = [9, 8, 1, 1, 7]
    ours = in_chunks(model, ids, chunks, new_cache(model, cache), **more), whole(model, ids, **more)
    model.set_attn_implementation("sdpa")
    theirs = in_chunks(model, ids, chunks, new_cache(model, cache), **more), whole(model, ids, **more)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[content], other[content], **TOLERANCE)
