"""Training with sentences to retrieve: which windows hold which, what their loss counts, what the hash covers."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.learning import measure, needles
from examples.learning.corpus import Corpus
from examples.learning.model import Sizes, before
from examples.learning.needles import ASKED, SENTENCE, TEXT, TOLD, Pairs, Sentences
from examples.learning.train import Run, Task
from examples.learning.windows import pairs_of, weights_of

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
TINY = yaml.safe_load((ROOT / "configs/learning/tiny.yaml").read_text())


def encode(text: str) -> list[int]:
    return list(text.encode())


def make_run(folder: Path, work: Path, arm: str = "full", seed: int = 0, **data: Any) -> Run:
    """A run of the tiny plan with other `data`; a value of None takes a key away."""
    plan = json.loads(json.dumps(TINY))
    plan["data"] = {k: v for k, v in (plan["data"] | data).items() if v is not None}
    plan["measures"]["routing_at"] = []
    return Run(Task(f"{arm}_s{seed}", arm, plan["arms"][arm], seed, plan, str(folder), str(work), deadline=1e12))


def test_names_and_answers_of_the_evaluation_do_not_occur_in_training() -> None:
    facts, asked = needles.training_facts(encode), needles.needles(encode)
    assert len(facts["questions"]) == len({tuple(q) for q in facts["questions"]}) == len(facts["answers"]) == 2048
    assert not {tuple(q) for q in facts["questions"]} & {tuple(fact["question"]) for fact in asked}
    assert not {tuple(a) for a in facts["answers"]} & {tuple(fact["answer"]) for fact in asked}
    names = [bytes(q).decode().split("code of ")[1].removesuffix(" is ").split("_") for q in facts["questions"]]
    assert not any(a in needles.WORDS and b in needles.WORDS for a, b in names)


def test_a_sentence_stands_twice_and_text_keeps_its_order() -> None:
    sentences = Sentences(needles.training_facts(encode))
    pairs = Pairs.draw(sentences, windows=40, count=3, size=800, seed=0)
    text = np.arange(1000, 1800, dtype=np.uint16)  # no byte
    for window in range(40):
        tokens, kinds = pairs.insert(window, text, sentences)
        assert tokens.shape == kinds.shape == text.shape
        kept = tokens[kinds == TEXT]
        assert (kept == text[: len(kept)]).all()
        assert (kept >= 1000).sum() == (kinds == TEXT).sum()
        words = bytes(tokens[kinds != TEXT].astype(np.uint8)).decode()
        lines = words.strip("\n").split("\n\n")
        assert len(lines) == 6
        assert sorted(lines.count(line) for line in set(lines)) == [2, 2, 2]
        asked = [tuple(part) for part in np.split(tokens[kinds == ASKED], 3)]
        told = [tuple(part) for part in np.split(tokens[kinds == TOLD], 3)]
        assert set(asked) == set(told)
        assert (kinds == SENTENCE).sum() == len(words) - 6 * 5
        for q, a in zip(pairs.questions[window], pairs.answers[window]):
            line = bytes([*sentences.questions[q], *sentences.answers[a]]).decode()
            first = tokens.tobytes().find(np.frombuffer(line.encode(), np.uint8).astype(np.uint16).tobytes()) // 2
            assert kinds[first + len(line) - 1] == TOLD  # the first of the two is the one that tells


def test_distances_are_those_of_two_uniform_places() -> None:
    pairs = Pairs.draw(Sentences(needles.training_facts(encode)), windows=2000, count=2, size=4000, seed=1)
    share = (pairs.cuts[:, 1] - pairs.cuts[:, 0]) / (4000 - 4 * 45)  # a sentence has about 45 bytes
    assert share.min() >= 0
    assert share.mean() == pytest.approx(1 / 3, abs=0.015)  # standard error 0.24 / 4000 ** 0.5 = 0.004
    assert (pairs.questions[:, 0] != pairs.questions[:, 1]).all()


def test_windows_that_do_not_hold_their_sentences_are_refused(corpus_folder: Path) -> None:
    sentences = Sentences(needles.training_facts(encode))
    with pytest.raises(ValueError, match=r"4 pairs take \d+ of 257 tokens, more than half"):
        Pairs.draw(sentences, 10, 4, 257, 0)
    with pytest.raises(ValueError, match=r"in \[1, 2048\], got 4096"):
        Pairs.draw(sentences, 1, 4096, 10**6, 0)
    corpus = Corpus(corpus_folder)
    with pytest.raises(ValueError, match="per_windows"):
        pairs_of({"length": 256, "pairs": {"per_windows": 1}}, corpus, 256, 8, 0)
    del corpus.facts["pairs"]
    with pytest.raises(ValueError, match="python -m examples.learning.corpus pairs"):
        pairs_of({"length": 256, "pairs": {"per_window": 1}}, corpus, 256, 8, 0)


def test_arms_of_a_seed_have_the_same_pairs_and_seeds_others(corpus_folder: Path, tmp_path: Path) -> None:
    full, moba, other = (
        make_run(corpus_folder, tmp_path, *each) for each in (("full", 0), ("moba_32_3", 0), ("full", 1))
    )
    assert [b.pairs is None for b in full.batches] == [True, False]  # none in the short windows of the tiny plan
    for step in range(2, 8):
        for mine, theirs in zip(
            full.batches[-1].with_pairs(full.corpus, step), moba.batches[-1].with_pairs(moba.corpus, step)
        ):
            assert (mine == theirs).all()
    assert full._hashes() == moba._hashes()
    assert (full.batches[-1].pairs.answers != other.batches[-1].pairs.answers).any()
    assert full._hashes()["order"] != other._hashes()["order"]


def test_the_hash_of_the_order_covers_the_pairs(corpus_folder: Path, tmp_path: Path) -> None:
    with_pairs, without = make_run(corpus_folder, tmp_path), make_run(corpus_folder, tmp_path, pairs=None)
    order = lambda run: run._hashes()["order"]  # noqa: E731
    starts = b"".join(b.starts.astype("<i8").tobytes() for b in without.batches)
    assert order(without) == hashlib.sha256(starts).hexdigest()  # as before there were pairs
    assert all((a.starts == b.starts).all() for a, b in zip(with_pairs.batches, without.batches))
    found = {order(without), order(with_pairs)}
    last, pairs = with_pairs.batches[-1], with_pairs.batches[-1].pairs
    for change in ("questions", "answers", "cuts"):
        moved = getattr(pairs, change).copy()
        moved.ravel()[-1] += 1
        with_pairs.batches[-1] = replace(last, pairs=replace(pairs, **{change: moved}))
        found.add(order(with_pairs))
    with_pairs.batches[-1] = last
    with_pairs.corpus.sentences.fingerprint = "of other words"
    assert len(found | {order(with_pairs)}) == 6


def test_loss_of_answers_has_its_weight_and_first_answers_none(corpus_folder: Path, tmp_path: Path) -> None:
    assert weights_of({"pairs": {"answer_weight": 3}}) == [1.0, 1.0, 0.0, 3.0]
    run = make_run(corpus_folder, tmp_path, begin_with=None)
    same = make_run(corpus_folder, tmp_path, begin_with=None)
    tokens, kinds = (torch.from_numpy(x.astype(np.int64)) for x in run.batches[0].with_pairs(run.corpus, 0))
    inputs, targets, kinds = tokens[:, :-1].flatten(), tokens[:, 1:].flatten(), kinds[:, 1:].flatten()
    layers, length = same.phase(0).layers, same.length
    losses = same.model.losses(
        same.model.hidden(inputs, layers, measure.packed(2, length), length, compiled=False), targets
    )
    expected = losses[(kinds == TEXT) | (kinds == SENTENCE)].sum() + 4 * losses[kinds == ASKED].sum()
    (expected / (2 * length)).backward()
    gradients = {}
    run.optimizers = []
    for name, weight in run.model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: gradients.update({name: w.grad.clone()}))
    run._train_step(0)
    for name, weight in same.model.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-6)  # fp32, sums in another order
    assert float(run.curve[0]) == pytest.approx(losses[kinds == TEXT].mean().item(), rel=1e-5)
    assert float(run.answers[0]) == pytest.approx(losses[kinds == ASKED].mean().item(), rel=1e-5)


def test_held_out_windows_have_no_sentences(corpus_folder: Path, tmp_path: Path) -> None:
    run, plain = make_run(corpus_folder, tmp_path), make_run(corpus_folder, tmp_path, pairs=None)
    assert run.measures() == plain.measures()


def test_a_prompt_can_hide_many_needles() -> None:
    facts = [{"question": [100 + i, 50], "answer": [200 + i, 201 + i], "end": [9]} for i in range(20)]
    prompt, answer = measure.needle_prompt(facts, np.zeros(500, dtype=np.uint16), 128, 16, trial=1, trials=4)
    assert sum(t == 9 for t in prompt.tolist()) == 16
    assert prompt[-2:].tolist() == answer


def test_sentences_can_be_added_to_a_corpus_without_them(corpus_folder: Path, tmp_path: Path) -> None:
    facts = json.loads((corpus_folder / "corpus.json").read_text())
    old = {k: v for k, v in facts.items() if k != "pairs"}
    path = tmp_path / "corpus.json"
    command = [sys.executable, "-m", "examples.learning.corpus", "pairs", "--corpus", str(tmp_path)]
    path.write_text(json.dumps(old))
    subprocess.run(command, cwd=ROOT, check=True)
    assert json.loads(path.read_text()) == facts
    old["needles"][0]["answer"][0] += 1
    path.write_text(json.dumps(old))
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode
    assert "is not the tokenizer of" in refused.stderr
    assert "pairs" not in json.loads(path.read_text())


def test_logit_scale_is_per_head_and_rope_can_rotate_a_share() -> None:
    sizes = Sizes(8, 16, 1, 4, 2, 8, 16, 10000.0, qk_norm=True, rope_share=0.5)
    assert sizes.rotated == 2
    assert sizes.rope_period() == pytest.approx(2 * np.pi * 10)
    for change, named in (({"rope_share": 0.0}, "rope_share.*0.0"), ({"logit_scale": -1.0}, "logit_scale.*-1.0")):
        with pytest.raises(ValueError, match=named):
            replace(sizes, **change)
    x, norm, qkv = torch.randn(5, 16), torch.ones(16), torch.randn(64, 16)
    half = torch.ones(5, 4), torch.zeros(5, 4)
    plain = before(x, norm, qkv, *half, 4, 2, 8, True)
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scaled = before(x, norm, qkv, *half, 4, 2, 8, True, scale)
    assert torch.equal(scaled[0], plain[0] * scale[:, None])
    assert all(torch.equal(a, b) for a, b in zip(scaled[1:], plain[1:]))


def test_pairs_of_dimensions_beyond_the_share_are_not_rotated(corpus_folder: Path, tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def noted(x: torch.Tensor, norm: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any):
        seen.append(sin)
        return before(x, norm, qkv, cos, sin, *rest)

    run = make_run(corpus_folder, tmp_path)
    run.model.fast[0] = noted
    run.model.hidden(torch.zeros(64, dtype=torch.int64), run.phase(0).layers, measure.packed(1, 64), 64)
    assert (seen[0][:, 4:] == 0).all()  # head_dim 16: four of eight pairs
    assert (seen[0][1:, :4] != 0).all()


def test_two_ranks_share_the_sentences_of_a_window(
    corpus_folder: Path, tmp_path: Path, run_plan: Callable[..., str]
) -> None:
    folders = ("--corpus", corpus_folder, "--work", tmp_path / "work", "--out", tmp_path)
    run_plan(*folders, "--only", "moba_32_3", "--only", "moba_32_3_cp2")
    one, two = json.loads((tmp_path / "learning.json").read_text())["runs"]
    assert [one["began_from"], two["began_from"]] == [None, "short_windows_s0"]
    assert two["gpus"] == 2
    np.testing.assert_allclose(two["loss_curve"], one["loss_curve"], atol=2e-3)  # fp32, sums in another order, 8 steps
    np.testing.assert_allclose(two["pairs"]["answer_curve"], one["pairs"]["answer_curve"], atol=5e-3)
    assert two["hashes"] == one["hashes"]
